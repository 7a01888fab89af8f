"""Write numbers for sentences and tables: rounded to their noise, with a true minus sign."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

MINUS, MISSING = "\u2212", "–"
MAX_DECIMALS = 3


def signed(value: float, decimals: int) -> str:
    """Return such as "−0.1", "0.3"; what rounds to zero has no sign."""
    text = f"{abs(value):,.{decimals}f}"
    return f"{MINUS}{text}" if value < 0 and text.strip("0.") else text


def number_text(value: float | None, decimals: int = 0) -> str:
    """Return a number of a table: "−0.1", "12,800"; a dash where it is None or NaN."""
    return MISSING if value is None or math.isnan(value) else signed(value, decimals)


def decimals_for(uncertainty: float | None) -> int:
    """Return the decimals that leave an uncertainty its first digit, or two if that is a 1."""
    if uncertainty is None or not math.isfinite(uncertainty) or uncertainty <= 0:
        return 2
    exponent = math.floor(math.log10(uncertainty))
    leading = uncertainty / 10**exponent
    return min(MAX_DECIMALS, max(0, -exponent + (1 if leading < 1.95 else 0)))


def plus_minus(value: float, half_width: float) -> str:
    """Return such as "−0.1 ± 0.3"."""
    decimals = decimals_for(half_width)
    return f"{signed(value, decimals)} ± {half_width:.{decimals}f}"


def short(value: float) -> str:
    """Return a number that a person chose, as they would write it: "0.3", "−2"."""
    return f"{MINUS if value < 0 else ''}{abs(value):g}"


def amount(value: float) -> str:
    """Return three digits, and all of those before the point: "0.0412", "3.14", "2,130"."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def percent(share: float, decimals: int = 0) -> str:
    """Return such as "12 %"."""
    return f"{signed(100 * share, decimals)} %"


def percent_of(part: float, whole: float) -> str:
    """Return such as "12 %"; below 1 % with a decimal; "-" of nothing."""
    if not whole:
        return "-"
    return percent(part / whole, decimals=1 if 0 < part / whole < 0.01 else 0)


def p_value(p: float) -> str:
    """Return such as "p = 0.03", "p < 0.001"."""
    if p < 0.001:
        return "p < 0.001"
    return f"p = {p:.3f}" if p < 0.01 else f"p = {p:.2f}"


def num_of(count: int, noun: str) -> str:
    """Return such as "1 seed", "3 seeds"."""
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def duration(seconds: float) -> str:
    """Return such as "40 s", "12 min", "3 h 05 min", "2 d 4 h"."""
    seconds = round(seconds)
    if seconds < 90:
        return f"{seconds} s"
    minutes = round(seconds / 60)
    if minutes < 90:
        return f"{minutes} min"
    if minutes < 48 * 60:
        return f"{minutes // 60} h {minutes % 60:02d} min"
    whole = round(minutes / 60)
    return f"{whole // 24} d {whole % 24} h"


def common_decimals(half_widths: Sequence[float]) -> int:
    """Return the decimals for numbers in one column: those that the surest of them needs."""
    return max(1, min(2, decimals_for(min(half_widths, default=None))))


@dataclass(frozen=True)
class Interval:
    """A confidence interval."""

    low: float
    high: float

    @property
    def half_width(self) -> float:
        return (self.high - self.low) / 2

    def __contains__(self, value: float) -> bool:
        return self.low <= value <= self.high


def interval_text(estimate: float, interval: Interval | None, decimals: int) -> str:
    """Return such as "−0.10  [−0.40, 0.20]"."""
    if interval is None:
        return signed(estimate, decimals)
    low, high = signed(interval.low, decimals), signed(interval.high, decimals)
    return f"{signed(estimate, decimals)}  [{low}, {high}]"
