"""Split a difference between two recipes into the parts that single changes cause."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

from scipy.special import stdtrit

from deta.platform.pages.number_format import Interval, num_of, percent, plus_minus, signed
from deta.platform.study.analyse import (
    difference_weights,
    measure_noise,
    pooled_difference,
    sort_results,
)
from deta.platform.study.linear_model import Fit, with_holm
from deta.platform.study.study_types import (
    Anchor,
    Cell,
    CellDifference,
    Decomposition,
    Noise,
    Observation,
    Step,
)


def decompose(
    cells: Sequence[Cell],
    observations: Sequence[Observation],
    path: Sequence[tuple[str, str]],
    *,
    metric: str = "AP",
    confidence: float = 0.95,
    published: tuple[Anchor, Anchor] | None = None,
) -> Decomposition:
    """Split the difference between two cells into steps through the cells between them.

    Args:
        path: from the first cell to the last: key of a cell, and what changed to get there, which
            is left empty for the first.
        published: what others reported for the two ends, in the order of the path.

    Raises:
        ValueError: a cell that the study has not, or a path of fewer than two cells.
    """
    if len(path) < 2:
        raise ValueError(f"the path {list(path)} has no step; it needs at least two cells")
    results = sort_results(cells, observations, metric)
    fit = Fit(results.values, confidence)
    first, last = path[0][0], path[-1][0]
    whole = pooled_difference(results, fit, f"{last} minus {first}", last, first)
    whole_weights = difference_weights(results, last, first)
    parts = with_holm(
        [
            pooled_difference(results, fit, what, later, earlier)
            for (earlier, _), (later, what) in pairwise(path)
        ]
    )
    steps = []
    for part in parts:
        share, interval = None, None
        if (
            part.estimate is not None
            and whole.estimate
            and whole.is_distinguishable(1 - confidence)
        ):
            share = part.estimate / whole.estimate
            weights = difference_weights(results, part.first, part.second)
            interval = _share_interval(fit, share, whole.estimate, weights, whole_weights)
        steps.append(Step(part.title, part, share, interval))
    text = _paragraph(whole, steps, metric, measure_noise(results, fit), confidence, published)
    return Decomposition(whole, tuple(steps), text)


def _share_interval(
    fit: Fit,
    share: float,
    whole: float,
    part_weights: dict[str, float],
    whole_weights: dict[str, float],
) -> Interval:
    """Return Fieller's interval (1954) of a ratio of contrasts; finite, as the whole is not 0."""
    t = float(stdtrit(fit.df, (1 + fit.confidence) / 2))
    v11 = fit.covariance(part_weights, part_weights)
    v12 = fit.covariance(part_weights, whole_weights)
    v22 = fit.covariance(whole_weights, whole_weights)
    g = t**2 * v22 / whole**2  # below 1
    inside = v11 - 2 * share * v12 + share**2 * v22 - g * (v11 - v12**2 / v22)
    half = t / abs(whole) * math.sqrt(max(0.0, inside))
    middle = share - g * v12 / v22
    return Interval((middle - half) / (1 - g), (middle + half) / (1 - g))


def _paragraph(
    whole: CellDifference,
    steps: Sequence[Step],
    metric: str,
    noise: Noise,
    confidence: float,
    published: tuple[Anchor, Anchor] | None,
) -> str:
    sentences = []
    if published is not None:
        begin, end = published
        sentences.append(
            f"Published are {begin.ap:.1f} AP ({begin.label}) and {end.ap:.1f} ({end.label}): "
            f"{signed(end.ap - begin.ap, 1)} AP between two single runs that differ in more than "
            "one thing."
        )
    sentences.append(f"Here, from {whole.second} to {whole.first}: {_amount(whole, metric)}.")
    parts = [f"{step.title} {_amount(step.difference, metric)}{_share(step)}" for step in steps]
    if len(parts) > 1:
        sentences.append(f"Step by step: {'; '.join(parts)}.")
    elif parts:
        sentences.append(f"That is one step: {steps[0].title}.")
    if whole.estimate is None or any(step.difference.estimate is None for step in steps):
        sentences.append("So no decomposition can be given.")
    elif whole.interval is None:
        sentences.append(
            "Without an estimate of the noise, no share can be distinguished from chance."
        )
    elif steps[0].share is None:
        sentences.append(
            f"With {num_of(len(whole.seeds), 'seed')} the whole is not significant, so no "
            "share of it is given."
        )
    else:
        clear = [step.title for step in steps if step.difference.is_distinguishable(1 - confidence)]
        sentences.append(
            f"Significant by themselves: {' and '.join(clear)}."
            if clear
            else "No step is significant by itself."
        )
        if len(steps) > 1:
            sentences.append(
                "The steps add up to the whole; taken in another order they would differ as far "
                "as the changes interact."
            )
    if published is not None and noise.seed_sd:
        # The difference that chance alone causes between two runs.
        reported = abs(published[1].ap - published[0].ap)
        limit = stdtrit(noise.seed_df, (1 + confidence) / 2) * math.sqrt(2) * noise.seed_sd
        sentences.append(
            f"By the noise measured here, on this data and model, two single runs that train alike "
            f"differ by up to {limit:.2g} in {100 * confidence:.0f} % of cases; the published "
            f"{reported:.1f} lies {'within' if reported <= limit else 'beyond'} that."
        )
    return " ".join(sentences)


def _amount(difference: CellDifference, metric: str) -> str:
    if difference.estimate is None:
        return f"unknown ({difference.note})"
    if difference.interval is None:
        return f"{signed(difference.estimate, 2)} {metric} ({difference.note})"
    return f"{plus_minus(difference.estimate, difference.interval.half_width)} {metric}"


def _share(step: Step) -> str:
    if step.share is None or step.share_interval is None:
        return ""
    low, high = step.share_interval.low, step.share_interval.high
    return f" ({percent(step.share)} of it; between {percent(low)} and {percent(high)})"
