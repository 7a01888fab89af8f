"""The promotion gate: checks a challenger against a policy, criterion by criterion.

Pure functions from metrics and a policy to a decision. gate_inputs.py collects the metrics.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from deta.platform.system.short_list import short_list

if TYPE_CHECKING:
    from deta.platform.evaluation.paired_bootstrap import PairedDifference

NUM_CLASSES_SHOWN = 3


@dataclass(frozen=True, kw_only=True)
class Policy:
    """The requirements. Every field is a key of jobs/promote.py; `none` means no limit."""

    min_gain: float = 0.0  # AP, 0..1: the interval of the difference must be above it
    confidence: float = 0.95  # of that interval
    resamples: int = 1000
    seed: int = 0
    min_ap: float = 0.0  # 0..1
    min_first_ap: float = 0.1  # 0..1, of a version without a champion to be compared with
    max_class_drop: float | None = 0.05  # how far any class may fall below the champion, AP 0..1
    min_class_ap: float | None = None  # of every class, 0..1
    class_floors: tuple[tuple[str, float], ...] = ()  # least AP of single classes, by name
    max_latency_ms: float | None = None  # of one image alone
    max_latency_ratio: float | None = 1.5  # of the champion's, on the same device
    max_megabytes: float | None = None  # of the file of the weights
    max_size_ratio: float | None = 1.5  # of the champion's
    parity: bool = True  # an exported file was checked and its detections are the model's
    clean_code: bool = False  # all code of the training was committed
    evaluation_set: str = ""  # prefix of `images_fingerprint`; empty: that of the champion

    def __post_init__(self) -> None:
        if not 0.5 <= self.confidence < 1:
            raise ValueError(f"confidence={self.confidence} is not in 0.5..1")
        if self.resamples < 100:
            raise ValueError(f"resamples={self.resamples} are too few for an interval; use 1000")
        limits = {"min_ap": self.min_ap, "max_class_drop": self.max_class_drop}
        limits |= {"min_first_ap": self.min_first_ap}
        limits |= {"min_class_ap": self.min_class_ap} | dict(self.class_floors)
        for name, value in limits.items():
            if value is not None and not 0 <= value <= 1:
                raise ValueError(f"{name}={value} is not an AP in 0..1")
        if not -1 < self.min_gain < 1:
            raise ValueError(f"min_gain={self.min_gain} is not a difference of AP in 0..1")
        for name in ("max_latency_ms", "max_latency_ratio", "max_megabytes", "max_size_ratio"):
            limit = getattr(self, name)
            if limit is not None and limit <= 0:
                raise ValueError(f"{name}={limit} must be above 0, or none")


@dataclass(frozen=True)
class Latency:
    """The time from one image in memory to its detections."""

    milliseconds: float  # median
    device: str  # name of the processor or GPU, and number of threads


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """The metrics and facts of a version. AP in 0..1."""

    label: str  # "deta version 3"
    sha256: str  # of the weights, as registered
    fault: str = ""  # why its files cannot be used
    missing_lineage: tuple[str, ...] = ()
    code_is_dirty: bool = False
    evaluated_sha256: str = ""  # of the weights that were evaluated
    images_fingerprint: str = ""
    ap: float = -1.0
    ap_by_class: Mapping[str, float] = field(default_factory=dict)  # of classes that have boxes
    num_bytes: int = 1  # of the file of the weights
    latency: Latency | None = None
    parity: str | None = None  # result of the check of the exported file, for people
    parity_fault: str = "no exported file was checked; jobs/register.py --export FOLDER"

    @property
    def megabytes(self) -> float:
        return self.num_bytes / 1e6


@dataclass(frozen=True)
class GateCriterion:
    """One row of the decision."""

    name: str
    passed: bool | None  # None: not required, or not applicable
    found: str
    required: str


@dataclass(frozen=True)
class Decision:
    """The result of the gate for one challenger."""

    challenger: Candidate
    champion: Candidate | None
    policy: Policy
    criteria: tuple[GateCriterion, ...]
    difference: PairedDifference | None  # challenger minus champion

    @property
    def accepted(self) -> bool:
        return all(criterion.passed is not False for criterion in self.criteria)

    @property
    def failed(self) -> tuple[str, ...]:
        return tuple(one.name for one in self.criteria if one.passed is False)

    def table(self) -> str:
        """Return the criteria as a table for a terminal."""
        marks = {True: "passed", False: "FAILED", None: "-"}
        rows = [("criterion", "", "found", "required")]
        rows += [(one.name, marks[one.passed], one.found, one.required) for one in self.criteria]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)

    def verdict(self) -> str:
        """Return the decision in one line."""
        against = f" over {self.champion.label}" if self.champion else " as the first champion"
        if self.accepted:
            return f"{self.challenger.label} passes{against}"
        return f"{self.challenger.label} does not pass: {', '.join(self.failed)}"

    def measurements(self) -> dict[str, Any]:
        """Return the metrics by name, for the decision log."""
        values: dict[str, Any] = {"ap": self.challenger.ap, "megabytes": self.challenger.megabytes}
        values["evaluation_set"] = self.challenger.images_fingerprint
        if self.challenger.latency is not None:
            values["latency"] = asdict(self.challenger.latency)
        if self.champion is not None:
            values["champion_ap"] = self.champion.ap
        if self.difference is not None:
            one = self.difference
            found = {"difference": one.difference, "corrected": one.corrected}
            found |= {"low": one.low, "high": one.high, "p_value": one.p_value}
            values |= {name: value for name, value in found.items() if not math.isnan(value)}
            values["resamples"] = one.resamples
        return values


def decide(
    challenger: Candidate,
    champion: Candidate | None,
    policy: Policy,
    difference: PairedDifference | None,
    names: Mapping[Any, str],
) -> Decision:
    """Check a challenger against the policy.

    Args:
        champion: None for the first one; then only absolute criteria apply.
        difference: challenger minus champion; None if there is no champion, or if the two
            evaluations cannot be compared.
        names: names of categories by id.
    """
    if challenger.fault:  # its metrics are not those of the present files
        return Decision(challenger, champion, policy, (_weights(challenger),), None)
    criteria = [
        _weights(challenger),
        _lineage(challenger, policy),
        _evaluation_set(challenger, champion, policy),
        _at_least_ap(challenger, champion, policy),
    ]
    if champion is not None:
        criteria += [_gain(difference, policy), _class_drop(difference, policy, names)]
    criteria.append(_class_floors(challenger, policy))
    criteria += _latency(challenger, champion, policy)
    criteria += _size(challenger, champion, policy)
    found = challenger.parity_fault or challenger.parity or ""
    passed = not challenger.parity_fault if policy.parity else None
    required = "the detections of the model" if policy.parity else "not required"
    criteria.append(GateCriterion("exported form", passed, found, required))
    return Decision(challenger, champion, policy, tuple(criteria), difference)


def _weights(one: Candidate) -> GateCriterion:
    required = f"SHA-256 {one.sha256[:12]}… in the registry, of its files and of what was evaluated"
    if one.fault:
        return GateCriterion("weights", False, one.fault, required)
    if one.evaluated_sha256 != one.sha256:
        found = f"the evaluation is of {one.evaluated_sha256[:12] or 'unknown weights'}…"
        return GateCriterion("weights", False, found, required)
    return GateCriterion("weights", True, "the same", required)


def _lineage(one: Candidate, policy: Policy) -> GateCriterion:
    required = "commit, configuration, data, environment, run" + ", no uncommitted code" * (
        policy.clean_code
    )
    if one.missing_lineage:
        return GateCriterion("lineage", False, f"lacks {', '.join(one.missing_lineage)}", required)
    found = "complete" + ", uncommitted code" * one.code_is_dirty
    return GateCriterion("lineage", not (policy.clean_code and one.code_is_dirty), found, required)


def _evaluation_set(one: Candidate, champion: Candidate | None, policy: Policy) -> GateCriterion:
    found = f"{one.images_fingerprint[:12]}…"
    wanted = policy.evaluation_set or (champion.images_fingerprint if champion else "")
    if not wanted:
        return GateCriterion("evaluation set", None, found, "any, for the first champion")
    passed = one.images_fingerprint.startswith(wanted)
    if champion is not None and not champion.images_fingerprint.startswith(wanted):
        passed, found = False, f"{found}, the champion's is {champion.images_fingerprint[:12]}…"
    return GateCriterion("evaluation set", passed, found, f"{wanted[:12]}…, for a comparison")


def _at_least_ap(one: Candidate, champion: Candidate | None, policy: Policy) -> GateCriterion:
    found, least, why = f"{100 * one.ap:.2f}", policy.min_ap, ""
    if champion is None and policy.min_first_ap > least:
        least = policy.min_first_ap
        why = f" of a first champion, which has no other to beat (min_first_ap={least:g})"
    if not least:
        return GateCriterion("AP", None, found, "no limit")
    return GateCriterion("AP", one.ap >= least, found, f"at least {100 * least:.2f}{why}")


def _gain(difference: PairedDifference | None, policy: Policy) -> GateCriterion:
    name = "AP gain"
    required = f"{100 * policy.confidence:g} % interval above {100 * policy.min_gain:+.2f}"
    if difference is None:
        return GateCriterion(name, False, "not comparable with the champion's evaluation", required)
    if difference.no_interval:
        found = f"{100 * difference.difference:+.2f}; {difference.no_interval}"
        return GateCriterion(name, False, found, required)
    found = (
        f"{100 * difference.difference:+.2f}, {100 * difference.low:+.2f} to "
        f"{100 * difference.high:+.2f}"
    )
    return GateCriterion(name, difference.low > policy.min_gain, found, required)


def _class_drop(
    difference: PairedDifference | None, policy: Policy, names: Mapping[Any, str]
) -> GateCriterion:
    name = "class drops"
    if policy.max_class_drop is None:
        return GateCriterion(name, None, "-", "no limit")
    required = f"no class more than {100 * policy.max_class_drop:.1f} below the champion's"
    if difference is None:
        return GateCriterion(name, False, "not comparable with the champion's evaluation", required)
    drops = [
        (-one.difference, f"{names.get(key, key)} {100 * one.ap_a:.1f} -> {100 * one.ap_b:.1f}")
        for key, one in difference.per_category.items()
        if math.isfinite(one.difference)
    ]
    drops.sort(key=lambda drop: -drop[0])
    over = [drop for drop in drops if drop[0] > policy.max_class_drop]
    if over:
        return GateCriterion(
            name, False, short_list([text for _, text in over], NUM_CLASSES_SHOWN), required
        )
    found = f"largest drop: {drops[0][1]}" if drops and drops[0][0] > 0 else "no class drops"
    return GateCriterion(name, True, found, required)


def _class_floors(one: Candidate, policy: Policy) -> GateCriterion:
    name = "class floors"
    floors = dict.fromkeys(one.ap_by_class, policy.min_class_ap) | dict(policy.class_floors)
    floors_set = {key: floor for key, floor in floors.items() if floor is not None}
    if not floors_set:
        return GateCriterion(name, None, "-", "none")
    required = "AP of " + short_list(
        [f"{key} {100 * floor:.1f}" for key, floor in floors_set.items()], NUM_CLASSES_SHOWN
    )
    under = [
        f"{key} {100 * one.ap_by_class[key]:.1f}" if key in one.ap_by_class else f"{key} unknown"
        for key, floor in floors_set.items()
        if one.ap_by_class.get(key, -1.0) < floor
    ]
    return GateCriterion(
        name, not under, short_list(under, NUM_CLASSES_SHOWN) if under else "all above", required
    )


def _latency(one: Candidate, champion: Candidate | None, policy: Policy) -> list[GateCriterion]:
    ratio_limit = None if champion is None else policy.max_latency_ratio
    if one.latency is None:
        passed = False if (policy.max_latency_ms, ratio_limit) != (None, None) else None
        required = "measured, for example by --measure"
        return [GateCriterion("latency", passed, "not measured", required)]
    milliseconds = one.latency.milliseconds
    criteria = [_at_most("latency", milliseconds, policy.max_latency_ms, "ms")]
    if champion is None or ratio_limit is None:
        return criteria
    other = champion.latency
    if other is not None and other.device == one.latency.device:
        found = f"of {other.milliseconds:.1f} ms"
        ratio = _ratio("latency ratio", milliseconds / other.milliseconds, ratio_limit, found)
        return [*criteria, ratio]
    where = "was not measured" if other is None else f"was measured on {other.device}"
    found = f"the champion's {where}; --measure measures both here"
    required = f"at most {ratio_limit:g} of the champion's"
    return [*criteria, GateCriterion("latency ratio", False, found, required)]


def _size(one: Candidate, champion: Candidate | None, policy: Policy) -> list[GateCriterion]:
    criteria = [_at_most("size", one.megabytes, policy.max_megabytes, "MB")]
    if champion is not None and policy.max_size_ratio is not None:
        ratio, found = one.num_bytes / champion.num_bytes, f"of {champion.megabytes:.1f} MB"
        criteria.append(_ratio("size ratio", ratio, policy.max_size_ratio, found))
    return criteria


def _at_most(name: str, value: float, limit: float | None, unit: str) -> GateCriterion:
    found = f"{value:.1f} {unit}"
    if limit is None:
        return GateCriterion(name, None, found, "no limit")
    return GateCriterion(name, value <= limit, found, f"at most {limit:.1f} {unit}")


def _ratio(name: str, ratio: float, limit: float, of: str) -> GateCriterion:
    required = f"at most {limit:g} of the champion's"
    return GateCriterion(name, ratio <= limit, f"{ratio:.2f} {of}", required)
