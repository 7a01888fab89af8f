"""Tables of a study or a sweep: design, results, trials, costs, failures, provenance."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from deta.platform.pages.content import Cell, Link, Number, Table, table
from deta.platform.pages.number_format import (
    MISSING,
    Interval,
    amount,
    common_decimals,
    duration,
    num_of,
    p_value,
    percent,
    short,
    signed,
)
from deta.platform.study.power import PilotPlan, power_table
from deta.platform.study.study_types import Analysis, Anchor, CellDifference, Decomposition, Effect
from deta.platform.study.trial_record import TrialRecord
from deta.platform.study_report.content import Provenance, StudyReport
from deta.platform.study_report.figures import MeanCurve

DELTAS = (0.1, 0.2, 0.3, 0.5, 1.0)  # differences in points of AP in the power table


def design_table(report: StudyReport) -> Table:
    """Return the cells of a study with their changes, or what a sweep varied."""
    if report.analysis is None:
        return _searched_table(report.trials)
    cells = [summary.cell for summary in report.analysis.cells]
    factors = list(dict.fromkeys(name for cell in cells for name in cell.labels))
    rows = []
    for cell in cells:
        changes = ", ".join(f"{key} = {value_text(value)}" for key, value in cell.changes.items())
        text = f"trains exactly as {cell.same_as}" if cell.same_as else changes or "the base"
        rows.append([cell.key, *(cell.labels.get(name) for name in factors), text])
    seeds = ", ".join(map(str, report.analysis.seeds))
    return table(
        f"The cells. Each is trained with the seeds {seeds}, on equally many samples.",
        ["cell", *factors, "changes to the base configuration"],
        rows,
    )


def _searched_table(trials: Sequence[TrialRecord]) -> Table:
    rows: list[list[Cell]] = []
    for key in varied_keys(trials):
        values = {repr(t.parameters[key]): t.parameters[key] for t in trials if key in t.parameters}
        numbers = [v for v in values.values() if isinstance(v, (int, float)) and v is not True]
        text = ", ".join(value_text(value) for value in list(values.values())[:12])
        if len(numbers) == len(values) > 6:
            text = f"{value_text(min(numbers))} to {value_text(max(numbers))}"
        rows.append([key, text, len(values)])
    return table("Varied parameters.", ["parameter", "values", Number("different values")], rows)


def cells_table(analysis: Analysis) -> Table:
    """Return the mean of each cell with its interval and seeds."""
    digits = _common_digits(cell.interval for cell in analysis.cells)
    rows: list[list[Cell]] = []
    for cell in analysis.cells:
        by_seed = ", ".join(
            signed(cell.values[seed], 2) if seed in cell.values else "failed"
            for seed in analysis.seeds
            if seed in cell.values or seed in cell.failures
        )
        half = f"± {cell.interval.half_width:.{digits}f}" if cell.interval else None
        rows.append(
            [cell.cell.key, cell.mean, half, cell.sd, len(cell.values), by_seed or None, cell.note]
        )
    level, unit = f"{100 * analysis.confidence:g} %", analysis.metric
    seeds = ", ".join(map(str, analysis.seeds))
    return table(
        f"{unit} of each cell: mean over seeds with its {level} interval. It is the interval of a "
        "single cell. To compare two cells, read the differences, which are taken within seeds.",
        ["cell", Number("mean", unit, digits), Number("interval", level),
         Number("sd over seeds", unit, 2), Number("n", "seeds"),
         Number("each seed", f"seeds {seeds}"), "note"],
        rows,
    )  # fmt: skip


def differences_table(
    analysis: Analysis, differences: Sequence[CellDifference], caption: str
) -> Table:
    """Return differences with their tests, before and after Holm's correction."""
    digits = _common_digits(item.interval for item in differences)
    rows: list[list[Cell]] = []
    for item in differences:
        is_distinct = item.is_distinguishable(1 - analysis.confidence)
        verdict = "significant" if is_distinct else "not significant"
        if item.estimate is None or item.p is None:
            verdict = MISSING
        rows.append([item.title, *_tested(item, digits), verdict, len(item.seeds), item.note])
    tests = _test_columns(analysis, digits)
    return table(
        caption, ["difference", *tests, "verdict after Holm", Number("seeds"), "note"], rows
    )


def effects_table(analysis: Analysis) -> Table:
    """Return the main effects and interactions with their tests."""
    digits = _common_digits(effect.interval for effect in analysis.effects)
    return table(
        "Effect of each factor, averaged over the others; of two factors, how much the effect of "
        "one changes with the other.",
        ["effect", *_test_columns(analysis, digits), "note"],
        [[effect.name, *_tested(effect, digits), effect.note] for effect in analysis.effects],
    )


