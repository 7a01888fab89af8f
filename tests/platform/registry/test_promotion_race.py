"""Eight processes promote at once: the best is champion, no decision is lost, none crashes.

On a database file, and on a real MLflow server. DETA_RACE_ROUNDS sets the number of rounds.
"""

from __future__ import annotations

import itertools
import multiprocessing
import os
import random
import signal
import socket
import subprocess
import sys
import time
import traceback
import urllib.request
import uuid
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mlflow import MlflowClient
from mlflow.entities.model_registry import ModelVersion

from deta.platform.evaluation.paired_bootstrap import PairedDifference, paired_difference
from deta.platform.registry.decision_log import ACCEPT, DecisionLog
from deta.platform.registry.decision_store import DecisionStore, UnknownOutcomeError
from deta.platform.registry.mlflow_client import RetryingClient
from deta.platform.registry.mlflow_registry import (
    MANIFEST_TAG,
    SHA256_TAG,
    Registry,
    UploadedFiles,
    Version,
)
from deta.platform.registry.model_address import parse_address
from deta.platform.registry.promote import promote
from deta.platform.registry.promotion_gate import Candidate, Decision, Policy, decide

NUM_PROCESSES = 8
ROUNDS = int(os.environ.get("DETA_RACE_ROUNDS", "2"))
POLICY = Policy(resamples=100, max_latency_ratio=None, max_size_ratio=None, parity=False)
NUM_IMAGES, NUM_BOXES = 20, 3
fork = multiprocessing.get_context("fork")  # MLflow takes seconds to import


def truth() -> dict[str, Any]:
    annotations = [
        {"id": 1 + image * NUM_BOXES + box, "image_id": image, "category_id": 1, "iscrowd": 0,
         "bbox": [100.0 * box, 0.0, 50.0, 50.0], "area": 2500.0}
        for image in range(NUM_IMAGES) for box in range(NUM_BOXES)
    ]  # fmt: skip
    images = [{"id": image, "width": 400, "height": 100} for image in range(NUM_IMAGES)]
    return {
        "images": images, "annotations": annotations, "categories": [{"id": 1, "name": "disc"}],
    }  # fmt: skip


TRUTH = truth()


def results_of(rank: int) -> list[dict[str, Any]]:
    """Return the detections of the model of a rank: those of the lower ranks, and more."""
    chance = np.random.default_rng(0).random(len(TRUTH["annotations"]))
    found = chance < (rank + 1) / (NUM_PROCESSES + 1)
    return [
        {"image_id": one["image_id"], "category_id": 1, "bbox": one["bbox"], "score": 0.9}
        for one, is_found in zip(TRUTH["annotations"], found, strict=True)
        if is_found
    ]


class SmallGate:
    """The gate with a real, small comparison, computed once for two ranks."""

    def __init__(self) -> None:
        self.known: dict[tuple[int, int], PairedDifference] = {}

    def __call__(self, challenger: Version, champion: Version | None) -> Decision:
        one = candidate(challenger)
        if champion is None:
            return decide(one, None, POLICY, None, {})
        pair = (rank_of(champion), rank_of(challenger))
        if pair not in self.known:
            self.known[pair] = paired_difference(
                TRUTH, results_of(pair[0]), results_of(pair[1]), resamples=POLICY.resamples
            )
        return decide(one, candidate(champion), POLICY, self.known[pair], {1: "disc"})


def rank_of(version: Version) -> int:
    return int(version.tags["rank"])


def candidate(version: Version) -> Candidate:
    return Candidate(
        label=str(version), sha256=version.sha256, evaluated_sha256=version.sha256,
        images_fingerprint="f" * 64, ap=0.5, ap_by_class={"disc": 0.5}, num_bytes=1000,
    )  # fmt: skip


def add(registry: Registry, name: str, files: UploadedFiles, rank: int) -> Version:
    tags = {SHA256_TAG: f"{rank:064d}", MANIFEST_TAG: f"{rank:064d}", "rank": str(rank)}
    return registry.add_version(name, files, tags, f"rank {rank}", uuid.uuid4().hex)


def compete(rank: int, pipe: Connection, barrier: Any) -> None:
    """Register and promote once for each name from the pipe; runs in a process."""
    registry, gate = None, SmallGate()
    while (task := pipe.recv()) is not None:
        uri, name, files = task
        try:
            registry = registry or Registry(uri)
            version = add(registry, name, files, rank)
            barrier.wait(600)
            outcome = promote(registry, name, version.number, gate, by=f"process {rank}")
            pipe.send((version.number, outcome.action, outcome.tries))
        except BaseException:
            barrier.abort()
            pipe.send(traceback.format_exc())


