"""A real MLflow server behind a failing proxy: every row arrives exactly once."""

from __future__ import annotations

import json
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient
from mlflow.entities import Run

import deta.platform.tracking.mlflow_store as tracking
from deta.platform.run.journal import Journal, read_events
from deta.platform.run.run_file import write_run_file
from deta.platform.system.artifact_names import folder_name
from deta.platform.tracking.mlflow_store import MlflowStore
from deta.platform.tracking.upload_plan import RECORD_FILE, count_unsent, metric_name, read_record
from deta.platform.tracking.upload_process import (
    UploadState,
    finish_uploader,
    read_upload_state,
    start_uploader,
)
from deta.platform.tracking.uploader import BusyError, FilesError, RunUploader
from deta.platform.tracking.uploader_main import Follower

BEST_FILES = ("model.safetensors", "config.json", "state.json")


class Server:
    """`mlflow server` on a port of its own, which can be killed and started again."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.port = folder, free_port()
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        with (self.folder / "log").open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--workers", "1",
                 "--port", str(self.port), "--artifacts-destination", str(self.folder / "files"),
                 "--backend-store-uri", f"sqlite:///{self.folder / 'mlflow.db'}"],
                env=os.environ | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"},
                stdout=log, stderr=log, start_new_session=True,
            )  # fmt: skip
        for _ in range(1000):
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{self.port}/health", timeout=2)
                return
            except OSError:
                assert self.process.poll() is None, (self.folder / "log").read_text()
                time.sleep(0.25)
        raise AssertionError((self.folder / "log").read_text())

    def kill(self) -> None:
        assert self.process is not None
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


class Proxy:
    """A proxy before the server: forwards requests, or fails as networks and servers do."""

    def __init__(self, upstream: int) -> None:
        self.upstream, self.port = upstream, free_port()
        self.mode, self.latency_s = "pass", 0.0
        self.random = random.Random(7)
        self.held: list[socket.socket] = []
        self.listener: socket.socket | None = None
        self.set("pass")

    @property
    def uri(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def set(self, mode: str, latency_s: float = 0.0) -> None:
        """pass, refuse, black_hole, slow (by `latency_s`), failing (half of the requests),
        or no_files (of artifacts)."""
        self.mode, self.latency_s = mode, latency_s
        if mode == "refuse" and self.listener is not None:
            self.listener.shutdown(socket.SHUT_RDWR)
            self.listener.close()
            self.listener = None
        if mode != "refuse" and self.listener is None:
            self.listener = socket.create_server(("127.0.0.1", self.port))
            threading.Thread(target=self._accept, args=(self.listener,), daemon=True).start()

    def _accept(self, listener: socket.socket) -> None:
        while True:
            try:
                client, _ = listener.accept()
            except OSError:
                return
            threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        if self.mode == "black_hole":
            self.held.append(client)  # accepted, but never answered
            return
        with client:
            try:
                request = read_request(client)
                time.sleep(self.latency_s)
                dice = self.random.random() if self.mode == "failing" else 1.0
                if (
                    self.mode == "no_files"
                    and b"/mlflow-artifacts/" in request.partition(b"\r\n")[0]
                ):
                    client.sendall(answer(507))
                    return
                if dice < 0.25:  # refused before it was processed
                    client.sendall(answer(500))
                    return
                with socket.create_connection(("127.0.0.1", self.upstream), timeout=30) as server:
                    server.sendall(request)
                    reply = b"".join(iter(lambda: server.recv(65536), b""))
                client.sendall(
                    answer(503) if dice < 0.5 else reply
                )  # processed, but reported as failed
            except OSError:
                return


def read_request(client: socket.socket) -> bytes:
    data = b""
    while b"\r\n\r\n" not in data:
        part = client.recv(65536)
        if not part:
            raise ConnectionError
        data += part
    head, _, body = data.partition(b"\r\n\r\n")
    lines = [line for line in head.split(b"\r\n") if not line.lower().startswith(b"connection:")]
    sizes = [int(x.split(b":")[1]) for x in lines if x.lower().startswith(b"content-length:")]
    while len(body) < (sizes[0] if sizes else 0):
        body += client.recv(65536)
    return b"\r\n".join([*lines, b"Connection: close"]) + b"\r\n\r\n" + body


def answer(status: int) -> bytes:
    return f"HTTP/1.1 {status} Failed\r\nContent-Length: 0\r\nConnection: close\r\n\r\n".encode()


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    server = Server(tmp_path_factory.mktemp("mlflow"))
    try:
        server.start()
        yield server
    finally:
        server.kill()


@pytest.fixture
def proxy(server: Server) -> Iterator[Proxy]:
    proxy = Proxy(server.port)
    yield proxy
    proxy.set("refuse")


@pytest.fixture
def client(server: Server) -> MlflowClient:
    os.environ["MLFLOW_HTTP_REQUEST_TIMEOUT"] = "30"
    return MlflowClient(f"http://127.0.0.1:{server.port}")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return new_run(tmp_path / "run")


def new_run(folder: Path, **changes: Any) -> Path:
    folder.mkdir(parents=True)
    data = {
        "name": "train", "images": "/data/images", "annotations": "/data/train.json",
        "fingerprint": "f" * 64, "num_images": 16, "num_classes": 2, "notes": ["3 without boxes"],
    }  # fmt: skip
    content = {
        "key": f"{random.getrandbits(128):032x}",
        "config": {
            "name": folder.name, "experiment": "deta", "init_checkpoint": None,
            "optim": {"lr": 1e-4, "freeze": ["backbone.stem", "backbone.layer1"]},
        },
        "train_fingerprint": "f" * 64, "val_fingerprint": "e" * 64, "code_commit": "abc",
        "created_s": time.time(), "parent": None, "tags": {},
        "data": {"training": data, "validation": data | {"fingerprint": "e" * 64}},
        "categories": {"1": "disc", "2": "box"}, "environment": {"python": "3.11"},
    }  # fmt: skip
    write_run_file(folder, content | changes)
    return folder


def train(journal: Journal, first: int, last: int, every: int = 1) -> None:
    """Write events as training does; repeated steps have other times and values."""
    journal.write("begin", step=first, num_steps=last, world_size=2)
    for step in range(first + 1, last + 1):
        if step % every == 0:
            metrics = {"train/loss": random.random(), "train/lr": 1e-4, "train/epoch": step / 10}
            journal.write("progress", step=step, metrics=metrics | {"train/none": None})
        if step % 20 == 0:
            metrics = {"val/AP": step / 4, "val/epoch": step / 10, "AP_of_class/disc": 1.0}
            journal.write("evaluation", step=step, metrics=metrics)


def end(journal: Journal, status: str = "FINISHED", reason: str = "") -> None:
    journal.write("ended", status=status, reason=reason)
    journal.close()


def upload(folder: Path, uri: str, within_s: float = 60.0) -> RunUploader:
    """Send until everything is there; retry at once."""
    uploader = RunUploader(folder, MlflowStore(uri))
    deadline_s = time.monotonic() + within_s
    while True:
        try:
            uploader.send_new()
            uploader.close()
            return uploader
        except Exception:
            assert time.monotonic() < deadline_s
            time.sleep(0.02)


def runs_of(client: MlflowClient, folder: Path) -> list[Run]:
    experiment = client.get_experiment_by_name("deta")
    assert experiment is not None
    key = json.loads((folder / "run.json").read_text())["key"]
    return list(client.search_runs([experiment.experiment_id], f"tags.`deta.key` = '{key}'"))


def require_every_row_once(client: MlflowClient, folder: Path) -> Run:
    """Check that MLflow has the values of the journal; for repeated steps, the first ones."""
    (run,) = runs_of(client, folder)
    expected: dict[str, dict[int, float]] = {}
    for event, _ in read_events(folder):
        if event["kind"] in ("progress", "evaluation"):
            for name, value in event["metrics"].items():
                if value is not None:
                    expected.setdefault(name, {}).setdefault(event["step"], value)
    assert sum(map(len, expected.values())) > 0
    for name, values in expected.items():
        history = client.get_metric_history(run.info.run_id, name)
        found = sorted((metric.step, metric.value) for metric in history)
        assert found == sorted(values.items()), name
    own = ("run/", "best/", "cost/", "model/", "train/skipped", "train/replaced", "checkpoint/")
    others = {name for name in run.data.metrics if not name.startswith(own)}
    assert others == set(expected)
    return run


def test_parameters_metrics_images_and_status_arrive(
    server: Server, client: MlflowClient, proxy: Proxy, folder: Path
):
    best = "checkpoints/step-00000040"
    for path in ("pictures/a.png", *(f"{best}/{name}" for name in BEST_FILES)):
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(b"{}")
    journal = Journal(folder)
    train(journal, 0, 40)
    journal.write("picture", step=40, path="pictures/a.png")
    journal.write("picture", step=40, path="../../../../etc/hostname")
    journal.write("skipped", step=7, images=[1], not_finite=["loss"], in_a_row=1, total=1)
    broken = {"image_id": 5, "path": "b.jpg", "reason": "cut short", "by_image_id": 6}
    journal.write("replaced", step=8, images=[broken])
    journal.write("replaced", step=18, images=[broken, broken | {"image_id": 9}])
    journal.write("checkpoint", step=40, path="checkpoints/x", blocked_s=0.25, seconds=2.0)
    end(journal, "FINISHED", "early")
    upload(folder, proxy.uri)
    run = require_every_row_once(client, folder)
    assert run.info.status == "FINISHED"
    assert run.data.tags["deta.reason"] == "early"
    assert run.data.params["optim.lr"] == "0.0001"
    assert run.data.params["optim.freeze"] == "('backbone.stem', 'backbone.layer1')"
    assert run.data.metrics["best/AP"] == 10.0
    assert run.data.metrics["train/skipped_steps"] == 1
    assert run.data.metrics["train/replaced_images"] == 2
    assert run.data.metrics["checkpoint/blocked_s"] == 0.25
    assert [i.tags[0].value for i in run.inputs.dataset_inputs] == ["training", "validation"]
    files = {
        file.path for place in ("", "pictures", "best_checkpoint")
        for file in client.list_artifacts(run.info.run_id, place)
    }  # fmt: skip
    assert {"pictures/a.png", "best_checkpoint/model.safetensors", "environment.json",
            "categories.json", "replaced_images.jsonl"} <= files  # fmt: skip
    assert "pictures/hostname" not in files
    local = client.download_artifacts(run.info.run_id, "replaced_images.jsonl")
    assert [json.loads(x)["image_id"] for x in Path(local).read_text().splitlines()] == [5, 9]


def test_numbers_arrive_while_no_file_is_stored(client: MlflowClient, proxy: Proxy, folder: Path):
    (folder / "pictures").mkdir()
    (folder / "pictures/a.png").write_bytes(b"picture")
    proxy.set("no_files")
    journal = Journal(folder)
    uploader = RunUploader(folder, MlflowStore(proxy.uri))
    for first in (0, 20):
        train(journal, first, first + 20)
        journal.write("picture", step=first + 20, path="pictures/a.png")
        with pytest.raises(FilesError, match=r"files are not stored: .*507"):
            uploader.send_new(heartbeats=True)
        require_every_row_once(client, folder)
        state = read_upload_state(folder)
        assert (state.left_rows, state.left_files, state.state) == (0, 3, "waiting")
    end(journal)
    with pytest.raises(FilesError):
        uploader.send_new()
    assert require_every_row_once(client, folder).info.status == "FINISHED"
    assert not uploader.is_complete()
    uploader.close()

    proxy.set("pass")
    upload(folder, proxy.uri)
    (run,) = runs_of(client, folder)
    files = {file.path for file in client.list_artifacts(run.info.run_id)}
    assert {"environment.json", "categories.json", "pictures"} <= files
    assert count_unsent(folder) == (0, 0)


def test_one_file_that_cannot_be_stored_blocks_no_number_and_no_other_file(tmp_path: Path):
    folder = new_run(tmp_path / "run")
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    for name in ("pictures", "evaluation"):
        (folder / name).mkdir()
        (folder / name / "a.png").write_bytes(b"picture")
    journal = Journal(folder)
    train(journal, 0, 20)
    uploader = RunUploader(folder, MlflowStore(uri))
    uploader.send_new()
    (tmp_path / "mlartifacts/deta" / uploader.record.run_id / "artifacts/pictures").write_text("")
    for name in ("pictures", "evaluation"):
        journal.write("file", path=f"{name}/a.png", to=name)
    end(journal)
    with pytest.raises(FilesError):
        uploader.send_new()
    uploader._files_due_s = 0.0
    with pytest.raises(FilesError):
        uploader.send_new()
    assert uploader.record.files == [["pictures/a.png", "pictures"]]
    assert uploader.has_sent_end()
    require_every_row_once(MlflowClient(uri), folder)


def test_a_run_whose_clock_is_wrong_is_not_reaped_while_it_beats(
    client: MlflowClient, proxy: Proxy, tmp_path: Path
):
    folders = {name: new_run(tmp_path / name) for name in ("behind", "ahead", "dead", "from ahead")}
    for folder in folders.values():
        Journal(folder).write("begin", step=0, num_steps=10)
        upload(folder, proxy.uri)
    ids = {name: read_record(folder).run_id for name, folder in folders.items()}
    off_s = {"behind": -300, "ahead": 300, "dead": -300, "from ahead": 300}
    for name, run_id in ids.items():
        client.set_tag(run_id, "deta.run_folder", f"/nowhere/{name}")
        client.set_tag(run_id, "deta.heartbeat", str(int(time.time()) + off_s[name]))

    def beat() -> None:
        for name in ("behind", "ahead"):
            client.set_tag(ids[name], "deta.heartbeat", str(int(time.time()) + off_s[name]))

    timer = threading.Timer(1.5, beat)
    timer.start()
    found = {name for _, name in MlflowStore(proxy.uri).reap("deta", watch_s=4)}
    timer.join()
    assert {"dead", "from ahead"} <= found
    assert not {"behind", "ahead"} & found


def test_repeated_steps_are_not_sent_again_even_if_the_record_is_lost(
    client: MlflowClient, proxy: Proxy, folder: Path
):
    journal = Journal(folder)
    train(journal, 0, 30)
    upload(folder, proxy.uri)
    old_record = (folder / RECORD_FILE).read_bytes()
    train(journal, 10, 40)  # a worker was lost
    second = upload(folder, proxy.uri).record
    assert second.skipped_rows == 20 * 3 + 3
    require_every_row_once(client, folder)
    (folder / RECORD_FILE).write_text("{")  # torn
    train(journal, 40, 50)
    upload(folder, proxy.uri)
    require_every_row_once(client, folder)
    # A machine was lost: record and journal of an earlier hour come back from a store.
    (folder / RECORD_FILE).write_bytes(old_record)
    lines = (folder / "journal.jsonl").read_bytes()[: json.loads(old_record)["offset_bytes"]]
    before = {m: len(client.get_metric_history(second.run_id, m)) for m in ("train/lr", "val/AP")}
    (folder / "journal.jsonl").write_bytes(lines)
    journal.close()
    journal = Journal(folder)
    train(journal, 30, 60)
    upload(folder, proxy.uri)
    after = {m: len(client.get_metric_history(second.run_id, m)) for m in ("train/lr", "val/AP")}
    assert before == {"train/lr": 50, "val/AP": 2}
    assert after == {"train/lr": 60, "val/AP": 3}


def test_a_black_hole_costs_ten_seconds_at_the_end_and_no_row(
    client: MlflowClient, proxy: Proxy, folder: Path
):
    proxy.set("black_hole")
    uploader = start_uploader(folder, os.environ | {"MLFLOW_TRACKING_URI": proxy.uri})
    journal = Journal(folder)
    train(journal, 0, 40)
    wait_for(lambda: bool(read_upload_state(folder).error), 40)
    began_s = time.monotonic()
    end(journal, "KILLED", "stopped from outside")
    state = finish_uploader(uploader, folder)
    took_s = time.monotonic() - began_s
    assert took_s < 10.5
    assert not state.is_complete
    assert state.error
    assert state.left_rows == count_unsent(folder)[0] == 40 * 3 + 2 * 3 + 1  # best/AP
    proxy.set("pass")
    upload(folder, proxy.uri)
    assert require_every_row_once(client, folder).info.status == "KILLED"


def test_errors_in_half_of_all_answers_lose_and_duplicate_nothing(
    client: MlflowClient, proxy: Proxy, folder: Path
):
    journal = Journal(folder)
    proxy.set("failing")
    for first in (0, 20, 15, 40):
        train(journal, first, first + 25)
        upload(folder, proxy.uri)
    end(journal)
    upload(folder, proxy.uri)
    require_every_row_once(client, folder)


def test_a_slow_mlflow_is_waited_for_longer(
    client: MlflowClient, proxy: Proxy, folder: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(tracking, "TIMEOUT_S", 1)
    uploader = RunUploader(folder, MlflowStore(proxy.uri))
    journal = Journal(folder)
    train(journal, 0, 10)
    uploader.send_new()
    proxy.set("slow", latency_s=1.5)  # longer than a call may take at first
    train(journal, 10, 30)
    end(journal)
    with pytest.raises(Exception, match="time"):
        uploader.send_new()
    while not uploader.is_complete():
        try:
            uploader.send_new()
        except Exception:
            time.sleep(0.1)
    require_every_row_once(client, folder)


def test_a_server_killed_in_the_middle_gets_the_rest_when_it_is_back(
    server: Server, client: MlflowClient, proxy: Proxy, folder: Path
):
    uploader = start_uploader(folder, os.environ | {"MLFLOW_TRACKING_URI": proxy.uri})
    journal = Journal(folder)
    train(journal, 0, 200)
    wait_for(lambda: read_upload_state(folder).sent_rows > 0, 40)
    server.kill()
    train(journal, 180, 400)
    wait_for(lambda: bool(read_upload_state(folder).error), 40)
    server.start()
    train(journal, 400, 420)
    end(journal)
    state = finish_uploader(uploader, folder)
    assert state.is_complete, state
    assert uploader.returncode == 0
    assert require_every_row_once(client, folder).info.status == "FINISHED"


def test_an_uploader_killed_at_any_moment_makes_no_second_run_and_no_second_row(
    client: MlflowClient, proxy: Proxy, folder: Path
):
    """The uploader runs in a fork, so that the import of MLflow takes none of the time."""
    journal = Journal(folder)
    random.seed(1)
    for kill in range(12):
        train(journal, 18 * kill, 18 * kill + 20)
        child = os.fork()
        if child == 0:
            try:
                Follower(folder, MlflowStore(proxy.uri)).follow()
            finally:
                os._exit(0)
        time.sleep(random.uniform(0.02, 0.35))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    end(journal)
    upload(folder, proxy.uri)
    require_every_row_once(client, folder)


def test_a_run_created_twice_after_a_lost_answer_becomes_one(
    client: MlflowClient, proxy: Proxy, folder: Path
):
    store = MlflowStore(proxy.uri)
    description = json.loads((folder / "run.json").read_text())
    experiment = store._experiment("deta")
    for _ in range(2):
        store._create(experiment, folder, description, description["key"], False)
        time.sleep(0.01)
    assert len(runs_of(client, folder)) == 2
    Journal(folder).write("begin", step=0, num_steps=1)
    upload(folder, proxy.uri)
    assert [run.info.run_id for run in runs_of(client, folder)] == [read_record(folder).run_id]


def test_sigterm_ends_it_even_in_a_black_hole(proxy: Proxy, folder: Path):
    proxy.set("black_hole")
    Journal(folder).write("begin", step=0, num_steps=10)
    uploader = start_uploader(folder, os.environ | {"MLFLOW_TRACKING_URI": proxy.uri})
    wait_for(lambda: read_upload_state(folder).process == uploader.pid, 40)
    before = (folder / "journal.jsonl").read_bytes()
    time.sleep(0.5)
    began_s = time.monotonic()
    uploader.terminate()
    uploader.wait(30)
    assert time.monotonic() - began_s < 8.5
    assert (folder / "journal.jsonl").read_bytes() == before
    assert json.loads((folder / RECORD_FILE).read_text())["run_id"] == ""


def test_two_uploaders_of_one_run_take_turns(proxy: Proxy, folder: Path):
    Journal(folder).write("begin", step=0, num_steps=10)
    first, second = (RunUploader(folder, MlflowStore(proxy.uri)) for _ in range(2))
    first.send_new()
    with pytest.raises(BusyError):
        second.send_new()
    first.close()
    second.send_new()
    second.close()


def test_many_uploaders_share_one_new_database_file(tmp_path: Path):
    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    children = []
    for number in range(4):
        folder = new_run(tmp_path / f"run-{number}")
        journal = Journal(folder)
        train(journal, 0, 100)
        end(journal)
        child = os.fork()
        if child == 0:
            code = 1
            try:
                code = 0 if Follower(folder, MlflowStore(uri)).follow() else 1
            finally:
                os._exit(code)
        children.append(child)
    assert [os.waitpid(child, 0)[1] for child in children] == [0, 0, 0, 0]
    client = MlflowClient(uri)
    for number in range(4):
        require_every_row_once(client, tmp_path / f"run-{number}")


def test_a_sweep_has_one_parent_and_a_child_for_each_trial(
    client: MlflowClient, proxy: Proxy, tmp_path: Path
):
    sweep = new_run(tmp_path / "sweep")
    key = json.loads((sweep / "run.json").read_text())["key"]
    journal = Journal(sweep)
    journal.write("begin", step=0, num_steps=2)
    (sweep / "report.html").write_text("<html>")
    follower = Follower(sweep, MlflowStore(proxy.uri), sweep=True)
    assert follower.send_new() is None
    for number in range(2):
        trial = new_run(
            sweep / "trials" / f"t{number}", parent=key,
            tags={"cell": "batch 8", "seed": str(number)},
        )  # fmt: skip
        own = Journal(trial)
        train(own, 0, 20)
        end(own)
    journal.write("file", step=0, path="report.html", to="report")
    end(journal)
    assert follower.follow()
    (parent,) = runs_of(client, sweep)
    assert parent.info.status == "FINISHED"
    assert [f.path for f in client.list_artifacts(parent.info.run_id, "report")] == [
        "report/report.html"
    ]
    for number in range(2):
        run = require_every_row_once(client, sweep / "trials" / f"t{number}")
        assert run.data.tags["mlflow.parentRunId"] == parent.info.run_id
        assert run.data.tags["seed"] == str(number)
        assert run.info.status == "FINISHED"


def test_no_planted_secret_reaches_mlflow(
    server: Server, client: MlflowClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    canaries = {
        "env": "Canary-of-the-environment-1", "url": "CanaryInTheUrl2",
        "amazon": "AKIACANARY3CANARY3XX", "hub": "hf_" + "Canary4" * 5, "named": "canary-five",
        "query": "CanarySix6", "random": "q7Zk2Rv9Xw4Tb8Nm3Lp6Jd1Hs5Gf0Ycanary".replace("c", "C"),
        "header": "canary8canary8canary8", "tag": "canary-nine", "file": "canary-ten-10",
    }  # fmt: skip
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", canaries["env"])
    name = random.getrandbits(32)
    folder = new_run(
        tmp_path / f"run-{name}",
        config={
            "name": "masked", "experiment": "deta",
            "init_checkpoint": f"https://me:{canaries['url']}@host/w.pth#sha256=" + "a1" * 32,
            "checkpoint": {"store": f"s3://b/x?access_key={canaries['amazon']}&scheme=http"},
            "hub": {"token_for": canaries["hub"], "password": canaries["named"]},
            "note": f"use {canaries['random']} here", "plain": "path/to/My_Images-2024/train2017",
        },
        tags={"HF_TOKEN": canaries["tag"], "where": f"x?sig=1&signature={canaries['query']}"},
    )  # fmt: skip
    checkpoint = folder / "checkpoints" / "step-00000020"
    checkpoint.mkdir(parents=True)
    for file in ("config.json", "state.json", "model.safetensors"):
        (checkpoint / file).write_text(json.dumps({"api_key": canaries["file"], "lr": 1e-4}))
    (checkpoint / "model.safetensors").write_bytes(b"weights")
    journal = Journal(folder)
    train(journal, 0, 20)
    end(journal, "FINISHED", f"Authorization: Bearer {canaries['header']} and {canaries['env']}")
    uri = f"http://me:{canaries['url']}@127.0.0.1:{server.port}"
    upload(folder, uri)
    (run,) = runs_of(client, folder)
    assert run.data.params["init_checkpoint"] == "https://***@host/w.pth#sha256=" + "a1" * 32
    assert run.data.params["plain"] == "path/to/My_Images-2024/train2017"
    assert run.data.tags["deta.run_folder"] == str(folder)
    stored = [server.folder / "mlflow.db", folder / RECORD_FILE, folder / "uploader.json"]
    stored += server.folder.glob("mlflow.db-*")
    stored += [path for path in (server.folder / "files").rglob("*") if path.is_file()]
    assert len(stored) > 5
    for path in stored:
        content = path.read_bytes()
        assert not [k for k, canary in canaries.items() if canary.encode() in content], path


def test_runs_without_heartbeat_and_folder_are_marked_killed(
    client: MlflowClient, proxy: Proxy, tmp_path: Path
):
    folders = {name: new_run(tmp_path / name) for name in ("gone", "here", "beating", "silent")}
    for folder in folders.values():
        Journal(folder).write("begin", step=0, num_steps=10)
        upload(folder, proxy.uri)
    ids = {name: read_record(folder).run_id for name, folder in folders.items()}
    for name in ("gone", "here"):
        client.set_tag(ids[name], "deta.heartbeat", str(int(time.time()) - 300))
    client.set_tag(ids["beating"], "deta.heartbeat", str(int(time.time()) - 10))
    for name in ("gone", "beating", "silent"):
        client.set_tag(ids[name], "deta.run_folder", f"/nowhere/{name}")
    store = MlflowStore(proxy.uri)
    assert (ids["gone"], "gone") in store.reap("deta", dry_run=True, watch_s=0)
    assert client.get_run(ids["gone"]).info.status == "RUNNING"
    store.reap("deta", watch_s=0)
    status = {name: client.get_run(run_id).info.status for name, run_id in ids.items()}
    assert status == {"gone": "KILLED", "here": "RUNNING", "beating": "RUNNING",
                      "silent": "RUNNING"}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "kept"),
    [("val/AP", True), ("AP_of_class/traffic light", True), ("AP_of_class/../x", False),
     ("AP_of_class/a//b", False), ("AP_of_class/100 %", False), ("AP_of_class/人", True),
     ("x" * 400, False)],
)  # fmt: skip
def test_class_names_become_valid_metric_names(name: str, kept: bool):
    changed = metric_name(name)
    assert (changed == name) is kept
    assert len(changed) <= 250
    assert metric_name(name + "?") != metric_name(name + "!")


def wait_for(condition: Callable[[], bool], within_s: float) -> None:
    deadline_s = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < deadline_s
        time.sleep(0.05)


def test_a_missing_state_is_no_error(tmp_path: Path):
    assert read_upload_state(tmp_path) == UploadState()


@pytest.mark.parametrize(
    "name",
    ["deta", "/Shared/detection", "/tmp/elsewhere", "..", "a/../../b", "сборка", "x" * 300, "a b%@",
     "😀", "."],
)  # fmt: skip
def test_no_name_of_an_experiment_leaves_the_folder_of_artifacts(tmp_path: Path, name: str):
    store = MlflowStore(f"sqlite:///{tmp_path / 'mlflow.db'}")
    store._connect()
    location = store._experiment(name).artifact_location
    folder = Path(urllib.request.url2pathname(urllib.parse.urlsplit(location).path))
    assert folder.resolve().parent == (tmp_path / "mlartifacts").resolve()


def test_experiments_with_like_names_have_folders_of_their_own():
    names = ["a b", "a-b", "a/b", "a  b", "/a/b", "😀", "😁", "..", "..."]
    assert len({folder_name(name) for name in names}) == len(names)
