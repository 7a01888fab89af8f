"""The run's own record: one line of JSON an event, appended and never changed.

Training writes here and nowhere else, so that a tracking server that is slow or away can neither
stop it nor lose a number. Whoever shows or uploads the run reads the file from where they stopped.
A disk that is full or gone does not stop it either: what cannot be written is kept, and written
when the disk takes it again.
"""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import math
import os
import time
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from deta.platform.run.fence import Fence

logger = logging.getLogger(__name__)

JOURNAL_FILE = "journal.jsonl"
MAX_BUFFERED_BYTES = 50_000_000  # of what the disk did not take: days of training
# After these a run may be gone with its machine, so they do not wait for the system's own time.
FORCED_TO_DISK = ("checkpoint", "end", "ended")


class Journal:
    """Appends events: rank 0 its own, the supervisor and jobs/sync.py theirs."""

    def __init__(self, run_folder: Path, fence: Fence | None = None) -> None:
        """
        Args:
            fence: asked before each line; what it raises goes on to the caller, and nothing is
                written, so that a worker that was given up cannot write behind its successor.
        """
        if not run_folder.is_dir():
            raise FileNotFoundError(f"{run_folder}: there is no such run")
        self._path, self._fence = run_folder / JOURNAL_FILE, fence
        self._descriptor: int | None = None
        self._buffer: deque[tuple[str, bytes]] = deque()  # kind and line, oldest first
        self._buffered_bytes = 0
        self._num_lost = 0
        self._is_failing = False

    @property
    def buffered_bytes(self) -> int:
        """What waits for the disk."""
        return self._buffered_bytes

    def write(self, kind: str, **values: Any) -> None:
        """Append an event; it is with the system when this returns, or kept for the next call.

        Numbers that are not finite are left out of mappings and noted by name, since JSON has no
        word for them and a NaN in a leaderboard sorts as it pleases; elsewhere they become null.

        Raises:
            What the fence raises. Never for the sake of the disk.
        """
        if self._fence is not None:
            self._fence.check()
        row: dict[str, Any] = {"kind": kind, "time_s": time.time()}
        for name, value in values.items():
            if isinstance(value, dict):
                bad = [k for k, v in value.items() if isinstance(v, float) and not math.isfinite(v)]
                if bad:
                    row[f"{name}_not_finite"] = bad
                    value = {k: v for k, v in value.items() if k not in bad}
            row[name] = value
        self._keep(kind, _line(row))
        self._flush()

    def close(self) -> None:
        """Write what is kept, if the disk takes it now, and force all to the disk."""
        if self._buffer and self._fence is not None:
            self._fence.check()
        self._flush()
        if self._buffer:
            logger.error(
                "%s: %d events could not be written and are lost", self._path, len(self._buffer)
            )
        if self._descriptor is not None:
            self._force_to_disk()
            self._release()

    def _keep(self, kind: str, line: bytes) -> None:
        self._buffer.append((kind, line))
        self._buffered_bytes += len(line)
        while self._buffered_bytes > MAX_BUFFERED_BYTES and len(self._buffer) > 1:
            _, dropped = self._buffer.popleft()
            self._buffered_bytes -= len(dropped)
            self._num_lost += 1

    def _flush(self) -> None:
        force = False
        try:
            if self._num_lost:
                message = f"the disk took nothing for so long that {self._num_lost} events are lost"
                lost = {"kind": "journal_lost", "time_s": time.time(), "message": message}
                self._append(_line(lost))
                self._num_lost = 0
            while self._buffer:
                kind, line = self._buffer[0]
                self._append(line)
                self._buffer.popleft()
                self._buffered_bytes -= len(line)
                force |= kind in FORCED_TO_DISK
        except OSError as error:
            if not self._is_failing:
                logger.warning(
                    "%s cannot be written (%s); the run goes on and events are kept in memory, up "
                    "to %d MB. Make room on the disk.",
                    self._path,
                    error,
                    MAX_BUFFERED_BYTES // 1_000_000,
                )
            self._is_failing = True
            self._release()  # a disk that comes back may want the file opened anew
            return
        if self._is_failing:
            logger.warning("%s is written again, nothing of it is missing", self._path)
            self._is_failing = False
        if force:
            self._force_to_disk()

    def _append(self, line: bytes) -> None:
        """One write for one line, so that lines of two processes never mix.

        Raises:
            OSError: the line is not in the file, or only a part that readers pass over.
        """
        if self._descriptor is None:
            self._descriptor = os.open(
                self._path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o644
            )
        size = os.fstat(self._descriptor).st_size
        if size and os.pread(self._descriptor, 1, size - 1) != b"\n":
            line = b"\n" + line  # a process died within its line, or the disk was full within it
        written = os.write(self._descriptor, line)
        if written < len(line) - 1:  # without its end alone it is whole; the next line adds that
            raise OSError(errno.ENOSPC, f"only {written} of {len(line)} bytes were written")

    def _release(self) -> None:
        descriptor, self._descriptor = self._descriptor, None
        if descriptor is not None:
            with contextlib.suppress(OSError):
                os.close(descriptor)

    def _force_to_disk(self) -> None:
        if self._descriptor is not None:
            try:
                os.fsync(self._descriptor)
            except OSError as error:
                logger.warning("%s could not be forced to the disk: %s", self._path, error)


def read_events(run_folder: Path, offset_bytes: int = 0) -> Iterator[tuple[dict[str, Any], int]]:
    """Events from an offset on, each with the offset behind it.

    A line half written is left for later; one that is no event, because a process or the machine
    died within it, is passed over. Every event has `kind` and `time_s`.
    """
    try:
        file = (run_folder / JOURNAL_FILE).open("rb")
    except FileNotFoundError:
        return
    with file:
        file.seek(offset_bytes)
        for line in file:
            if not line.endswith(b"\n"):
                return
            offset_bytes += len(line)
            event = _event(line)
            if event is not None:
                yield event, offset_bytes


def _event(line: bytes) -> dict[str, Any] | None:
    try:
        # A machine that lost its power may leave a hole of zeros before a good line.
        event = json.loads(line.lstrip(b"\0"))
    except (ValueError, RecursionError):  # no JSON, or not even UTF-8
        return None
    if not isinstance(event, dict) or not isinstance(event.get("kind"), str):
        return None
    time_s = event.get("time_s")
    if not isinstance(time_s, (int, float)) or not math.isfinite(time_s):
        return None
    return event


def _line(row: dict[str, Any]) -> bytes:
    try:
        text = json.dumps(row, allow_nan=False)
    except ValueError:  # deeper within lists and mappings
        text = json.dumps(_without_not_finite(row), allow_nan=False)
    return text.encode() + b"\n"


def _without_not_finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_not_finite(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_without_not_finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
