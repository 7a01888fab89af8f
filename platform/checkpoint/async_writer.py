"""Asynchronous checkpoint writer: training waits only for a copy of its state in memory.

One save runs at a time, from one copy, so a slow disk costs saves but neither steps nor memory.
Copies to the store run in another thread, so an unreachable store does not delay checkpoints on
disk. A failure is reported, and the next save retries.
"""

from __future__ import annotations

import errno
import logging
import os
import shutil
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from deta.platform.checkpoint.local import (
    Snapshot,
    all_checkpoints,
    clean_leftovers,
    keep_newest_and_best,
    write_checkpoint,
)
from deta.platform.run.fence import Fence, FencedOffError

if TYPE_CHECKING:
    from deta.platform.checkpoint.remote import CheckpointStore

logger = logging.getLogger(__name__)

MAX_RESERVE_BYTES = 10**9  # left free on the disk; on a small disk, a twentieth of it
_NO_ROOM = "Make room there; a twentieth of the disk, or 1 GB, is reserved for the journal. "
_READ_ONLY = "Make the folder writable again. "
ADVICE = {
    errno.ENOSPC: _NO_ROOM, errno.EDQUOT: _NO_ROOM,
    errno.EROFS: _READ_ONLY, errno.EACCES: _READ_ONLY, errno.EPERM: _READ_ONLY,
}  # fmt: skip


@dataclass(frozen=True)
class WriteResult:
    """The result of a save, or of a failed copy to the store."""

    step: int
    path: Path | None  # the checkpoint; None if it could not be written
    seconds: float  # from the call of `save` to its end
    blocked_s: float  # of these, how long training waited
    error: str | None = None
    place: Literal["disk", "store"] = "disk"  # "store": the checkpoint on disk is complete
    fenced_off: bool = False  # another worker group writes this run now


