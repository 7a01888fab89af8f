"""Write the results of a sweep from its trials' folders: trials.json, analysis, report."""

from __future__ import annotations

import json
import logging
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from deta.platform.run.config import RunConfig, flatten
from deta.platform.run.run_file import read_run_file
from deta.platform.study.analyse import analyse
from deta.platform.study.decomposition import decompose
from deta.platform.study.design import Trial
from deta.platform.study.study_types import Analysis, Decomposition
from deta.platform.study.trial_record import TrialRecord
from deta.platform.study_report.content import Provenance, StudyReport
from deta.platform.study_report.html_report import HTML_NAME, MARKDOWN_NAME, write_study_report
from deta.platform.sweep.search_space import Grid, Optuna, Random, Search, Sweep
from deta.platform.sweep.sweep_folder import TRIAL_FILE, TRIALS_FOLDER, base_of, read_sweep
from deta.platform.sweep.trial_folder import TrialFolder
from deta.platform.system.atomic_write import write_atomic
from deta.platform.tracking.upload_plan import read_record

logger = logging.getLogger(__name__)

TRIALS_NAME, TABLE_NAME = "trials.json", "table.txt"
HOW: dict[type[Search], str] = {
    Grid: "All combinations of a grid",
    Random: "Combinations drawn at random",
    Optuna: "Combinations proposed by Optuna (TPE)",
}
# What the sweep's own MLflow run gets.
FILES_TO_SEND = ("sweep.json", TRIALS_NAME, TABLE_NAME, HTML_NAME, MARKDOWN_NAME)
PACKAGES = ("torch", "ray", "mlflow", "optuna", "timm", "numpy")


def open_trials(sweep: Sweep, trials: Sequence[Trial]) -> list[TrialFolder]:
    """Open the trials of a sweep by their folders, including planned ones without a folder."""
    base = sweep.config
    folder = Path(base.storage) / base.name / TRIALS_FOLDER
    opened = [
        TrialFolder(trial, sweep.trial_name(trial), sweep.trial_config(trial), folder / trial.id)
        for trial in trials
    ]
    for one in opened:
        one.poll()
    return opened


def proposed_trials(sweep: Sweep) -> list[Trial]:
    """Return the trials that a search proposed in earlier starts, in their order."""
    base = sweep.config
    found: list[tuple[float, dict[str, Any]]] = []
    for path in (Path(base.storage) / base.name / TRIALS_FOLDER).glob(f"*/{TRIAL_FILE}"):
        content = json.loads(path.read_text(encoding="utf-8"))
        found.append((float(read_run_file(path.parent)["created_s"]), content["changes"]))
    found.sort(key=lambda pair: pair[0])
    return [sweep.trial(changes, number) for number, (_, changes) in enumerate(found, 1)]


def records_of(trials: Sequence[TrialFolder], tracking: str) -> list[TrialRecord]:
    return [trial.record(_run_url(tracking, trial.folder)) for trial in trials]


def write_results(
    folder: Path,
    sweep: Sweep,
    records: Sequence[TrialRecord],
    content: Mapping[str, Any],
    *,
    is_over: bool,
    with_page: bool = True,
) -> StudyReport:
    """Write trials.json, report.html and report.md into the sweep's folder.

    Args:
        content: of sweep.json.
        is_over: if false, unfinished trials are left out of the analysis instead of failed.
        with_page: if false, write trials.json alone.
    """
    text = json.dumps([asdict(record) for record in records], indent=1, default=str)
    write_atomic(folder / TRIALS_NAME, text)
    analysis, decomposition = _analyse(sweep, records, is_over=is_over)
    described = read_run_file(folder)
    report = StudyReport(
        title=sweep.title or f"Sweep {sweep.config.name}",
        trials=records,
        analysis=analysis,
        method=sweep.method or _method(sweep),
        decomposition=decomposition,
        anchors=sweep.anchors,
        relevant=min((question.relevant for question in sweep.questions), default=0.3),
        provenance=Provenance(
            command=str(content.get("command") or ""),
            code_commit=str(described.get("code_commit") or ""),
            changed=_changed(sweep.config),
            train_fingerprint=str(described.get("train_fingerprint") or ""),
            val_fingerprint=str(described.get("val_fingerprint") or ""),
            versions={"python": platform.python_version()} | {n: version(n) for n in PACKAGES},
            hardware=str(content.get("hardware") or ""),
            began=datetime.fromtimestamp(described["created_s"], UTC),
            ended=datetime.now(UTC) if is_over else None,
            run_url=_run_url(read_record(folder).uri, folder),
        ),
    )
    if with_page:
        write_study_report(folder, report)
    return report


def report_only(sweep: Sweep) -> StudyReport:
    """Write the report of a sweep again from its folder, without data or a cluster.

    Raises:
        ValueError: there is no such sweep.
    """
    folder = Path(sweep.config.storage).expanduser().resolve() / sweep.config.name
    content = read_sweep(folder)
    if content is None:
        raise ValueError(f"{folder}: there is no sweep; name=… gives its name")
    sweep = sweep.with_base(base_of(content))
    trials = open_trials(sweep, sweep.trials() or proposed_trials(sweep))
    records = records_of(trials, read_record(folder).uri)
    is_over = all(trial.is_done for trial in trials)
    return write_results(folder, sweep, records, content, is_over=is_over)


def _analyse(
    sweep: Sweep, records: Sequence[TrialRecord], *, is_over: bool
) -> tuple[Analysis | None, Decomposition | None]:
    if sweep.design is None:
        return None, None
    cells = sweep.design.cells()
    observations = [r.observation() for r in records
                    if is_over or r.status not in ("waiting", "running")]  # fmt: skip
    if all(observation.failure for observation in observations):
        return None, None
    analysis = analyse(cells, observations, questions=sweep.questions)
    decomposition = None
    if sweep.path:
        try:
            decomposition = decompose(cells, observations, sweep.path, published=sweep.published)
        except ValueError as error:  # cells of the path have no result yet
            logger.info("the published difference is not explained: %s", error)
    return analysis, decomposition


def _method(sweep: Sweep) -> str:
    if sweep.design is not None:
        return (
            "Every cell is trained with the same seeds on equally many samples, so that "
            "differences are taken within seeds."
        )
    how = HOW[type(sweep.search)]
    if sweep.stopping is None:
        return f"{how}, each trained to its end."
    return (
        f"{how}; ASHA stops a trial early that is not in the upper 1/{sweep.stopping.reduction:g} "
        f"by AP at equal samples seen, from {sweep.stopping.grace_samples:,} samples on."
    )


def _changed(config: RunConfig) -> dict[str, tuple[Any, Any]]:
    """Return where the base differs from the defaults, apart from its name and place."""
    default, used = flatten(RunConfig()), flatten(config)
    return {
        key: (default.get(key), value)
        for key, value in used.items()
        if value != default.get(key) and key not in ("name", "storage", "experiment")
    }


def _run_url(tracking: str, folder: Path) -> str:
    """Return the address of the run's page; empty if MLflow is a file."""
    run_id = read_record(folder).run_id
    return (
        f"{tracking.rstrip('/')}/#/runs/{run_id}" if run_id and tracking.startswith("http") else ""
    )
