"""The history of decisions on a model: entries that only ever come behind one another.

An entry names the hash of the one before it. Whoever adds one has read the log to its end, has
decided on that ground, and names that end. If somebody else was faster, the entry names an end
that is none any more: it is void, everybody can see so, and its author reads and decides again.
That makes compare-and-set out of a store that can only append. No lock is held, so none is left
behind by who is killed.

The hashes show as well whether an entry was changed or taken out. They do not keep somebody from
writing the whole log anew who may write to the store; `head_line` noted elsewhere does.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any

CHAMPION = "champion"


ACCEPT, REFUSE, FORCE, ROLLBACK = "accept", "refuse", "force", "rollback"
ACTIONS = (ACCEPT, REFUSE, FORCE, ROLLBACK)
FORMAT = 1
MAX_TEXT_CHARACTERS = 5000  # of MLflow's descriptions


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One decision."""

    id: str  # of the act of deciding; of several entries of one id at most one counts
    previous: str  # hash of the entry before it; empty for the first
    action: str
    version: int  # that was decided on
    sha256: str  # of its weights
    champion_before: int | None
    champion_after: int | None
    by: str  # user and host
    time: str  # UTC, ISO 8601
    reason: str
    text: str  # all of it, for people
    policy: dict[str, Any] = field(default_factory=dict)
    criteria: list[dict[str, Any]] = field(default_factory=list)
    figures: dict[str, Any] = field(default_factory=dict)
    format: int = FORMAT

    @property
    def hash(self) -> str:
        text = json.dumps(asdict(self), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()

    def to_line(self) -> str:
        """One line of JSON, with its own hash."""
        return json.dumps(asdict(self) | {"hash": self.hash}, sort_keys=True)


@dataclass(frozen=True)
class Row:
    """As an entry stands in the store."""

    number: int  # ascending in the order in which they came; voids that were removed leave gaps
    line: str
    text: str  # shown beside it


@dataclass(frozen=True)
class Log:
    entries: tuple[tuple[int, Entry], ...]  # those that count, with their numbers
    void: tuple[int, ...]  # that came too late
    problems: tuple[str, ...]  # signs of tampering

    @property
    def head(self) -> str:
        """What the next entry has to name as `previous`."""
        return self.entries[-1][1].hash if self.entries else ""

    @property
    def champion(self) -> int | None:
        return self.entries[-1][1].champion_after if self.entries else None

    @property
    def champion_sha256(self) -> str:
        """Of the weights of the version that became champion; empty where the log has it not."""
        made = [one for _, one in self.entries if one.action != REFUSE]
        return next((one.sha256 for one in reversed(made) if one.version == self.champion), "")

    @property
    def head_line(self) -> str:
        """Number and hash of the last entry, and the champion; empty for an empty log."""
        if not self.entries:
            return ""
        number, entry = self.entries[-1]
        return f"{number} {entry.hash} {entry.champion_after}"

    def has(self, id_: str) -> Entry | None:
        return next((entry for _, entry in self.entries if entry.id == id_), None)

    def champions(self) -> list[int]:
        """Who a rollback goes back to, and who is champion, last."""
        stack: list[int] = []
        for _, entry in self.entries:
            if entry.action in (ACCEPT, FORCE) and entry.champion_after is not None:
                if not stack and entry.champion_before is not None:
                    stack.append(entry.champion_before)  # from before there was a log
                stack.append(entry.champion_after)
            elif entry.action == ROLLBACK and entry.champion_after is not None:
                while stack and stack[-1] != entry.champion_after:
                    stack.pop()
                stack = stack or [entry.champion_after]
        return stack

    def require_intact(self) -> None:
        """
        Raises:
            ValueError: somebody tampered with the log.
        """
        if self.problems:
            raise ValueError(
                "the history of decisions has been tampered with, so nothing is decided on it:\n  "
                + "\n  ".join(self.problems)
                + "\nSee `jobs/promote.py history`; put the entries back from a backup"
            )


def read_log(rows: Sequence[Row], head_line: str = "") -> Log:
    """Tell which entries count, and what does not fit.

    Args:
        rows: all there are, in the order of their numbers.
        head_line: of the log as it was at some time before.
    """
    counted: list[tuple[int, Entry]] = []
    hashes: list[str] = []  # as the entries state them; of those that count
    void: list[int] = []
    problems: list[str] = []
    for row in rows:
        try:
            entry, stated = _parse(row.line)
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            problems.append(f"entry {row.number} is no entry ({error})")
            continue
        expected = hashes[-1] if hashes else ""
        if entry.previous != expected:
            if entry.previous in hashes or entry.previous == "":
                void.append(row.number)
                continue
            place = f"after entry {counted[-1][0]} and " if counted else ""
            problems.append(f"an entry {place}before entry {row.number} is missing")
        if entry.hash != stated:
            problems.append(f"entry {row.number} has been changed")
        elif row.text != entry.text:
            problems.append(f"the text shown for entry {row.number} has been changed")
        counted.append((row.number, entry))
        hashes.append(stated)
    if head_line:
        number, stated, _ = head_line.split()
        if stated not in hashes:
            problems.append(f"entry {number}, the last one at some time, is missing")
    return Log(tuple(counted), tuple(void), tuple(problems))


def _parse(line: str) -> tuple[Entry, str]:
    content = json.loads(line)
    stated = str(content.pop("hash"))
    if content.get("format") != FORMAT:
        raise ValueError(f"of format {content.get('format')}, this version reads {FORMAT}")
    if unknown := content.keys() - {part.name for part in fields(Entry)}:
        raise ValueError(f"holds {sorted(unknown)}")
    return Entry(**content), stated
