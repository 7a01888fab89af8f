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
    size = answer.interval
    if size is None:
        return f"{title}{signed(answer.estimate, 2)} {metric}; {answer.note}"
    assert answer.p is not None
    assert answer.p_holm is not None
    num_seeds, relevant = len(answer.seeds), short(question.relevant)
    seeds = num_of(num_seeds, "seed")
    text = f"{title}{plus_minus(answer.estimate, size.half_width)} {metric}; "
    is_small = max(abs(size.low), abs(size.high)) < question.relevant
    if answer.is_distinguishable(alpha):
        text += f"{question.first_name or question.first} is "
        text += (
            f"{'higher' if answer.estimate > 0 else 'lower'} ({p_value(answer.p_holm)}, {seeds})"
        )
        return text + (f", by less than the {relevant} that would matter" if is_small else "")
    text += f"not distinguishable with {seeds}"
    if answer.p < alpha:
        text += (
            f" once the comparisons are corrected for ({p_value(answer.p)} alone, "
            f"{answer.p_holm:.2f} among them)"
        )
    if is_small:
        return f"{text}; a difference of {relevant} is excluded"
    assert noise.residual_sd  # there is an interval, so there is noise
    plan = StudyPlan(noise.residual_sd, num_cells=num_cells, alpha=alpha)
    needed = plan.seeds_for(question.relevant)
    if needed is None:
        return f"{text}; no affordable number would be enough for {relevant}"
    if needed <= num_seeds:
        return f"{text}; enough to find {relevant} in {100 * POWER:.0f} % of such studies"
    return f"{text}; {needed} would be needed for {relevant}"
