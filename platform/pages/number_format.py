"""Numbers in sentences: rounded to their noise, with a true minus sign."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

MINUS = "\u2212"
MAX_DECIMALS = 3


def signed(value: float, decimals: int) -> str:
    """Such as "−0.1", "0.3"; what rounds to nothing has no sign."""
    text = f"{abs(value):.{decimals}f}"
    return f"{MINUS}{text}" if value < 0 and float(text) != 0 else text


def decimals_for(uncertainty: float | None) -> int:
    """Decimals that leave an uncertainty its first digit, or two where that is a 1."""
    if uncertainty is None or not math.isfinite(uncertainty) or uncertainty <= 0:
        return 2
    exponent = math.floor(math.log10(uncertainty))
    leading = uncertainty / 10**exponent
    return min(MAX_DECIMALS, max(0, -exponent + (1 if leading < 1.95 else 0)))


def plus_minus(value: float, half_width: float) -> str:
    """Such as "−0.1 ± 0.3"."""
    decimals = decimals_for(half_width)
    return f"{signed(value, decimals)} ± {half_width:.{decimals}f}"


def short(value: float) -> str:
    """A number that someone chose, as they would write it: "0.3", "−2"."""
    return f"{MINUS if value < 0 else ''}{abs(value):g}"


def percent(share: float) -> str:
    return f"{signed(100 * share, 0)} %"


def p_value(p: float) -> str:
    if p < 0.001:
        return "p < 0.001"
    return f"p = {p:.3f}" if p < 0.01 else f"p = {p:.2f}"


def num_of(count: int, noun: str) -> str:
    """Such as "1 seed", "3 seeds"."""
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def hours_text(hours: float) -> str:
    """Such as "40 s", "12 min", "3 h 05 min", "2 d 4 h"."""
    seconds = round(hours * 3600)
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
    """Decimals for numbers that stand below one another: those that the surest of them needs."""
    return max(1, min(2, decimals_for(min(half_widths, default=None))))


@dataclass(frozen=True)
class Interval:
    low: float
    high: float

    @property
    def half_width(self) -> float:
        return (self.high - self.low) / 2

    def __contains__(self, value: float) -> bool:
        return self.low <= value <= self.high


def interval_text(estimate: float, interval: Interval | None, decimals: int) -> str:
    """Such as "−0.10  [−0.40, 0.20]"."""
    if interval is None:
        return signed(estimate, decimals)
    low, high = signed(interval.low, decimals), signed(interval.high, decimals)
    return f"{signed(estimate, decimals)}  [{low}, {high}]"
