"""Writes the journal and the checkpoints of a run while it trains. Only rank 0 writes.

The other ranks have a recorder that does nothing, so the loop is the same on all ranks.
"""

from __future__ import annotations

import os
import socket
import time

from deta.platform.checkpoint.async_writer import CheckpointWriter
from deta.platform.checkpoint.format import Checkpoint, CheckpointError
from deta.platform.checkpoint.local import clean_leftovers, newest_checkpoint, take_snapshot
from deta.platform.learning.distributed import Worker
from deta.platform.run.fence import Fence, FencedOffError
from deta.platform.run.journal import JOURNAL_FILE, Journal, read_events
from deta.platform.run.run import STOP_FILE, Run
from deta.platform.run.run_state import RunState
from deta.platform.training.train_state import TrainState

POLL_STOP_FILE_EVERY_S = 0.5
FINAL_RETRIES, FINAL_RETRY_WAIT_S = 5, 10.0  # for the last checkpoint on a full disk
TAIL_BYTES = 1 << 16  # of a journal; enough for its latest events


class Recorder:
    """Writes the journal and checkpoints of one worker group.

    Creating it fences off all earlier groups: they cannot write any more.
    """

    def __init__(self, run: Run, *, leads: bool) -> None:
        self.run = run
        self.blocked_s = 0.0  # how long the training has waited for saves
        self._journal: Journal | None = None
        self._writer: CheckpointWriter | None = None
        self._saved_s = self._polled_s = time.monotonic()
        self._is_owed = False  # a checkpoint, by `checkpoint.every_steps`
        # A run that fails more often than it saves would make no progress, so it saves sooner.
        self._starts_here = 1
        if leads:
            fence = Fence.acquire(run.folder, f"{socket.gethostname()}:{os.getpid()}")
            clean_leftovers(run.checkpoints)
            self._journal = Journal(run.folder, fence)
            keep, store = run.config.checkpoint.keep, run.config.checkpoint.store
            self._writer = CheckpointWriter(run.checkpoints, keep=keep, store=store, fence=fence)

    def open_newest(self) -> Checkpoint | None:
        """Return the checkpoint to resume from, and log the start; on rank 0 only."""
        newest = newest_checkpoint(
            self.run.checkpoints, lambda message: self.log_event("damaged", message=message)
        )
        self.log_event("starting", step=newest.state.step if newest is not None else 0)
        return newest

    # The journal

    def log_event(self, kind: str, **values: object) -> None:
        """Append an event to the journal; on other ranks do nothing."""
        if self._journal is not None:
            self._journal.write(kind, **values)

    def log_begin(
        self, state: RunState, worker: Worker, num_parameters: int, num_loader_workers: int
    ) -> None:
        """Log that the first step follows, and how many steps and seconds a restart has cost.

        Args:
            num_parameters: of the model, trained or not.
            num_loader_workers: of each training worker.
        """
        if self._journal is None:
            return
        step = state.step
        path = self.run.folder / JOURNAL_FILE
        tail = max(0, path.stat().st_size - TAIL_BYTES) if path.exists() else 0
        last, starts_here = None, 0
        for event, _ in read_events(self.run.folder, tail):
            if event["kind"] in ("progress", "evaluation", "checkpoint"):
                last = event
            elif event["kind"] == "starting":
                starts_here += event["step"] == step
        self._starts_here = max(1, starts_here)
        lost = {}
        if last is not None and step > 0:
            lost["wasted_steps"] = max(0, last["step"] - step)
            lost["restart_s"] = time.time() - last["time_s"]
        self.log_event(
            "begin",
            step=step,
            num_steps=self.run.num_steps,
            world_size=worker.world_size,
            loader_workers=num_loader_workers,
            cpus=worker.num_cpus,
            num_parameters=num_parameters,
            useful_s=state.useful_s,
            **lost,
        )

    def is_stop_requested(self) -> bool:
        now_s = time.monotonic()
        if self._journal is None or now_s - self._polled_s <= POLL_STOP_FILE_EVERY_S:
            return False
        self._polled_s = now_s
        return (self.run.folder / STOP_FILE).exists()

    # Checkpoints

    def is_save_due(self, *, at_once: bool) -> bool:
        """Return whether this worker wants the state to be saved before the next step."""
        if self._writer is None or self._writer.is_busy:
            return False
        every_s = 60 * (self.run.config.checkpoint.every_minutes or float("inf"))
        is_time = time.monotonic() - self._saved_s >= every_s / 4.0 ** (self._starts_here - 1)
        return at_once or self._is_owed or is_time

    def count_step(self, step: int) -> None:
        """Register a finished step, after which `checkpoint.every_steps` may demand a save."""
        every_steps = self.run.config.checkpoint.every_steps
        self._is_owed = self._is_owed or bool(every_steps and step % every_steps == 0)

    def save(self, train_state: TrainState, state: RunState, *, wait: bool) -> None:
        """Copy the state and write it in the background; with `wait`, block until it is written."""
        if self._writer is None:
            return
        began_s = time.perf_counter()
        is_taken = self._writer.save(
            lambda into: take_snapshot(
                state,
                self.run.config,
                self.run.train_set.categories,
                train_state.eval_model.state_dict(),
                train_state.training_state(),
                into,
            ),
            wait=wait,
        )
        if is_taken:
            self._saved_s, self._is_owed = time.monotonic(), False
        self.blocked_s += time.perf_counter() - began_s

    def save_evaluated(self, train_state: TrainState, state: RunState) -> None:
        """Save the evaluated state. The last state must not be lost, so it is retried for a while.

        Raises:
            CheckpointError: the run has ended, and its last state cannot be written.
        """
        is_last = self.run.is_done(state)
        for attempt in range(1 + FINAL_RETRIES):
            if attempt:
                time.sleep(FINAL_RETRY_WAIT_S)
            self.save(train_state, state, wait=True)
            error = self.log_saves()
            if not (error and is_last):
                return
        raise CheckpointError(
            f"the training is done, but its last checkpoint cannot be written: {error}. Free "
            "some disk space, then use --resume; it continues from the checkpoint before."
        )

    def log_saves(self) -> str:
        """Log what the checkpoint writer has finished; return why the last save failed, if it did.

        Raises:
            FencedOffError: another worker group has taken over the run.
        """
        error = ""
        for outcome in self._writer.poll() if self._writer is not None else ():
            if outcome.fenced_off:
                raise FencedOffError(outcome.error)
            if outcome.error is not None:
                self.log_event("checkpoint_failed", step=outcome.step, message=outcome.error)
            if outcome.place == "store":  # the disk has it; the copy is retried later
                continue
            error = outcome.error or ""
            if outcome.path is not None:
                self.log_event(
                    "checkpoint",
                    step=outcome.step,
                    path=str(outcome.path.relative_to(self.run.folder)),
                    blocked_s=outcome.blocked_s,
                    seconds=outcome.seconds,
                )
        return error

    def close(self, timeout_s: float) -> None:
        """Wait for unfinished writes and copies to a store, but at most `timeout_s`."""
        if self._writer is not None:
            self._writer.close(timeout_s)
            self.log_saves()
        if self._journal is not None:
            self._journal.close()
