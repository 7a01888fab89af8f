"""Events that the supervisor of a run logs in the journal and prints."""

from __future__ import annotations

import math
from collections.abc import Callable

from deta.platform.checkpoint.local import newest_checkpoint
from deta.platform.evaluation.evaluation_folder import best_evaluation, read_evaluation
from deta.platform.evaluation.paired_bootstrap import ap_interval
from deta.platform.run.journal import Journal
from deta.platform.run.run import Run
from deta.platform.run.run_lock import RunLock
from deta.platform.tracking.upload_process import UploadState


class RunEvents:
    """Logs and prints restarts and the end of a run."""

    def __init__(self, run: Run, lock: RunLock, echo: Callable[[str], None]) -> None:
        self.run, self.lock, self.echo = run, lock, echo

    def log_restart(self, reason: str, backoff_s: float = 0.0) -> None:
        """Log that workers or an attempt are replaced."""
        first_line = reason.strip().partition("\n")[0]
        self.echo(
            f"{first_line}; continuing from {resume_point(self.run)}"
            + (f" in {backoff_s:.0f} s" if backoff_s else "")
        )
        self._write("restart", reason=reason, backoff_s=backoff_s)

    def log_end(self, status: str, reason: str, goodput: float) -> None:
        """Log how the run ended, unless another process has taken it over."""
        if not self.lock.lost:
            self._write("ended", status=status, reason=reason, goodput=goodput)

    def log_interval(self) -> None:
        """Log the confidence interval of the best AP. No worker waits for it here."""
        folder = best_evaluation(self.run.folder)
        if folder is None:
            return
        try:
            read = read_evaluation(folder)
            low, high = (100 * bound for bound in ap_interval(read.ground_truth, read.results))
        except Exception as error:  # the training is done even without the interval
            self.echo(f"the interval of the best AP could not be computed: {error}")
            return
        if math.isnan(low):
            return
        step, best = read.origin.step or 0, 100 * read.metrics.AP
        self.echo(f"best AP {best:.1f}, 95 % interval over images {low:.1f} to {high:.1f}")
        self._write("interval", step=step, low=low, high=high)

    def print_upload(self, uploaded: UploadState) -> None:
        """Print what MLflow does not have, and how to send it."""
        if not uploaded.is_complete:
            self.echo(
                f"MLflow at {uploaded.uri} does not have everything yet ({uploaded.left_rows} rows "
                f"are left{': ' + uploaded.error if uploaded.error else ''}). Nothing is lost; "
                f"send the rest with: python jobs/sync.py {self.run.folder}"
            )

    def _write(self, kind: str, **values: object) -> None:
        journal = Journal(self.run.folder)
        journal.write(kind, **values)
        journal.close()


def resume_point(run: Run) -> str:
    """Return the name of the checkpoint that the run continues from."""
    newest = newest_checkpoint(run.checkpoints)
    return newest.path.name if newest is not None else "the beginning"