class CheckpointWriter:
    """Writes the checkpoints of one run, in the process of rank 0."""

    def __init__(
        self,
        folder: Path,
        *,
        keep: int = 2,
        store: str | Path | CheckpointStore | None = None,
        fence: Fence | None = None,
    ) -> None:
        """
        Args:
            folder: RUN/checkpoints.
            keep: how many of the newest to keep, besides the best by AP.
            store: where to copy each checkpoint; see platform/checkpoint/remote.py.
        """
        self.folder, self._keep, self._fence = folder, keep, fence
        self._spare: Snapshot | None = None
        self._save: threading.Thread | None = None
        self._results: list[WriteResult] = []
        self._guard = threading.Lock()  # for the results and the members below
        self._store = store
        self._copy: threading.Thread | None = None
        self._to_copy: Path | None = None
        self._being_copied: Path | None = None

    @property
    def is_busy(self) -> bool:
        """Return whether a save is in progress."""
        return self._save is not None and self._save.is_alive()

    def save(self, make: Callable[[Snapshot | None], Snapshot], *, wait: bool = False) -> bool:
        """Start a save. It never raises; `poll` returns its result.

        Args:
            make: makes the snapshot; called here with an earlier one whose memory it can reuse.
            wait: wait for a save in progress, and then for this one; not for the copy to the
                store, see `close`.

        Returns:
            False if another save is in progress; nothing was done then.
        """
        began_s = time.perf_counter()
        if self._save is not None:
            if self._save.is_alive() and not wait:
                return False
            self._save.join()
        try:
            spare, self._spare = self._spare, None
            snapshot = make(spare)
            blocked_s = None if wait else time.perf_counter() - began_s
            self._save = threading.Thread(
                target=self._write, args=(snapshot, began_s, blocked_s), daemon=True,
                name="checkpoint",
            )  # fmt: skip
            self._save.start()
        except Exception as error:  # such as too little memory; training does not need the copy
            logger.exception("the state could not be copied for a checkpoint")
            self._save = None
            message = f"the state could not be copied for a checkpoint: {_text_of(error)}"
            seconds, message = time.perf_counter() - began_s, f"{message}; the next save retries"
            self._add_result(WriteResult(-1, None, seconds, seconds, message))
            return True
        if wait:
            self._save.join()
        return True

    def poll(self) -> list[WriteResult]:
        """Return the results since the last call."""
        with self._guard:
            results, self._results = self._results, []
        return results

    def close(self, timeout_s: float) -> bool:
        """Wait for the save and the copy to the store; return True if both have ended."""
        deadline_s = time.monotonic() + timeout_s
        if self._save is not None:
            self._save.join(max(0.0, deadline_s - time.monotonic()))
        if (copy := self._copy) is not None:  # the last save may have started it
            copy.join(max(0.0, deadline_s - time.monotonic()))
        return not self.is_busy and (copy is None or not copy.is_alive())

    def _write(self, snapshot: Snapshot, began_s: float, blocked_s: float | None) -> None:
        step, path, message, fenced_off = snapshot.state.step, None, None, False
        try:
            if self._fence is not None:
                self._fence.check()
            clean_leftovers(self.folder)
            self._require_room(snapshot)
            path = write_checkpoint(self.folder, snapshot, self._fence)
        except FencedOffError as error:
            message, fenced_off = str(error), True
        except Exception as error:
            if not isinstance(error, OSError):
                logger.exception("step %d: the checkpoint could not be written", step)
            message = self._explain(error, snapshot)
        finally:
            self._spare = snapshot
        if path is not None:
            self._delete_old(path)
        seconds = time.perf_counter() - began_s
        blocked_s = seconds if blocked_s is None else blocked_s
        self._add_result(
            WriteResult(step, path, seconds, blocked_s, message, fenced_off=fenced_off)
        )
        if path is not None and self._store is not None:
            self._copy_to_store(path)

    def _require_room(self, snapshot: Snapshot) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        disk = shutil.disk_usage(self.folder)
        if disk.free - snapshot.num_bytes < min(disk.total // 20, MAX_RESERVE_BYTES):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def _explain(self, error: Exception, snapshot: Snapshot) -> str:
        free, last = "", "There is none yet"
        try:
            free = f"{shutil.disk_usage(self.folder).free / 1e6:.1f} MB are free there. "
            paths = all_checkpoints(self.folder)
            last = f"The newest checkpoint is {paths[-1].name}" if paths else last
        except OSError:  # the disk is unavailable
            pass
        advice = "If this repeats, check that disk. "
        if isinstance(error, OSError):
            advice = ADVICE.get(error.errno or 0, advice)
        return (
            f"step {snapshot.state.step}: the checkpoint could not be written to {self.folder}: "
            f"{_text_of(error)}. It takes {snapshot.num_bytes / 1e6:.1f} MB; {free}{advice}"
            f"Training continues, and the next save retries. {last}"
        )

    def _delete_old(self, path: Path) -> None:
        with self._guard:
            protect = {path, *(p for p in (self._to_copy, self._being_copied) if p is not None)}
        try:
            keep_newest_and_best(self.folder, self._keep, protect)
        except OSError as error:  # the checkpoint is complete; the next save retries
            logger.warning("%s: old checkpoints could not be deleted (%s)", self.folder, error)

    def _copy_to_store(self, path: Path) -> None:
        """Copy now, or after the copy in progress; of several that wait, only the newest."""
        with self._guard:
            self._to_copy = path
            if self._copy is None:
                self._copy = threading.Thread(
                    target=self._copy_all, daemon=True, name="checkpoint-store"
                )
                self._copy.start()

    def _copy_all(self) -> None:
        from deta.platform.checkpoint.remote import copy_run, open_store

        while True:
            with self._guard:
                path = self._being_copied = self._to_copy
                self._to_copy = None
                if path is None:
                    self._copy = None
                    return
            step = int(path.name.removeprefix("step-"))
            began_s = time.perf_counter()
            try:
                assert self._store is not None
                self._store = open_store(self._store)
                copy_run(self._store, self.folder.parent, path, keep=self._keep, fence=self._fence)
            except Exception as error:
                message = (
                    f"step {step}: {error}. The checkpoint on disk is complete; training "
                    "continues, and the next save copies again"
                )
                seconds = time.perf_counter() - began_s
                is_fenced = isinstance(error, FencedOffError)
                self._add_result(WriteResult(step, None, seconds, 0.0, message, "store", is_fenced))

    def _add_result(self, result: WriteResult) -> None:
        with self._guard:
            self._results.append(result)


def _text_of(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return f"{type(error).__name__}: {error}"
