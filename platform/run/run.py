"""A run: configuration, data sets and folder; when it evaluates, and when it stops."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from deta.platform.data.sample_order import TrainingOrder
from deta.platform.run.config import RunConfig

if TYPE_CHECKING:  # the Ray driver needs nothing of torch
    from deta.platform.data.coco_dataset import CocoDataset
    from deta.platform.run.run_state import RunState

# Files in the folder of a run.
STOP_FILE = "stop"  # ask the workers to save and exit at the next step
ATTEMPT_LOG = "attempt.log"  # the output of the Ray drivers
OUTCOME_FILE = "attempt.json"  # the driver's AttemptOutcome
FAILURES = "failures"  # a folder: the last failure of each rank


@dataclass(frozen=True)
class Run:
    """A configuration with its data and its folder."""

    config: RunConfig
    folder: Path  # of this run; the same for all workers
    train_set: CocoDataset
    val_set: CocoDataset
    code_commit: str = ""
    notes: tuple[str, ...] = ()  # about the initial weights, for the log

    @property
    def checkpoints(self) -> Path:
        return self.folder / "checkpoints"

    @property
    def order(self) -> TrainingOrder:
        return TrainingOrder(self.config.seed, len(self.train_set), self.config.total_batch_size)

    @property
    def num_steps(self) -> int:
        return self.order.first_step_of_epoch(self.config.schedule.epochs)

    def epoch_at(self, step: int) -> float:
        return step * self.config.total_batch_size / len(self.train_set)

    def evaluation_steps(self) -> set[int]:
        """Return the step numbers after which the model is evaluated."""
        epochs, every = self.config.schedule.epochs, self.config.evaluate_every_epochs
        ends = {self.order.first_step_of_epoch(epoch) for epoch in range(every, epochs + 1, every)}
        return ends | {self.num_steps}

    def reason_to_stop(self, state: RunState) -> str:
        """Return why early stopping ends a run in this state; empty if it does not."""
        schedule = self.config.schedule
        if state.step >= self.num_steps or not schedule.is_exhausted(state.ap_history):
            return ""
        return (
            f"stopped early after step {state.step} of {self.num_steps}: none of the last "
            f"{schedule.patience} evaluations had an AP more than {schedule.min_delta:g} above the "
            f"best before them, {max(state.ap_history):.1f} in all (schedule.patience)"
        )

    def is_done(self, state: RunState) -> bool:
        """Return whether nothing is left to do in this state, not even an evaluation."""
        if state.step in self.evaluation_steps() and not state.metrics:
            return False
        return state.step >= self.num_steps or bool(self.reason_to_stop(state))


@dataclass(frozen=True)
class AttemptOutcome:
    """The outcome of an attempt, as its driver reports it to the supervisor."""

    # refused: the cluster can never provide the requested resources. unreachable: no cluster.
    kind: Literal["ended", "refused", "unreachable", "lost"]
    message: str = ""


@dataclass(frozen=True)
class RunResult:
    """The result of a run."""

    folder: Path
    metrics: dict[str, float]  # of the last evaluation, in 0..100
    best_checkpoint: Path | None
    mlflow_uri: str
    mlflow_run_id: str  # empty if MLflow was never reached
    goodput: float  # share of this launch spent in steps and evaluations that were not repeated
    rows_left: int  # of the journal, not yet sent to MLflow
