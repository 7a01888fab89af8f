"""The types of a study: cells, observations, differences, effects, and the statistical model.

Pure statistics: no cluster, no tracking, no plots. The model is

    value = cell + seed + noise

with one parameter a cell (so all interactions of the factors are in it), one a seed (a block: the
same seed means the same order of images and the same random numbers in every cell), and normal
noise with one standard deviation for all cells. Effects of factors are contrasts of cells: what
ordinary least squares with sum-to-zero coding gives for the factors, the blocks and all
interactions. Seeds are fixed effects there: differences between cells are compared within seeds
and hold for any seed. The interval of a single cell's mean takes seeds as random: it is that of a
plain mean, and speaks of seeds that were not run.
"""

# C cells that were observed   S seeds   R observations (a cell with a seed)   K contrasts

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from deta.platform.pages.number_format import Interval


@dataclass(frozen=True)
class Cell:
    """One way to train, of a study: every seed runs it once."""

    key: str  # "batch=8, rate=1×", or the name of a named cell; unique in a study
    labels: Mapping[str, str]  # factor to level; empty for a named cell
    changes: Mapping[str, object]  # dotted key to value, over the study's base configuration
    same_as: str = ""  # key of an earlier cell that trains exactly alike; it is not run twice

    @property
    def is_named(self) -> bool:
        return not self.labels


@dataclass(frozen=True)
class Observation:
    """The result of one trial."""

    cell: str
    seed: int
    metrics: Mapping[str, float] = field(default_factory=dict)  # AP in 0..100, and any other
    failure: str = ""  # why there are no metrics; such a trial is counted, never imputed


@dataclass(frozen=True)
class CellSummary:
    """One cell alone. Seeds are a sample here, so the interval is that of a plain mean."""

    cell: Cell
    values: Mapping[int, float]  # by seed; of the cell it equals, where `cell.same_as` is set
    failures: Mapping[int, str]  # by seed: why it has no value
    mean: float | None  # none without any value
    sd: float | None  # over seeds; none below two values
    interval: Interval | None
    note: str = ""  # why something is missing, in words


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A number and its uncertainty. Unknown parts are None, and `note` says why."""

    estimate: float | None
    standard_error: float | None = None
    df: int = 0
    interval: Interval | None = None
    p: float | None = None  # two-sided, that it is zero
    p_holm: float | None = None  # the same, corrected for all numbers in the list it stands in
    note: str = ""

    def is_distinguishable(self, alpha: float = 0.05) -> bool:
        """Return whether it is statistically significant after the correction."""
        p = self.p if self.p_holm is None else self.p_holm
        return p is not None and p < alpha


@dataclass(frozen=True, kw_only=True)
class CellDifference(Estimate):
    """One cell minus another."""

    title: str
    first: str  # key of the cell that is subtracted from
    second: str
    # "paired": from the differences of the seeds that both have, and their own sd. "pooled": from
    # the model of the whole study, whose noise all cells share, with more degrees of freedom.
    method: Literal["paired", "pooled"]
    seeds: tuple[int, ...]  # that both cells have


@dataclass(frozen=True, kw_only=True)
class Effect(Estimate):
    """The effect of going from a factor's first level to another, averaged over the other factors.

    Of two factors: how much the effect of the one changes with the other; and so on. With two
    levels it is twice the coefficient of sum-to-zero coding, four times for two such factors.
    """

    factors: tuple[str, ...]
    levels: tuple[str, ...]  # one of each factor
    first_levels: tuple[str, ...]

    @property
    def name(self) -> str:
        """For example "batch: 16 − 8", or "(batch: 16 − 8) × (rate: 2 − 1)"."""
        parts = zip(self.factors, self.levels, self.first_levels, strict=True)
        steps = [f"{factor}: {level} − {first}" for factor, level, first in parts]
        return steps[0] if len(steps) == 1 else " × ".join(f"({step})" for step in steps)


@dataclass(frozen=True)
class Term:
    """The F test of all effects of a factor, or of an interaction."""

    factors: tuple[str, ...]
    df: int
    residual_df: int
    f: float | None
    p: float | None
    note: str = ""

    @property
    def name(self) -> str:
        return " × ".join(self.factors)


@dataclass(frozen=True)
class Noise:
    """The variation of a result when only chance differs."""

    residual_sd: float | None  # of one observation about cell + seed; what differences suffer from
    df: int
    interval: Interval | None  # of residual_sd, chi-square
    seed_sd: float | None  # over seeds within a cell, pooled: what single runs suffer from
    seed_df: int
    correlation: float | None  # between two cells of one seed: what blocking gains
    note: str = ""


@dataclass(frozen=True)
class Question:
    """Two cells to compare."""

    title: str  # "16 vs 8 at equal rate per sample"
    first: str
    second: str
    first_name: str = ""  # how the sentence calls the first cell: "16"; its key if empty
    second_name: str = ""
    relevant: float = 0.3  # the smallest difference that would matter, in points of the metric


@dataclass(frozen=True)
class Step:
    """One step of the way from one cell to another."""

    title: str  # what changes: "batch", "weight decay, backbone rate and frozen layers"
    difference: CellDifference  # pooled; later cell minus earlier one
    share: float | None  # of the whole difference; none where the whole is not significant
    share_interval: Interval | None


@dataclass(frozen=True)
class Decomposition:
    """A difference between two cells as the sum of the steps between them."""

    whole: CellDifference
    steps: tuple[Step, ...]
    text: str  # the paragraph for a person


@dataclass(frozen=True)
class Anchor:
    """A published number to compare ours with."""

    label: str
    ap: float  # box AP on COCO val2017
    total_batch_size: int
    source: str
    note: str = ""


@dataclass(frozen=True)
class Analysis:
    """All results of a study for one metric."""

    metric: str
    confidence: float
    seeds: tuple[int, ...]
    cells: tuple[CellSummary, ...]  # in the order of the design
    noise: Noise
    effects: tuple[Effect, ...]  # main effects first, then interactions of two, of three, …
    terms: tuple[Term, ...]
    differences: tuple[CellDifference, ...]  # paired, of all pairs of cells
    answers: tuple[CellDifference, ...]  # pooled, one for each question, in their order
    verdicts: tuple[str, ...]  # one sentence for each question
    notes: tuple[str, ...]  # what a reader has to know: failures, missing cells, assumptions

    def cell(self, key: str) -> CellSummary:
        return next(summary for summary in self.cells if summary.cell.key == key)
