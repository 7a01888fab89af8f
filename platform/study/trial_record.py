"""The record of one trial of a sweep, which the report, the costs and the table read.

A sweep writes one for every trial, also for those that failed, stopped early or have not begun, so
that a reader of the list sees the whole sweep and not its survivors.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from deta.platform.study.study_types import Observation

# stopped: ended before its last step on purpose, by ASHA or by a person. Its AP is that of its
# last evaluation, so it is not comparable with that of a finished trial.
Status = Literal["waiting", "running", "finished", "stopped", "failed"]


@dataclass(frozen=True, kw_only=True)
class TrialCost:
    """The resources that a trial used. None means not measured, which is not the same as 0."""

    wall_s: float | None = None  # from the first step to the last, over all restarts
    gpu_hours: float | None = None  # GPUs held, times the hours they were held
    cpu_hours: float | None = None
    images_per_s: float | None = None  # training images, over all workers, in steady state


@dataclass(frozen=True, kw_only=True)
class TrialRecord:
    """One trial: its configuration, results, cost, and why it ended."""

    name: str
    cell: str  # the combination of levels it belongs to, as the design names it
    seed: int
    status: Status
    reason: str = ""  # why it failed or was stopped, in words
    metrics: Mapping[str, float] = field(default_factory=dict)  # last evaluation; AP in 0 to 100
    curve: tuple[tuple[int, float], ...] = ()  # (samples seen, AP) at each evaluation
    parameters: Mapping[str, Any] = field(default_factory=dict)  # flat: dotted key to value
    cost: TrialCost = TrialCost()
    run_id: str = ""  # of MLflow
    run_url: str = ""

    def __post_init__(self) -> None:
        if bad := [name for name, value in self.metrics.items() if not math.isfinite(value)]:
            raise ValueError(
                f"trial {self.name!r} has metrics that are no numbers, {', '.join(bad)}; leave "
                "them out, or use status failed"
            )
        if self.status == "finished" and "AP" not in self.metrics:
            raise ValueError(f"trial {self.name!r} is finished without an AP; use status failed")

    @property
    def ap(self) -> float | None:
        return self.metrics.get("AP")

    def observation(self) -> Observation:
        """Return what the analysis sees: of an unfinished trial only the reason."""
        if self.status == "finished":
            return Observation(self.cell, self.seed, dict(self.metrics))
        reason = f"{self.status}: {self.reason}" if self.reason else self.status
        return Observation(self.cell, self.seed, failure=reason)
