"""Read and write the folder of a sweep, and check that a restart continues the same sweep.

<storage>/<name>/
  sweep.json    the base configuration, the design, the planned trials
  run.json      description of the sweep's own MLflow run, the parent of its trials
  journal.jsonl report.html report.md trials.json
  trials/<id>/  a run folder each
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from deta.platform.run.config import RunConfig, flatten, from_json, to_json
from deta.platform.run.run import Run
from deta.platform.run.run_file import (
    FREE_TO_CHANGE,
    RUN_FILE,
    RunExistsError,
    describe_run,
    read_run_file,
    write_run_file,
)
from deta.platform.study.design import Trial
from deta.platform.sweep.search_space import Sweep, describe_domain
from deta.platform.system.atomic_write import write_json

SWEEP_FILE, TRIALS_FOLDER, TRIAL_FILE = "sweep.json", "trials", "trial.json"


def read_sweep(folder: Path) -> dict[str, Any] | None:
    """Read sweep.json; None if there is none.

    Raises:
        RunExistsError: the folder holds something else, or the file is damaged.
    """
    path = folder / SWEEP_FILE
    if not path.exists():
        if (folder / RUN_FILE).exists():
            raise RunExistsError(f"{folder}: holds a run, not a sweep; choose another name=")
        # A sweep that was killed before it began leaves a lock and a probe.
        known = ("run.lock", "probe")
        if folder.exists() and any(
            not one.name.startswith(".") and one.name not in known for one in folder.iterdir()
        ):
            raise RunExistsError(f"{folder}: holds something else; choose another name=")
        return None
    try:
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise RunExistsError(
            f"{path}: is damaged; choose another name=, or remove the folder"
        ) from error
    return content


def base_of(content: Mapping[str, Any]) -> RunConfig:
    """Return the base configuration of a sweep, with its data, as it began."""
    return from_json(RunConfig, json.dumps(content["base"]))


def describe_sweep(
    sweep: Sweep, run: Run, trials: list[Trial], before: Mapping[str, Any] | None
) -> dict[str, Any]:
    """Return the content of sweep.json."""
    before = before or {}
    return {
        "base": json.loads(to_json(run.config)),
        "design": json.loads(json.dumps(sweep.describe(), default=str)),
        "train_fingerprint": run.train_set.fingerprint,
        "val_fingerprint": run.val_set.fingerprint,
        "trials": {trial.id: sweep.trial_name(trial) for trial in trials},
        "created_s": before.get("created_s") or time.time(),
        "estimate": before.get("estimate"),
    }


def refuse_another(folder: Path, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Check that this is the sweep that began, or the same with more trials.

    Raises:
        RunExistsError: names what differs.
    """
    old, new = (flatten(base_of(content)) for content in (before, now))
    different = {key: f"{key}: {old[key]} -> {new[key]}" for key in new if new[key] != old[key]}
    changes = [text for key, text in different.items() if not key.startswith(FREE_TO_CHANGE)]
    for split in ("train", "val"):
        if before[f"{split}_fingerprint"] != now[f"{split}_fingerprint"]:
            changes.append(f"the {split} data set has other images, boxes or classes")
    old_design, new_design = before["design"], now["design"]
    gone = [name for id, name in before["trials"].items() if id not in now["trials"]]
    keys = dict.fromkeys([*old_design, *new_design])
    if "optuna" in (new_design.get("search"), old_design.get("search")):
        gone = []  # its trials follow from results; only their space must be the same
        keys.pop("num_trials", None)
    elif not gone:
        keys = {"stopping": None}
    changes += [
        f"{key}: {old_design.get(key, 'none')} -> {new_design.get(key, 'none')}"
        for key in keys
        if old_design.get(key) != new_design.get(key)
    ]
    if gone and not changes:
        changes += different.values()
    if gone:
        named = ", ".join(gone[:5]) + (f" and {len(gone) - 5} more" if len(gone) > 5 else "")
        changes.append(f"no longer part of it: {named}")
    if changes:
        raise RunExistsError(
            f"{folder}: this sweep differs from the one that began, so it cannot continue:\n  "
            + "\n  ".join(changes)
            + "\nUndo these changes (you may add trials or seeds), or choose another name=."
        )


def write_sweep(folder: Path, content: Mapping[str, Any]) -> None:
    write_json(folder / SWEEP_FILE, dict(content), indent=2, durable=True)


def write_parent_file(folder: Path, sweep: Sweep, run: Run) -> str:
    """Write run.json of the sweep's own MLflow run. Returns its key, the parent of all trials.

    For varied keys it holds the values to choose from instead of the base's value.
    """
    before = read_run_file(folder) if (folder / RUN_FILE).exists() else None
    design = json.dumps(sweep.describe(), default=str)
    tags = {"deta.kind": "study" if sweep.design else "sweep", "deta.design": design}
    description = describe_run(replace(run, folder=folder), before, tags=tags)
    for key, text in _varied(sweep).items():
        *path, last = key.split(".")
        place = description["config"]
        for part in path:
            place = place[part]
        place[last] = text
    write_run_file(folder, description)
    return str(description["key"])


def write_trial_files(
    sweep: Sweep, trial: Trial, base: Run, config: RunConfig, folder: Path, parent: str
) -> Run:
    """Write the files of a trial's run folder, keeping its identity if it exists."""
    folder.mkdir(parents=True, exist_ok=True)
    run = replace(base, config=config, folder=folder)
    before = read_run_file(folder) if (folder / RUN_FILE).exists() else None
    tags = {
        "deta.sweep": sweep.config.name,
        "deta.trial": trial.id,
        "deta.cell": trial.cell.key,
        "deta.seed": str(trial.seed),
    }
    description = describe_run(run, before, parent=parent, tags=tags)
    description["title"] = sweep.trial_title(trial)
    write_run_file(folder, description)
    write_json(
        folder / TRIAL_FILE,
        {"id": trial.id, "changes": dict(trial.changes), "cell": asdict(trial.cell)},
        indent=2,
        durable=True,
    )
    return run


def _varied(sweep: Sweep) -> dict[str, str]:
    if sweep.design is None:
        return {key: describe_domain(domain) for key, domain in sweep.space.items()}
    base, cells = flatten(sweep.design.base), sweep.design.cells()
    values = {"seed": list(map(str, sweep.design.seeds))}
    for key in dict.fromkeys(key for cell in cells for key in cell.changes):
        found = (str(cell.changes.get(key, base[key])) for cell in cells)
        values[key] = list(dict.fromkeys(found))
    return {key: ", ".join(texts) for key, texts in values.items()}
