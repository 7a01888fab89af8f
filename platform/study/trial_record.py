"""The record of one trial of a sweep, which the report, the costs and the table read.

`sweep/tune_sweep.py` writes one for every trial, also for those that failed, stopped early or have
not begun, so that a reader of the list sees the whole sweep and not its survivors.
"""

from __future__ import annotations

import math
import types
import typing
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Literal, get_args

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
    energy_kwh: float | None = None  # where the driver reports it
    price: float | None = None  # from the table of prices, in `currency`
    currency: str = "USD"


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
        if self.status not in get_args(Status):
            known = ", ".join(get_args(Status))
            raise ValueError(f"trial {self.name!r} has status {self.status!r}; known are {known}")
        if bad := [name for name, value in self.metrics.items() if not math.isfinite(value)]:
            raise ValueError(
                f"trial {self.name!r} has metrics that are no numbers, {', '.join(bad)}; leave "
                "them out, or use status failed"
            )
        if self.status == "finished" and "AP" not in self.metrics:
            raise ValueError(f"trial {self.name!r} is finished without an AP; use status failed")
        object.__setattr__(self, "curve", tuple((int(x), float(y)) for x, y in self.curve))

    @property
    def ap(self) -> float | None:
        return self.metrics.get("AP")

    def observation(self) -> Observation:
        """Return what the analysis sees: of an unfinished trial only the reason."""
        if self.status == "finished":
            return Observation(self.cell, self.seed, dict(self.metrics))
        reason = f"{self.status}: {self.reason}" if self.reason else self.status
        return Observation(self.cell, self.seed, failure=reason)

    def to_json(self) -> dict[str, Any]:
        """Return plain values for `json.dumps`."""
        return asdict(self)

    @classmethod
    def from_json(cls, row: Mapping[str, Any]) -> TrialRecord:
        """Read the record that `to_json` wrote. JSON has no tuples: in parameters they are lists.

        Raises:
            ValueError: keys are missing or unknown, or a value is of the wrong type.
        """
        values = _checked(cls, row, f"trial {row.get('name')!r}")
        if "cost" in values:
            values["cost"] = TrialCost(**_checked(TrialCost, values["cost"], "its cost"))
        return cls(**values)


def _checked(cls: type, row: Mapping[str, Any], what: str) -> dict[str, Any]:
    known = {item.name for item in fields(cls)}
    if unknown := sorted(set(row) - known):
        raise ValueError(f"{what} has unknown keys: {', '.join(unknown)}")
    hints = typing.get_type_hints(cls)
    for name, value in row.items():
        allowed = hints[name]
        kinds = get_args(allowed) if isinstance(allowed, types.UnionType) else (allowed,)
        plain = tuple(kind for kind in kinds if kind in (str, int, float, type(None)))
        if float in plain:
            plain = (*plain, int)
        if plain and (not isinstance(value, plain) or isinstance(value, bool)):
            raise ValueError(f"{what}: {name}={value!r} is not of type {allowed}")
    if missing := {"name", "cell", "seed", "status"} & known - set(row):
        raise ValueError(f"{what} lacks {', '.join(sorted(missing))}")
    return dict(row)
