"""Answer a question of a study in one plain sentence."""

from __future__ import annotations

from deta.platform.pages.number_format import num_of, p_value, plus_minus, short, signed
from deta.platform.study.power import ALPHA, POWER, StudyPlan
from deta.platform.study.study_types import CellDifference, Noise, Question


def verdict(
    question: Question,
    answer: CellDifference,
    metric: str,
    noise: Noise,
    num_cells: int,
    alpha: float = ALPHA,
) -> str:
    """Return the sentence that answers a question.

    For example "16 vs 8 at equal rate per sample: −0.1 ± 0.3 AP; not distinguishable with 3 seeds;
    9 would be needed for 0.3". ± is half the interval of the analysis (95 % by default). "Needed"
    is for a power of 80 % at the measured noise.

    Args:
        answer: pooled, corrected for all questions.
        num_cells: cells whose noise is pooled.
    """
    title = f"{question.title}: "
    if answer.estimate is None:
        return f"{title}no answer; {answer.note}"
    if answer.interval is None:
        return f"{title}{signed(answer.estimate, 2)} {metric}; {answer.note}"
    seeds = num_of(len(answer.seeds), "seed")
    found = f"{title}{plus_minus(answer.estimate, answer.interval.half_width)} {metric}"
    size = answer.interval
    is_small = max(abs(size.low), abs(size.high)) < question.relevant
    relevant = short(question.relevant)
    assert answer.p is not None
    assert answer.p_holm is not None
    if answer.is_distinguishable(alpha):
        higher = answer.estimate > 0
        name = question.first_name or question.first
        text = f"{found}; {name} is {'higher' if higher else 'lower'} ({p_value(answer.p_holm)}"
        text += f", {seeds})"
        return text + (f", by less than the {relevant} that would matter" if is_small else "")
    text = f"{found}; not distinguishable with {seeds}"
    if answer.p < alpha:
        text += (
            f" once the comparisons are corrected for ({p_value(answer.p)} alone, "
            f"{answer.p_holm:.2f} among them)"
        )
    if is_small:
        return f"{text}; a difference of {relevant} is excluded"
    assert noise.residual_sd  # there is an interval, so there is noise
    plan = StudyPlan(noise.residual_sd, num_cells=num_cells, alpha=alpha)
    return f"{text}; {_needed(plan, question.relevant, len(answer.seeds))}"


def _needed(plan: StudyPlan, relevant: float, num_seeds: int) -> str:
    needed = plan.seeds_for(relevant)
    if needed is None:
        return f"no affordable number would be enough for {short(relevant)}"
    if needed <= num_seeds:
        return f"enough to find {short(relevant)} in {100 * POWER:.0f} % of such studies"
    return f"{needed} would be needed for {short(relevant)}"
