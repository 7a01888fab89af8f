"""The supervisor retries with backoff, and ends a run once in every case."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from deta.platform.launch import supervisor
from deta.platform.launch.attempt_monitor import RunFailedError, resume_point
from deta.platform.launch.console import Console
from deta.platform.launch.supervisor import Supervisor
from deta.platform.run.journal import Journal, read_events
from deta.platform.run.run import STOP_FILE, AttemptOutcome, Run
from deta.platform.tracking.upload_process import UploadState
from tests.platform.launch.tiny_splits import DATA, make_run, write_split

LOST = AttemptOutcome("lost", "a reason\nand its details")


class World:
    """A supervisor whose attempts are functions, without processes."""

    def __init__(self, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
        self.run = run
        self.printed: list[str] = []
        self.slept_s: list[float] = []
        self.now_s = 0.0
        self.stop_requests = self.terminated = 0
        self.attempts: list[Callable[[], AttemptOutcome]] = []
        self.lock = SimpleNamespace(lost=False, release=lambda: None)
        reaper = SimpleNamespace(stdin=SimpleNamespace(write=self._reap, close=lambda: None),
                                 wait=lambda: None)  # fmt: skip
        self.reaper_lines: list[bytes] = []
        patches: dict[str, Any] = {
            "RayDriver": lambda mark: SimpleNamespace(terminate=self.terminate),
            "Attempt": lambda *_: self,
            "write_dataset_snapshot": lambda run: None,
            "start_orphan_reaper": lambda mark, folder: reaper,
            "start_uploader": lambda folder: None,
            "finish_uploader": lambda *_, **__: UploadState(uri="sqlite:///x", left_rows=3),
            "time": SimpleNamespace(monotonic=self._clock,
                                    sleep=self.slept_s.append),
        }  # fmt: skip
        monkeypatch.setenv(supervisor.RUN_MARK, "")
        for name, value in patches.items():
            monkeypatch.setattr(supervisor, name, value)
        self.supervisor = Supervisor(run, self.lock, Console(run, self.printed.append))  # type: ignore[arg-type]

    def _clock(self) -> float:
        self.now_s += 1.0
        return self.now_s

    def _reap(self, line: bytes) -> None:
        self.reaper_lines.append(line)

    def write(self, *events: tuple[str, dict[str, Any]]) -> None:
        journal = Journal(self.run.folder)
        for kind, values in events:
            journal.write(kind, **values)
        journal.close()

    def events(self, kind: str) -> list[dict[str, Any]]:
        return [event for event, _ in read_events(self.run.folder) if event["kind"] == kind]

    # The interface of an attempt

    def run_to_end(self) -> AttemptOutcome:
        outcome = self.attempts.pop(0)()
        self.supervisor.monitor.poll()
        return outcome

    def request_stop(self) -> None:
        self.stop_requests += 1

    def terminate(self) -> None:
        self.terminated += 1

    def end(self) -> AttemptOutcome:
        self.write(("end", {"step": 4, "metrics": {}, "reason": "stopped early"}))
        return AttemptOutcome("ended")

    def start_at(self, step: int) -> Callable[[], AttemptOutcome]:
        def attempt() -> AttemptOutcome:
            self.write(("starting", {"step": step}))
            return LOST

        return attempt


@pytest.fixture
def run(tmp_path: Path) -> Run:
    folder = tmp_path / "run"
    folder.mkdir()
    return make_run(write_split(tmp_path / "train", [[], []]), folder, DATA)


@pytest.fixture
def world(run: Run, monkeypatch: pytest.MonkeyPatch) -> World:
    return World(run, monkeypatch)


def test_a_lost_attempt_is_retried_until_the_run_has_ended(world: World):
    (world.run.folder / STOP_FILE).touch()  # left by an earlier launch
    world.attempts = [world.start_at(0), world.start_at(2), world.end]
    result = world.supervisor.supervise()
    assert result.rows_left == 3
    assert world.slept_s == [0.0, 0.0]  # each start was further than the last
    assert [e["reason"] for e in world.events("restart")] == [
        f"the attempt ended: {LOST.message}"
    ] * 2
    (ended,) = world.events("ended")
    assert (ended["status"], ended["reason"]) == ("FINISHED", "stopped early")
    assert world.terminated == 3
    assert world.reaper_lines == [supervisor.CLEAN_EXIT]
    assert not (world.run.folder / STOP_FILE).exists()
    assert "the attempt ended: a reason; continuing from the beginning" in world.printed
    assert any("3 rows are left" in line and "jobs/sync.py" in line for line in world.printed)


def test_backoff_doubles_without_progress_up_to_a_limit_of_starts(world: World):
    limit = world.run.config.cluster.max_fruitless_starts
    world.attempts = [world.start_at(0)] * (limit + 1)
    with pytest.raises(RunFailedError, match=f"{limit} starts in a row made no progress"):
        world.supervisor.supervise()
    assert world.slept_s == [0.0, *(2.0**n for n in range(1, limit - 1))]
    (ended,) = world.events("ended")
    assert ended["status"] == "FAILED"
    assert "no progress" in ended["reason"]


def test_a_cluster_that_never_answered_fails_the_run(world: World):
    world.attempts = [lambda: AttemptOutcome("unreachable", "no answer")]
    with pytest.raises(RunFailedError, match="there is no Ray cluster: no answer"):
        world.supervisor.supervise()


def test_a_cluster_that_answered_before_is_waited_for(world: World):
    unreachable = lambda: AttemptOutcome("unreachable", "no answer")  # noqa: E731
    world.attempts = [world.start_at(0), unreachable, unreachable, world.end]
    world.supervisor.supervise()
    assert world.slept_s == [0.0, 10.0, 10.0]


def test_a_refusal_is_not_retried(world: World):
    world.attempts = [lambda: AttemptOutcome("refused", "lower cluster.num_workers")]
    with pytest.raises(RunFailedError, match=r"lower cluster\.num_workers"):
        world.supervisor.supervise()
    assert world.events("restart") == []


def test_an_end_that_the_journal_does_not_have_is_a_lost_attempt(world: World):
    world.attempts = [lambda: AttemptOutcome("ended"), world.end]
    world.supervisor.supervise()
    assert "its journal has no end" in world.events("restart")[0]["reason"]


def test_an_interrupted_run_is_asked_to_save(world: World):
    def interrupt() -> AttemptOutcome:
        raise KeyboardInterrupt

    world.attempts = [interrupt]
    with pytest.raises(KeyboardInterrupt):
        world.supervisor.supervise()
    assert (world.stop_requests, world.terminated) == (1, 1)
    (ended,) = world.events("ended")
    assert (ended["status"], ended["reason"]) == ("KILLED", "stopped from outside")


def test_a_run_that_was_taken_over_gets_no_end(world: World):
    def lose() -> AttemptOutcome:
        world.lock.lost = True
        raise RunFailedError("taken over")

    world.attempts = [lose]
    with pytest.raises(RunFailedError, match="taken over"):
        world.supervisor.supervise()
    assert world.events("ended") == []
    assert resume_point(world.run) == "the beginning"
