"""Rows and boards for the tests of the leaderboard."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from deta.platform.leaderboard.board import Board
from deta.platform.leaderboard.rows import LeaderboardRow, Promotion, RegisteredModels

HOSTILE = (
    "<script>document.title='owned'</script>",
    '"><img src=x onerror="document.title=1">',
    "</script><svg onload=alert(1)>\u2028%{y} <b>",
)


def some_row(number: int, **changes: Any) -> LeaderboardRow:
    row = LeaderboardRow(
        id=f"{number:032x}",
        experiment_id="1",
        name=f"run-{number}",
        recipe=f"deta_r50.v{number % 3}",
        data=f"val{number % 2} 0123abcd",
        status="FINISHED",
        ap=float(number % 60),
        gpu_hours=1.0 + number % 7,
        started_s=1_700_000_000.0 + number,
    )
    return replace(row, **changes)


class FixedSource:
    """A source of fixed rows, in pages of ten."""

    def __init__(self, rows: list[LeaderboardRow], models: RegisteredModels | None = None) -> None:
        self.rows, self.found = rows, models or RegisteredModels()

    def pages(self, since_s: float | None = None) -> Iterator[list[LeaderboardRow]]:
        for begin in range(0, len(self.rows), 10):
            yield [
                row
                for row in self.rows[begin : begin + 10]
                if since_s is None or row.status == "RUNNING" or row.ended_s >= since_s
            ]

    def models(self) -> RegisteredModels:
        return self.found


def filled_board(*rows: LeaderboardRow) -> Board:
    board = Board("x")
    board.refresh(FixedSource(list(rows)))
    return board


def hostile_board() -> Board:
    board = Board("x")
    rows = [
        some_row(n, name=text, recipe=text, data=text, models=text, report=text, commit=text)
        for n, text in enumerate(HOSTILE, 1)
    ]
    promotion = Promotion(
        model=HOSTILE[0], version=1, time=HOSTILE[1], action=HOSTILE[2], by=HOSTILE[0],
        reason=HOSTILE[1], run_id=rows[0].id,
    )  # fmt: skip
    versions = {row.id: HOSTILE[0] for row in rows}
    board.refresh(FixedSource(rows, RegisteredModels(versions, frozenset(), (promotion,))))
    return board


def column(content: dict[str, Any], name: str) -> list[Any]:
    return [row[content["columns"].index(name)] for row in content["rows"]]