def terms_table(analysis: Analysis) -> Table:
    """Return the F test of each factor."""
    return table(
        "Whether a factor has any effect: F test of all its effects.",
        ["factor", Number("F", "", 2), Number("degrees of freedom"), Number("p"), "note"],
        [[term.name, term.f, f"{term.df}, {term.residual_df}", p_text(term.p), term.note]
         for term in analysis.terms],
    )  # fmt: skip


def curve_table(curves: Mapping[str, MeanCurve], metric: str) -> Table:
    """Return the points of `mean_learning_curves`."""
    return table(
        f"{metric} at each evaluation, of trials that finished.",
        ["cell", Number("samples seen"), Number("mean", metric, 2),
         Number("lowest to highest seed", metric), Number("n", "seeds")],
        [[key, x, curve.mean[i], f"{signed(curve.low[i], 2)} to {signed(curve.high[i], 2)}",
          curve.num_seeds]
         for key, curve in curves.items() for i, x in enumerate(curve.samples)],
    )  # fmt: skip


def steps_table(decomposition: Decomposition, metric: str) -> Table:
    """Return the effect of each change between two published systems."""
    digits = _common_digits(step.difference.interval for step in decomposition.steps)
    rows: list[list[Cell]] = [
        [title, item.estimate, _range(item.interval, digits),
         None if share is None else percent(share), item.note]
        for title, item, share in [
            *((step.title, step.difference, step.share) for step in decomposition.steps),
            ("together", decomposition.whole, None),
        ]
    ]  # fmt: skip
    return table(
        "The published pair, one change at a time, as measured here.",
        ["what changes", Number("effect", metric, digits), Number("interval"), Number("share"),
         "note"],
        rows,
    )  # fmt: skip


def anchors_table(anchors: Sequence[Anchor]) -> Table:
    """Return the published results that a study is compared with."""
    return table(
        "Published numbers: box AP on COCO val2017.",
        ["system", Number("AP", "", 1), Number("total batch"), "setting", "source"],
        [[one.label, one.ap, one.total_batch_size, one.note, one.source] for one in anchors],
    )


@dataclass(frozen=True)
class CostKind:
    """A cost by which a report can compare trials."""

    title: str
    unit: str
    of: Callable[[TrialRecord], float | None]


COST_KINDS = (
    CostKind("GPU time of one training", "GPU-hours", lambda trial: trial.cost.gpu_hours or None),
    CostKind("CPU time of one training", "CPU-hours", lambda trial: trial.cost.cpu_hours or None),
    CostKind("wall time of one training", "s", lambda trial: trial.cost.wall_s or None),
)


def cost_kind(trials: Sequence[TrialRecord]) -> CostKind | None:
    """Return the first of `COST_KINDS` that every finished trial has."""
    finished = [trial for trial in trials if trial.status == "finished"]
    for kind in COST_KINDS:
        if finished and all(kind.of(trial) is not None for trial in finished):
            return kind
    return None


def cost_table(report: StudyReport) -> Table:
    """Return the mean cost of a finished trial of each cell."""
    rows: list[list[Cell]] = []
    for key in report.cell_names:
        trials = [t for t in report.trials if t.cell == key and t.status == "finished"]
        if not trials:
            continue
        costs = [t.cost for t in trials]
        wall_s, ap = _mean(c.wall_s for c in costs), _mean(t.ap for t in trials)
        hours = [[c.gpu_hours for c in costs], [c.cpu_hours for c in costs]]
        speed = amount_text(_mean(c.images_per_s for c in costs))
        rows.append(
            [key, len(trials), ap, speed, None if wall_s is None else duration(wall_s),
             *(amount_text(_mean(values)) for values in hours)]
        )  # fmt: skip
    return table(
        "Cost of one training of each cell: the mean of its finished trials.",
        ["cell", Number("trials"), Number("mean", report.metric, 2), Number("speed", "images/s"),
         Number("wall time"), Number("GPU time", "GPU-hours"), Number("CPU time", "CPU-hours")],
        rows,
    )  # fmt: skip


def trials_table(report: StudyReport) -> Table:
    """Return every trial with its parameters and its result."""
    keys = [key for key in varied_keys(report.trials) if key != "seed"]
    kind = cost_kind(report.trials)
    rows: list[list[Cell]] = [
        [Link(trial.name, trial.run_url), str(trial.seed), trial.status, trial.ap,
         amount_text(kind.of(trial) if kind else None),
         *(value_text(trial.parameters[key]) if key in trial.parameters else None for key in keys)]
        for trial in report.trials
    ]  # fmt: skip
    return table(
        "Every trial. Parameters that are equal in all of them are left out.",
        ["trial", Number("seed"), "status", Number("result", report.metric, 2),
         Number("cost", kind.unit if kind else ""), *map(Number, keys)],
        rows,
    )  # fmt: skip


