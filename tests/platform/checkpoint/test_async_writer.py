"""Asynchronous saves: killed, on a full or read-only disk, one at a time."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
import torch

from deta.platform.checkpoint.async_writer import CheckpointWriter, WriteResult
from deta.platform.checkpoint.format import read_checkpoint
from deta.platform.checkpoint.local import (
    Snapshot,
    all_checkpoints,
    best_checkpoint,
    newest_checkpoint,
    take_snapshot,
    write_checkpoint,
)
from deta.platform.data.coco_dataset import Category
from deta.platform.run.config import RunConfig
from deta.platform.run.fence import Fence
from deta.platform.run.run_state import RunState

ROOT = Path(__file__).resolve().parents[3]
CATEGORIES = (Category(1, "disc"),)

# For each input line, start a child that resumes from the last checkpoint and saves 16 MB each
# step until it is killed. The file `acknowledged` lists the steps whose save was reported.
TRAIN = """
import os, sys
from pathlib import Path
import torch
from deta.platform.run.run_state import RunState
from deta.platform.checkpoint.local import clean_leftovers, newest_checkpoint, take_snapshot
from deta.platform.checkpoint.async_writer import CheckpointWriter
from deta.platform.data.coco_dataset import Category
from deta.platform.run.config import RunConfig

folder = Path(sys.argv[1]) / "checkpoints"
torch.set_num_threads(1)

