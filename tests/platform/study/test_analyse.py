"""What a study says, against scipy and statsmodels, by properties and in words."""

from __future__ import annotations

import dataclasses
import math
import random
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from deta.platform.pages.number_format import Interval, decimals_for, plus_minus, signed
from deta.platform.study.analyse import analyse
from deta.platform.study.decomposition import decompose
from deta.platform.study.linear_model import with_holm
from deta.platform.study.study_types import (
    Analysis,
    Anchor,
    Cell,
    CellDifference,
    Effect,
    Estimate,
    Noise,
    Observation,
    Question,
)
from deta.platform.study.verdict import verdict

few = settings(max_examples=40, deadline=None)  # the machine may be busy


def crossed(**factors: Sequence[str]) -> list[Cell]:
    cells: list[dict[str, str]] = [{}]
    for name, levels in factors.items():
        cells = [labels | {name: level} for labels in cells for level in levels]
    return [Cell(" ".join(labels.values()), labels, {}) for labels in cells]


CELLS = [*crossed(a=("x", "y"), b=("p", "q", "r")), Cell("named", {}, {})]
PAIRS = (("y p", "x p"), ("y r", "x q"), ("named", "x p"))
QUESTIONS = [Question(f"{one} vs {other}", one, other) for one, other in PAIRS]


def results(cells: Sequence[Cell], num_seeds: int, seed: int = 0) -> list[Observation]:
    generator = np.random.default_rng(seed)
    blocks = generator.normal(scale=0.3, size=num_seeds)
    return [
        Observation(cell.key, s, {"AP": 50 + place * 0.1 + blocks[s] + generator.normal(scale=0.2)})
        for s in range(num_seeds)
        for place, cell in enumerate(cells)
    ]


def with_gaps(observations: list[Observation]) -> list[Observation]:
    return [o for place, o in enumerate(observations) if place not in (0, 3, 11, 17)]


@pytest.mark.parametrize("gaps", [False, True])
def test_a_cells_interval_is_that_of_scipy(gaps: bool):
    observations = results(CELLS, 4)
    observations = with_gaps(observations) if gaps else observations

    for summary in analyse(CELLS, observations).cells:
        values = list(summary.values.values())
        wanted = stats.ttest_1samp(values, 0).confidence_interval(0.95)
        assert summary.interval is not None
        assert (summary.mean, summary.sd) == pytest.approx(
            (np.mean(values), np.std(values, ddof=1))
        )
        assert (summary.interval.low, summary.interval.high) == pytest.approx(wanted)


def test_a_paired_difference_is_scipys_paired_t_test():
    analysis = analyse(CELLS, with_gaps(results(CELLS, 5)))

    assert len(analysis.differences) == 21
    for difference in analysis.differences:
        one = analysis.cell(difference.first).values
        other = analysis.cell(difference.second).values
        wanted = stats.ttest_rel(
            [one[seed] for seed in difference.seeds], [other[seed] for seed in difference.seeds]
        )
        low, high = wanted.confidence_interval(0.95)
        assert difference.interval is not None
        assert difference.p == pytest.approx(wanted.pvalue)
        assert (difference.interval.low, difference.interval.high) == pytest.approx((low, high))
        assert difference.estimate == pytest.approx((low + high) / 2)


def fit_statsmodels(observations: Sequence[Observation], formula: str) -> Any:
    pandas = pytest.importorskip("pandas")
    ols = pytest.importorskip("statsmodels.formula.api").ols
    labels = {cell.key: dict(cell.labels) for cell in CELLS}
    frame = pandas.DataFrame(
        [
            {"AP": o.metrics["AP"], "seed": str(o.seed), "cell": o.cell} | labels[o.cell]
            for o in observations
        ]
    )
    return ols(formula, frame).fit()


@pytest.mark.parametrize("gaps", [False, True])
def test_pooled_differences_and_noise_are_those_of_statsmodels(gaps: bool):
    observations = results(CELLS, 4)
    observations = with_gaps(observations) if gaps else observations

    analysis = analyse(CELLS, observations, questions=QUESTIONS)

    fit = fit_statsmodels(observations, "AP ~ 0 + C(cell) + C(seed, Sum)")
    assert analysis.noise.residual_sd == pytest.approx(math.sqrt(fit.mse_resid))
    assert analysis.noise.df == fit.df_resid
    for answer, (one, other) in zip(analysis.answers, PAIRS, strict=True):
        test = fit.t_test(f"C(cell)[{one}] - C(cell)[{other}] = 0")
        assert answer.interval is not None
        assert answer.estimate == pytest.approx(test.effect[0])
        assert answer.p == pytest.approx(float(test.pvalue))
        found = (answer.interval.low, answer.interval.high)
        assert found == pytest.approx(tuple(test.conf_int(0.05)[0]))