@pytest.fixture(params=["database", "server"])
def race(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[str, list[Connection]]]:
    """Yield the address of MLflow and the pipes to the processes."""
    barrier = fork.Barrier(NUM_PROCESSES)
    pipes, processes = [], []
    for rank in range(NUM_PROCESSES):  # before this process opens a database
        ours, theirs = fork.Pipe()
        processes.append(fork.Process(target=compete, args=(rank, theirs, barrier), daemon=True))
        processes[-1].start()
        pipes.append(ours)
    server = None
    try:
        uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
        if request.param == "server":
            server, uri = start_server(tmp_path)
        yield uri, pipes
    finally:
        for process in processes:
            process.kill()
            process.join()
        if server is not None:
            os.killpg(server.pid, signal.SIGKILL)
            server.wait()


def start_server(folder: Path) -> tuple[subprocess.Popen[bytes], str]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with (folder / "log").open("wb") as log:
        server = subprocess.Popen(
            [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--workers", "2",
             "--port", str(port), "--artifacts-destination", str(folder / "files"),
             "--backend-store-uri", f"sqlite:///{folder / 'mlflow.db'}"],
            env=os.environ | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"},
            stdout=log, stderr=log, start_new_session=True,
        )  # fmt: skip
    for _ in range(2000):
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5)
            return server, f"http://127.0.0.1:{port}"
        except OSError:
            assert server.poll() is None, (folder / "log").read_text()
            time.sleep(0.25)
    raise AssertionError((folder / "log").read_text())


def some_files(uri: str, folder: Path) -> UploadedFiles:
    """Upload the file that every version has here."""
    client = MlflowClient(tracking_uri=uri)  # makes the database
    place = None if uri.startswith("http") else (folder / "files").as_uri()
    experiment = client.create_experiment("race", artifact_location=place)
    run_id = client.create_run(experiment).info.run_id
    (folder / "part").mkdir()
    (folder / "part" / "file.txt").write_text("weights")
    return Registry(uri).upload("race", run_id, {"": folder / "part"})


def test_the_best_is_champion_and_nothing_is_lost(
    race: tuple[str, list[Connection]], tmp_path: Path
):
    uri, pipes = race
    files = some_files(uri, tmp_path)
    registry = Registry(uri)
    began_s, tries = time.monotonic(), []
    for number in range(ROUNDS):
        name = f"race-{number}"
        for pipe in pipes:
            pipe.send((uri, name, files))
        answers = [pipe.recv() for pipe in pipes]
        assert not [answer for answer in answers if isinstance(answer, str)], answers

        log = registry.decisions.read(name)
        versions = {rank_of(one): one.number for one in registry.versions(name)}
        assert sorted(versions) == list(range(NUM_PROCESSES))
        assert {one[0] for one in answers} == set(range(1, NUM_PROCESSES + 1))
        assert sorted(e.version for _, e in log.entries) == list(range(1, NUM_PROCESSES + 1))
        assert log.problems == ()
        assert log.void == ()  # each author has removed its late entries
        assert log.champion == versions[NUM_PROCESSES - 1]
        assert registry.aliases(name) == {"champion": log.champion}
        ranks = {version: rank for rank, version in versions.items()}
        accepted = [ranks[e.version] for _, e in log.entries if e.action == ACCEPT]
        assert accepted == sorted(accepted)  # each better than the one before
        for (_, one), (_, other) in itertools.pairwise(log.entries):
            assert other.champion_before == one.champion_after
        tries += [one[2] for one in answers]
    took_s = time.monotonic() - began_s
    print(
        f"\n{uri.partition(':')[0]}: {ROUNDS} rounds of {NUM_PROCESSES} in {took_s:.1f} s, "
        f"{np.mean(tries):.2f} tries each, at most {max(tries)}"
    )


def promote_endlessly(pipe: Connection) -> None:
    uri, name, numbers = pipe.recv()
    registry, gate = Registry(uri), SmallGate()
    for turn in itertools.count():
        number = numbers[turn % len(numbers)]
        if registry.decisions.read(name).champion != number:
            promote(registry, name, number, gate, by="doomed", force=True, reason="a test")


