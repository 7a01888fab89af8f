"""The run's own record: one line of JSON an event, appended and never changed.

Training writes here and nowhere else, so that a tracking server that is slow or away can neither
stop it nor lose a number. Whoever shows or uploads the run reads the file from where they stopped.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

FILE_NAME = "journal.jsonl"


class Journal:
    """Appends events. One process writes it: rank 0."""

    def __init__(self, run_folder: Path) -> None:
        path = run_folder / FILE_NAME
        torn = path.exists() and not path.read_bytes().endswith(b"\n")
        self._file = path.open("a", encoding="utf-8")
        if torn and path.stat().st_size > 0:  # a process died within its last line
            self._file.write("\n")

    def write(self, kind: str, **values: Any) -> None:
        """Append an event; it is on its way to the disk when this returns.

        Numbers that are not finite are left out of mappings and noted by name, since JSON has no
        word for them and a NaN in a leaderboard sorts as it pleases.
        """
        row: dict[str, Any] = {"kind": kind, "time_s": time.time()}
        for name, value in values.items():
            if isinstance(value, dict):
                bad = [k for k, v in value.items() if isinstance(v, float) and not math.isfinite(v)]
                if bad:
                    row[f"{name}_not_finite"] = bad
                    value = {k: v for k, v in value.items() if k not in bad}
            row[name] = value
        self._file.write(json.dumps(row, allow_nan=False) + "\n")
        self._file.flush()

    def close(self) -> None:
        os.fsync(self._file.fileno())
        self._file.close()


def read_events(run_folder: Path, offset_bytes: int = 0) -> Iterator[tuple[dict[str, Any], int]]:
    """Events from an offset on, each with the offset behind it. A line half written is left."""
    path = run_folder / FILE_NAME
    if not path.exists():
        return
    with path.open("rb") as file:
        file.seek(offset_bytes)
        for line in file:
            if not line.endswith(b"\n"):
                return
            offset_bytes += len(line)
            try:
                event = json.loads(line)
            except ValueError:  # a process died within the line and another went on behind it
                continue
            yield event, offset_bytes
