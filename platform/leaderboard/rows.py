"""The rows of the leaderboard, without MLflow, and intervals over runs of several seeds.

Runs that differ in their seed alone repeat one experiment. Together they show the variance of an
AP, which a single run cannot.
"""

from __future__ import annotations

import hashlib
import json
import math
import statistics
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

from scipy.special import stdtrit  # quantiles of Student's t

from deta.platform.system.redaction import redact

# Parameters that may differ between runs of one experiment.
IGNORED_PARAMETERS = (
    "seed", "name", "experiment", "storage", "num_pictures", "log_every", "cluster.", "checkpoint.",
    "data.loader_workers", "data.val_", "data.train_",  # paths; fingerprints identify the data
)  # fmt: skip
MAX_TEXT = 300  # characters of a name in a table


@dataclass(frozen=True, kw_only=True)
class LeaderboardRow:
    """One run. AP is 0..100; a number that was not recorded is None."""

    id: str  # of the MLflow run
    experiment_id: str
    name: str
    experiment: str = ""
    recipe: str = ""
    data: str = ""  # name of the validation set, and the first digits of its fingerprint
    status: str = ""  # as MLflow reports it
    ap: float | None = None  # of the best checkpoint; of the last one while the run lasts
    low: float | None = None  # 95 % interval, by `interval`
    high: float | None = None
    interval: str = (
        ""  # "images": over half-samples of images; "3 seeds": of the mean, by Student's t
    )
    ap50: float | None = None
    gpu_hours: float | None = None
    cpu_hours: float | None = None
    hours: float | None = None  # of wall time
    parameters: float | None = None  # of the model, a count
    latency_ms: float | None = None  # per image, if it was measured
    images_per_s: float | None = None  # throughput of the whole evaluation
    started_s: float = 0.0  # since 1970
    ended_s: float = 0.0  # 0: not ended
    models: str = ""  # its registered versions: "deta 3 @champion"
    is_champion: bool = False
    sweep: str = ""  # MLflow run id of the sweep, if this is a trial
    report: str = ""  # artifact path of the evaluation report
    commit: str = ""
    group: str = ""  # equal for runs that differ in their seed alone


COLUMNS = tuple(part.name for part in fields(LeaderboardRow))


@dataclass(frozen=True, kw_only=True)
class Promotion:
    """One entry in the history of a registered model's champions."""

    model: str
    version: int
    time: str  # UTC, ISO 8601; empty if unknown
    action: str  # accept, refuse, force, rollback; "alias": set by hand
    by: str = ""
    reason: str = ""
    champion_after: int | None = None
    run_id: str = ""


@dataclass(frozen=True)
class RegisteredModels:
    """The versions and champions that the registry records for runs."""

    versions: Mapping[str, str] = field(default_factory=dict)  # "deta 3 @champion" by run id
    champions: frozenset[str] = frozenset()  # ids of their runs
    promotions: tuple[Promotion, ...] = ()  # the newest first
    aps: Mapping[str, float] = field(default_factory=dict)  # of a run's newest version, 0..100


def make_row(run: Any, experiment: str, data: tuple[str, str, int]) -> LeaderboardRow:
    """Return the row of a run.

    Args:
        run: of MLflow's client.
        experiment: its name.
        data: name, fingerprint and number of images of the validation set; 0 if unknown.
    """
    info, metrics, tags = run.info, run.data.metrics, run.data.tags
    start_ms, end_ms = info.start_time or 0, info.end_time or 0

    def number(*names: str) -> float | None:
        found = (metrics.get(one) for one in names)
        return next((x for x in found if x is not None and math.isfinite(x)), None)

    data_name, fingerprint, num_images = data
    fingerprint = fingerprint or tags.get("deta.val_fingerprint", "")
    seconds, wall_s = number("val/seconds"), number("cost/wall_s")
    if wall_s is None and end_ms > start_ms > 0:
        wall_s = (end_ms - start_ms) / 1000  # of runs from before costs were logged
    low, high = number("best/AP_low"), number("best/AP_high")
    if low is None or high is None:
        low = high = None
    return LeaderboardRow(
        id=info.run_id,
        experiment_id=info.experiment_id,
        experiment=_display_text(experiment),
        name=_display_text(info.run_name or info.run_id),
        recipe=_display_text(_recipe(tags)),
        data=_display_text(f"{data_name} {fingerprint.removeprefix('sha256:')[:8]}".strip()),
        status=info.status,
        ap=number("best/AP", "val/AP"),
        low=low,
        high=high,
        interval="" if low is None else "images",
        ap50=number("best/AP50", "val/AP50"),
        gpu_hours=number("cost/gpu_hours") or None,
        cpu_hours=number("cost/cpu_hours"),
        hours=None if wall_s is None else wall_s / 3600,
        parameters=number("model/parameters"),
        latency_ms=number("model/latency_ms"),
        images_per_s=num_images / seconds if seconds and num_images else None,
        started_s=start_ms / 1000,
        ended_s=end_ms / 1000,
        sweep=tags.get("mlflow.parentRunId", ""),
        report=_display_text(tags.get("deta.report", "")),
        commit=_display_text(tags.get("mlflow.source.git.commit", "")[:12]),
        group=_group_key(run.data.params, tags, fingerprint),
    )


def with_seed_intervals(rows: Iterable[LeaderboardRow]) -> list[LeaderboardRow]:
    """Return the rows; those without an interval over images get one over seeds.

    That is the interval of the mean AP of all finished runs that differ in the seed alone, so the
    AP of a single run can be outside of it.
    """
    rows = list(rows)
    groups: dict[str, list[float]] = defaultdict(list)
    for row in rows:
        if row.group and row.ap is not None and row.status == "FINISHED":
            groups[row.group].append(row.ap)
    found: dict[str, dict[str, Any]] = {}
    for group, values in groups.items():
        if (number := len(values)) > 1:
            half = stdtrit(number - 1, 0.975) * statistics.stdev(values) / math.sqrt(number)
            mean = statistics.fmean(values)
            found[group] = {
                "low": mean - half, "high": mean + half, "interval": f"{number} seeds",
            }  # fmt: skip
    return [
        replace(row, **found[row.group])
        if row.interval != "images"
        and row.group in found
        and row.status == "FINISHED"
        and row.ap is not None
        else row
        for row in rows
    ]


def with_models(rows: Iterable[LeaderboardRow], models: RegisteredModels) -> list[LeaderboardRow]:
    """Return the rows with the versions that were registered from them.

    A run without an AP of its own, such as one that was evaluated later, has that of its version.
    """
    return [
        replace(
            row,
            models=models.versions[row.id],
            is_champion=row.id in models.champions,
            ap=models.aps.get(row.id) if row.ap is None else row.ap,
        )
        if row.id in models.versions
        else row
        for row in rows
    ]


def _recipe(tags: Mapping[str, str]) -> str:
    sweep = tags.get("deta.sweep")
    return (
        tags.get("deta.recipe")
        or (f"sweep {sweep}" if sweep else "")
        or tags.get("mlflow.source.name", "")
    )


def _group_key(params: Mapping[str, str], tags: Mapping[str, str], fingerprint: str) -> str:
    if "seed" not in params or not fingerprint:
        return ""
    relevant = {
        name: value for name, value in params.items() if not name.startswith(IGNORED_PARAMETERS)
    }
    train = tags.get("deta.train_fingerprint", "")
    text = json.dumps([sorted(relevant.items()), train, fingerprint])
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _display_text(text: str) -> str:
    text = redact(text)
    return text if len(text) <= MAX_TEXT else f"{text[: MAX_TEXT - 1]}…"
