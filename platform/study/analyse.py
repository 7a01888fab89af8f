"""Analyse the results of a study: cells, differences, effects, noise."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from deta.platform.pages.number_format import num_of
from deta.platform.study.linear_model import (
    NO_DF,
    NO_NOISE,
    Fit,
    mean_estimate,
    sd_interval,
    with_holm,
)
from deta.platform.study.study_types import (
    Analysis,
    Cell,
    CellDifference,
    CellSummary,
    Effect,
    Noise,
    Observation,
    Question,
    Term,
)
from deta.platform.study.verdict import verdict


@dataclass(frozen=True)
class Results:
    """Observations sorted into cells."""

    cells: tuple[Cell, ...]
    values: Mapping[str, Mapping[int, float]]  # by cell that was trained, and seed
    failures: Mapping[str, Mapping[int, str]]
    seeds: tuple[int, ...]
    trained_as: Mapping[str, str]  # cell to the cell that was trained for it: itself as a rule

    def of(self, key: str) -> Mapping[int, float]:
        if key not in self.trained_as:
            known = ", ".join(map(repr, self.trained_as))
            raise ValueError(f"the study has no cell {key!r}; its cells are {known}")
        return self.values[self.trained_as[key]]

    def seeds_of_both(self, first: str, second: str) -> tuple[int, ...]:
        return tuple(sorted(self.of(first).keys() & self.of(second).keys()))


def sort_results(
    cells: Sequence[Cell], observations: Sequence[Observation], metric: str
) -> Results:
    """
    Raises:
        ValueError: an observation of a cell that is not in the design, or two of one trial.
    """
    trained_as = {cell.key: cell.same_as or cell.key for cell in cells}
    values: dict[str, dict[int, float]] = {cell.key: {} for cell in cells if not cell.same_as}
    failures: dict[str, dict[int, str]] = {key: {} for key in values}
    for observation in observations:
        if observation.cell not in trained_as:
            raise ValueError(
                f"a result names {observation.cell!r}, which is no cell of the design; its cells "
                f"are {', '.join(map(repr, trained_as))}"
            )
        key, seed = trained_as[observation.cell], observation.seed
        if seed in values[key] or seed in failures[key]:
            raise ValueError(
                f"two results name cell {key!r} with seed {seed}; a trial has one result, its last"
            )
        value = observation.metrics.get(metric, math.nan)
        if observation.failure:
            failures[key][seed] = observation.failure
        elif not math.isfinite(value):
            failures[key][seed] = f"it reported no finite {metric}"
        else:
            values[key][seed] = float(value)
    seeds = sorted({observation.seed for observation in observations})
    return Results(tuple(cells), values, failures, tuple(seeds), trained_as)


def analyse(
    cells: Sequence[Cell],
    observations: Sequence[Observation],
    *,
    metric: str = "AP",
    questions: Sequence[Question] = (),
    confidence: float = 0.95,
) -> Analysis:
    """Analyse the results of a study for one metric.

    Args:
        cells: `Design.cells()`.
        observations: any number of them, in any order; failed trials with their reason.
        questions: pairs of cells to answer in a sentence each.

    Raises:
        ValueError: an observation or a question names a cell that the design does not have, or two
            observations of one trial.
    """
    results = sort_results(cells, observations, metric)
    fit = Fit(results.values, confidence)
    noise = measure_noise(results, fit)
    effects, terms = factor_effects(results, fit)
    answers = with_holm(
        [pooled_difference(results, fit, q.title, q.first, q.second) for q in questions]
    )
    return Analysis(
        metric=metric,
        confidence=confidence,
        seeds=results.seeds,
        cells=tuple(summarise(results, cell, confidence) for cell in cells),
        noise=noise,
        effects=effects,
        terms=terms,
        differences=paired_differences(results, confidence),
        answers=answers,
        verdicts=tuple(
            verdict(question, answer, metric, noise, num_cells=len(fit.cells), alpha=1 - confidence)
            for question, answer in zip(questions, answers, strict=True)
        ),
        notes=tuple(_notes(results, fit, metric)),
    )


def summarise(results: Results, cell: Cell, confidence: float) -> CellSummary:
    key = results.trained_as[cell.key]
    values = results.values[key]
    sd, mean = mean_estimate(np.array(list(values.values())), confidence)
    note = f"trains exactly as {key}" if key != cell.key else ""
    note = "; ".join(part for part in (note, mean.note) if part)
    return CellSummary(cell, values, results.failures[key], mean.estimate, sd, mean.interval, note)


def measure_noise(results: Results, fit: Fit) -> Noise:
    """Measure the residual noise about the model, and the noise over seeds within a cell."""
    samples = [np.array(list(by_seed.values())) for by_seed in results.values.values()]
    seed_df = sum(len(sample) - 1 for sample in samples if len(sample) > 1)
    squares = sum(float(((sample - sample.mean()) ** 2).sum()) for sample in samples if len(sample))
    seed_sd = math.sqrt(squares / seed_df) if seed_df else None
    sd, interval, correlation, note = fit.residual_sd, None, None, ""
    if sd is None:
        note = NO_DF
    elif sd == 0:
        note = NO_NOISE
    else:
        interval = sd_interval(sd, fit.df, fit.confidence)
        if seed_sd:
            # With complete blocks this is the intraclass correlation of the analysis of variance.
            correlation = max(-1.0, 1 - (sd / seed_sd) ** 2)
    return Noise(sd, fit.df, interval, seed_sd, seed_df, correlation, note)


def paired_differences(results: Results, confidence: float) -> tuple[CellDifference, ...]:
    """Compare every two cells by the differences of the seeds that both have."""
    found = []
    for first, second in itertools.combinations([cell.key for cell in results.cells], 2):
        one, other = results.of(first), results.of(second)
        seeds = results.seeds_of_both(first, second)
        _, mean = mean_estimate(np.array([one[s] - other[s] for s in seeds]), confidence)
        note = mean.note
        if results.trained_as[first] == results.trained_as[second]:
            note = "they train exactly alike"
        elif len(seeds) < 2:
            note = NO_DF if seeds else "no seed has a result of both"
        found.append(
            CellDifference(
                **vars(mean) | {"note": note},
                title=f"{first} minus {second}",
                first=first,
                second=second,
                method="paired",
                seeds=seeds,
            )
        )
    return with_holm(found)


def pooled_difference(
    results: Results, fit: Fit, title: str, first: str, second: str
) -> CellDifference:
    """Compare two cells by the model of the whole study."""
    return CellDifference(
        **vars(fit.contrast(difference_weights(results, first, second))),
        title=title,
        first=first,
        second=second,
        method="pooled",
        seeds=results.seeds_of_both(first, second),
    )


def difference_weights(results: Results, first: str, second: str) -> dict[str, float]:
    for key in (first, second):
        results.of(key)  # raises for an unknown cell
    one, other = results.trained_as[first], results.trained_as[second]
    return {} if one == other else {one: 1.0, other: -1.0}


def factor_effects(results: Results, fit: Fit) -> tuple[tuple[Effect, ...], tuple[Term, ...]]:
    """Main effects and all interactions of the crossed cells."""
    crossed = [cell for cell in results.cells if not cell.is_named]
    levels: dict[str, list[str]] = {}
    for cell in crossed:
        for factor, level in cell.labels.items():
            if level not in levels.setdefault(factor, []):
                levels[factor].append(level)
    effects: list[Effect] = []
    terms: list[Term] = []
    orders = range(1, len(levels) + 1)
    for factors in itertools.chain(*(itertools.combinations(levels, n) for n in orders)):
        first = tuple(levels[factor][0] for factor in factors)
        contrasts = []
        for chosen in itertools.product(*(levels[factor][1:] for factor in factors)):
            weights = _contrast(results, crossed, levels, dict(zip(factors, chosen, strict=True)))
            contrasts.append(weights)
            estimate = vars(fit.contrast(weights))
            effects.append(Effect(**estimate, factors=factors, levels=chosen, first_levels=first))
        df, f, p, note = fit.f_test(contrasts)
        terms.append(Term(factors, df, fit.df, f, p, note))
    return with_holm(effects), tuple(terms)


def _contrast(
    results: Results, crossed: list[Cell], levels: dict[str, list[str]], chosen: dict[str, str]
) -> dict[str, float]:
    """Return cell weights: the chosen levels minus the first ones, averaged over other factors."""
    weights: dict[str, float] = {}
    for cell in crossed:
        weight = 1.0
        for factor, all_levels in levels.items():
            if factor not in chosen:
                weight /= len(all_levels)
            elif cell.labels[factor] == all_levels[0]:
                weight = -weight
            elif cell.labels[factor] != chosen[factor]:
                weight = 0.0
        key = results.trained_as[cell.key]
        weights[key] = weights.get(key, 0.0) + weight
    return weights


def _notes(results: Results, fit: Fit, metric: str) -> list[str]:
    notes = []
    num_results = sum(len(by_seed) for by_seed in results.values.values())
    if failed := [
        f"{key} with seed {seed}: {why}"
        for key, by_seed in results.failures.items()
        for seed, why in by_seed.items()
    ]:
        notes.append(
            f"{num_of(len(failed), 'trial')} failed and {'is' if len(failed) == 1 else 'are'} left "
            f"out, which is fair only if the failure has nothing to do with the {metric} it would "
            f"have reached ({'; '.join(failed)})."
        )
    if empty := [key for key, by_seed in results.values.items() if not by_seed]:
        notes.append(f"No result yet of {'; '.join(empty)}: what needs it is left open.")
    num_wanted = len(fit.cells) * len(fit.seeds)
    if 0 < num_results < num_wanted:
        notes.append(
            f"{num_results} of {num_wanted} results are there: cells are compared within the seeds "
            "that connect them, by least squares."
        )
    if alike := [f"{one} as {other}" for one, other in results.trained_as.items() if one != other]:
        notes.append(f"These train exactly alike and were run once: {'; '.join(alike)}.")
    if num_results:
        notes.append(
            "Differences and effects are compared within seeds (seeds as fixed blocks), with one "
            "standard deviation of the noise for all cells; the interval of a cell's own mean "
            "takes its seeds as a sample and includes the scatter between them."
        )
    return notes
