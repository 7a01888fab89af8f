"""The folder of a run: made for a new one, or made sure that it is the same run that goes on."""

from __future__ import annotations

import json
from typing import Any

from deta.platform.checkpoint.local import newest_checkpoint
from deta.platform.checkpoint.remote import restore_from_store
from deta.platform.run.config import RunConfig, flatten, from_json, to_json
from deta.platform.run.run import Run
from deta.platform.run.run_file import FREE_TO_CHANGE, RUN_FILE, RunExistsError, read_run_file


def claim_folder(run: Run, *, resume: bool) -> None:
    """Make the run's folder; or make sure that there is one to go on with.

    Raises:
        RunExistsError: says what to do.
    """
    folder, store = run.folder, run.config.checkpoint.store
    if not resume:
        try:
            folder.mkdir(parents=True)
        except FileExistsError:
            raise RunExistsError(
                f"{folder}: a run of this name is there already; add --resume to go on with it, or "
                "choose another name with name=…"
            ) from None
        return
    if store is not None:
        restore_from_store(store, run.config.name, folder)
    if not (folder / RUN_FILE).exists() and newest_checkpoint(run.checkpoints) is None:
        elsewhere = f" nor in {store}" if store is not None else ""
        raise RunExistsError(f"{folder}: there is no run to resume{elsewhere}; leave --resume out")


def changes_since(run: Run) -> list[str]:
    """What of configuration, data and code is not as when the run in the folder began.

    Those that change what is learnt come first; of the rest only the code is told, as a note.

    Raises:
        RunExistsError: run.json is damaged.
    """
    before = what_was(run)
    try:
        began = from_json(RunConfig, json.dumps(before["config"]))
    except ValueError as error:
        raise RunExistsError(
            f"{run.folder / RUN_FILE}: was written by another version of deta-platform ({error}); "
            "go on with that version, or start a new run with init_checkpoint"
        ) from error
    changes = _differences(began, run.config)
    for split, dataset in (("train", run.train_set), ("val", run.val_set)):
        if before[f"{split}_fingerprint"] != dataset.fingerprint:
            changes.append(f"the {split} data set has other images, boxes or classes")
    return changes or _foreign_checkpoint(run)


def _foreign_checkpoint(run: Run) -> list[str]:
    """What in the newest checkpoint is not of this run: one that somebody put there, say."""
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
    if changes:
        raise RunExistsError(
            f"{run.folder}: the run began otherwise, so it cannot go on as the same run:\n  "
            + "\n  ".join(changes)
            + "\nUndo these changes, or start a new run with init_checkpoint set to its last one. "
            "--force goes on all the same, and the run's journal will say so."
        )


def refuse_if_done(run: Run) -> None:
    """
    Raises:
        RunExistsError: the run has reached its end; there is nothing to go on with.
    """
    newest = newest_checkpoint(run.checkpoints)
    if newest is None or not run.is_done(newest.state):
        return
    how = run.reason_to_stop(newest.state) or f"{run.num_steps} steps"
    raise RunExistsError(
        f"{run.folder}: is finished ({how}); choose another name, or more "
        "schedule.epochs for a new run with init_checkpoint"
    )


def what_was(run: Run) -> dict[str, Any]:
    """run.json; where it is damaged or gone, what the newest checkpoint knows of it.

    Raises:
        RunExistsError: there is neither.
    """
    try:
        return read_run_file(run.folder)
    except (ValueError, OSError) as error:
        newest = newest_checkpoint(run.checkpoints)
        if newest is None:
            raise RunExistsError(f"{error}; and no checkpoint is there to make it from") from error
    return {
        "config": json.loads(to_json(newest.config)),
        "train_fingerprint": newest.state.data_fingerprint,
        "val_fingerprint": run.val_set.fingerprint,  # not in a checkpoint
        "code_commit": newest.state.code_commit,
    }