@pytest.mark.parametrize("gaps", [False, True])
def test_effects_are_those_of_sum_to_zero_coding(gaps: bool):
    cells = CELLS[:-1]
    observations = results(cells, 4)
    observations = with_gaps(observations) if gaps else observations

    analysis = analyse(cells, observations)

    fit = fit_statsmodels(observations, "AP ~ C(a, Sum) * C(b, Sum) + C(seed, Sum)")
    # The last level's coefficient is minus the sum of the others.
    a, p, q = "C(a, Sum)[S.x]", "C(b, Sum)[S.p]", "C(b, Sum)[S.q]"
    contrasts = {
        "a: y − x": f"-2 * {a}",
        "b: q − p": f"{q} - {p}",
        "b: r − p": f"-{q} - 2 * {p}",
        "(a: y − x) × (b: q − p)": f"2 * {a}:{p} - 2 * {a}:{q}",
        "(a: y − x) × (b: r − p)": f"4 * {a}:{p} + 2 * {a}:{q}",
    }
    assert [effect.name for effect in analysis.effects] == list(contrasts)
    for effect in analysis.effects:
        test = fit.t_test(f"{contrasts[effect.name]} = 0")
        assert effect.interval is not None
        assert effect.estimate == pytest.approx(test.effect[0])
        assert effect.p == pytest.approx(float(test.pvalue))
        found = (effect.interval.low, effect.interval.high)
        assert found == pytest.approx(tuple(test.conf_int(0.05)[0]))


def test_the_f_tests_are_type_three():
    cells = CELLS[:-1]
    observations = with_gaps(results(cells, 4))
    anova = pytest.importorskip("statsmodels.stats.anova").anova_lm

    terms = analyse(cells, observations).terms

    fit = fit_statsmodels(observations, "AP ~ C(a, Sum) * C(b, Sum) + C(seed, Sum)")
    wanted = anova(fit, typ=3)
    rows = ("C(a, Sum)", "C(b, Sum)", "C(a, Sum):C(b, Sum)")
    assert [(term.df, term.f, term.p) for term in terms] == [
        (wanted["df"][row], pytest.approx(wanted["F"][row]), pytest.approx(wanted["PR(>F)"][row]))
        for row in rows
    ]


def test_with_two_levels_an_interaction_is_the_difference_of_differences():
    cells = crossed(a=("x", "y"), b=("p", "q"))
    analysis = analyse(cells, results(cells, 3))
    mean = {s.cell.key: s.mean or 0.0 for s in analysis.cells}

    by_hand = (mean["y q"] - mean["x q"]) - (mean["y p"] - mean["x p"])

    assert analysis.effects[2].estimate == pytest.approx(by_hand)
    assert analysis.terms[2].p == pytest.approx(analysis.effects[2].p)


def test_holm_is_that_of_statsmodels():
    multipletests = pytest.importorskip("statsmodels.stats.multitest").multipletests
    ps = [0.03, 0.001, 0.2, 0.04, 0.5, 0.03]

    def holm(*ps: float | None) -> list[float | None]:
        return [one.p_holm for one in with_holm([Estimate(estimate=1.0, p=p) for p in ps])]

    assert holm(*ps) == pytest.approx(list(multipletests(ps, method="holm")[1]))
    assert holm(0.03, None, 0.01) == [0.03, None, 0.02]


def test_the_noise_has_its_chi_square_interval_and_the_blocks_their_correlation():
    cells = CELLS[:-1]
    observations = results(cells, 6)

    noise = analyse(cells, observations).noise

    assert noise.residual_sd is not None
    assert noise.interval is not None
    low, high = stats.chi2.ppf((0.975, 0.025), 25)
    assert noise.df == 25
    assert noise.interval.low == pytest.approx(noise.residual_sd * math.sqrt(25 / low))
    assert noise.interval.high == pytest.approx(noise.residual_sd * math.sqrt(25 / high))
    # Intraclass correlation from the mean squares of blocks and residuals.
    table = np.array([o.metrics["AP"] for o in observations]).reshape(6, 6)  # seeds, cells
    between = 6 * table.mean(1).var(ddof=1)
    within = noise.residual_sd**2
    assert noise.correlation == pytest.approx((between - within) / (between + 5 * within))


