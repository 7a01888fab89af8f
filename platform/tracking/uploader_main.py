"""The uploader process: sends a run, or all runs in a folder, to MLflow until the run has ended.

`start_uploader` starts it as `python -m deta.platform.tracking.uploader_main FOLDER`.
"""

from __future__ import annotations

import argparse
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from deta.platform.run.journal import JOURNAL_FILE
from deta.platform.system.redaction import redact
from deta.platform.tracking.upload_plan import uri_of
from deta.platform.tracking.upload_process import find_runs
from deta.platform.tracking.uploader import BusyError, FilesError, RunUploader

if TYPE_CHECKING:
    from deta.platform.tracking.mlflow_store import MlflowStore

logger = logging.getLogger(__name__)

POLL_EVERY_S = 1.0
MAX_BACKOFF_S = 15.0
LAST_WAIT_S = 5.0  # for the supervisor's last event, if both received a signal to stop
STOP_WITHIN_S = 7.0  # after SIGTERM, whatever MLflow does
WAIT_FOR_PARENT_S = 60.0


class Follower:
    """Sends a run, or all runs in a folder, until they have ended or `stop` is called."""

    def __init__(
        self,
        folder: Path,
        store: MlflowStore,
        *,
        sweep: bool = False,
        behind_bytes: int = 0,
        parent: int | None = None,
    ) -> None:
        """
        Args:
            behind_bytes: an `ended` event before this offset belongs to an earlier start.
            parent: process id of the supervisor; once it has died, no more events will be written.
        """
        self.folder, self.store, self.sweep = folder, store, sweep
        self.behind_bytes, self.parent = behind_bytes, parent
        self._runs: dict[Path, RunUploader] = {}
        self._stop = threading.Event()
        self._began_s = time.monotonic()
        self._stopped_s = 0.0
        self._are_files_left = False

    def follow(self) -> bool:
        """Send until the run has ended; return True if everything is in MLflow."""
        failures = 0
        for run in self._find_runs():
            run.write_state("waiting")  # it has started
        while True:
            error = self.send_new()
            own = self._runs.get(self.folder)
            if error is None and own is not None and own.is_complete(self.behind_bytes):
                return True
            # If the supervisor was also stopped, it has yet to write the last event, `ended`.
            is_late = time.monotonic() - self._stopped_s > LAST_WAIT_S
            has_end = own is not None and own.has_sent_end(self.behind_bytes)
            waits = error is None and not (is_late or has_end) and self.parent == os.getppid()
            if self._stop.is_set() and not waits:
                return error is None and not self._are_files_left
            if error is None:
                failures = 0
                self._wait(POLL_EVERY_S)
            else:
                failures += 1
                logger.warning("MLflow: %s", redact(error)[:500])
                self._wait(min(MAX_BACKOFF_S, 0.5 * 2 ** min(failures, 6)))

    def send_new(self) -> str | None:
        """Send what is new of every run; return the error, unless only files were not stored."""
        first: str | None = None
        self._are_files_left = False
        for run in self._find_runs():
            if run.is_complete() and run.folder != self.folder:
                continue
            try:
                run.needs_parent = time.monotonic() - self._began_s < WAIT_FOR_PARENT_S
                run.send_new(heartbeats=not self._stop.is_set())
            except FilesError:  # it has recorded it, and knows when to try again
                self._are_files_left = True
            except BusyError as error:
                first = first or str(error)
            except (OSError, ValueError) as error:  # of this folder alone
                first = first or f"{run.folder}: {error}"
                run.write_state("waiting", str(error))
            except Exception as error:
                run.write_state("waiting", str(error) or type(error).__name__)
                return str(error) or type(error).__name__
        return first

    def stop(self) -> None:
        self._stopped_s = time.monotonic()
        self._stop.set()
        self.store.shorten_timeouts()

    def write_stopped(self) -> None:
        for run in list(self._runs.values()):
            if not run.is_complete():
                run.write_state("stopped", run.written_state.error)

    def _find_runs(self) -> Iterator[RunUploader]:
        for folder in find_runs(self.folder) if self.sweep else [self.folder]:
            if folder not in self._runs:
                self._runs[folder] = RunUploader(folder, self.store)
            yield self._runs[folder]

    def _wait(self, seconds: float) -> None:
        until_s = time.monotonic() + seconds
        had_ended = self._has_ended()
        while time.monotonic() < until_s:
            if self._stop.wait(0.1):
                time.sleep(0.1)
                return
            if not had_ended and self._has_ended():
                return  # at once, since the supervisor waits
            if self.parent not in (None, os.getppid()):
                self.stop()
                return

    def _has_ended(self) -> bool:
        try:
            with (self.folder / JOURNAL_FILE).open("rb") as file:
                end = file.seek(0, os.SEEK_END)
                if end <= self.behind_bytes:
                    return False
                file.seek(max(0, end - 4096))
                return b'"kind": "ended"' in file.read().rstrip().rpartition(b"\n")[2]
        except OSError:
            return False


def stop_on_signals(stop: Callable[[], None], before_exit: Callable[[], None]) -> None:
    """On SIGTERM call `stop`, and end the process after `STOP_WITHIN_S` wherever it hangs.

    A separate thread receives the signal through a pipe, since the main thread may be in a library
    call that does not return to Python. Ctrl-C is ignored: the supervisor handles it.
    """
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    signal.signal(signal.SIGTERM, lambda *_: None)
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    def watch() -> None:
        while signal.SIGTERM not in os.read(reader, 1):
            pass
        deadline = threading.Timer(STOP_WITHIN_S, os._exit, (1,))
        deadline.daemon = True
        deadline.start()
        stop()
        time.sleep(STOP_WITHIN_S - 0.5)
        before_exit()
        os._exit(1)

    threading.Thread(target=watch, name="signals", daemon=True).start()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--sweep", action="store_true", help="all runs in FOLDER, also later ones")
    parser.add_argument("--behind", type=int, default=0, help="see Follower")
    parser.add_argument("--parent", type=int, help="see Follower")
    given = parser.parse_args()
    os.nice(5)  # training has priority; also its start, over the import of MLflow
    from deta.platform.tracking.mlflow_store import MlflowStore

    logging.basicConfig(format="%(asctime)s %(message)s", level=logging.WARNING)
    follower = Follower(
        given.folder,
        MlflowStore(uri_of(given.folder)),
        sweep=given.sweep,
        behind_bytes=given.behind,
        parent=given.parent,
    )
    stop_on_signals(follower.stop, follower.write_stopped)
    is_complete = follower.follow()
    follower.write_stopped()
    return 0 if is_complete else 1


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # do not wait for MLflow's threads