def required_seeds_table(report: StudyReport, pilot: PilotPlan) -> Table:
    """Return the seeds that each difference needs, at the measured noise and at its upper limit."""
    kind = cost_kind(report.trials)
    num_cells = len({trial.cell for trial in report.trials})
    finished = [trial for trial in report.trials if trial.status == "finished"]
    each = _mean(kind.of(trial) for trial in finished) if kind else None
    deltas = sorted({*DELTAS, report.relevant})
    rows: list[list[Cell]] = []
    for row, bad in zip(
        power_table(pilot.estimate, deltas, num_cells=num_cells),
        power_table(pilot.cautious, deltas, num_cells=num_cells),
        strict=True,
    ):
        cost = None if each is None or row.num_trials is None else each * row.num_trials
        is_time = cost is not None and kind is not None and kind.unit == "s"
        rows.append(
            [short(row.delta), count_text(row.seeds), count_text(row.num_trials),
             duration(cost or 0) if is_time else amount_text(cost),
             count_text(bad.seeds), count_text(bad.num_trials)]
        )  # fmt: skip
    unit = kind.unit if kind and kind.unit != "s" else ""
    return table(
        f"Seeds of each of the {num_of(num_cells, 'cell')} that detect a true difference four "
        "times in five (80 % power, one comparison at 5 %).",
        [f"difference, {report.metric}", Number("seeds", "of each cell"),
         Number("trials", "in all"), Number("cost", unit), Number("seeds", "at worst"),
         Number("trials", "at worst")],
        rows,
    )  # fmt: skip


def failures_table(report: StudyReport) -> Table:
    """Return the trials that did not finish, with their reasons."""
    return table(
        "Trials without a final result, with the reason. No result is imputed for them.",
        ["trial", "status", "reason", Number("samples seen"),
         Number(f"last {report.metric}", "", 2)],
        [[Link(t.name, t.run_url), t.status, t.reason or "no reason recorded",
          t.curve[-1][0] if t.curve else None, t.ap]
         for t in report.trials if t.status != "finished"],
    )  # fmt: skip


def how_table(how: Provenance) -> Table:
    """Return what a person needs to run the study again."""
    rows = {
        "command": how.command,
        "code commit": how.code_commit,
        "training data": how.train_fingerprint,
        "validation data": how.val_fingerprint,
        "hardware": how.hardware,
        "began": f"{how.began:%Y-%m-%d %H:%M:%S %Z}" if how.began else "",
        "ended": f"{how.ended:%Y-%m-%d %H:%M:%S %Z}" if how.ended else "",
        "versions": ", ".join(f"{name} {version}" for name, version in how.versions.items()),
    }
    given = [item for item in rows.items() if item[1]]
    return table("What is needed to run this again.", ["what", "value"], given)


def changed_table(how: Provenance) -> Table:
    """Return where the base configuration differs from the defaults."""
    return table(
        "Where the base configuration of this study differs from the defaults.",
        ["key", "default", "here"],
        [[key, value_text(old), value_text(new)] for key, (old, new) in how.changed.items()],
    )


def varied_keys(trials: Sequence[TrialRecord]) -> list[str]:
    """Return the parameters that differ between trials."""
    keys = dict.fromkeys(key for trial in trials for key in trial.parameters)
    return [
        key
        for key in keys
        if len({repr(trial.parameters.get(key, MISSING)) for trial in trials}) > 1
    ]


def value_text(value: Any) -> str:
    """Return a value of a configuration as a person writes it."""
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, (list, tuple)):
        return ", ".join(map(value_text, value)) or "nothing"
    return str(value)


def p_text(value: float | None) -> str | None:
    """Return a p value for a column with the title p."""
    return None if value is None else p_value(value).removeprefix("p ").removeprefix("= ")


def amount_text(value: float | None) -> str | None:
    """Return a number with three digits."""
    return None if value is None else amount(value)


def count_text(value: int | None) -> str:
    """Return a number of seeds or trials; None is beyond the search."""
    return "over 10,000" if value is None else f"{value:,}"


def _test_columns(analysis: Analysis, digits: int) -> list[Number]:
    interval = Number("interval", f"{100 * analysis.confidence:g} %")
    estimate = Number("estimate", analysis.metric, digits)
    return [estimate, interval, Number("p"), Number("p", "after Holm")]


def _tested(item: CellDifference | Effect, digits: int) -> list[Cell]:
    return [item.estimate, _range(item.interval, digits), p_text(item.p), p_text(item.p_holm)]


def _range(interval: Interval | None, digits: int) -> str | None:
    if interval is None:
        return None
    return f"{signed(interval.low, digits)} to {signed(interval.high, digits)}"


def _common_digits(intervals: Iterable[Interval | None]) -> int:
    return common_decimals([interval.half_width for interval in intervals if interval])


def _mean(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None
