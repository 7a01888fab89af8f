"""What a run has saved survives a power failure: every byte, and every name that leads to it.

A file system may keep a name without the bytes, or bytes without the name, unless file and folder
were forced to the disk. These tests record what each fsync saw, and look at what that alone leaves.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from deta.platform.checkpoint.format import read_checkpoint
from deta.platform.checkpoint.local import newest_checkpoint, take_snapshot, write_checkpoint
from deta.platform.data.coco_dataset import Category
from deta.platform.run.config import RunConfig
from deta.platform.run.fence import Fence
from deta.platform.run.journal import Journal, read_events
from deta.platform.run.run_file import read_run_file, write_run_file
from deta.platform.run.run_lock import RunLock
from deta.platform.run.run_state import RunState
from deta.platform.system.atomic_write import write_atomic
from deta.platform.weights.weight_files import read_weights, write_weights


class Disk:
    """What would be left of a folder, which is on the disk itself, after a power failure."""

    def __init__(self, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.root = root
        self.files: dict[int, bytes] = {}  # by inode, as the last fsync saw them
        self.folders: dict[int, dict[str, int]] = {root.stat().st_ino: {}}
        self.early: list[str] = []  # names that were given before the bytes were on the disk
        self.after_each: list[Callable[[], None]] = []
        fsync, rename, replace = os.fsync, os.rename, os.replace

        def record(descriptor: int) -> None:
            fsync(descriptor)
            status = os.fstat(descriptor)
            if stat.S_ISDIR(status.st_mode):
                with os.scandir(descriptor) as entries:
                    self.folders[status.st_ino] = {e.name: e.inode() for e in entries}
            else:
                self.files[status.st_ino] = Path(f"/proc/self/fd/{descriptor}").read_bytes()
            for check in self.after_each:
                check()

        def checked(change: Callable[..., None]) -> Callable[..., None]:
            def change_name(old: str | Path, new: str | Path, **options: int) -> None:
                for path in [Path(old), *Path(old).rglob("*")]:
                    if path.is_file() and self.files.get(path.stat().st_ino) != path.read_bytes():
                        self.early.append(f"{path.name} as {Path(new).name}")
                change(old, new, **options)

            return change_name

        monkeypatch.setattr(os, "fsync", record)
        monkeypatch.setattr(os, "rename", checked(rename))
        monkeypatch.setattr(os, "replace", checked(replace))

    def survivors(self, to: Path) -> Path:
        """Write what survives into an empty folder."""
        self._copy(self.root.stat().st_ino, to)
        return to

    def _copy(self, inode: int, to: Path) -> None:
        to.mkdir()
        for name, child in self.folders.get(inode, {}).items():
            if child in self.files:
                (to / name).write_bytes(self.files[child])
            else:
                self._copy(child, to / name)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    root = tmp_path / "disk"
    root.mkdir()
    return root


@pytest.fixture
def disk(root: Path, monkeypatch: pytest.MonkeyPatch) -> Disk:
    return Disk(root, monkeypatch)


def save(folder: Path, step: int, value: float) -> Path:
    tensors = {"weight": torch.full((1000,), value)}
    state = RunState(step=step, samples_seen=step, epoch=0.0, data_fingerprint="f")
    snapshot = take_snapshot(state, RunConfig(), (Category(1, "disc"),), tensors, tensors)
    return write_checkpoint(folder, snapshot)


def test_a_run_that_was_begun_survives_with_all_it_has_saved(
    disk: Disk, root: Path, tmp_path: Path
):
    run = root / "storage" / "run"
    with RunLock.acquire(run):
        write_run_file(run, {"config": {}})
        fence = Fence.acquire(run, "me")
        journal = Journal(run, fence)
        journal.write("progress", step=4)
        save(run / "checkpoints", 4, 1.0)
        journal.write("checkpoint", step=4)
        write_weights(root / "out" / "model.safetensors", {"weight": torch.ones(3)})
        left = disk.survivors(tmp_path / "left")
    assert not disk.early
    kept = newest_checkpoint(left / "storage/run/checkpoints")
    assert kept is not None
    assert kept.state.step == 4
    assert [event["kind"] for event, _ in read_events(left / "storage/run")] == [
        "progress", "checkpoint"
    ]  # fmt: skip
    assert read_run_file(left / "storage/run") == {"config": {}}
    assert (left / "storage/run/fence.json").is_file()
    assert read_weights(left / "out/model.safetensors")["weight"].tolist() == [1, 1, 1]


def test_the_name_of_a_new_journal_survives_with_its_last_event(
    disk: Disk, root: Path, tmp_path: Path
):
    Journal(root).write("ended", status="FAILED")
    assert [event["kind"] for event, _ in read_events(disk.survivors(tmp_path / "left"))] == [
        "ended"
    ]


def test_at_every_moment_of_a_second_save_a_checkpoint_survives(
    disk: Disk, root: Path, tmp_path: Path
):
    """Also while the checkpoint of a step is written again."""
    folder = root / "checkpoints"
    save(folder, 4, 1.0)
    found: list[tuple[int, float]] = []

    def check() -> None:
        checkpoints = disk.survivors(tmp_path / f"left-{len(found)}") / "checkpoints"
        kept = newest_checkpoint(checkpoints)
        assert kept is not None
        weight = read_checkpoint(kept.path).model_state()["weight"]
        found.append((kept.state.step, float(weight[0])))

    disk.after_each.append(check)
    save(folder, 8, 2.0)
    save(folder, 8, 3.0)
    assert not disk.early
    assert found == sorted(found)
    assert {(4, 1.0), (8, 2.0), (8, 3.0)} == set(found)


def test_the_disk_of_these_tests_loses_what_was_not_forced(disk: Disk, root: Path, tmp_path: Path):
    write_atomic(root / "kept", "text", durable=True)
    (root / "new").mkdir()
    write_atomic(root / "new/name-lost", "text", durable=True)
    (root / "kept").write_text("later")
    write_atomic(root / "not-durable", "text")
    left = disk.survivors(tmp_path / "left")
    assert {p.name: p.read_text() for p in left.iterdir()} == {"kept": "text"}
    assert [name.rpartition(" ")[2] for name in disk.early] == ["not-durable"]
