"""Whether 95 % means 95 %: a thousand studies with a known truth."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from functools import lru_cache

import numpy as np
import pytest

from deta.platform.study.analyse import analyse
from deta.platform.study.decomposition import decompose
from deta.platform.study.power import StudyPlan
from deta.platform.study.study_types import Analysis, Cell, Observation, Question

NUM_STUDIES = 1000
NUM_SHARES = 500
SD, CORRELATION = 0.25, 0.4
SEEDS = (1, 2, 3, 4)
CELLS = [
    Cell(f"{batch} {rate}", {"batch": batch, "rate": rate}, {})
    for batch, rate in itertools.product(("8", "16"), ("1×", "2×"))
] + [Cell("published", {}, {})]
TRUTH = {"8 1×": 50.0, "8 2×": 50.2, "16 1×": 49.9, "16 2×": 50.5, "published": 49.5}
QUESTION = Question("16 vs 8", "16 2×", "8 1×")  # true difference 0.5


def simulate(generator: np.random.Generator, share_lost: float) -> list[Observation]:
    block = generator.normal(size=len(SEEDS)) * SD * math.sqrt(CORRELATION)
    noise = generator.normal(size=(len(CELLS), len(SEEDS))) * SD * math.sqrt(1 - CORRELATION)
    lost = generator.random((len(CELLS), len(SEEDS))) < share_lost
    return [
        Observation(cell.key, seed, failure="lost")
        if lost[i, j]
        else Observation(cell.key, seed, {"AP": TRUTH[cell.key] + block[j] + noise[i, j]})
        for i, cell in enumerate(CELLS)
        for j, seed in enumerate(SEEDS)
    ]


@lru_cache(maxsize=2)
def studies(share_lost: float) -> list[Analysis]:
    generator = np.random.default_rng(20261121)
    return [
        analyse(CELLS, simulate(generator, share_lost), questions=[QUESTION])
        for _ in range(NUM_STUDIES)
    ]


def true_effect(factors: tuple[str, ...]) -> float:
    t = TRUTH
    if factors == ("batch",):
        return (t["16 1×"] + t["16 2×"] - t["8 1×"] - t["8 2×"]) / 2
    if factors == ("rate",):
        return (t["8 2×"] + t["16 2×"] - t["8 1×"] - t["16 1×"]) / 2
    return (t["16 2×"] - t["8 2×"]) - (t["16 1×"] - t["8 1×"])


@pytest.mark.parametrize("share_lost", [0.0, 0.15])
def test_intervals_cover_the_truth_in_95_of_100_studies(share_lost: float):
    covered, seen = Counter[str](), Counter[str]()

    def count(kind: str, interval: object, truth: float) -> None:
        if interval is not None:
            seen[kind] += 1
            covered[kind] += truth in interval  # type: ignore[operator]

    for analysis in studies(share_lost):
        count("pooled difference", analysis.answers[0].interval, 0.5)
        for effect in analysis.effects:
            count(f"effect {effect.name}", effect.interval, true_effect(effect.factors))
        one = analysis.differences[0]
        count("paired difference", one.interval, TRUTH[one.first] - TRUTH[one.second])
        count("cell mean", analysis.cells[0].interval, TRUTH["8 1×"])
        count("noise", analysis.noise.interval, SD * math.sqrt(1 - CORRELATION))

    coverage = {kind: covered[kind] / seen[kind] for kind in seen}
    assert len(coverage) == 7
    assert all(0.93 <= value <= 0.97 for value in coverage.values()), coverage


def test_studies_find_a_difference_as_often_as_planned():
    plan = StudyPlan(SD, CORRELATION, num_cells=len(CELLS))

    found = np.mean([(analysis.answers[0].p or 0) < 0.05 for analysis in studies(0.0)])

    assert plan.power(0.5, len(SEEDS)) == pytest.approx(float(found), abs=0.03)


def test_a_share_of_a_clear_difference_is_covered():
    generator = np.random.default_rng(5)
    truth = (TRUTH["16 1×"] - TRUTH["8 2×"]) / (TRUTH["published"] - TRUTH["8 2×"])
    path = [("8 2×", ""), ("16 1×", "batch"), ("published", "the rest")]

    intervals = [
        decompose(CELLS, simulate(generator, 0.0), path).steps[0].share_interval
        for _ in range(NUM_SHARES)
    ]

    told = [interval for interval in intervals if interval is not None]
    coverage = np.mean([truth in interval for interval in told])
    # Studies whose whole difference is not significant give no share; those are the odd ones.
    assert len(told) > 0.8 * NUM_SHARES
    assert 0.93 <= coverage <= 0.97