def test_a_killed_process_leaves_nothing_behind_that_stops_others(tmp_path: Path):
    doomed, pipes = [], []
    for _ in range(3):  # before this process opens a database
        ours, theirs = fork.Pipe()
        doomed.append(fork.Process(target=promote_endlessly, args=(theirs,), daemon=True))
        doomed[-1].start()
        pipes.append(ours)
    uri, name = f"sqlite:///{tmp_path / 'mlflow.db'}", "killed"
    files = some_files(uri, tmp_path)
    registry = Registry(uri)
    numbers = [add(registry, name, files, rank).number for rank in range(3)]
    pause = random.Random(0)
    for process, pipe in zip(doomed, pipes, strict=True):
        before = len(registry.decisions.read(name).entries)
        pipe.send((uri, name, numbers))
        while len(registry.decisions.read(name).entries) < before + 2:
            assert process.is_alive()
            time.sleep(0.01)
        time.sleep(pause.uniform(0, 0.2))
        process.kill()
        process.join()

        log = registry.decisions.read(name)
        assert log.problems == ()
        other = next(number for number in numbers if number != log.champion)
        outcome = promote(registry, name, other, SmallGate(), by="ann", force=True, reason="after")
        assert outcome.champion == other
        assert registry.aliases(name) == {"champion": other}
        assert registry.decisions.read(name).problems == ()


def test_the_same_command_finishes_what_a_killed_one_began(tmp_path: Path):
    class Killed(DecisionStore):
        num_syncs = 0

        def sync_alias(self, name: str) -> DecisionLog:
            self.num_syncs += 1
            if self.num_syncs == 2:  # after the entry
                raise SystemExit
            return super().sync_alias(name)

    uri, name = f"sqlite:///{tmp_path / 'mlflow.db'}", "lagging"
    files = some_files(uri, tmp_path)
    registry, doomed = Registry(uri), Registry(uri)
    first, second = (add(registry, name, files, rank).number for rank in (1, 5))
    promote(registry, name, first, SmallGate(), by="ann")
    doomed.decisions = Killed(doomed._client)
    with pytest.raises(SystemExit):
        promote(doomed, name, second, SmallGate(), by="ann")
    assert registry.decisions.read(name).champion == second
    assert registry.aliases(name) == {"champion": first}

    again = promote(registry, name, second, SmallGate(), by="ann")

    assert (again.action, again.champion, again.tries) == ("accept", second, 0)
    assert again.entry == registry.decisions.read(name).entries[-1][1]
    assert registry.aliases(name) == {"champion": second}
    assert len(registry.decisions.read(name).entries) == 2
    with pytest.raises(ValueError, match="is the champion already"):
        promote(registry, name, second, SmallGate(), by="ann")
    assert registry.find(parse_address(f"models:/{name}@champion")).number == second


def test_a_lost_response_makes_no_second_decision(tmp_path: Path):
    """The entry is stored, but its author gets an error."""

    class Forgetful(DecisionStore):
        num_lost = 0

        def append(self, name: str, version: int, entry: str, text: str) -> int:
            number = super().append(name, version, entry, text)
            if self.num_lost < 1:
                self.num_lost += 1
                raise UnknownOutcomeError("the connection broke")
            return number

    uri, name = f"sqlite:///{tmp_path / 'mlflow.db'}", "lost"
    files = some_files(uri, tmp_path)
    registry = Registry(uri)
    decisions = registry.decisions = Forgetful(registry._client)
    number = add(registry, name, files, 3).number

    outcome = promote(registry, name, number, SmallGate(), by="ann")

    assert decisions.num_lost == 1
    assert outcome.champion == number
    assert len(registry.decisions.read(name).entries) == 1
    assert registry.aliases(name) == {"champion": number}


def test_an_entry_that_is_removed_while_it_is_read_is_not_tampering(tmp_path: Path):
    """MLflow reads versions first and their tags later; a version deleted in between has none."""

    class Torn(RetryingClient):
        num_torn = 0

        def model_versions(self, name: str) -> list[ModelVersion]:
            found = super().model_versions(name)
            if found and name.endswith("-history") and self.num_torn < 1:
                self.num_torn += 1
                found[-1].tags.clear()
            return found

    uri, name = f"sqlite:///{tmp_path / 'mlflow.db'}", "torn"
    files = some_files(uri, tmp_path)
    registry, client = Registry(uri), Torn(uri)
    registry.decisions = DecisionStore(client)
    promote(registry, name, add(registry, name, files, 3).number, SmallGate(), by="ann")

    assert client.num_torn == 1
    assert registry.decisions.read(name).problems == ()
    assert len(registry.decisions.read(name).entries) == 1