def numbers(thing: Any, skip: Sequence[str] = ()) -> list[float]:
    """All numbers in an analysis, however deep."""
    if dataclasses.is_dataclass(thing):
        parts = [getattr(thing, f.name) for f in dataclasses.fields(thing) if f.name not in skip]
        return [number for part in parts for number in numbers(part, skip)]
    if isinstance(thing, dict):
        return [number for part in thing.values() for number in numbers(part, skip)]
    if isinstance(thing, tuple | list):
        return [number for part in thing for number in numbers(part, skip)]
    return [float(thing)] if isinstance(thing, int | float) else []


SMALL = [*crossed(a=("x", "y"), b=("p", "q")), Cell("named", {}, {})]
studies = st.lists(
    st.one_of(st.none(), st.floats(0, 100).map(lambda value: round(value, 3))),
    min_size=15,
    max_size=15,
)


def observed(values: Sequence[float | None], seeds: Sequence[int] = (1, 2, 3)) -> list[Observation]:
    keys = [(cell.key, seed) for cell in SMALL for seed in seeds]
    return [
        Observation(key, seed, {"AP": value}) if value is not None
        else Observation(key, seed, failure="lost")
        for (key, seed), value in zip(keys, values, strict=True)
    ]  # fmt: skip


SMALL_QUESTIONS = [Question("y vs x", "y p", "x p"), Question("named", "named", "x q")]


def study(values: Sequence[float | None], seeds: Sequence[int] = (1, 2, 3)) -> Analysis:
    return analyse(SMALL, observed(values, seeds), questions=SMALL_QUESTIONS)


@few
@given(studies)
def test_no_number_is_ever_not_a_number(values: list[float | None]):
    analysis = study(values)

    assert all(math.isfinite(number) for number in numbers(analysis))
    assert len(analysis.verdicts) == 2
    things: list[CellDifference | Effect] = [
        *analysis.differences,
        *analysis.answers,
        *analysis.effects,
    ]
    for thing in things:
        assert (thing.interval is None) == (thing.p is None) == (thing.p_holm is None)
        assert thing.note or thing.interval is not None
        if thing.p is not None and thing.p_holm is not None:
            assert thing.p <= thing.p_holm <= 1


@few
@given(studies, st.permutations([1, 2, 3]), st.randoms(use_true_random=False))
def test_which_seed_is_which_and_the_order_of_results_change_nothing(
    values: list[float | None], seeds: list[int], rng: random.Random
):
    before = study(values)
    shuffled = observed(values, seeds)
    rng.shuffle(shuffled)
    after = analyse(SMALL, shuffled, questions=SMALL_QUESTIONS)

    skipped = ("seeds", "values", "failures")
    assert numbers(after, skipped) == pytest.approx(numbers(before, skipped), rel=1e-6, abs=1e-7)


@few
@given(studies, st.floats(-50, 50).map(lambda value: round(value, 2)))
def test_shifting_all_results_shifts_the_means_and_nothing_else(
    values: list[float | None], shift: float
):
    before = study(values)
    after = study([None if value is None else value + shift for value in values])

    for one, other in zip(before.cells, after.cells, strict=True):
        assert (one.mean is None) == (other.mean is None)
        if one.mean is not None and other.mean is not None:
            assert other.mean - one.mean == pytest.approx(shift, abs=1e-7)
    for name in ("effects", "terms", "differences", "answers", "noise"):
        found, wanted = numbers(getattr(after, name)), numbers(getattr(before, name))
        assert found == pytest.approx(wanted, rel=1e-5, abs=1e-6)


@few
@given(studies)
def test_a_question_turned_round_has_the_opposite_answer(values: list[float | None]):
    there = analyse(SMALL, observed(values), questions=[Question("t", "y p", "x p")]).answers[0]
    back = analyse(SMALL, observed(values), questions=[Question("t", "x p", "y p")]).answers[0]

    assert (there.estimate is None) == (back.estimate is None)
    if there.estimate is not None and back.estimate is not None:
        assert there.estimate == pytest.approx(-back.estimate, abs=1e-9)
        assert there.p == pytest.approx(back.p) if there.p is not None else back.p is None


