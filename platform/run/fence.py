"""The fence of a run: only the newest group of workers may write its checkpoints and journal.

Files in the folder of the run, so that the fence holds on every machine that sees the folder:

    fence.json   the newest group: number and owner
    .fence-N     number N is taken. Created exclusively, which local and network file systems
                 allow to one process alone.
"""

from __future__ import annotations

import json
import os
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deta.platform.system.atomic_write import make_folder, write_json

FENCE_FILE = "fence.json"
TICKETS_KEPT = 16


class FencedOffError(RuntimeError):
    """Another worker group writes this run now."""


@dataclass(frozen=True)
class Fence:
    """The right to write the checkpoints and journal of a run. Only the newest group has it."""

    folder: Path
    number: int
    owner: str

    @classmethod
    def acquire(cls, folder: Path, owner: str) -> Fence:
        """Fence off all earlier groups; return the fence of a new one.

        Args:
            owner: such as host and process; for people who read the file.

        Raises:
            OSError: the folder cannot be written.
        """
        make_folder(folder)
        while True:
            number = _newest_number(folder) + 1
            with suppress(FileExistsError):
                (folder / f".fence-{number}").touch(0o644, exist_ok=False)
                # A process that slept before may get an old number whose ticket was removed.
                if _newest_number(folder) < number + TICKETS_KEPT:
                    break
        fence = cls(folder, number, owner)
        record = {"number": number, "owner": owner, "since_s": time.time()}
        # This may overwrite the record of a newer group; the tickets still show which is newest.
        write_json(folder / FENCE_FILE, record, indent=2, durable=True)
        for ticket in folder.glob(".fence-*"):
            suffix = ticket.name.removeprefix(".fence-")
            if suffix.isdecimal() and int(suffix) <= number - TICKETS_KEPT:
                ticket.unlink(missing_ok=True)
        return fence

    def check(self) -> None:
        """Return if this is still the newest group.

        Raises:
            FencedOffError: it is not; this process must not write to the run any more.
        """
        newest = _newest_number(self.folder)
        if newest == self.number:
            return
        raise FencedOffError(
            f"{self.folder}: worker group {self.number} ({self.owner}) has been replaced by group "
            f"{newest} ({_fence_record(self.folder).get('owner', 'unknown')}), which continues "
            "from the last checkpoint; this one exits"
        )


def _newest_number(folder: Path) -> int:
    """Return the newest number. The record alone may come from a slow, older group."""
    recorded = _fence_record(folder).get("number", 0)
    names = [name.removeprefix(".fence-") for name in os.listdir(folder)]
    tickets = [int(name) for name in names if name.isdecimal()]
    return max([*tickets, recorded if isinstance(recorded, int) else 0])


def _fence_record(folder: Path) -> dict[str, Any]:
    try:
        record = json.loads((folder / FENCE_FILE).read_bytes())
    except (FileNotFoundError, ValueError):
        return {}
    return record if isinstance(record, dict) else {}
