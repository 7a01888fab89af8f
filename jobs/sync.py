#!/usr/bin/env python
"""Send to MLflow what it has not got yet, and mark the runs whose process died.

  python jobs/sync.py                          all runs in ~/deta-runs
  python jobs/sync.py ~/deta-runs/my-run       one run; or a folder of runs, or several
  python jobs/sync.py --dry-run RUNS           only say what is left
  python jobs/sync.py --reap RUNS              and mark runs of machines that are gone

Runs keep a journal and never wait for MLflow, so after it was away, or a run was killed, something
may be left. It is sent once, however often this is run. Runs that are alive are left to themselves.
A run whose process died is marked KILLED, or FINISHED if its training had come to its end.

With --reap, runs that MLflow holds for running are marked KILLED as well if nothing was heard of
them for two minutes and their folder is not on this machine. They are watched for 45 seconds
before, since the clock of their machine may be wrong.

MLflow is the one of MLFLOW_TRACKING_URI, else the one a run went to before, else the database file
beside the runs. The exit code is 0 if all is sent, 1 if something is left, 2 for a bad folder.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from tyro.conf import Positional, UseAppendAction

from deta.jobs.command_line import DEFAULT_STORAGE, read_options, run_tool
from deta.platform.run.run_file import RUN_FILE, read_run_file, tracking_uri
from deta.platform.system.redaction import redact
from deta.platform.tracking.sync_run import PATIENCE_S, sync_runs
from deta.platform.tracking.upload_process import find_runs

if TYPE_CHECKING:
    from deta.platform.tracking.mlflow_store import MlflowStore


@dataclass(frozen=True, kw_only=True)
class SyncOptions:
    folders: Positional[tuple[Path, ...]] = (Path(DEFAULT_STORAGE),)  # runs, or folders of runs
    dry_run: bool = False  # change nothing, only say
    reap: bool = False  # mark dead runs of other machines
    patience: float = PATIENCE_S  # give MLflow up that takes nothing for so many seconds
    # For --reap. Default: those of the runs found, or deta.
    experiment: UseAppendAction[tuple[str, ...]] = ()


def main() -> NoReturn:
    options = read_options(SyncOptions, __doc__)
    run_tool(
        lambda: _find_all(options.folders),
        lambda runs: _sync(runs, options),
        "what is sent is sent",
    )


def _find_all(folders: Sequence[Path]) -> list[Path]:
    runs: dict[Path, None] = {}
    for folder in folders:
        path = folder.expanduser().resolve()
        if not path.is_dir():
            raise ValueError(f"{path}: is no folder; give a run, or a folder of runs")
        found = find_runs(path)
        if not found:
            print_line(f"{path}: there is no run in it (a run has a {RUN_FILE})")
        runs |= dict.fromkeys(found)
    return list(runs)


def _sync(runs: list[Path], options: SyncOptions) -> int:
    logging.getLogger("mlflow").setLevel(logging.ERROR)
    stores: dict[str, MlflowStore] = {}
    is_all_sent = sync_runs(
        runs,
        stores,
        patience_s=options.patience,
        dry_run=options.dry_run,
        echo=print_line,
        show_progress=_show,
    )
    if options.reap:
        is_all_sent &= _reap(runs, stores, options)
    return 0 if is_all_sent else 1


def _reap(runs: list[Path], stores: dict[str, MlflowStore], options: SyncOptions) -> bool:
    from deta.platform.tracking.mlflow_store import MlflowStore

    found = {read_run_file(run)["config"].get("experiment", "deta") for run in runs}
    if not stores:
        uri = tracking_uri(runs[0].parent if runs else Path(DEFAULT_STORAGE).expanduser())
        stores[uri] = MlflowStore(uri)
    is_well = True
    for store, experiment in product(
        stores.values(), sorted(options.experiment or found or ("deta",))
    ):
        try:
            for run_id, name in store.reap(experiment, dry_run=options.dry_run):
                print_line(f"{name} ({run_id}): nothing was heard of it; marked KILLED")
        except Exception as error:
            print_line(f"{store.shown_uri}: {redact(str(error))}")
            is_well = False
    return is_well


def print_line(line: str) -> None:
    print(f"\r\033[K{line}" if sys.stdout.isatty() else line, flush=True)


def _show(line: str) -> None:
    if sys.stderr.isatty():
        print(f"\r\033[K{line[:150]}", end="\r", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