def test_one_seed_separates_nothing_from_noise():
    analysis = analyse(SMALL, observed([50, None, None] * 5), questions=SMALL_QUESTIONS)

    assert analysis.noise.residual_sd is None
    assert "one seed" in analysis.noise.note
    assert analysis.verdicts[0] == (
        "y vs x: 0.00 AP; one seed (or as many unknowns as results) cannot separate a "
        "difference from noise"
    )


def test_results_without_any_scatter_are_not_taken_for_certainty():
    analysis = study([50, 50, 50] * 3 + [49, 49, 49] * 2)

    assert analysis.noise.residual_sd == 0
    assert "exactly the same" in analysis.noise.note
    assert all(answer.p is None for answer in analysis.answers)
    assert "exactly the same" in analysis.verdicts[0]


def test_a_cell_without_results_leaves_open_what_needs_it_and_nothing_else():
    values: list[float | None] = [50.1, 50.3, 49.9, 50.4, 50.2, 50.3] + [None] * 3
    values += [49.9, 49.7, 49.8, 50.0, 50.5, 50.1]

    analysis = study(values)

    assert analysis.cells[2].note == "no values"
    assert analysis.verdicts[0] == "y vs x: no answer; no result of y p"
    assert "±" in analysis.verdicts[1]
    assert [effect.note for effect in analysis.effects] == ["no result of y p"] * 3
    assert "3 trials failed and are left out" in analysis.notes[0]
    assert any("No result yet of y p" in note for note in analysis.notes)


def test_seeds_that_connect_no_two_cells_are_not_compared():
    observations = [Observation("x p", seed, {"AP": 50.0 + seed / 10}) for seed in (1, 2)] + [
        Observation("y p", seed, {"AP": 49.0 + seed / 7}) for seed in (3, 4)
    ]

    analysis = analyse(SMALL, observations, questions=SMALL_QUESTIONS[:1])

    assert "not run with the same seeds" in analysis.verdicts[0]
    assert analysis.differences[1].note == "no seed has a result of both"


def test_a_metric_that_is_not_finite_is_a_failed_trial():
    observations = [
        Observation("x p", 1, {"AP": math.nan}),
        Observation("x p", 2, {"AP50": 70.0}),
        Observation("x p", 3, {"AP": 50.0}),
    ]

    summary = analyse(SMALL, observations).cell("x p")

    assert summary.values == {3: 50.0}
    assert set(summary.failures) == {1, 2}
    assert "no finite AP" in summary.failures[1]


def test_cells_that_train_alike_share_their_results():
    cells = [*SMALL[:4], Cell("again", {}, {}, same_as="x p")]
    observations = [o for o in observed([50.0, 50.2, 50.1] * 5) if o.cell != "named"]

    analysis = analyse(cells, observations, questions=[Question("again", "again", "x p")])

    assert analysis.cell("again").mean == analysis.cell("x p").mean
    assert analysis.verdicts[0] == "again: 0.00 AP; they train exactly alike"
    assert any("run once: again as x p" in note for note in analysis.notes)


@pytest.mark.parametrize(
    ("observations", "words"),
    [
        ([Observation("z", 1)], "names 'z', which is no cell of the design"),
        ([Observation("x p", 1, {"AP": 1.0})] * 2, "two results name cell 'x p' with seed 1"),
    ],
)
def test_results_that_do_not_fit_the_design_are_refused(
    observations: list[Observation], words: str
):
    with pytest.raises(ValueError, match=words):
        analyse(SMALL, observations)


def test_a_question_about_an_unknown_cell_is_refused():
    with pytest.raises(ValueError, match="no cell 'z'; its cells are 'x p'"):
        analyse(SMALL, observed([50.0] * 15), questions=[Question("t", "z", "x p")])


NOISE = Noise(0.2, 6, Interval(0.13, 0.44), 0.25, 8, 0.36)
QUESTION = Question("16 vs 8 at equal rate per sample", "16, 2×", "8, 1×", "16", "8", relevant=0.3)


