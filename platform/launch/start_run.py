"""Starts a new run, or resumes one: from a configuration to the end of its training."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable

from deta.platform.launch.console import Console
from deta.platform.launch.ray_driver import RayDriver
from deta.platform.launch.resume_check import (
    changes_since_start,
    open_run_folder,
    original_run_file,
    refuse_changes,
    refuse_if_finished,
)
from deta.platform.launch.supervisor import Supervisor
from deta.platform.run.journal import Journal
from deta.platform.run.run import Run, RunResult
from deta.platform.run.run_file import describe_run, write_run_file
from deta.platform.run.run_lock import RunLock
from deta.platform.system.process_tree import working_in


def launch_prepared(
    run: Run,
    *,
    resume: bool = False,
    force: bool = False,
    echo: Callable[[str], None] = print,
    preview: Callable[[Run], None] | None = None,
    tags: dict[str, str] | None = None,
    driver: RayDriver | None = None,
) -> RunResult:
    """Train on the Ray cluster named by RAY_ADDRESS, or on one that is started on this machine.

    Args:
        run: from `prepare_run`.
        resume: continue the run of this name; otherwise the name must be new.
        force: resume even if data or configuration have changed.
        echo: prints a line for the user.
        preview: called for a new run once its folder exists and before the cluster is used; may
            write images and journal events. If it fails, the folder is removed.
        tags: further tags of the MLflow run, such as the recipe's name.
        driver: one that was started already.

    Raises:
        ValueError: the name is invalid, or the run is locked. Nothing was started.
        RuntimeError: the run failed on the cluster; the message has the reason.
    """
    console = Console(run, echo, is_live=sys.stdout.isatty())
    console.print_start()
    open_run_folder(run, resume=resume)
    with RunLock.acquire(run.folder) as lock:
        original = None
        if resume:
            changes = changes_since_start(run)
            if not force:
                refuse_changes(run, changes)
            refuse_if_finished(run)
            original = original_run_file(run)
            _log_changes(run, changes, str(original.get("code_commit", "")), echo)
        elif preview is not None:
            try:
                preview(run)
            except BaseException:  # also Ctrl-C: free the name again
                lock.release()
                shutil.rmtree(run.folder)
                raise
        write_run_file(run.folder, describe_run(run, original, tags=tags))
        with working_in(run.folder):
            return Supervisor(run, lock, console, driver).supervise()


def _log_changes(
    run: Run, changes: list[str], old_commit: str, echo: Callable[[str], None]
) -> None:
    if old_commit and run.code_commit and old_commit != run.code_commit:
        echo(f"the code has changed: {old_commit[:12]} -> {run.code_commit[:12]}")
    if changes:
        echo("forced to resume with these changes:\n  " + "\n  ".join(changes))
        journal = Journal(run.folder)
        journal.write("forced", changes=changes)
        journal.close()
