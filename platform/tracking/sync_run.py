"""Sends the rest of runs to MLflow, and marks the end of runs whose supervisor died.

python -m deta.platform.tracking.sync_run RUN      what the orphan reaper of a run starts
"""

from __future__ import annotations

import functools
import logging
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from deta.platform.run.journal import Journal, read_events
from deta.platform.run.run_lock import is_alive
from deta.platform.system.redaction import redact
from deta.platform.tracking.upload_plan import count_unsent, uri_of
from deta.platform.tracking.upload_process import find_runs
from deta.platform.tracking.uploader import BusyError, RunUploader

if TYPE_CHECKING:
    from deta.platform.tracking.mlflow_store import MlflowStore

PATIENCE_S = 30.0  # how long to retry while MLflow takes nothing


def sync_runs(
    runs: Sequence[Path],
    stores: dict[str, MlflowStore],
    *,
    patience_s: float = PATIENCE_S,
    dry_run: bool = False,
    echo: Callable[[str], None] = lambda line: None,
    show_progress: Callable[[str], None] = lambda line: None,
) -> bool:
    """Send each run that is not alive; return True if nothing is left.

    Args:
        stores: MLflow stores by address. Stores that are opened here are added.
        patience_s: how long to retry while a store takes nothing. An unreachable store gets one
            try for each further run.
        dry_run: only report what is left.
        echo: receives one line for each run.
        show_progress: receives a line that the next one replaces.
    """
    unreachable: set[str] = set()
    is_all_sent = True
    for index, run in enumerate(runs, 1):
        title = f"[{index}/{len(runs)}] {run.name}"
        if is_alive(run):
            rows, _ = count_unsent(run)
            echo(f"{title}: is running and sends its own data, {rows} rows are left")
            continue
        status = missing_end(run)
        if status is not None:
            echo(f"{title}: its process died; marked {status}")
        if dry_run:
            rows, files = count_unsent(run)
            echo(f"{title}: {rows} rows and {files} files are left")
            is_all_sent &= not rows and not files and status is None
            continue
        if status is not None:
            _write_end(run, status)
        try:
            uri = uri_of(run)
        except ValueError as error:
            echo(f"{title}: {error}")
            is_all_sent = False
            continue
        if uri not in stores:
            from deta.platform.tracking.mlflow_store import MlflowStore  # slow; often not needed

            stores[uri] = MlflowStore(uri)
        patience = 0.0 if uri in unreachable else patience_s
        show = functools.partial(_show_with_title, show_progress, title)
        is_complete, is_reached, text = send_run(run, stores[uri], patience, show)
        echo(f"{title}: {text}")
        unreachable |= set() if is_reached else {uri}
        is_all_sent &= is_complete
    return is_all_sent


def send_run(
    run: Path, store: MlflowStore, patience_s: float, show_progress: Callable[[str], None]
) -> tuple[bool, bool, str]:
    """Send what is left of one run; retry with backoff while MLflow takes nothing.

    Returns:
        Whether all is sent, whether MLflow was reached within `patience_s`, and a line for people.
    """
    uploader, error, is_reached = RunUploader(run, store), "", True
    before, stuck_s, pause_s = -1, time.monotonic(), 0.5
    while True:
        try:
            uploader.send_new()
            error = ""
            break
        except (BusyError, ValueError, FileNotFoundError) as failure:  # concerns this run alone
            error = str(failure)
            break
        except Exception as failure:
            error = redact(str(failure) or type(failure).__name__).partition("\n")[0]
        if uploader.record.sent_rows != before:
            before, stuck_s, pause_s = uploader.record.sent_rows, time.monotonic(), 0.5
        show_progress(f"{uploader.record.sent_rows} rows sent; {error}")
        if time.monotonic() - stuck_s > patience_s:
            is_reached = False
            break
        time.sleep(pause_s)
        pause_s = min(5.0, 2 * pause_s)
    rows, files = count_unsent(run)
    uploader.write_state("waiting" if error or rows or files else "finished", error)
    uploader.close()
    record = uploader.record
    text = f"{record.sent_rows} rows sent, {record.skipped_rows} skipped, {rows} left"
    text += f", {record.refused_rows} refused as invalid" * (record.refused_rows > 0)
    text += f", {files} files left" * (files > 0)
    is_complete = not (error or rows or files)
    return is_complete, is_reached, f"{text}; {error or record.status}"


def _show_with_title(show_progress: Callable[[str], None], title: str, text: str) -> None:
    show_progress(f"{title}: {text}")


def missing_end(run: Path) -> str | None:
    """Return the status of a run whose supervisor died before it wrote one; else None."""
    kinds = [event["kind"] for event, _ in read_events(run)]
    begin = max((index for index, kind in enumerate(kinds) if kind == "begin"), default=0)
    last = kinds[begin:]  # of the last start
    return None if "ended" in last else "FINISHED" if "end" in last else "KILLED"


def _write_end(run: Path, status: str) -> None:
    reason = "" if status == "FINISHED" else "its process died; found by jobs/sync.py"
    journal = Journal(run)
    journal.write("ended", status=status, reason=reason)
    journal.close()


if __name__ == "__main__":
    logging.getLogger("mlflow").setLevel(logging.ERROR)
    sys.exit(0 if sync_runs(find_runs(Path(sys.argv[1])), {}, echo=print) else 1)