def answer(estimate: float, half: float, p: float, p_holm: float | None = None) -> CellDifference:
    interval = Interval(estimate - half, estimate + half)
    corrected = p if p_holm is None else p_holm
    return CellDifference(
        title="t", first="16, 2×", second="8, 1×", method="pooled", seeds=(1, 2, 3),
        estimate=estimate, standard_error=0.1, df=6, interval=interval, p=p, p_holm=corrected,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("difference", "sentence"),
    [
        (answer(-0.11, 0.32, 0.4), "−0.1 ± 0.3 AP; not distinguishable with 3 seeds; 10 would be "
                                   "needed for 0.3"),
        (answer(-0.62, 0.21, 0.0004), "−0.6 ± 0.2 AP; 16 is lower (p < 0.001, 3 seeds)"),
        (answer(0.62, 0.21, 0.004), "0.6 ± 0.2 AP; 16 is higher (p = 0.004, 3 seeds)"),
        (answer(0.12, 0.11, 0.02), "0.12 ± 0.11 AP; 16 is higher (p = 0.02, 3 seeds), by less than "
                                   "the 0.3 that would matter"),
        (answer(-0.01, 0.21, 0.9), "0.0 ± 0.2 AP; not distinguishable with 3 seeds; a difference "
                                   "of 0.3 is excluded"),
        (answer(-0.4, 0.3, 0.03, 0.09), "−0.4 ± 0.3 AP; not distinguishable with 3 seeds once the "
                                        "comparisons are corrected for (p = 0.03 alone, 0.09 among "
                                        "them); 10 would be needed for 0.3"),
    ],
)  # fmt: skip
def test_a_verdict_is_a_plain_sentence(difference: CellDifference, sentence: str):
    found = verdict(QUESTION, difference, "AP", NOISE, num_cells=2)

    assert found == f"16 vs 8 at equal rate per sample: {sentence}"


def test_numbers_are_rounded_to_their_noise():
    assert plus_minus(-0.123, 0.345) == "−0.1 ± 0.3"
    assert plus_minus(-0.123, 0.145) == "−0.12 ± 0.14"
    assert plus_minus(12.3, 4.2) == "12 ± 4"
    assert plus_minus(0.5, 0.097) == "0.50 ± 0.10"
    assert plus_minus(0.00012, 0.00002) == "0.000 ± 0.000"
    assert signed(-0.04, 1) == "0.0"
    assert decimals_for(None) == decimals_for(0.0) == 2


PATH = [("x p", ""), ("y p", "a"), ("named", "the rest")]
PUBLISHED = (Anchor("one", 50.0, 8, "a README"), Anchor("other", 49.4, 16, "a README"))


@few
@given(studies)
def test_steps_add_up_to_the_whole(values: list[float | None]):
    found = decompose(SMALL, observed(values), PATH)

    estimates = [step.difference.estimate for step in found.steps]
    if None not in estimates and found.whole.estimate is not None:
        assert sum(e for e in estimates if e is not None) == pytest.approx(found.whole.estimate)
        shares = [step.share for step in found.steps]
        if None not in shares:
            assert sum(s for s in shares if s is not None) == pytest.approx(1)
    assert all(math.isfinite(number) for number in numbers(found))


def test_a_whole_that_is_told_from_noise_is_shared_out():
    values = [50.0, 50.1, 49.9] * 4 + [49.0, 49.1, 49.0]

    found = decompose(SMALL, observed(values), PATH, published=PUBLISHED)

    assert found.text.startswith(
        "Published are 50.0 AP (one) and 49.4 (other): −0.6 AP between two single runs that differ "
        "in more than one thing. Here, from x p to named: −0.97 ± "
    )
    assert "a 0.00 ± 0.0" in found.text
    assert "Significant by themselves: the rest." in found.text
    assert "the published 0.6 lies beyond that" in found.text
    assert found.steps[1].share == pytest.approx(1)


def test_no_share_is_stated_of_what_may_be_chance():
    generator = np.random.default_rng(3)

    found = decompose(SMALL, observed(list(50 + generator.normal(size=15))), PATH)

    assert all(step.share is None for step in found.steps)
    assert "no share of it is given" in found.text
    assert "%" not in found.text


def test_without_results_there_is_no_decomposition():
    values: list[float | None] = [50.0, 50.1, 49.9] * 4 + [None] * 3

    found = decompose(SMALL, observed(values), PATH)

    assert "unknown (no result of named)" in found.text
    assert found.text.endswith("So no decomposition can be given.")
