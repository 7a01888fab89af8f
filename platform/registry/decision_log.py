"""An append-only log of promotion decisions on a model.

Each entry contains the hash of the entry before it. A process reads the log to its end, decides,
and appends an entry with the hash of that end. If another process was faster, the hash is no longer
that of the end: the entry is void, which every reader can see, and its author reads and decides
again. So a store that can only append provides compare-and-set. No lock is held, so a killed
process leaves none behind.

The hashes also reveal a changed or removed entry. They do not prevent a person with write access
from rewriting the whole log; a copy of `head_line` in another place reveals that.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

# Names in MLflow
CHAMPION = "champion"
HISTORY_SUFFIX = "-history"
ENTRY_TAG, HEAD_TAG = "deta.entry", "deta.history_head"

ACCEPT, REFUSE, FORCE, ROLLBACK = "accept", "refuse", "force", "rollback"
FORMAT = 1
MAX_TEXT_CHARACTERS = 5000  # of MLflow's descriptions


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One decision."""

    id: str  # of the decision; of several entries with one id, at most one counts
    previous: str  # hash of the entry before it; empty for the first
    action: str
    version: int  # that the decision is about
    sha256: str  # of its weights
    champion_before: int | None
    champion_after: int | None
    by: str  # user and host
    time: str  # UTC, ISO 8601
    reason: str
    text: str  # the decision in Markdown, for people
    policy: dict[str, Any] = field(default_factory=dict)
    criteria: list[dict[str, Any]] = field(default_factory=list)
    figures: dict[str, Any] = field(default_factory=dict)
    format: int = FORMAT

    @property
    def hash(self) -> str:
        text = json.dumps(asdict(self), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()

    def to_line(self) -> str:
        """Return the entry and its hash as one line of JSON."""
        return json.dumps(asdict(self) | {"hash": self.hash}, sort_keys=True)


@dataclass(frozen=True)
class DecisionRow:
    """An entry as it is stored."""

    number: int  # ascending in order of arrival; removed void entries leave gaps
    line: str
    text: str  # shown beside it


@dataclass(frozen=True)
class DecisionLog:
    """The valid entries of a log, and what is wrong with the others."""

    entries: tuple[tuple[int, Entry], ...]  # those that count, with their numbers
    void: tuple[int, ...]  # numbers of entries that came too late
    problems: tuple[str, ...]  # signs of tampering

    @property
    def head(self) -> str:
        """Return the hash that the next entry needs as `previous`."""
        return self.entries[-1][1].hash if self.entries else ""

    @property
    def champion(self) -> int | None:
        return self.entries[-1][1].champion_after if self.entries else None

    @property
    def champion_sha256(self) -> str:
        """Return the SHA-256 of the champion's weights; empty if the log does not contain it."""
        made = [one for _, one in self.entries if one.action != REFUSE]
        return next((one.sha256 for one in reversed(made) if one.version == self.champion), "")

    @property
    def head_line(self) -> str:
        """Return number and hash of the last entry, and the champion; empty for an empty log."""
        return "".join(f"{n} {one.hash} {one.champion_after}" for n, one in self.entries[-1:])

    def find(self, id_: str) -> Entry | None:
        return next((entry for _, entry in self.entries if entry.id == id_), None)

    def champions(self) -> list[int]:
        """Return the versions that rollbacks go back to, then the champion."""
        stack: list[int] = []
        for _, entry in self.entries:
            if entry.action == REFUSE or entry.champion_after is None:
                continue
            if not stack and entry.champion_before is not None:
                stack.append(entry.champion_before)  # champion before the log began
            if entry.action == ROLLBACK:
                while stack and stack[-1] != entry.champion_after:
                    stack.pop()
            if stack[-1:] != [entry.champion_after]:
                stack.append(entry.champion_after)
        return stack

    def require_intact(self) -> None:
        """
        Raises:
            ValueError: the log was tampered with.
        """
        if self.problems:
            raise ValueError(
                "the log of decisions was tampered with, so no decision is based on it:\n  "
                + "\n  ".join(self.problems)
                + "\nSee `jobs/promote.py history`; restore the entries from a backup"
            )


def read_log(rows: Sequence[DecisionRow], head_line: str = "") -> DecisionLog:
    """Return which entries count, which came too late, and signs of tampering.

    Args:
        rows: all rows, in the order of their numbers.
        head_line: the `head_line` of the log at an earlier time.
    """
    counted: list[tuple[int, Entry]] = []
    hashes = [""]  # of the entries that count, as they state them
    void: list[int] = []
    problems: list[str] = []
    for row in rows:
        try:
            content = json.loads(row.line)
            stated = str(content.pop("hash"))
            entry = Entry(**content)
            if entry.format != FORMAT:
                raise ValueError(f"it has format {entry.format}; this version reads {FORMAT}")
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            problems.append(f"entry {row.number} cannot be read ({error})")
            continue
        if entry.previous in hashes[:-1]:
            void.append(row.number)
            continue
        if entry.previous != hashes[-1]:
            place = f"after entry {counted[-1][0]} and " if counted else ""
            problems.append(f"an entry {place}before entry {row.number} is missing")
        if entry.hash != stated:
            problems.append(f"entry {row.number} was changed")
        elif row.text != entry.text:
            problems.append(f"the text shown for entry {row.number} was changed")
        counted.append((row.number, entry))
        hashes.append(stated)
    if head_line:
        number, stated, _ = head_line.split()
        if stated not in hashes:
            problems.append(f"entry {number}, which was the last one once, is missing")
    return DecisionLog(tuple(counted), tuple(void), tuple(problems))
