"""The driver maps what happens on a cluster to an outcome; here the cluster is pretended."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("ray")

import ray

from deta.platform.cluster import connection, driver
from deta.platform.cluster.auth_token import OpenClusterError
from deta.platform.cluster.connection import ClusterTooSmallError, join_cluster
from deta.platform.cluster.driver import (
    MAX_CONTROLLERS,
    RunRefusedError,
    check_resources,
    run_attempt,
)
from deta.platform.run.config import ClusterConfig
from deta.platform.run.dataset_snapshot import DATA_FILE
from deta.platform.run.run import ATTEMPT_LOG
from deta.platform.system.places import child_environment
from deta.platform.system.process_tree import ATTEMPT_MARK, new_mark

CLUSTER = ClusterConfig(num_workers=4, cpus_per_worker=2, gpu=True)


@pytest.fixture
def attempt(monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[str, str]]:
    """Return a function that runs an attempt with some parts of the driver replaced."""

    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.5:6379")
    monkeypatch.setattr(driver.ray, "nodes", list)
    orders = SimpleNamespace(cluster=lambda: CLUSTER, folder=lambda: Path("/nowhere"))

    def attempt(**parts: Callable) -> tuple[str, str]:
        parts = {
            "join_cluster": lambda: "Ray cluster of a test",
            "check_resources": lambda cluster: None,
            "check_gpus": lambda cluster: None,
            "fit_cpus": lambda cluster, nodes: cluster,
            "newest_step": lambda folder: -1,
            "_train": lambda cluster, orders: None,
        } | parts
        for name, part in parts.items():
            monkeypatch.setattr(driver, name, part)
        outcome = run_attempt(orders)  # type: ignore[arg-type]
        return outcome.kind, outcome.message

    return attempt


def raising(error: Exception) -> Callable:
    def function(*_: object, **__: object) -> None:
        raise error

    return function


def test_the_outcome_depends_on_what_failed(attempt, monkeypatch: pytest.MonkeyPatch):
    assert attempt() == ("ended", "")
    assert attempt(_train=raising(RunRefusedError("damaged"))) == ("refused", "damaged")
    assert attempt(join_cluster=raising(OpenClusterError("open"))) == ("refused", "open")
    too_small = ClusterTooSmallError("no GPU")
    assert attempt(check_resources=raising(too_small)) == ("refused", "no GPU")
    failed = attempt(_train=raising(RuntimeError("a worker failed")))
    assert failed == ("lost", "RuntimeError: a worker failed")
    for address, kind in (("10.0.0.5:6379", "unreachable"), ("", "lost")):
        monkeypatch.setenv("RAY_ADDRESS", address)
        found = attempt(join_cluster=raising(ConnectionError("no answer")))
        assert found == (kind, "ConnectionError: no answer")


def test_a_lost_controller_is_replaced_while_there_is_progress(attempt, capsys):
    steps = iter([1, 2, *[2] * MAX_CONTROLLERS])
    calls = []

    def lose(cluster: ClusterConfig, orders: object) -> None:
        calls.append(cluster)
        raise ray.exceptions.RayActorError

    kind, _ = attempt(newest_step=lambda folder: next(steps), _train=lose)
    assert kind == "lost"
    assert calls == [CLUSTER] * (2 + MAX_CONTROLLERS)
    assert "Ray's controller was lost" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("available", "lacking"),
    [
        ({"CPU": 8, "GPU": 4}, None),
        ({"CPU": 7, "GPU": 4}, r"4 workers and therefore 8 CPUs \(it has 7\)"),
        ({"CPU": 8}, r"4 GPUs \(it has 0\)"),
    ],
)
def test_a_cluster_that_is_too_small_is_refused(monkeypatch, available, lacking):
    monkeypatch.setattr(driver.ray, "cluster_resources", lambda: available)
    if lacking is None:
        check_resources(CLUSTER)
        return
    with pytest.raises(ClusterTooSmallError, match=lacking):
        check_resources(CLUSTER)


@pytest.mark.parametrize(
    ("address", "is_open", "expected"),
    [
        ("", False, "Ray cluster on this machine: 1 node(s), 2 CPUs, 0 GPUs"),
        ("", True, None),
        ("10.0.0.5:6379", True, "NO TOKEN"),
    ],
)
def test_an_own_cluster_must_require_a_token_and_others_are_reported(
    monkeypatch: pytest.MonkeyPatch, address: str, is_open: bool, expected: str | None
):
    monkeypatch.setenv("RAY_ADDRESS", address)
    stopped = []
    fake = SimpleNamespace(
        is_initialized=lambda: False,
        init=lambda address, **options: SimpleNamespace(dashboard_url="127.0.0.1:1"),
        shutdown=lambda: stopped.append(True),
        nodes=lambda: [{}],
        cluster_resources=lambda: {"CPU": 2.0},
    )
    monkeypatch.setattr(connection, "ray", fake)
    monkeypatch.setattr(connection, "ensure_private_token", lambda: None)
    monkeypatch.setattr(connection, "is_open", lambda dashboard: is_open)
    if expected is None:
        with pytest.raises(OpenClusterError):
            join_cluster()
        assert stopped
        return
    assert expected in join_cluster()
    assert not stopped


def test_a_run_that_cannot_be_read_is_refused(tmp_path: Path):
    (tmp_path / DATA_FILE).write_bytes(b"not tables")
    orders: Any = SimpleNamespace(folder=lambda: tmp_path)
    with pytest.raises(RunRefusedError, match="is damaged"):
        driver._train(CLUSTER, orders)


FOLLOW = """
import os, sys, threading
from deta.platform.cluster.driver import Orders
print("before", flush=True)
orders = Orders()
threading.Thread(target=orders.follow, daemon=True).start()
print(orders.cluster().num_workers, flush=True)
folder = orders.folder()
print(folder == orders.folder(), orders.folder_file.read_text() == str(folder), flush=True)
threading.Event().wait()
"""


def test_orders_come_one_by_one_and_their_end_ends_the_driver(tmp_path: Path):
    early = (tmp_path / "early").open("w+b")
    (tmp_path / ATTEMPT_LOG).write_text("of an earlier attempt\n")
    process = subprocess.Popen(
        [sys.executable, "-c", FOLLOW],
        stdin=subprocess.PIPE,
        stdout=early,
        env=child_environment({ATTEMPT_MARK: new_mark()}),
        start_new_session=True,
    )
    assert process.stdin is not None

    def say(order: dict[str, Any]) -> None:
        process.stdin.write(json.dumps(order).encode() + b"\n")
        process.stdin.flush()

    def wait_for(file: Path, text: str) -> None:
        deadline_s = time.monotonic() + 60
        while text not in file.read_text():
            assert time.monotonic() < deadline_s, file.read_text()
            time.sleep(0.05)

    say({"cluster": asdict(CLUSTER)})
    wait_for(tmp_path / "early", "before\n4\n")
    say({"folder": str(tmp_path)})
    log = "of an earlier attempt\nbefore\n4\nTrue True\n"
    wait_for(tmp_path / ATTEMPT_LOG, log)
    assert (tmp_path / "early").read_text() == ""
    process.stdin.close()
    assert process.wait(30) == 1


def test_a_folder_that_cannot_be_written_ends_the_driver_instead_of_leaving_it_to_wait(
    tmp_path: Path,
):
    process = subprocess.run(
        [sys.executable, "-c", FOLLOW],
        input="\n".join(json.dumps(o) for o in (
            {"cluster": asdict(CLUSTER)}, {"folder": str(tmp_path / "missing")}, {}
        )),
        stdout=(tmp_path / "early").open("w+"),
        env=child_environment({ATTEMPT_MARK: new_mark()}),
        text=True, timeout=90, start_new_session=True,
    )  # fmt: skip
    assert process.returncode == 1
    assert "could not be followed" in (tmp_path / "early").read_text()
