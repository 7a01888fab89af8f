"""Starts, observes and ends the uploader process of a run.

This file does not import MLflow. Only the uploader process does (`uploader_main.py`), so MLflow
cannot block a training.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import BinaryIO

from deta.platform.run.journal import JOURNAL_FILE
from deta.platform.run.run_file import RUN_FILE
from deta.platform.system.places import child_environment
from deta.platform.tracking.upload_plan import NUM_LEVELS, count_unsent

STATE_FILE = "uploader.json"
LOG_FILE = "uploader.log"
MAX_LOG_BYTES = 1_000_000
# Folders inside a run, which contain no runs.
PARTS_OF_RUNS = ("checkpoints", "evaluations", "pictures", "stacks", "heartbeats", "ray")
START_WITHIN_S = 60.0  # of the uploader; a new database file takes long on a slow disk
LAST_TRY_S = 3.0  # of the uploader's time at the end, for a last try after SIGTERM


@dataclass(frozen=True)
class UploadState:
    """The state of an upload, as uploader.json has it."""

    uri: str = ""  # without its password
    run_id: str = ""  # empty until MLflow was reached
    state: str = "not started"  # waiting, sending, finished, stopped
    left_rows: int = 0  # in the journal and not in MLflow
    left_files: int = 0
    sent_rows: int = 0
    skipped_rows: int = 0  # of steps repeated after a restart
    refused_rows: int = 0  # rejected by MLflow as invalid
    error: str = ""  # the last one; empty once MLflow answers again
    last_success_s: float = 0.0  # seconds since 1970
    call_s: float = 0.0  # how long the last call took
    process: int = 0

    @property
    def is_complete(self) -> bool:
        return self.state == "finished"


def start_uploader(
    folder: Path, env: Mapping[str, str] | None = None, *, sweep: bool = False
) -> subprocess.Popen[bytes]:
    """Start the process that sends a run to MLflow until the run has ended.

    Call it before the run's first event is written: the `ended` event of an earlier start does not
    end it. The process has its own session, so Ctrl-C reaches only the supervisor. If the
    supervisor dies, the uploader sends what is there and exits.

    Args:
        folder: of a run; with `sweep`, of runs, also of those that are added later.
        env: environment; by default that of this process.
    """
    journal = folder / JOURNAL_FILE
    behind_bytes = journal.stat().st_size if journal.exists() else 0
    command = [sys.executable, "-m", "deta.platform.tracking.uploader_main"]
    command += [str(folder), f"--behind={behind_bytes}", f"--parent={os.getpid()}"]
    if sweep:
        command.append("--sweep")
    with contextlib.ExitStack() as opened:
        log: BinaryIO | int = subprocess.DEVNULL
        with contextlib.suppress(OSError):  # a full disk
            path = folder / LOG_FILE
            is_full = path.exists() and path.stat().st_size > MAX_LOG_BYTES
            log = opened.enter_context(path.open("wb" if is_full else "ab"))
        return subprocess.Popen(
            command,
            env=child_environment(base=env),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )


def finish_uploader(
    process: subprocess.Popen[bytes],
    folder: Path,
    within_s: float = 10.0,
    at_most_s: float = 120.0,
) -> UploadState:
    """Wait until everything is in MLflow or the time is up; then the process has ended.

    Call it after the last event, `ended`, is written and the journal is closed.

    Args:
        within_s: limit if MLflow is unreachable, slow or failing. Unsent rows stay in the journal,
            and jobs/sync.py sends them later.
        at_most_s: limit if MLflow answers well, for example for a large best checkpoint.
    """
    began_s = time.monotonic()
    is_terminated = False
    while process.poll() is None:
        waited_s = time.monotonic() - began_s
        state = read_upload_state(folder)
        is_well = _answers_well(state) and waited_s < at_most_s
        # It has not reached MLflow yet: the run ended before its uploader had started.
        is_starting = state.process != process.pid or not (state.error or state.last_success_s)
        is_well = is_well or (is_starting and waited_s < START_WITHIN_S)
        if waited_s > within_s - LAST_TRY_S and not is_well and not is_terminated:
            process.send_signal(signal.SIGTERM)
            is_terminated = True
        if waited_s > within_s and (is_terminated or not is_well):
            process.kill()
            process.wait()
        time.sleep(0.05)
    state = read_upload_state(folder)
    left = [count_unsent(run) for run in find_runs(folder)]
    rows, files = sum(rows for rows, _ in left), sum(files for _, files in left)
    if rows or files:  # it may have had no time to write its state
        state = replace(state, left_rows=rows, left_files=files, state="stopped")
    return state


def read_upload_state(folder: Path) -> UploadState:
    """Read the uploader's last state; it may be called at any time."""
    try:
        content = json.loads((folder / STATE_FILE).read_text(encoding="utf-8"))
        known = {part.name for part in fields(UploadState)}
        return UploadState(**{name: value for name, value in content.items() if name in known})
    except (OSError, ValueError, AttributeError, TypeError):
        return UploadState()


def find_runs(folder: Path, levels: int = NUM_LEVELS) -> list[Path]:
    """Return the folders of runs, this one and those below it, sweeps before their trials."""
    found = [folder] if (folder / RUN_FILE).is_file() else []
    if levels == 0:
        return found
    try:
        with os.scandir(folder) as entries:
            inner = sorted(e.name for e in entries if e.is_dir(follow_symlinks=False))
    except OSError:  # deleted meanwhile, or not readable
        return found
    for name in inner:
        if not name.startswith(".") and name not in PARTS_OF_RUNS:
            found += find_runs(folder / name, levels - 1)
    return found


def _answers_well(state: UploadState) -> bool:
    is_recent = time.time() - state.last_success_s < 10.0
    return not state.error and state.call_s < 1.0 and is_recent and state.state == "sending"
