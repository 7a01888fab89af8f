"""The tables of a study or a sweep; the page and the summary show the same ones."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from deta.platform.pages.content import Column, Link, Table
from deta.platform.pages.number_format import (
    Interval,
    common_decimals,
    duration,
    num_of,
    p_value,
    short,
    signed,
)
from deta.platform.study.power import PilotPlan, power_table
from deta.platform.study.study_types import Analysis, Anchor, CellDifference, Decomposition
from deta.platform.study.trial_record import TrialRecord
from deta.platform.study_report.content import Provenance, StudyReport

NOTHING = "–"
DELTAS = (0.1, 0.2, 0.3, 0.5, 1.0)  # differences in points of AP that the power table asks for


@dataclass(frozen=True)
class CostKind:
    """The cost that a report compares by: the first of these that every finished trial has."""

    title: str
    unit: str
    of: Callable[[TrialRecord], float | None]


COST_KINDS = (
    CostKind("GPU time of one training", "GPU-hours", lambda trial: trial.cost.gpu_hours or None),
    CostKind("CPU time of one training", "CPU-hours", lambda trial: trial.cost.cpu_hours or None),
    CostKind("wall time of one training", "s", lambda trial: trial.cost.wall_s or None),
)


def cost_kind(trials: Sequence[TrialRecord]) -> CostKind | None:
    finished = [trial for trial in trials if trial.status == "finished"]
    for kind in COST_KINDS:
        if finished and all(kind.of(trial) is not None for trial in finished):
            return kind
    return None


def facts(report: StudyReport) -> str:
    """The line below the verdict: how much was run, and when."""
    parts = []
    if report.analysis:
        own = [cell for cell in report.analysis.cells if not cell.cell.same_as]
        parts.append(f"{num_of(len(own), 'cell')} × {num_of(len(report.analysis.seeds), 'seed')}")
    count = dict.fromkeys(("finished", "stopped", "failed", "running", "waiting"), 0)
    for trial in report.trials:
        count[trial.status] += 1
    states = ", ".join(f"{number} {status}" for status, number in count.items() if number)
    parts.append(f"{num_of(len(report.trials), 'trial')}: {states}")
    for unit, values in (
        ("GPU-hours", [t.cost.gpu_hours for t in report.trials]),
        ("CPU-hours", [t.cost.cpu_hours for t in report.trials]),
    ):
        if total := sum(value or 0.0 for value in values):
            parts.append(f"{amount(total)} {unit} in all")
    how = report.provenance
    if how.began and how.ended:
        hours = (how.ended - how.began).total_seconds() / 3600
        parts.append(f"{duration(3600 * hours)}, ended {how.ended:%Y-%m-%d %H:%M %Z}".strip())
    return " · ".join(parts)


def design_table(report: StudyReport) -> Table | None:
    if report.analysis is None:
        return None
    cells = [summary.cell for summary in report.analysis.cells]
    factors = list(dict.fromkeys(name for cell in cells for name in cell.labels))
    rows = []
    for cell in cells:
        changes = ", ".join(f"{key} = {show(value)}" for key, value in cell.changes.items())
        text = f"trains exactly as {cell.same_as}" if cell.same_as else changes or "the base"
        rows.append([cell.key, *(cell.labels.get(name, NOTHING) for name in factors), text])
    seeds = ", ".join(map(str, report.analysis.seeds))
    return Table(
        caption=f"The cells. Each is trained with the seeds {seeds}, on equally many samples.",
        columns=[Column(title="cell"), *(Column(title=name) for name in factors),
                 Column(title="changes to the base configuration")],
        rows=rows,
    )  # fmt: skip


def searched_table(report: StudyReport) -> Table | None:
    """Of a sweep: what was varied, and between which values."""
    rows = []
    for key in varied_keys(report.trials):
        values = {repr(t.parameters[key]): t.parameters[key]
                  for t in report.trials if key in t.parameters}  # fmt: skip
        numbers = [v for v in values.values() if isinstance(v, (int, float)) and v is not True]
        if len(numbers) == len(values) and len(values) > 6:
            text = f"{show(min(numbers))} to {show(max(numbers))}"
        else:
            text = ", ".join(show(value) for value in list(values.values())[:12])
        rows.append([key, text, str(len(values))])
    if not rows:
        return None
    return Table(
        caption="What was varied.",
        columns=[Column(title="parameter"), Column(title="values"),
                 Column(title="different values", is_number=True)],
        rows=rows,
    )  # fmt: skip


def cells_table(analysis: Analysis) -> Table:
    rows = []
    digits = _digits([cell.interval for cell in analysis.cells])
    for cell in analysis.cells:
        half = cell.interval.half_width if cell.interval else None
        by_seed = ", ".join(
            f"{signed(cell.values[seed], 2)}" if seed in cell.values else "failed"
            for seed in analysis.seeds
            if seed in cell.values or seed in cell.failures
        )
        rows.append(
            [
                cell.cell.key,
                NOTHING if cell.mean is None else signed(cell.mean, digits),
                NOTHING if half is None else f"± {half:.{digits}f}",
                NOTHING if cell.sd is None else f"{cell.sd:.2f}",
                str(len(cell.values)),
                by_seed or NOTHING,
                cell.note,
            ]
        )
    seeds = ", ".join(map(str, analysis.seeds))
    percent = f"{100 * analysis.confidence:g} %"
    return _without_empty(
        Table(
            caption=f"{analysis.metric} of each cell: mean over seeds with its {percent} "
            "interval. This interval speaks of a cell by itself; to compare two cells, read the "
            "differences, which are taken within seeds.",
            columns=[
                Column(title="cell"),
                Column(title="mean", unit=analysis.metric, is_number=True),
                Column(title="interval", unit=percent, is_number=True),
                Column(title="sd over seeds", unit=analysis.metric, is_number=True),
                Column(title="n", unit="seeds", is_number=True),
                Column(title="each seed", unit=f"seeds {seeds}", is_number=True),
                Column(title="note"),
            ],
            rows=rows,
        )
    )


def differences_table(
    analysis: Analysis, differences: Sequence[CellDifference], caption: str
) -> Table:
    rows = []
    digits = _digits([item.interval for item in differences])
    for item in differences:
        distinct = item.is_distinguishable(1 - analysis.confidence)
        rows.append(
            [
                item.title,
                *_estimate(item.estimate, item.interval, digits),
                _p(item.p),
                _p(item.p_holm),
                NOTHING if item.estimate is None or item.p is None
                else "told from noise" if distinct else "not told from noise",
                str(len(item.seeds)),
                item.note,
            ]
        )  # fmt: skip
    return _without_empty(
        Table(
            caption=caption,
            columns=[Column(title="difference"), *_estimate_columns(analysis),
                     Column(title="p", is_number=True),
                     Column(title="p", unit="after Holm", is_number=True),
                     Column(title="verdict", unit="after Holm"),
                     Column(title="seeds", is_number=True), Column(title="note")],
            rows=rows,
        )
    )  # fmt: skip


def effects_table(analysis: Analysis) -> Table:
    digits = _digits([effect.interval for effect in analysis.effects])
    rows = [
        [effect.name, *_estimate(effect.estimate, effect.interval, digits), _p(effect.p),
         _p(effect.p_holm), effect.note]
        for effect in analysis.effects
    ]  # fmt: skip
    return _without_empty(
        Table(
            caption="Effect of each factor, averaged over the others; of two factors, how much "
            "the effect of one changes with the other.",
            columns=[Column(title="effect"), *_estimate_columns(analysis),
                     Column(title="p", is_number=True),
                     Column(title="p", unit="after Holm", is_number=True), Column(title="note")],
            rows=rows,
        )
    )  # fmt: skip


def terms_table(analysis: Analysis) -> Table:
    rows = [
        [term.name, NOTHING if term.f is None else f"{term.f:.2f}",
         f"{term.df}, {term.residual_df}", _p(term.p), term.note]
        for term in analysis.terms
    ]  # fmt: skip
    return _without_empty(
        Table(
            caption="Whether a factor does anything at all: F test of all its effects.",
            columns=[Column(title="factor"), Column(title="F", is_number=True),
                     Column(title="degrees of freedom", is_number=True),
                     Column(title="p", is_number=True), Column(title="note")],
            rows=rows,
        )
    )  # fmt: skip


def curve_table(curves: Mapping[str, Any], metric: str) -> Table:
    """Args: curves: `sweep_figures.mean_curves`."""
    rows = [
        [key, f"{x:,}", signed(curve.mean[i], 2),
         f"{signed(curve.low[i], 2)} to {signed(curve.high[i], 2)}", str(curve.num_seeds)]
        for key, curve in curves.items()
        for i, x in enumerate(curve.samples)
    ]  # fmt: skip
    return Table(
        caption=f"{metric} at each evaluation, of trials that finished.",
        columns=[Column(title="cell"), Column(title="samples seen", is_number=True),
                 Column(title="mean", unit=metric, is_number=True),
                 Column(title="lowest to highest seed", unit=metric, is_number=True),
                 Column(title="n", unit="seeds", is_number=True)],
        rows=rows,
    )  # fmt: skip


def cost_table(report: StudyReport) -> Table:
    """What one training of each cell cost, on average over its finished trials."""
    rows = []
    for key in report.cell_names:
        trials = [t for t in report.trials if t.cell == key and t.status == "finished"]
        if not trials:
            continue

        def mean(of: Callable[[TrialRecord], float | None], ours: Any = trials) -> float | None:
            values = [value for trial in ours if (value := of(trial)) is not None]
            return sum(values) / len(values) if values else None

        wall_s = mean(lambda t: t.cost.wall_s)
        price = mean(lambda t: t.cost.price)
        rows.append(
            [
                key,
                str(len(trials)),
                NOTHING if (ap := mean(lambda t: t.ap)) is None else signed(ap, 2),
                _number(mean(lambda t: t.cost.images_per_s)),
                NOTHING if wall_s is None else duration(wall_s),
                _number(mean(lambda t: t.cost.gpu_hours)),
                _number(mean(lambda t: t.cost.cpu_hours)),
                _number(mean(lambda t: t.cost.energy_kwh)),
                NOTHING if price is None else f"{price:,.2f} {trials[0].cost.currency}",
            ]
        )
    return _without_empty(
        Table(
            caption="What one training of each cell cost, on average over its finished trials.",
            columns=[Column(title="cell"),
                     *(Column(title=title, unit=unit, is_number=True) for title, unit in (
                         ("trials", ""), ("mean", report.metric), ("speed", "images/s"),
                         ("wall time", ""), ("GPU time", "GPU-hours"), ("CPU time", "CPU-hours"),
                         ("energy", "kWh"), ("price", "")))],
            rows=rows,
        ),
        also=NOTHING,
    )  # fmt: skip


def trials_table(report: StudyReport) -> Table:
    """Every trial with what it was given and what came out."""
    keys = [key for key in varied_keys(report.trials) if key != "seed"]
    kind = cost_kind(report.trials)
    rows: list[list[str | Link]] = []
    for trial in report.trials:
        cost = kind.of(trial) if kind else None
        rows.append(
            [
                Link(trial.name, trial.run_url),
                str(trial.seed),
                trial.status,
                NOTHING if trial.ap is None else signed(trial.ap, 2),
                _number(cost),
                *(show(trial.parameters[key]) if key in trial.parameters else NOTHING
                  for key in keys),
            ]
        )  # fmt: skip
    return _without_empty(
        Table(
            caption="Every trial. Parameters that are the same in all of them are left out.",
            columns=[Column(title="trial"), Column(title="seed", is_number=True),
                     Column(title="status"),
                     Column(title="result", unit=report.metric, is_number=True),
                     Column(title="cost", unit=kind.unit if kind else "", is_number=True),
                     *(Column(title=key, is_number=True) for key in keys)],
            rows=rows,
        ),
        also=NOTHING,
    )  # fmt: skip


def power_rows(report: StudyReport, pilot: PilotPlan) -> Table:
    """What each difference would need, by the noise measured and at its worst."""
    finished = [trial for trial in report.trials if trial.status == "finished"]
    kind = cost_kind(report.trials)
    num_cells = len({trial.cell for trial in report.trials})
    each = None
    if kind and finished:
        each = sum(kind.of(trial) or 0.0 for trial in finished) / len(finished)
    deltas = sorted({*DELTAS, report.relevant})
    worst = power_table(pilot.cautious, deltas, num_cells=num_cells)
    rows = []
    for row, bad in zip(
        power_table(pilot.estimate, deltas, num_cells=num_cells), worst, strict=True
    ):
        cost = None if each is None or row.num_trials is None else each * row.num_trials
        if cost is not None and kind is not None and kind.unit == "s":
            cost_text = duration(cost)
        else:
            cost_text = _number(cost)
        rows.append(
            [short(row.delta), _count(row.seeds), _count(row.num_trials), cost_text,
             _count(bad.seeds), _count(bad.num_trials)]
        )  # fmt: skip
    unit = kind.unit if kind and kind.unit != "s" else ""
    return Table(
        caption=f"Seeds of each of the {num_of(num_cells, 'cell')} that tell a true difference "
        "from noise four times in five (80 % power, one comparison at 5 %).",
        columns=[Column(title="difference", unit=report.metric),
                 *(Column(title=title, unit=sub, is_number=True) for title, sub in (
                     ("seeds", "of each cell"), ("trials", "in all"), ("cost", unit),
                     ("seeds", "at worst"), ("trials", "at worst")))],
        rows=rows,
    )  # fmt: skip


def failures_table(report: StudyReport) -> Table | None:
    rows: list[list[str | Link]] = [
        [
            Link(trial.name, trial.run_url),
            trial.status,
            trial.reason or "no reason was given",
            f"{trial.curve[-1][0]:,}" if trial.curve else NOTHING,
            NOTHING if trial.ap is None else signed(trial.ap, 2),
        ]
        for trial in report.trials
        if trial.status != "finished"
    ]
    if not rows:
        return None
    return Table(
        caption="Trials without a final result, and why. They are counted and never filled in.",
        columns=[Column(title="trial"), Column(title="status"), Column(title="reason"),
                 Column(title="samples seen", is_number=True),
                 Column(title=f"last {report.metric}", is_number=True)],
        rows=rows,
    )  # fmt: skip


def anchors_table(anchors: Sequence[Anchor]) -> Table:
    rows = [
        [anchor.label, f"{anchor.ap:.1f}", str(anchor.total_batch_size), anchor.note, anchor.source]
        for anchor in anchors
    ]
    return _without_empty(
        Table(
            caption="Published numbers: box AP on COCO val2017.",
            columns=[Column(title="system"), Column(title="AP", is_number=True),
                     Column(title="total batch", is_number=True), Column(title="setting"),
                     Column(title="source")],
            rows=rows,
        )
    )  # fmt: skip


def steps_table(decomposition: Decomposition, metric: str) -> Table:
    rows = []
    digits = _digits([step.difference.interval for step in decomposition.steps])
    for title, item, share in [
        *((step.title, step.difference, step.share) for step in decomposition.steps),
        ("together", decomposition.whole, None),
    ]:
        text = NOTHING if share is None else f"{signed(100 * share, 0)} %"
        rows.append([title, *_estimate(item.estimate, item.interval, digits), text, item.note])
    return _without_empty(
        Table(
            caption="The published pair, one change at a time, as measured here.",
            columns=[Column(title="what changes"), Column(title="effect", unit=metric,
                     is_number=True), Column(title="interval", is_number=True),
                     Column(title="share", is_number=True), Column(title="note")],
            rows=rows,
        ),
        also=NOTHING,
    )  # fmt: skip


def how_table(how: Provenance) -> Table:
    rows = [
        ("command", how.command),
        ("code commit", how.code_commit),
        ("training data", how.train_fingerprint),
        ("validation data", how.val_fingerprint),
        ("hardware", how.hardware),
        ("began", f"{how.began:%Y-%m-%d %H:%M:%S %Z}" if how.began else ""),
        ("ended", f"{how.ended:%Y-%m-%d %H:%M:%S %Z}" if how.ended else ""),
        ("versions", ", ".join(f"{name} {version}" for name, version in how.versions.items())),
    ]
    return Table(
        caption="What it takes to run this again.",
        columns=[Column(title="what"), Column(title="value")],
        rows=[[name, value] for name, value in rows if value],
    )


def changed_table(how: Provenance) -> Table | None:
    if not how.changed:
        return None
    return Table(
        caption="Where the base configuration of this study differs from the defaults.",
        columns=[Column(title="key"), Column(title="default"), Column(title="here")],
        rows=[[key, show(old), show(new)] for key, (old, new) in how.changed.items()],
    )


def varied_keys(trials: Sequence[TrialRecord]) -> list[str]:
    """Parameters that are not the same in all trials."""
    keys = dict.fromkeys(key for trial in trials for key in trial.parameters)
    return [
        key
        for key in keys
        if len({repr(trial.parameters.get(key, NOTHING)) for trial in trials}) > 1
    ]


def show(value: Any) -> str:
    """A value of a configuration as a person writes it."""
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, (list, tuple)):
        return ", ".join(map(show, value)) or "nothing"
    return str(value)


def _estimate(estimate: float | None, interval: Interval | None, digits: int) -> list[str]:
    if estimate is None:
        return [NOTHING, NOTHING]
    if interval is None:
        return [signed(estimate, digits), NOTHING]
    return [
        signed(estimate, digits),
        f"{signed(interval.low, digits)} to {signed(interval.high, digits)}",
    ]


def _estimate_columns(analysis: Analysis) -> list[Column]:
    return [
        Column(title="estimate", unit=analysis.metric, is_number=True),
        Column(title="interval", unit=f"{100 * analysis.confidence:g} %", is_number=True),
    ]


def amount(value: float) -> str:
    """Three digits, all of those before the point: "0.0412", "3.14", "2,130"."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def _digits(intervals: Sequence[Interval | None]) -> int:
    return common_decimals([interval.half_width for interval in intervals if interval])


def _p(value: float | None) -> str:
    return NOTHING if value is None else p_value(value).removeprefix("p ").removeprefix("= ")


def _number(value: float | None) -> str:
    return NOTHING if value is None else amount(value)


def _count(value: int | None) -> str:
    return "over 10,000" if value is None else f"{value:,}"


def _without_empty(table: Table, also: str = "") -> Table:
    """The table without columns in which nothing stands."""
    kept = [
        i
        for i in range(len(table.columns))
        if i == 0 or any(row[i] not in ("", also) for row in table.rows)
    ]
    return Table(
        caption=table.caption,
        columns=[table.columns[i] for i in kept],
        rows=[[row[i] for i in kept] for row in table.rows],
    )