def train():
    acknowledged = os.open(folder.parent / "acknowledged", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    clean_leftovers(folder)
    newest = newest_checkpoint(folder)
    step = newest.state.step if newest is not None else 0
    newest_has_metrics = newest is not None and bool(newest.state.metrics)
    assert not list(folder.glob(".*")), list(folder.glob(".*"))
    weights, moments = torch.zeros(2_000_000), torch.zeros(2_000_000)
    writer = CheckpointWriter(folder, keep=2)
    while True:
        # Sometimes a step is written again with metrics, as at the end of an epoch.
        again = step > 0 and step % 4 == 3 and not newest_has_metrics
        step += 0 if again else 1
        metrics = {"AP": float(step % 5)} if again else {}
        newest_has_metrics = again
        weights.fill_(step)
        state = RunState(step=step, samples_seen=step, epoch=0.0, metrics=metrics)
        def make(into):
            return take_snapshot(state, RunConfig(), (Category(1, "disc"),), {"w": weights},
                                 {"m": moments}, into)
        writer.save(make, wait=True)
        (result,) = writer.poll()
        assert result.error is None, result
        os.write(acknowledged, b"%d\\n" % step)

for line in sys.stdin:
    pid = os.fork()
    if pid == 0:
        try:
            train()
        except BaseException:
            import traceback
            traceback.print_exc()
        os._exit(1)
    print(pid, flush=True)
    print(os.waitpid(pid, 0)[1], flush=True)
"""


def make(step: int, ap: float | None = None, num_values: int = 1000) -> Snapshot:
    state = RunState(
        step=step, samples_seen=step, epoch=0.0, metrics={} if ap is None else {"AP": ap}
    )
    weights = torch.full((num_values,), float(step))
    return take_snapshot(state, RunConfig(), CATEGORIES, {"w": weights}, {"m": weights})


def save(writer: CheckpointWriter, snapshot: Snapshot) -> WriteResult:
    assert writer.save(lambda _: snapshot, wait=True)
    (result,) = writer.poll()
    return result


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture
def quick_disk(tmp_path: Path) -> Iterator[Path]:
    """A folder in memory if there is space: the disk does not matter for killed processes."""
    memory = Path("/dev/shm")
    if not memory.is_dir() or shutil.disk_usage(memory).free < 500e6:
        yield tmp_path
        return
    with tempfile.TemporaryDirectory(prefix="deta-kills-", dir=memory) as folder:
        yield Path(folder)


def test_32_kills_at_random_moments_lose_no_acknowledged_step(quick_disk: Path):
    folder = quick_disk / "checkpoints"
    folder.mkdir()
    with subprocess.Popen(
        [sys.executable, "-c", TRAIN, str(quick_disk)], cwd=ROOT, text=True,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    ) as server:  # fmt: skip
        try:
            _kill_and_look(server, quick_disk)
        finally:
            assert server.stdin is not None
            server.stdin.close()


def _kill_and_look(server: subprocess.Popen[str], place: Path) -> None:
    folder = place / "checkpoints"
    generator = random.Random(0)
    leftovers = last = 0
    start_s = save_s = 0.0  # how long a child takes to its first checkpoint, and for one more
    for number in range(32):
        assert server.stdin is not None
        assert server.stdout is not None
        server.stdin.write("go\n")
        server.stdin.flush()
        pid = int(server.stdout.readline())
        if number == 0:
            start_s, save_s = _time_saves(place)
        elif number % 2:
            time.sleep(generator.uniform(0, start_s + 2 * save_s))
        else:  # progress on a slow machine, too
            _wait_for_another_save(place)
            time.sleep(generator.uniform(0, 2 * save_s))
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
        if int(server.stdout.readline()) != signal.SIGKILL:
            server.stdin.close()
            pytest.fail(f"the child ended by itself:\n{server.stderr and server.stderr.read()}")

        leftovers += bool(list(folder.glob(".*")))
        told: list[str] = []
        found = newest_checkpoint(folder, told.append)
        assert told == [], "something looked like a checkpoint and was none"
        assert found is not None
        acknowledged = _acknowledged(place)
        assert found.state.step >= max(*acknowledged, last)
        last = found.state.step
        assert (found.model_state()["w"] == last).all()
        aps = [step % 5 for step in acknowledged if step % 4 == 3 and acknowledged.count(step) > 1]
        best = best_checkpoint(folder)
        if aps:
            assert best is not None
            assert read_checkpoint(best).state.metrics["AP"] >= max(aps)
        assert len(all_checkpoints(folder)) <= 4  # two newest, the best, one to be deleted
    assert last > 5, "the children hardly trained"
    assert leftovers > 0, "no kill came during a save"


def _acknowledged(place: Path) -> list[int]:
    file = place / "acknowledged"
    return [int(line) for line in file.read_text().split()] if file.exists() else []


def _wait_for_another_save(place: Path) -> None:
    before, until_s = len(_acknowledged(place)), time.monotonic() + 60
    while len(_acknowledged(place)) <= before and time.monotonic() < until_s:
        time.sleep(0.002)


def _time_saves(place: Path) -> tuple[float, float]:
    began_s, times_s = time.monotonic(), [0.0]
    while len(times_s) < 5 and times_s[-1] < 60:
        if len(_acknowledged(place)) >= len(times_s):
            times_s.append(time.monotonic() - began_s)
        time.sleep(0.002)
    return times_s[1], (times_s[-1] - times_s[1]) / 3


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MiB."""
    place = tmp_path / "disk"
    place.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=1m", "none", str(place)]
    if not shutil.which("mount") or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("mounting a file system takes root")
    try:
        yield place
    finally:
        subprocess.run(["umount", "-l", str(place)], check=True)


def fill(disk: Path, leave_bytes: int) -> Path:
    filler = disk / "filler"
    filler.write_bytes(b"\0" * (shutil.disk_usage(disk).free - leave_bytes))
    return filler


def test_on_a_full_disk_training_continues_and_the_next_save_works(small_disk: Path):
    folder = small_disk / "run" / "checkpoints"
    writer = CheckpointWriter(folder)
    first = save(writer, make(1, ap=5.0, num_values=20_000)).path
    filler = fill(small_disk, 100_000)
    result = save(writer, make(2, num_values=20_000))
    assert result.path is None
    assert result.error is not None
    for part in ("step 2", str(folder), "No space left", "It takes 0.2 MB", "0.1 MB are free"):
        assert part in result.error
    for part in ("Make room", "next save retries", "newest checkpoint is step-00000001"):
        assert part in result.error
    assert names(folder) == ["step-00000001"]
    filler.unlink()
    assert save(writer, make(3, num_values=20_000)).error is None
    newest = newest_checkpoint(folder)
    assert newest is not None
    assert newest.state.step == 3
    assert first in all_checkpoints(folder)
    assert writer.close(5)


def test_a_disk_that_fills_during_a_save_keeps_no_part_of_it(small_disk: Path):
    write_checkpoint(small_disk, make(1))
    fill(small_disk, 100_000)
    with pytest.raises(OSError, match="No space left"):
        write_checkpoint(small_disk, make(2, num_values=20_000))
    assert names(small_disk) == ["filler", "step-00000001"]


def test_on_a_read_only_disk_training_continues_and_can_be_resumed(small_disk: Path):
    folder = small_disk / "checkpoints"
    writer = CheckpointWriter(folder)
    save(writer, make(1))
    damaged = save(writer, make(2)).path
    assert damaged is not None
    (damaged / "model.safetensors").write_bytes(b"")
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    error = save(writer, make(3)).error
    assert error is not None
    assert "Read-only file system" in error
    assert "writable again" in error
    told: list[str] = []
    newest = newest_checkpoint(folder, told.append)
    assert newest is not None
    assert newest.state.step == 1
    assert "left in place" in told[0]
    subprocess.run(["mount", "-o", "remount,rw", str(small_disk)], check=True)
    assert save(writer, make(3)).error is None
    newest = newest_checkpoint(folder)
    assert newest is not None
    assert newest.state.step == 3


def test_a_disk_error_is_a_result_and_not_an_exception(tmp_path: Path):
    (tmp_path / "run").write_text("a file where the run's folder should be")
    writer = CheckpointWriter(tmp_path / "run" / "checkpoints")
    result = save(writer, make(1))
    assert result.path is None
    assert result.error is not None
    assert "Not a directory" in result.error

    def no_memory(into: Snapshot | None) -> Snapshot:
        raise RuntimeError("out of memory")

    assert writer.save(no_memory)
    (result,) = writer.poll()
    assert result.error is not None
    assert "out of memory" in result.error
    assert not writer.is_busy


def test_during_a_save_no_other_copy_is_made(tmp_path: Path):
    folder, fence = tmp_path / "checkpoints", _SlowFence()
    writer = CheckpointWriter(folder, fence=fence)  # type: ignore[arg-type]
    calls: list[Snapshot | None] = []

    def snapshot(into: Snapshot | None) -> Snapshot:
        calls.append(into)
        return make(len(calls))

    assert writer.save(snapshot)
    assert writer.is_busy
    assert not writer.save(snapshot)
    assert len(calls) == 1
    assert writer.poll() == []
    assert not writer.close(0.05)
    fence.go.set()
    assert writer.save(snapshot, wait=True)
    assert not writer.is_busy
    results = writer.poll()
    assert [result.step for result in results] == [1, 2]
    assert results[0].blocked_s < results[0].seconds
    assert results[1].blocked_s == results[1].seconds
    assert calls[0] is None
    assert calls[1] is not None, "the memory of the first is used again"
    assert writer.close(5)


class _SlowFence:
    """A fence that blocks until it is released."""

    def __init__(self) -> None:
        self.go = threading.Event()

    def check(self) -> None:
        self.go.wait(30)


def test_a_group_that_was_replaced_writes_and_deletes_nothing(tmp_path: Path):
    folder = tmp_path / "checkpoints"
    old = CheckpointWriter(folder, keep=1, fence=Fence.acquire(tmp_path, "old"))
    new = CheckpointWriter(folder, keep=1, fence=Fence.acquire(tmp_path, "new"))
    save(new, make(5))
    (folder / ".step-00000006.0a1b2c3d.unfinished").mkdir()  # what the new group is writing
    result = save(old, make(7))
    assert result.fenced_off
    assert result.path is None
    assert names(folder) == [".step-00000006.0a1b2c3d.unfinished", "step-00000005"]


def test_the_writer_keeps_the_newest_and_the_best(tmp_path: Path):
    writer = CheckpointWriter(tmp_path, keep=2)
    (tmp_path / ".step-00000000.0a1b2c3d.unfinished").mkdir()
    for step, ap in enumerate([3.0, 9.0, None, 5.0, None, None, None]):
        save(writer, make(step, ap))
    assert names(tmp_path) == ["step-00000001", "step-00000005", "step-00000006"]


def test_saving_leaks_no_threads_or_files(tmp_path: Path):
    writer = CheckpointWriter(tmp_path)
    save(writer, make(0))
    threads, files = threading.active_count(), len(list(Path("/proc/self/fd").iterdir()))
    for step in range(1, 10):
        save(writer, make(step))
    assert threading.active_count() == threads
    assert len(list(Path("/proc/self/fd").iterdir())) == files
