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
them for two minutes and their folder is not on this machine.

MLflow is the one of MLFLOW_TRACKING_URI, else the one a run went to before, else the database file
beside the runs. The exit code is 0 if all is sent, 1 if something is left, 2 for a bad folder.
"""

from __future__ import annotations

import argparse
import logging
import sys
import time
from pathlib import Path
from typing import NoReturn

from deta.jobs.command_line import DEFAULT_STORAGE, described_parser
from deta.platform.run.journal import Journal, read_events
from deta.platform.run.run_file import RUN_FILE, read_run_file, tracking_uri
from deta.platform.run.run_lock import is_alive
from deta.platform.system.redaction import mask_text
from deta.platform.tracking.upload_plan import what_is_left
from deta.platform.tracking.upload_process import find_runs, uri_of
from deta.platform.tracking.uploader import BusyError, RunUploader, Store


def main() -> NoReturn:
    parser = described_parser(__doc__)
    parser.add_argument(
        "folders",
        nargs="*",
        type=Path,
        metavar="RUN_OR_STORAGE",
        help=f"default: {DEFAULT_STORAGE}",
    )
    parser.add_argument("--dry-run", action="store_true", help="change nothing, only say")
    parser.add_argument("--reap", action="store_true", help="mark dead runs of other machines")
    parser.add_argument(
        "--patience", type=float, default=30.0, metavar="SECONDS",
        help="give MLflow up that takes nothing for so long (default: 30)",
    )  # fmt: skip
    parser.add_argument(
        "--experiment", action="append", metavar="NAME",
        help="for --reap; default: those of the runs found, or deta",
    )  # fmt: skip
    arguments = parser.parse_args()
    # Not evaluate.py's run_tool: that knows models, and this has to be quick.
    try:
        sys.exit(_sync(_prepare(arguments.folders), arguments))
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("\nstopped; what is sent is sent", file=sys.stderr)
        sys.exit(130)


def _prepare(folders: list[Path]) -> list[Path]:
    runs: list[Path] = []
    for folder in folders or [Path(DEFAULT_STORAGE)]:
        path = folder.expanduser().resolve()
        if not path.is_dir():
            raise ValueError(f"{path}: is no folder; give a run, or a folder of runs")
        found = find_runs(path)
        if not found and folders:
            echo(f"{path}: there is no run in it (a run has a {RUN_FILE})")
        runs += [run for run in found if run not in runs]
    return runs


def _sync(runs: list[Path], arguments: argparse.Namespace) -> int:
    logging.getLogger("mlflow").setLevel(logging.ERROR)
    stores: dict[str, Store] = {}
    away: set[str] = set()  # MLflows that do not answer: for further runs one try is enough
    is_all_sent = True
    for index, run in enumerate(runs, 1):
        title = f"[{index}/{len(runs)}] {run.name}"
        if is_alive(run):
            rows, _ = what_is_left(run)
            echo(f"{title}: is running and sends its own, {rows} rows are left")
            continue
        ending = _missing_end(run)
        if ending is not None:
            echo(f"{title}: its process died; marked {ending}")
        if arguments.dry_run:
            rows, files = what_is_left(run)
            echo(f"{title}: {rows} rows and {files} files are left")
            is_all_sent &= not rows and not files and ending is None
            continue
        if ending is not None:
            _write_end(run, ending)
        try:
            uri = uri_of(run)
        except ValueError as error:
            echo(f"{title}: {error}")
            is_all_sent = False
            continue
        if uri not in stores:
            stores[uri] = _store(uri)
        is_sent, is_away = _send(run, stores[uri], title, 0 if uri in away else arguments.patience)
        is_all_sent &= is_sent
        away |= {uri} if is_away else set()
    if arguments.reap:
        is_all_sent &= _reap(runs, stores, arguments)
    return 0 if is_all_sent else 1


def _send(run: Path, store: Store, title: str, patience_s: float) -> tuple[bool, bool]:
    """Whether all of a run is sent; and whether MLflow was given up."""
    uploader = RunUploader(run, store)
    before, stuck_s, pause_s = -1, time.monotonic(), 0.5
    is_away = False
    while True:
        try:
            uploader.turn()
            error = ""
            break
        except (BusyError, ValueError, FileNotFoundError) as failure:  # of this run alone
            error = str(failure)
            break
        except Exception as failure:
            error = mask_text(str(failure) or type(failure).__name__).partition("\n")[0]
        if uploader.record.sent_rows != before:
            before, stuck_s, pause_s = uploader.record.sent_rows, time.monotonic(), 0.5
        _show(f"{title}: {uploader.record.sent_rows} rows sent; {error}")
        if time.monotonic() - stuck_s > patience_s:
            is_away = True
            break
        time.sleep(pause_s)
        pause_s = min(5.0, 2 * pause_s)
    rows, files = what_is_left(run)
    uploader.tell("waiting" if error else "finished", error)
    uploader.close()
    record = uploader.record
    line = f"{title}: {record.sent_rows} rows sent, {record.skipped_rows} skipped, {rows} left"
    line += f", {record.refused_rows} refused as invalid" * (record.refused_rows > 0)
    line += f", {files} files left" * (files > 0)
    echo(f"{line}; {error}" if error else f"{line}; {record.status}")
    return not error and not rows and not files, is_away


def _missing_end(run: Path) -> str | None:
    """How a run ended whose supervisor did not live to say so; none if it did say."""
    has_end = is_told = False
    is_empty = True
    for event, _ in read_events(run):
        is_empty = False
        if event["kind"] == "begin":
            has_end = is_told = False
        elif event["kind"] == "end":
            has_end = True
        elif event["kind"] == "ended":
            is_told = True
    if is_told and not is_empty:
        return None
    return "FINISHED" if has_end else "KILLED"


def _write_end(run: Path, status: str) -> None:
    reason = "" if status == "FINISHED" else "its process died; found by jobs/sync.py"
    journal = Journal(run)
    journal.write("ended", status=status, reason=reason)
    journal.close()


def _reap(runs: list[Path], stores: dict[str, Store], arguments: argparse.Namespace) -> bool:
    from deta.platform.tracking.mlflow_store import MlflowStore, reap

    experiments = set(arguments.experiment or ())
    if not experiments:
        experiments = {read_run_file(run)["config"].get("experiment", "deta") for run in runs}
    if not stores:
        uri = tracking_uri(runs[0].parent if runs else Path(DEFAULT_STORAGE).expanduser())
        stores[uri] = MlflowStore(uri)
    is_well = True
    for store in stores.values():
        assert isinstance(store, MlflowStore)
        for experiment in sorted(experiments or {"deta"}):
            try:
                dead = reap(store, experiment, dry_run=arguments.dry_run)
            except Exception as error:
                echo(f"{store.shown_uri}: {mask_text(str(error))}")
                is_well = False
                continue
            for run_id, name in dead:
                echo(f"{name} ({run_id}): nothing was heard of it; marked KILLED")
    return is_well


def _store(uri: str) -> Store:
    from deta.platform.tracking.mlflow_store import (
        MlflowStore,  # slow to import, and often not needed
    )

    return MlflowStore(uri)


def echo(line: str) -> None:
    print(f"\r\033[K{line}" if sys.stdout.isatty() else line, flush=True)


def _show(line: str) -> None:
    if sys.stderr.isatty():
        print(f"\r\033[K{line[:150]}", end="\r", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
