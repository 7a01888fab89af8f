"""The journal of a run: an append-only file with one event of JSON per line.

Training writes events only here, so a slow or unreachable tracking server can neither stop it nor
lose a metric. Readers, such as the console and the uploader, continue from their last offset. A
full or missing disk does not stop training either: events are buffered in memory and written once
the disk accepts them again.
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
from deta.platform.system.atomic_write import force_to_disk

logger = logging.getLogger(__name__)

JOURNAL_FILE = "journal.jsonl"
MAX_BUFFERED = 200_000  # events that the disk did not accept, 50 MB: days of training
# These are followed by an fsync: the machine may disappear right after them.
FORCED_TO_DISK = ("checkpoint", "end", "ended")


class Journal:
    """Appends events. Writers are rank 0, the supervisor and jobs/sync.py."""

    def __init__(self, run_folder: Path, fence: Fence | None = None) -> None:
        """
        Args:
            fence: checked before each event. Its error reaches the caller and nothing is written,
                so that a replaced worker group cannot write after its successor.
        """
        if not run_folder.is_dir():
            raise FileNotFoundError(f"{run_folder}: there is no such run")
        self._path, self._fence = run_folder / JOURNAL_FILE, fence
        self._descriptor: int | None = None
        # kind and line of events that wait for the disk, oldest first
        self._buffer: deque[tuple[str, bytes]] = deque(maxlen=MAX_BUFFERED)
        self._num_lost = 0
        self._is_failing = self._is_named = False

    def write(self, kind: str, **values: Any) -> None:
        """Append an event. It is written when this returns, or buffered for the next call.

        JSON has no NaN, and a NaN in a leaderboard has no order. So numbers that are not finite
        are removed from mappings, and their names are recorded; elsewhere they become null.

        Raises:
            FencedOffError: another worker group writes this run now. Disk errors never raise.
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
        self._num_lost += len(self._buffer) == self._buffer.maxlen
        self._buffer.append((kind, _line(row)))
        self._flush()

    def close(self) -> None:
        """Write the buffer, if the disk accepts it, and force everything to the disk."""
        if self._buffer and self._fence is not None:
            self._fence.check()
        self._flush()
        if self._buffer:
            lost = len(self._buffer)
            logger.error("%s: %d events could not be written and are lost", self._path, lost)
        self._force_to_disk()
        self._release()

    def _flush(self) -> None:
        force = False
        try:
            if self._num_lost:
                text = f"the disk accepted nothing for too long: {self._num_lost} events are lost"
                lost = {"kind": "journal_lost", "time_s": time.time(), "message": text}
                self._append(_line(lost))
                self._num_lost = 0
            while self._buffer:
                kind, line = self._buffer[0]
                self._append(line)
                self._buffer.popleft()
                force |= kind in FORCED_TO_DISK
        except OSError as error:
            if not self._is_failing:
                logger.warning(
                    f"{self._path} cannot be written ({error}); the run continues and keeps the "
                    f"last {MAX_BUFFERED} events in memory. Make room on the disk."
                )
            self._is_failing = True
            self._release()  # a disk that comes back may need the file reopened
            return
        if self._is_failing:
            logger.warning("%s is written again, with all buffered events", self._path)
            self._is_failing = False
        if force:
            self._force_to_disk()

    def _append(self, line: bytes) -> None:
        """Write a line in one call, so that lines of two processes never mix.

        Raises:
            OSError: the line is not in the file, or only a part, which readers skip.
        """
        if self._descriptor is None:
            flags = os.O_RDWR | os.O_APPEND | os.O_CREAT
            self._descriptor = os.open(self._path, flags, 0o644)
        size = os.fstat(self._descriptor).st_size
        if size and os.pread(self._descriptor, 1, size - 1) != b"\n":
            line = b"\n" + line  # a process died, or the disk was full, within a line
        written = os.write(self._descriptor, line)
        if written < len(line) - 1:  # if only its newline is missing, the next line adds it
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
                if not self._is_named:  # this process may have created it
                    force_to_disk(self._path.parent)
                    self._is_named = True
            except OSError as error:
                logger.warning("%s could not be forced to the disk: %s", self._path, error)


def read_events(run_folder: Path, offset_bytes: int = 0) -> Iterator[tuple[dict[str, Any], int]]:
    """Yield events from an offset on, each with the offset of its end.

    An incomplete last line is left for the next call. A line that is not an event, because a
    process or the machine died while writing it, is skipped. Every event has `kind` and `time_s`.
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
            try:
                # A power failure may leave zeros before an intact line.
                event = json.loads(line.lstrip(b"\0"))
                is_event = isinstance(event["kind"], str) and math.isfinite(event["time_s"])
            except (ValueError, TypeError, KeyError, RecursionError):
                continue
            if is_event:
                yield event, offset_bytes


def _line(row: dict[str, Any]) -> bytes:
    try:
        text = json.dumps(row, allow_nan=False)
    except ValueError:  # a nested number is not finite
        text = json.dumps(_without_not_finite(row), allow_nan=False)
    return text.encode() + b"\n"


def _without_not_finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_not_finite(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_without_not_finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
