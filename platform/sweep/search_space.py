"""The search space of a sweep over dotted configuration keys, and the search through it.

    Sweep(
        base=demo(),
        space={
            "optim.lr": FloatDistribution(3e-4, 6e-3, log=True),
            "total_batch_size": CategoricalDistribution((4, 8, 16)),
        },
        search=Random(12),
        stopping=Asha(grace_samples=500),
    )

The domains are those of `optuna.distributions`. Nothing here knows the cluster. A sweep checks its
keys and values against the configuration when it is created, so a typo costs nothing.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import random
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

from deta.platform.run.config import RunConfig, flatten, override
from deta.platform.study.design import NEUTRAL_KEYS, Design, Trial, is_in, numbers_id
from deta.platform.study.study_types import Anchor, Cell, Question

# Keys that no trial may change: they name the run, or would need the data to be checked again.
FIXED_KEYS = (
    "name", "storage", "experiment", "data.train_", "data.val_", "data.lenient", "data.max_pixels",
    "init_checkpoint", "init_backbone", "model.num_classes", "checkpoint.store",
)  # fmt: skip
OBJECTIVES = ("AP", "gpu_hours", "cpu_hours", "wall_s")
DIGITS = 6  # significant digits of a drawn number, so that a person can retype it
MAX_DRAWS = 100  # to find a trial that is not a duplicate

# A choice may be a tuple. Optuna cannot save such a study, and a sweep does not save its study.
warnings.filterwarnings("ignore", "Choices for a categorical distribution")
Domain = CategoricalDistribution | FloatDistribution | IntDistribution


def describe_domain(domain: Domain) -> str:
    """Describe a domain for people and for sweep.json, by which a restart compares it."""
    if isinstance(domain, CategoricalDistribution):
        return "one of " + ", ".join(map(str, domain.choices))
    text = f"{domain.low:g} to {domain.high:g}"
    if isinstance(domain, IntDistribution):
        text = f"{domain.low} to {domain.high}, whole numbers"
    text += ", by order of magnitude" if domain.log else ""
    return text + (f", in steps of {domain.step:g}" if domain.step not in (None, 1) else "")


def _ends(domain: Domain) -> tuple[Any, ...]:
    if isinstance(domain, CategoricalDistribution):
        return domain.choices
    return domain.low, domain.high


def _draw(domain: Domain, rng: random.Random) -> Any:
    """Draw a value. Not by Optuna's sampler: that of one version need not be that of the next."""
    if isinstance(domain, CategoricalDistribution):
        return domain.choices[rng.randrange(len(domain.choices))]
    low, high, step = domain.low, domain.high, domain.step
    if isinstance(domain, IntDistribution) and not domain.log:
        return rng.randrange(domain.low, domain.high + 1, domain.step)
    if domain.log:
        drawn = math.exp(rng.uniform(math.log(low), math.log(high)))
    else:
        drawn = rng.uniform(low, high)
    if isinstance(domain, IntDistribution):
        return round(drawn)
    return float(f"{drawn if step is None else low + (drawn - low) // step * step:.{DIGITS}g}")


@dataclass(frozen=True)
class Grid:
    """Every combination; the last key varies fastest."""


@dataclass(frozen=True)
class Random:
    """Combinations drawn at random; more trials leave the first ones unchanged."""

    num_trials: int
    seed: int = 0


@dataclass(frozen=True)
class Optuna:
    """Combinations that Optuna proposes from the results so far (TPE)."""

    num_trials: int
    # AP alone, or AP and a cost: then it searches for the Pareto front.
    objectives: tuple[str, ...] = ("AP",)
    seed: int = 0

    def __post_init__(self) -> None:
        names = set(self.objectives)
        if not names <= set(OBJECTIVES) or "AP" not in names or len(names) > 2:
            raise ValueError(
                f"objectives={self.objectives} must be AP, alone or with one of "
                f"{', '.join(OBJECTIVES[1:])}"
            )


Search = Grid | Random | Optuna


