"""A scenario, its options and its outcome."""

from __future__ import annotations

import json
import os
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tests.chaos.runs import Place, ScenarioError, log_progress

BETWEEN_KILLS_S = 120.0  # in the goodput scenario


@dataclass(frozen=True)
class Options:
    """How often a scenario injects its fault, and its limits."""

    repeats: int | None = None  # faults per scenario; None: the scenario's own small number
    slack: float = 1.0  # multiplies limits in seconds, which are for a quiet machine
    soak_s: float = 90.0

    def times(self, few: int) -> int:
        return self.repeats or few


@dataclass(frozen=True)
class Outcome:
    """A measurement and whether it reaches the goal.

    A scenario raises `ScenarioError` for what must hold whatever the measurement is.
    """

    value: float | int | str
    unit: str
    passed: bool = True
    note: str = ""


@dataclass(frozen=True)
class Scenario:
    """One row of the scorecard."""

    id: str
    fault: str
    goal: str
    ours: Callable[[Place, Options], Outcome]
    # Result of plain Ray Train, torch.save and MLflow under the same fault in the earlier study;
    # `stock`, where it exists, measures it again.
    stock_known: str = ""
    stock: Callable[[Place, Options], Outcome] | None = None
    quick: bool = False  # part of the quick subset
    core: bool = True  # part of the scorecard

    def play(self, place: Place, options: Options, *, with_stock: bool) -> dict[str, Any]:
        """Run the scenario and return its row for the output."""
        log_progress(f"{self.id}: {self.fault}")
        row: dict[str, Any] = {"id": self.id}
        row |= _attempt(self.ours, place, options)
        row["goal"] = self.goal
        if with_stock and self.stock is not None:
            log_progress(f"{self.id}: plain Ray and MLflow")
            measured = _attempt(self.stock, place, options)
            row["stock"] = f"{measured['figure']} {measured['unit']}".strip()
            if "reason" in measured:
                row["stock"] = f"not measured: {measured['reason']}"
        elif self.stock_known:
            row["stock"] = f"{self.stock_known} (earlier study)"
        log_progress(json.dumps(row, ensure_ascii=False))
        return row


def _attempt(
    function: Callable[[Place, Options], Outcome], place: Place, options: Options
) -> dict[str, Any]:
    began_s = time.monotonic()
    try:
        outcome = function(place, options)
    except ScenarioError as error:
        row = {"passed": False, "figure": "failed", "unit": "", "reason": str(error)[-1500:]}
    except Exception as error:  # one broken scenario must not stop the others
        trace = "".join(traceback.format_exception(error))
        row = {"passed": False, "figure": "broken", "unit": "", "reason": trace[-2500:]}
    else:
        row = {"passed": outcome.passed, "figure": outcome.value, "unit": outcome.unit}
        if outcome.note:
            row["note"] = outcome.note
    # Load per core from all processes: measured seconds mean little where this is far above 1.
    load = max(os.getloadavg()[:2]) / (os.cpu_count() or 1)
    return row | {"took_s": round(time.monotonic() - began_s, 1), "load": round(load, 1)}
