"""What is kept of a run while it trains: its journal and its checkpoints. Rank 0 does it for all.

The other ranks have a keeper too, which keeps nothing, so that the loop is the same on all.
"""

from __future__ import annotations

import os
import socket
import time

from deta.platform.checkpoint.async_writer import CheckpointWriter
from deta.platform.checkpoint.format import Checkpoint, CheckpointError
from deta.platform.checkpoint.local import clean_leftovers, newest_checkpoint, take_snapshot
from deta.platform.run.fence import Fence, FencedOffError
from deta.platform.run.journal import FILE_NAME, Journal, read_events
from deta.platform.run.run import STOP_FILE, Run
from deta.platform.run.run_state import RunState
from deta.platform.training.train_state import Learner

LOOK_FOR_STOP_EVERY_S = 0.5
TRIES_AT_THE_END, SECONDS_BETWEEN_TRIES = 5, 10.0  # for the last checkpoint on a full disk
TAIL_BYTES = 1 << 16  # of a journal: enough for what happened last


class Keeper:
    """Of one group of workers. From when it is made, no earlier group can write any more."""

    def __init__(self, run: Run, *, leads: bool) -> None:
        self.run = run
        self.blocked_s = 0.0  # how long the training has waited for saves
        self._journal: Journal | None = None
        self._writer: CheckpointWriter | None = None
        self._saved_s = self._looked_s = time.monotonic()
        self._owed = False  # a checkpoint, by `checkpoint.every_steps`
        # A run that is cut off more often than it saves would never get on; so it saves sooner.
        self._starts_here = 1
        if leads:
            fence = Fence.acquire(run.folder, f"{socket.gethostname()}:{os.getpid()}")
            clean_leftovers(run.checkpoints)
            self._journal = Journal(run.folder, fence)
            keep, store = run.config.checkpoint.keep, run.config.checkpoint.store
            self._writer = CheckpointWriter(run.checkpoints, keep=keep, store=store, fence=fence)

    def open_newest(self) -> Checkpoint | None:
        """What the run goes on from; only of rank 0."""
        newest = newest_checkpoint(self.run.checkpoints, lambda m: self.tell("damaged", message=m))
        self.tell("starting", step=newest.state.step if newest is not None else 0)
        return newest

    # The journal

    def tell(self, kind: str, **values: object) -> None:
        if self._journal is not None:
            self._journal.write(kind, **values)

    def tell_begin(self, state: RunState, world_size: int, num_parameters: int) -> None:
        """That the first step follows, and what the start has cost if something was lost.

        Args:
            num_parameters: of the model, trained or not.
        """
        if self._journal is None:
            return
        step = state.step
        path = self.run.folder / FILE_NAME
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
            lost = {
                "wasted_steps": max(0, last["step"] - step),
                "restart_s": time.time() - last["time_s"],
            }
        self.tell(
            "begin",
            step=step,
            num_steps=self.run.num_steps,
            world_size=world_size,
            num_parameters=num_parameters,
            useful_s=state.useful_s,
            **lost,
        )

    def is_asked_to_stop(self) -> bool:
        now_s = time.monotonic()
        if self._journal is None or now_s - self._looked_s <= LOOK_FOR_STOP_EVERY_S:
            return False
        self._looked_s = now_s
        return (self.run.folder / STOP_FILE).exists()

    # Checkpoints

    def is_save_due(self, *, at_once: bool) -> bool:
        """Whether this worker wants the state to be saved before the next step."""
        if self._writer is None or self._writer.is_busy:
            return False
        every_s = 60 * (self.run.config.checkpoint.every_minutes or float("inf"))
        is_time = time.monotonic() - self._saved_s >= every_s / 4.0 ** (self._starts_here - 1)
        return at_once or self._owed or is_time

    def note_step(self, step: int) -> None:
        every_steps = self.run.config.checkpoint.every_steps
        self._owed = self._owed or bool(every_steps and step % every_steps == 0)

    def save(self, learner: Learner, state: RunState, *, wait: bool) -> None:
        """Copy the state and write it beside the training; with `wait`, until it is written."""
        if self._writer is None:
            return
        began_s = time.perf_counter()
        is_taken = self._writer.save(
            lambda into: take_snapshot(
                state,
                self.run.config,
                self.run.train_set.categories,
                learner.evaluated.state_dict(),
                learner.training_state(),
                into,
            ),
            wait=wait,
        )
        if is_taken:
            self._saved_s, self._owed = time.monotonic(), False
        self.blocked_s += time.perf_counter() - began_s

    def save_evaluated(self, learner: Learner, state: RunState) -> None:
        """Save what was evaluated. The last state must not be lost: try for a while.

        Raises:
            CheckpointError: the run is at its end, and its last state cannot be written.
        """
        is_last = self.run.is_done(state)
        self.save(learner, state, wait=True)
        error = self.tell_saved()
        for _ in range(TRIES_AT_THE_END if is_last else 0):
            if not error:
                return
            time.sleep(SECONDS_BETWEEN_TRIES)
            self.save(learner, state, wait=True)
            error = self.tell_saved()
        if error and is_last:
            raise CheckpointError(
                f"the training is done, but its last checkpoint cannot be written: {error}. Make "
                "room, and --resume goes on from the one before."
            )

    def tell_saved(self) -> str:
        """What the writer has done since, into the journal; returns why the last save failed.

        Raises:
            FencedOffError: another group of workers has taken the run over.
        """
        error = ""
        for outcome in self._writer.poll() if self._writer is not None else ():
            if outcome.fenced_off:
                raise FencedOffError(outcome.error)
            if outcome.error is not None:
                self.tell("checkpoint_failed", step=outcome.step, message=outcome.error)
            if outcome.place == "store":  # the disk has it; the copy is made up for later
                continue
            error = outcome.error or ""
            if outcome.path is not None:
                self.tell(
                    "checkpoint",
                    step=outcome.step,
                    path=str(outcome.path.relative_to(self.run.folder)),
                    blocked_s=outcome.blocked_s,
                    seconds=outcome.seconds,
                )
        return error

    def close(self, timeout_s: float) -> None:
        """Wait for what is being written or copied to a store, but not for longer."""
        if self._writer is not None:
            self._writer.close(timeout_s)
            self.tell_saved()
        if self._journal is not None:
            self._journal.close()