@dataclass(frozen=True)
class Asha:
    """Stop trials early that have a lower AP at equal samples seen (ASHA, Li et al. 2020).

    At grace_samples, reduction × grace_samples and so on, a trial continues if its AP is in the
    upper 1 / reduction of the trials that reached that point before.
    Source: https://arxiv.org/abs/1810.05934
    """

    grace_samples: int
    reduction: float = 3
    max_samples: int | None = None  # an upper limit of these points; none: the end

    def __post_init__(self) -> None:
        if self.grace_samples < 1 or self.reduction <= 1:
            raise ValueError(f"{self}: grace_samples must be at least 1, reduction above 1")
        if self.max_samples is not None and self.max_samples < self.grace_samples:
            raise ValueError(f"{self}: max_samples is below grace_samples")


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """Many runs from one configuration: a space that is searched, or the design of a study."""

    base: RunConfig  # its name is the sweep's; the folder is storage/name
    space: Mapping[str, Domain] = field(default_factory=dict)
    search: Search = field(default_factory=Grid)
    stopping: Asha | None = None
    design: Design | None = None  # instead of a space
    max_concurrent: int | None = None  # trials; none: as many as fit on the cluster
    max_failures: int = 2  # how often a trial is retried after its workers were lost
    title: str = ""  # of the report
    method: str = ""  # a sentence for it
    questions: tuple[Question, ...] = ()
    path: tuple[tuple[str, str], ...] = ()  # through the cells, to explain a difference
    published: tuple[Anchor, Anchor] | None = None  # that difference, as published
    anchors: tuple[Anchor, ...] = ()

    def __post_init__(self) -> None:
        """
        Raises:
            ValueError: a key that does not exist or cannot be varied, a value that the
                configuration refuses, or parts that do not fit together; names them.
        """
        if self.max_failures < 0 or (self.max_concurrent is not None and self.max_concurrent < 1):
            raise ValueError("max_failures must be at least 0 and max_concurrent at least 1")
        if not isinstance(self.search, Grid) and self.search.num_trials < 1:
            raise ValueError(f"{self.search}: num_trials must be at least 1")
        if self.design is not None:
            if self.space or not isinstance(self.search, Grid) or self.stopping is not None:
                raise ValueError(
                    "a design defines its trials and runs all of them to the end: leave "
                    "out space, search and stopping"
                )
            return
        if not self.space:
            raise ValueError("the sweep has neither a space nor a design")
        for key in self.space:
            if key not in flatten(self.base):
                override(self.base, {key: ""})  # raises an error that suggests keys
            if any(key.startswith(fixed) for fixed in FIXED_KEYS):
                raise ValueError(f"{key} cannot be varied: it is the same for all trials")
        if isinstance(self.search, Grid):
            uncountable = [key for key, domain in self.space.items()
                           if not isinstance(domain, CategoricalDistribution)]  # fmt: skip
            if uncountable:
                raise ValueError(
                    f"a grid needs CategoricalDistribution(…) for {', '.join(uncountable)}; or use "
                    "the search Random"
                )
        wants_gpu = isinstance(self.search, Optuna) and "gpu_hours" in self.search.objectives
        if wants_gpu and not self.base.cluster.gpu:
            raise ValueError(
                "the objective gpu_hours is the same for all trials without GPUs "
                "(cluster.gpu=false); take cpu_hours"
            )
        # All keys at their first value, at their last, and each one at each of its ends.
        ends = {key: _ends(domain) for key, domain in self.space.items()}
        first = {key: values[0] for key, values in ends.items()}
        _resolve(self.base, {key: values[-1] for key, values in ends.items()})
        for key, value in [(key, value) for key, values in ends.items() for value in values]:
            _resolve(self.base, first | {key: value})
        self.trials()

    @property
    def config(self) -> RunConfig:
        return self.base if self.design is None else self.design.base

    def with_base(self, base: RunConfig) -> Sweep:
        """Return the same sweep over another base, such as one with its data filled in."""
        design = None if self.design is None else replace(self.design, base=base)
        return replace(self, base=base, design=design)

    def trials(self) -> list[Trial]:
        """Return the trials that are known before anything runs; none with Optuna."""
        if self.design is not None:
            return self.design.trials()
        if isinstance(self.search, Optuna):
            return []
        if isinstance(self.search, Random):
            return self._drawn(self.search)
        trials: dict[str, Trial] = {}
        for values in itertools.product(*map(_ends, self.space.values())):
            trial = self.trial(dict(zip(self.space, values, strict=True)), len(trials) + 1)
            if twin := trials.get(trial.id):
                raise ValueError(
                    f"two trials of the grid train exactly alike: {dict(twin.changes)} and "
                    f"{dict(trial.changes)}; take one of the values out"
                )
            trials[trial.id] = trial
        return list(trials.values())

    @property
    def num_trials(self) -> int:
        return self.search.num_trials if isinstance(self.search, Optuna) else len(self.trials())

    def trial(self, changes: Mapping[str, Any], number: int) -> Trial:
        """Return the trial of a combination.

        Args:
            number: its position among the trials, from 1, and its name unless seeds are varied.

        Raises:
            ValueError: the configuration refuses it; names the key.
        """
        config = _resolve(self.base, changes)
        flat, identity = flatten(config), numbers_id(config)
        resolved = {key: flat[key] for key in changes}
        if neutral := {
            k: v for k, v in resolved.items() if is_in(k, NEUTRAL_KEYS)
        }:  # such as cluster.num_workers, which changes the cost but not the result
            text = identity + json.dumps(neutral, sort_keys=True, default=str)
            identity = hashlib.sha256(text.encode()).hexdigest()[:12]
        others = {key: value for key, value in resolved.items() if key != "seed"}
        key = f"trial {number:02d}"
        if "seed" in resolved:
            key = _values_text(others)
        cell = Cell(key or "the base", {}, others)
        return Trial(identity, cell, config.seed, resolved)

    def trial_config(self, trial: Trial) -> RunConfig:
        """Return the configuration of a trial, whose folder is <sweep>/trials/<id>."""
        storage = f"{self.config.storage}/{self.config.name}/trials"
        return replace(_resolve(self.config, trial.changes), storage=storage, name=trial.id)

    def trial_name(self, trial: Trial) -> str:
        return trial.name if self.design or "seed" in self.space else trial.cell.key

    def trial_title(self, trial: Trial) -> str:
        """Return the name of the trial's MLflow run, with the values that it tries."""
        if self.design or "seed" in self.space:
            return trial.name
        return f"{trial.cell.key}: {_values_text(trial.cell.changes)}"

    def varied_keys(self) -> list[str]:
        """Return the keys in which trials differ."""
        if self.design is None:
            return list(self.space)
        keys = {key: None for cell in self.design.cells() for key in cell.changes}
        return [*keys, "seed"]

    def describe(self) -> dict[str, Any]:
        """Describe the design in words and values, for people and for sweep.json."""
        if self.design is not None:
            return {
                "factors": {
                    factor.name: {level.label: dict(level.changes) for level in factor.levels}
                    for factor in self.design.factors
                },
                "named cells": {k: dict(v) for k, v in self.design.named_cells.items()},
                "seeds": list(self.design.seeds),
            }
        return {
            "space": {key: describe_domain(domain) for key, domain in self.space.items()},
            "search": type(self.search).__name__.lower(),
            **vars(self.search),
            "stopping": str(self.stopping) if self.stopping else "none",
        }

    def _drawn(self, search: Random) -> list[Trial]:
        rng = random.Random(f"sweep {search.seed}")
        trials: dict[str, Trial] = {}
        for number in range(1, search.num_trials + 1):
            for _ in range(MAX_DRAWS):
                drawn = {key: _draw(domain, rng) for key, domain in self.space.items()}
                trial = self.trial(drawn, number)
                if trial.id not in trials:
                    break
            else:
                raise ValueError(
                    f"the space has fewer than {search.num_trials} different trials; "
                    f"{len(trials)} were found. Search it with Grid() instead"
                )
            trials[trial.id] = trial
        return list(trials.values())


def format_value(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _values_text(changes: Mapping[str, Any]) -> str:
    return ", ".join(f"{k.rpartition('.')[2]}={format_value(v)}" for k, v in changes.items())


def _resolve(base: RunConfig, changes: Mapping[str, Any]) -> RunConfig:
    try:
        return override(base, changes)
    except ValueError as error:
        values = ", ".join(f"{key}={format_value(value)}" for key, value in changes.items())
        raise ValueError(f"the trial {values}: {error}") from error
