"""Creates the folder of a new run, or checks that a folder contains the run to resume."""

from __future__ import annotations

import json
from typing import Any

from deta.platform.checkpoint.local import newest_checkpoint
from deta.platform.checkpoint.remote import restore_from_store
from deta.platform.run.config import RunConfig, flatten, from_json, to_json
from deta.platform.run.run import Run
from deta.platform.run.run_file import FREE_TO_CHANGE, RUN_FILE, RunExistsError, read_run_file


def open_run_folder(run: Run, *, resume: bool) -> None:
    """Create the run's folder; with `resume`, require a run in it, from a remote store if needed.

    Raises:
        RunExistsError: a new run's name is taken, or there is nothing to resume.
    """
    folder, store = run.folder, run.config.checkpoint.store
    if not resume:
        try:
            folder.mkdir(parents=True)
        except FileExistsError:
            raise RunExistsError(
                f"{folder}: a run of this name exists already; add --resume to continue it, or "
                "choose another name with name=…"
            ) from None
        return
    if store is not None:
        restore_from_store(store, run.config.name, folder)
    if not (folder / RUN_FILE).exists() and newest_checkpoint(run.checkpoints) is None:
        elsewhere = f" nor in {store}" if store is not None else ""
        raise RunExistsError(f"{folder}: there is no run to resume{elsewhere}; leave --resume out")


def changes_since_start(run: Run) -> list[str]:
    """Return the changes of configuration and data since the run began that change its result.

    Keys that are free to change (`FREE_TO_CHANGE`) and the code are not compared.

    Raises:
        RunExistsError: run.json is damaged, or of another version.
    """
    before = original_run_file(run)
    try:
        began = from_json(RunConfig, json.dumps(before["config"]))
    except ValueError as error:
        raise RunExistsError(
            f"{run.folder / RUN_FILE}: was written by another version of deta-platform ({error}); "
            "continue with that version, or start a new run with init_checkpoint"
        ) from error
    changes = _differences(began, run.config)
    for split, dataset in (("train", run.train_set), ("val", run.val_set)):
        if before[f"{split}_fingerprint"] != dataset.fingerprint:
            changes.append(f"the {split} data set has other images, boxes or classes")
    return changes or _foreign_checkpoint(run)


def _foreign_checkpoint(run: Run) -> list[str]:
    """Return how the newest checkpoint differs from this run; it may be copied from another."""
    newest = newest_checkpoint(run.checkpoints)
    if newest is None:
        return []
    changes = _differences(newest.config, run.config)
    if newest.state.data_fingerprint not in ("", run.train_set.fingerprint):
        changes.append("the training data set has other images, boxes or classes")
    return [f"{newest.path.name}: {change}" for change in changes]


def _differences(began: RunConfig, config: RunConfig) -> list[str]:
    old, new = flatten(began), flatten(config)
    return [
        f"{key}: {old.get(key)} -> {new[key]}"
        for key in new
        if new[key] != old.get(key) and not key.startswith(FREE_TO_CHANGE)
    ]


def refuse_changes(run: Run, changes: list[str]) -> None:
    """
    Raises:
        RunExistsError: there are changes; names them.
    """
    if changes:
        raise RunExistsError(
            f"{run.folder}: the run began with other settings, so it cannot continue as the same "
            "run:\n  " + "\n  ".join(changes) + "\nUndo these changes, or start a new run with "
            "init_checkpoint set to the last checkpoint of this one. --force continues anyway, and "
            "records the changes in the run's journal."
        )


def refuse_if_finished(run: Run) -> None:
    """
    Raises:
        RunExistsError: the run has ended; there is nothing to continue.
    """
    newest = newest_checkpoint(run.checkpoints)
    if newest is None or not run.is_done(newest.state):
        return
    how = run.reason_to_stop(newest.state) or f"{run.num_steps} steps"
    raise RunExistsError(
        f"{run.folder}: the run is finished ({how}); choose another name, or start a new run with "
        "init_checkpoint and more schedule.epochs"
    )


def original_run_file(run: Run) -> dict[str, Any]:
    """Return run.json; if it is damaged or missing, derive it from the newest checkpoint.

    Raises:
        RunExistsError: there is no checkpoint either.
    """
    try:
        return read_run_file(run.folder)
    except (ValueError, OSError) as error:
        newest = newest_checkpoint(run.checkpoints)
        if newest is None:
            raise RunExistsError(
                f"{error}; and there is no checkpoint to derive it from"
            ) from error
    return {
        "config": json.loads(to_json(newest.config)),
        "train_fingerprint": newest.state.data_fingerprint,
        "val_fingerprint": run.val_set.fingerprint,  # not in a checkpoint
        "code_commit": newest.state.code_commit,
    }
