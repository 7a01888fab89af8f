"""Format the cells that the tables of a study or a sweep share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from deta.platform.pages.content import Column, Table
from deta.platform.pages.number_format import Interval, amount, common_decimals, p_value, signed
from deta.platform.study.study_types import Analysis

NOTHING = "–"


def value_text(value: Any) -> str:
    """Return a value of a configuration as a person writes it."""
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, (list, tuple)):
        return ", ".join(map(value_text, value)) or "nothing"
    return str(value)


def estimate_cells(estimate: float | None, interval: Interval | None, digits: int) -> list[str]:
    """Return the cells below `estimate_columns`."""
    if estimate is None:
        return [NOTHING, NOTHING]
    if interval is None:
        return [signed(estimate, digits), NOTHING]
    return [
        signed(estimate, digits),
        f"{signed(interval.low, digits)} to {signed(interval.high, digits)}",
    ]


def estimate_columns(analysis: Analysis) -> list[Column]:
    """Return the columns of an estimate and its interval."""
    return [
        Column(title="estimate", unit=analysis.metric, is_number=True),
        Column(title="interval", unit=f"{100 * analysis.confidence:g} %", is_number=True),
    ]


def common_digits(intervals: Sequence[Interval | None]) -> int:
    """Return the decimals of a column of estimates."""
    return common_decimals([interval.half_width for interval in intervals if interval])


def p_text(value: float | None) -> str:
    """Return a p value for a column with the title p."""
    return NOTHING if value is None else p_value(value).removeprefix("p ").removeprefix("= ")


def amount_text(value: float | None) -> str:
    """Return a number with three digits, or a dash."""
    return NOTHING if value is None else amount(value)


def count_text(value: int | None) -> str:
    """Return a number of seeds or trials; None is beyond the search."""
    return "over 10,000" if value is None else f"{value:,}"


def without_empty_columns(table: Table, also: str = "") -> Table:
    """Return the table without its empty columns.

    Args:
        also: a text that counts as empty too.
    """
    kept = [
        i
        for i in range(len(table.columns))
        if i == 0 or any(row[i] not in ("", also) for row in table.rows)
    ]
    return Table(
        caption=table.caption,
        columns=[table.columns[i] for i in kept],
        rows=[[row[i] for i in kept] for row in table.rows],
    )
