"""Tables of any study or sweep: trials, what they varied and cost, failures, provenance."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from deta.platform.pages.content import Column, Link, Table
from deta.platform.pages.number_format import amount, duration, num_of, short, signed
from deta.platform.study.power import PilotPlan, power_table
from deta.platform.study.trial_record import TrialRecord
from deta.platform.study_report.content import Provenance, StudyReport
from deta.platform.study_report.table_cells import (
    NOTHING,
    amount_text,
    count_text,
    value_text,
    without_empty_columns,
)

DELTAS = (0.1, 0.2, 0.3, 0.5, 1.0)  # differences in points of AP in the power table


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


def facts_line(report: StudyReport) -> str:
    """Return the line below the verdict: how much was run, and when."""
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
            parts.append(f"{amount(total)} {unit} in total")
    how = report.provenance
    if how.began and how.ended:
        hours = (how.ended - how.began).total_seconds() / 3600
        parts.append(f"{duration(3600 * hours)}, ended {how.ended:%Y-%m-%d %H:%M %Z}".strip())
    return " · ".join(parts)


def searched_table(report: StudyReport) -> Table | None:
    """Return what a sweep varied, and between which values."""
    rows = []
    for key in varied_keys(report.trials):
        values = {repr(t.parameters[key]): t.parameters[key]
                  for t in report.trials if key in t.parameters}  # fmt: skip
        numbers = [v for v in values.values() if isinstance(v, (int, float)) and v is not True]
        if len(numbers) == len(values) and len(values) > 6:
            text = f"{value_text(min(numbers))} to {value_text(max(numbers))}"
        else:
            text = ", ".join(value_text(value) for value in list(values.values())[:12])
        rows.append([key, text, str(len(values))])
    if not rows:
        return None
    return Table(
        caption="Varied parameters.",
        columns=[Column(title="parameter"), Column(title="values"),
                 Column(title="different values", is_number=True)],
        rows=rows,
    )  # fmt: skip


def cost_table(report: StudyReport) -> Table:
    """Return the mean cost of a finished trial of each cell."""
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
                amount_text(mean(lambda t: t.cost.images_per_s)),
                NOTHING if wall_s is None else duration(wall_s),
                amount_text(mean(lambda t: t.cost.gpu_hours)),
                amount_text(mean(lambda t: t.cost.cpu_hours)),
                amount_text(mean(lambda t: t.cost.energy_kwh)),
                NOTHING if price is None else f"{price:,.2f} {trials[0].cost.currency}",
            ]
        )
    return without_empty_columns(
        Table(
            caption="Cost of one training of each cell: the mean of its finished trials.",
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
    """Return every trial with its parameters and its result."""
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
                amount_text(cost),
                *(value_text(trial.parameters[key]) if key in trial.parameters else NOTHING
                  for key in keys),
            ]
        )  # fmt: skip
    return without_empty_columns(
        Table(
            caption="Every trial. Parameters that are equal in all of them are left out.",
            columns=[Column(title="trial"), Column(title="seed", is_number=True),
                     Column(title="status"),
                     Column(title="result", unit=report.metric, is_number=True),
                     Column(title="cost", unit=kind.unit if kind else "", is_number=True),
                     *(Column(title=key, is_number=True) for key in keys)],
            rows=rows,
        ),
        also=NOTHING,
    )  # fmt: skip


def required_seeds_table(report: StudyReport, pilot: PilotPlan) -> Table:
    """Return the seeds that each difference needs, at the measured noise and at its upper limit."""
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
            cost_text = amount_text(cost)
        rows.append(
            [short(row.delta), count_text(row.seeds), count_text(row.num_trials), cost_text,
             count_text(bad.seeds), count_text(bad.num_trials)]
        )  # fmt: skip
    unit = kind.unit if kind and kind.unit != "s" else ""
    return Table(
        caption=f"Seeds of each of the {num_of(num_cells, 'cell')} that detect a true "
        "difference four times in five (80 % power, one comparison at 5 %).",
        columns=[Column(title="difference", unit=report.metric),
                 *(Column(title=title, unit=sub, is_number=True) for title, sub in (
                     ("seeds", "of each cell"), ("trials", "in all"), ("cost", unit),
                     ("seeds", "at worst"), ("trials", "at worst")))],
        rows=rows,
    )  # fmt: skip


def failures_table(report: StudyReport) -> Table | None:
    """Return the trials that did not finish, with their reasons."""
    rows: list[list[str | Link]] = [
        [
            Link(trial.name, trial.run_url),
            trial.status,
            trial.reason or "no reason recorded",
            f"{trial.curve[-1][0]:,}" if trial.curve else NOTHING,
            NOTHING if trial.ap is None else signed(trial.ap, 2),
        ]
        for trial in report.trials
        if trial.status != "finished"
    ]
    if not rows:
        return None
    return Table(
        caption="Trials without a final result, with the reason. No result is imputed for them.",
        columns=[Column(title="trial"), Column(title="status"), Column(title="reason"),
                 Column(title="samples seen", is_number=True),
                 Column(title=f"last {report.metric}", is_number=True)],
        rows=rows,
    )  # fmt: skip


def how_table(how: Provenance) -> Table:
    """Return what a person needs to run the study again."""
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
        caption="What is needed to run this again.",
        columns=[Column(title="what"), Column(title="value")],
        rows=[[name, value] for name, value in rows if value],
    )


def changed_table(how: Provenance) -> Table | None:
    """Return where the base configuration differs from the defaults."""
    if not how.changed:
        return None
    return Table(
        caption="Where the base configuration of this study differs from the defaults.",
        columns=[Column(title="key"), Column(title="default"), Column(title="here")],
        rows=[[key, value_text(old), value_text(new)] for key, (old, new) in how.changed.items()],
    )


def varied_keys(trials: Sequence[TrialRecord]) -> list[str]:
    """Return the parameters that differ between trials."""
    keys = dict.fromkeys(key for trial in trials for key in trial.parameters)
    return [
        key
        for key in keys
        if len({repr(trial.parameters.get(key, NOTHING)) for trial in trials}) > 1
    ]
