"""What a scenario is, and what it says when it is over."""

from __future__ import annotations

import json
import os
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tests.chaos.runs import Place, ScenarioError, say

BETWEEN_KILLS_S = 120.0  # where goodput is measured


@dataclass(frozen=True)
class Options:
    """How thorough to be."""

    repeats: int | None = None  # of a fault; none: a few, which differ by scenario
    # Limits in seconds are for a quiet machine; they are multiplied by this.
    slack: float = 1.0
    soak_s: float = 90.0

    def times(self, few: int) -> int:
        return self.repeats or few


@dataclass(frozen=True)
class Outcome:
    """A figure and whether it reaches the goal.

    Raised errors (`ScenarioError`) are for what must hold whatever the figure.
    """

    figure: float | int | str
    unit: str
    passed: bool = True
    note: str = ""


@dataclass(frozen=True)
class Scenario:
    """One cell of the scorecard."""

    id: str
    fault: str
    goal: str
    ours: Callable[[Place, Options], Outcome]
    # Plain Ray Train, torch.save and MLflow under the same fault; measured by `stock` where there
    # is such a function, otherwise the figure of the reliability study that the scorecard is from.
    stock_known: str = ""
    stock: Callable[[Place, Options], Outcome] | None = None
    quick: bool = False  # among those of ten minutes
    core: bool = True  # of the scorecard

    def play(self, place: Place, options: Options, *, with_stock: bool) -> dict[str, Any]:
        """Run it; the line to print."""
        say(f"{self.id}: {self.fault}")
        row: dict[str, Any] = {"id": self.id}
        row |= _attempt(self.ours, place, options)
        row["goal"] = self.goal
        if with_stock and self.stock is not None:
            say(f"{self.id}: plain Ray and MLflow")
            measured = _attempt(self.stock, place, options)
            row["stock"] = f"{measured['figure']} {measured['unit']}".strip()
            if "reason" in measured:
                row["stock"] = f"not measured: {measured['reason']}"
        elif self.stock_known:
            row["stock"] = f"{self.stock_known} (earlier study)"
        say(json.dumps(row, ensure_ascii=False))
        return row


def _attempt(
    function: Callable[[Place, Options], Outcome], place: Place, options: Options
) -> dict[str, Any]:
    began_s = time.monotonic()
    try:
        outcome = function(place, options)
    except ScenarioError as error:
        row = {"passed": False, "figure": "failed", "unit": "", "reason": str(error)[-1500:]}
    except Exception as error:  # of one scenario; the others are still worth running
        trace = "".join(traceback.format_exception(error))
        row = {"passed": False, "figure": "broken", "unit": "", "reason": trace[-2500:]}
    else:
        row = {"passed": outcome.passed, "figure": outcome.figure, "unit": outcome.unit}
        if outcome.note:
            row["note"] = outcome.note
    # How busy the machine was, by all its users: seconds mean little where this is far above 1.
    load = max(os.getloadavg()[:2]) / (os.cpu_count() or 1)
    return row | {"took_s": round(time.monotonic() - began_s, 1), "load": round(load, 1)}
