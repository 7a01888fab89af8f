"""All readers of the append-only log agree on its valid entries and detect tampering."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from deta.platform.registry.decision_log import (
    ACCEPT,
    REFUSE,
    ROLLBACK,
    DecisionRow,
    Entry,
    read_log,
)


def entry(previous: str, action: str, version: int, before: int | None, after: int | None) -> Entry:
    return Entry(
        id=f"{action}-{version}-{previous[:6]}", previous=previous, action=action, version=version,
        sha256="ab" * 32, champion_before=before, champion_after=after, by="ann@desk",
        time="2026-01-01T00:00:00+00:00", reason="", text=f"version {version}: {action}",
    )  # fmt: skip


def rows_of(*entries: Entry) -> list[DecisionRow]:
    return [DecisionRow(number, one.to_line(), one.text) for number, one in enumerate(entries, 1)]


def three() -> list[Entry]:
    first = entry("", ACCEPT, 1, None, 1)
    second = entry(first.hash, REFUSE, 2, 1, 1)
    return [first, second, entry(second.hash, ACCEPT, 3, 1, 3)]


def test_the_last_entry_determines_the_champion():
    log = read_log(rows_of(*three()))

    assert log.champion == 3
    assert log.problems == ()
    assert log.head == three()[-1].hash
    assert log.champion_sha256 == "ab" * 32
    assert log.champions() == [1, 3]
    assert read_log([]).champion is None


def test_an_entry_that_came_too_late_does_not_count():
    first, second, third = three()
    late = entry(first.hash, ACCEPT, 9, 1, 9)  # decided before the second was there

    log = read_log(rows_of(first, second, late, third))

    assert log.champion == 3
    assert log.void == (3,)
    assert log.problems == ()
    assert log.find(late.id) is None
    # Its author took it out: the numbers have a gap, and nothing is missing.
    kept = [row for row in rows_of(first, second, late, third) if row.number != 3]
    assert read_log(kept).problems == ()


def test_a_rollback_returns_to_the_champion_before():
    first, second, third = three()
    back = entry(third.hash, ROLLBACK, 1, 3, 1)
    again = entry(back.hash, ACCEPT, 4, 1, 4)

    assert read_log(rows_of(first, second, third, back)).champions() == [1]
    assert read_log(rows_of(first, second, third, back, again)).champions() == [1, 4]


@pytest.mark.parametrize("place", [0, 1, 2])
def test_a_changed_entry_is_detected(place: int):
    rows = rows_of(*three())
    content = json.loads(rows[place].line) | {"by": "eve@desk"}
    rows[place] = replace(rows[place], line=json.dumps(content))

    log = read_log(rows)

    assert log.problems == (f"entry {place + 1} was changed",)
    with pytest.raises(ValueError, match="tampered"):
        log.require_intact()


def test_a_changed_text_is_detected():
    rows = rows_of(*three())
    rows[1] = replace(rows[1], text="version 2: accept")

    assert read_log(rows).problems == ("the text shown for entry 2 was changed",)


def test_a_removed_entry_is_detected():
    rows, head = rows_of(*three()), read_log(rows_of(*three())).head_line

    assert read_log(rows[1:], head).problems == ("an entry before entry 2 is missing",)
    assert read_log([rows[0], rows[2]], head).problems == (
        "an entry after entry 1 and before entry 3 is missing",
    )
    assert read_log(rows[:2], head).problems == (
        "entry 3, which was the last one once, is missing",
    )
    assert "missing" in read_log([], head).problems[0]


def test_an_unreadable_entry_is_detected():
    rows = rows_of(*three())
    rows[2] = replace(rows[2], line="")

    assert "entry 3 cannot be read" in read_log(rows).problems[0]
