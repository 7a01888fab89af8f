"""An attempt ends with the outcome of its driver, or fails the run where a retry cannot help."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from deta.platform.launch import ray_driver
from deta.platform.launch.attempt import Attempt
from deta.platform.launch.attempt_monitor import AttemptMonitor, RunFailedError
from deta.platform.launch.console import Console
from deta.platform.launch.ray_driver import RayDriver
from deta.platform.run.journal import Journal
from deta.platform.run.run import ATTEMPT_LOG, OUTCOME_FILE, STOP_FILE, Run
from deta.platform.run.run_file import RUN_FILE
from deta.platform.system.process_tree import new_mark
from tests.platform.launch.tiny_splits import DATA, make_run, write_split


@pytest.fixture
def run(tmp_path: Path) -> Run:
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / RUN_FILE).write_text("{}")
    return make_run(write_split(tmp_path / "train", [[], []]), folder, DATA)


ORDERS = """\
import json, pathlib, sys
cluster, folder = (json.loads(sys.stdin.readline()) for _ in range(2))
f = pathlib.Path(folder["folder"])
"""


def start(run: Run, monkeypatch: pytest.MonkeyPatch, driver: str, lock: object = None) -> Attempt:
    """Make an attempt whose driver reads its orders, and then runs the code `driver`."""

    def popen(command: list[str], **options):
        assert command[1:] == ["-m", "deta.platform.cluster.driver"]
        return subprocess.Popen([sys.executable, "-c", ORDERS + driver], **options)

    patched = SimpleNamespace(Popen=popen, PIPE=subprocess.PIPE, STDOUT=subprocess.STDOUT)
    monkeypatch.setattr(ray_driver, "subprocess", patched)
    printed: list[str] = []
    lock = lock or SimpleNamespace(lost=False)
    console = Console(run, printed.append)
    started = RayDriver(new_mark())
    attempt = Attempt(run, lock, AttemptMonitor(run), console, started)  # type: ignore[arg-type]
    attempt.printed = printed  # type: ignore[attr-defined]
    return attempt


@pytest.mark.parametrize(
    ("outcome", "kind", "message"),
    [
        ({"kind": "refused", "message": "too small"}, "refused", "too small"),
        ({"kind": "lost", "message": "x"}, "lost", "x"),
        (None, "lost", "the Ray driver died (exit code 3)"),
        ({"unknown": 1}, "lost", "the Ray driver died (exit code 3)"),
    ],
)
def test_the_outcome_is_what_the_driver_wrote(run: Run, monkeypatch, outcome, kind, message):
    write = "" if outcome is None else f"(f / {OUTCOME_FILE!r}).write_text({json.dumps(outcome)!r})"
    driver = (
        f"(f / {ATTEMPT_LOG!r}).write_text('Ray cluster on this machine: 1 node(s)\\n')\n"
        f"print('not moved')\n{write}\nsys.exit(3)"
    )
    attempt = start(run, monkeypatch, driver)
    found = attempt.run_to_end()
    attempt.driver.terminate()
    assert (found.kind, found.message) == (kind, message)
    assert "Ray cluster on this machine: 1 node(s)" in attempt.printed  # type: ignore[attr-defined]
    assert (run.folder / ATTEMPT_LOG).read_text().endswith("\nnot moved\n")


def test_a_lost_lock_fails_the_run(run: Run, monkeypatch):
    driver = "sys.stdin.read()"
    attempt = start(run, monkeypatch, driver, SimpleNamespace(lost=True))
    with pytest.raises(RunFailedError, match="another process has taken over this run"):
        attempt.run_to_end()
    attempt.driver.terminate()
    assert attempt.driver.process.poll() is not None


def test_a_stop_is_requested_once_the_training_has_begun(run: Run, monkeypatch):
    attempt = start(run, monkeypatch, "")
    attempt.request_stop()
    assert not (run.folder / STOP_FILE).exists()

    wait = (
        "import pathlib, sys, time\nwhile not pathlib.Path(sys.argv[1]).exists(): time.sleep(0.01)"
    )
    child = subprocess.Popen([sys.executable, "-c", wait, str(run.folder / STOP_FILE)])
    attempt.driver.terminate()
    attempt.driver.process = child
    journal = Journal(run.folder)
    journal.write("begin", step=0, num_steps=9, world_size=1)
    journal.close()
    attempt.request_stop()
    assert child.wait(10) == 0
    assert attempt.printed[-1] == "stopping: saving the state …"  # type: ignore[attr-defined]
