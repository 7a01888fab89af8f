"""The training loop of one worker, from the newest checkpoint to the end of the run.

The loop does not know the cluster. `cluster/train_worker.py` calls it inside a Ray Train worker; a
test or a notebook calls it directly. It always tries to resume first, so a new run, a resumed run
and a restart after a failure are the same code.

Everything that is not an update happens between two steps, at the same step on all workers:
`_Loop.run_to_end` names each of these periodic actions in order.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import replace

import torch
import torch.distributed as dist

from deta.model.architectures import make_criterion
from deta.platform.data.data_loader import LoadedBatch, choose_loader_workers, train_loader
from deta.platform.data.sample_order import splitmix64
from deta.platform.evaluation.evaluate_model import evaluate_model
from deta.platform.learning.device_batches import DeviceBatches, StepBatches
from deta.platform.learning.distributed import (
    DriftError,
    StepVote,
    Worker,
    broadcast_from_leader,
    first_different_tensor,
    sum_votes,
)
from deta.platform.learning.gradient_sum import broadcast_statistics
from deta.platform.learning.hang_watchdog import Watchdog
from deta.platform.learning.numerics import AUTOCAST
from deta.platform.learning.optimizer import set_lr
from deta.platform.learning.train_step import train_step
from deta.platform.run.run import Run
from deta.platform.run.run_state import RunState
from deta.platform.training.evaluation_history import EvaluationHistory
from deta.platform.training.recorder import Recorder
from deta.platform.training.run_metrics import StepTimes
from deta.platform.training.train_events import LogWindow, TrainEvents
from deta.platform.training.train_state import TrainState, make_train_state

POLL_CLUSTER_EVERY_S = 5.0


def train(
    run: Run,
    worker: Worker,
    on_evaluation: Callable[[dict[str, float]], None] | None = None,
    is_preemption_announced: Callable[[], bool] | None = None,
    on_step: Callable[[StepTimes], None] | None = None,
) -> dict[str, float]:
    """Train until the schedule ends, early stopping applies, or a stop is requested.

    Args:
        on_evaluation: called on every worker with the metrics after each evaluation, so that a
            sweep can stop bad trials.
        is_preemption_announced: called on every worker at the same step, every few seconds; returns
            True once the cluster has announced a preemption. The run is then saved at every step.
        on_step: called after every step with the times that this worker measured.

    Returns:
        The last metrics, AP and the other COCO metrics in 0..100; the same on every worker. Empty
        if the run was stopped before its first evaluation.

    Raises:
        FloatingPointError: losses or gradients were not finite for too many steps in a row; names
            the images.
        BrokenImagesError: too many training images are broken; names them.
        DriftError: the workers' weights are no longer equal.
        CheckpointError: the checkpoint to resume from is inconsistent, or the run has ended and its
            last state cannot be written.
    """
    watchdog = Watchdog(
        run.folder,
        worker.rank,
        run.config.cluster.hang_timeout_s,
        spins=worker.device.type == "cuda",
    )
    try:
        recorder = Recorder(run, leads=worker.is_leader)
        resumed = broadcast_from_leader(
            recorder.open_newest() if worker.is_leader else None, worker
        )
        train_state = make_train_state(run, worker, resumed)
        state = resumed.state if resumed else RunState(step=0, samples_seen=0, epoch=0.0)
        loop = _Loop(run, worker, train_state, state, recorder, watchdog)
        loop.on_evaluation, loop.on_step = on_evaluation, on_step
        loop.is_preemption_announced = is_preemption_announced
        return loop.run_to_end()
    finally:
        watchdog.close()


def _only_finite(metrics: Mapping[str, float | None]) -> dict[str, float]:
    """Drop values that cannot be ranked: a NaN or infinite AP would count as the best."""
    return {n: float(v) for n, v in metrics.items() if v is not None and math.isfinite(v)}


class _Loop:
    """The loop over steps on one worker."""

    on_evaluation: Callable[[dict[str, float]], None] | None = None
    is_preemption_announced: Callable[[], bool] | None = None
    on_step: Callable[[StepTimes], None] | None = None

    def __init__(
        self,
        run: Run,
        worker: Worker,
        train_state: TrainState,
        state: RunState,
        recorder: Recorder,
        watchdog: Watchdog,
    ) -> None:
        self.run, self.worker, self.train_state, self.state = run, worker, train_state, state
        self.recorder, self.watchdog = recorder, watchdog
        self.events = TrainEvents(run, worker, recorder, dict(state.broken_images))
        self.history = EvaluationHistory(run, recorder.log_event)
        self.criterion = make_criterion(run.config.criterion, run.config.model)
        self.precision = AUTOCAST[run.config.precision]
        self.num_loader_workers = choose_loader_workers(
            run.config.data.loader_workers,
            on_gpu=worker.device.type == "cuda",
            num_cpus=worker.num_cpus,
        )
        self.window = LogWindow()
        self.step_ended_s = self.polled_cluster_s = time.monotonic()
        self.is_preempted = False
        self.data_wait_s = 0.0  # of the present step

    def run_to_end(self) -> dict[str, float]:
        run, config = self.run, self.run.config
        num_parameters = sum(one.numel() for one in self.train_state.model.parameters())
        self.recorder.log_begin(
            self.state, self.worker, num_parameters, num_loader_workers=self.num_loader_workers
        )
        evaluation_steps = run.evaluation_steps()
        if self.state.step in evaluation_steps and not self.state.metrics:
            self._evaluate_and_save()  # the run was interrupted here
        self.batches = self._batches()
        metrics = dict(self.state.metrics)
        self._reset_window()
        for step in range(self.state.step, run.num_steps):
            if run.reason_to_stop(self.state):  # also where a stopped run is resumed
                break
            batches = self._next_batches()
            micro_batches = batches.micro_batches
            self.watchdog.heartbeat("peers")
            vote = sum_votes(self._vote(batches), self.worker)
            self.watchdog.heartbeat("step")
            if vote.num_replaced:
                self.events.log_broken_images(self.state, micro_batches)
            if vote.check_preemption:
                assert self.is_preemption_announced is not None
                self.polled_cluster_s = time.monotonic()
                self.is_preempted = self.is_preemption_announced()
            if vote.save or vote.stop or step % config.compare_weights_every_steps == 0:
                self._require_equal_weights()
            if vote.save or vote.stop:
                self.watchdog.heartbeat("saving")
                self.recorder.save(self.train_state, self.state, wait=vote.stop)
                self.watchdog.heartbeat("step")
            self.recorder.log_saves()
            if vote.stop:
                self.recorder.log_event("stopping", step=step, reason="asked to stop")
                self.recorder.close(timeout_s=5)  # the caller does not wait for a store
                return metrics
            began_s = time.perf_counter()
            self._update(step, micro_batches, vote.num_boxes)
            if self.on_step is not None:
                num_images = sum(len(loaded) for loaded in micro_batches)
                update_s = time.perf_counter() - began_s
                self.on_step(StepTimes(num_images, self.data_wait_s, update_s))
            self.data_wait_s = 0.0
            is_evaluation = step + 1 in evaluation_steps
            if (step + 1) % config.log_every_steps == 0 or is_evaluation:
                lr = self.train_state.optimizer.param_groups[0]["lr"]
                self.events.log_progress(self.state, self.window, lr)
                self._reset_window()
            if is_evaluation:
                metrics = self._evaluate_and_save()
        reason = run.reason_to_stop(self.state)
        self.recorder.log_event("end", step=self.state.step, metrics=metrics, reason=reason)
        self.recorder.close(timeout_s=600)
        return metrics

    def _batches(self) -> DeviceBatches:
        """Load the micro-batches of this worker, from the present step to the end."""
        config = self.run.config
        loader = train_loader(
            self.run.train_set,
            config.data.augmentation,
            seed=config.seed,
            total_batch_size=config.total_batch_size,
            micro_batch_size=config.micro_batch_size,
            rank=self.worker.rank,
            world_size=self.worker.world_size,
            start_step=self.state.step,
            end_step=self.run.num_steps,
            num_loader_workers=self.num_loader_workers,
            pin_memory=self.worker.device.type == "cuda",
        )
        return DeviceBatches(iter(loader) if len(loader) > 0 else iter(()), self.worker.device)

    def _next_batches(self) -> StepBatches:
        """Return the data of the next step."""
        self.watchdog.heartbeat("data")
        began_s = time.perf_counter()
        batches = next(self.batches)
        self._count_data_wait(time.perf_counter() - began_s)
        self.watchdog.heartbeat("step")
        return batches

    def _prefetch(self) -> None:
        """Load and begin to copy the data of the next step, while the GPU computes this one."""
        if self.worker.device.type != "cuda":
            return
        computed = torch.cuda.Event()
        computed.record()
        self.watchdog.heartbeat("data")
        began_s = time.perf_counter()
        self.batches.prefetch()
        if computed.query():  # else the GPU has not waited
            self._count_data_wait(time.perf_counter() - began_s)
        self.watchdog.heartbeat("step")

    def _count_data_wait(self, seconds: float) -> None:
        self.window.data_wait_s += seconds
        self.data_wait_s += seconds

    # Between two steps

    def _vote(self, batches: StepBatches) -> StepVote:
        """Return what this worker contributes to the all_reduce before a step."""
        may_ask = self.worker.is_leader and self.is_preemption_announced is not None
        is_time = time.monotonic() - self.polled_cluster_s > POLL_CLUSTER_EVERY_S
        return StepVote(
            num_boxes=batches.num_boxes,
            stop=self.recorder.is_stop_requested(),
            save=self.recorder.is_save_due(at_once=self.is_preempted),
            check_preemption=may_ask and is_time,
            num_replaced=sum(len(loaded.replaced) for loaded in batches.micro_batches),
        )

    def _require_equal_weights(self) -> None:
        different = first_different_tensor(self.train_state.model, self.worker)
        if different is not None:
            self.recorder.log_event("drift", step=self.state.step, parameter=different)
            raise DriftError(
                f"step {self.state.step}: {different} differs among the "
                f"{self.worker.world_size} workers but must be equal; restarting from an older "
                "checkpoint. If it happens again on one machine, test its memory"
            )

    # A step

    def _update(self, step: int, micro_batches: list[LoadedBatch], num_boxes: int) -> None:
        config, train_state = self.run.config, self.train_state
        set_lr(train_state.optimizer, config.schedule.lr_factor(self.run.epoch_at(step)))
        result = train_step(
            train_state.parallel,
            self.criterion,
            [loaded.batch for loaded in micro_batches],
            train_state.optimizer,
            num_boxes=num_boxes,
            # Dropout and stochastic depth: a function of the position, for any number of workers.
            seeds=[splitmix64(config.seed, loaded.first_position) for loaded in micro_batches],
            max_grad_norm=config.optim.max_grad_norm,
            precision=self.precision,
            device=self.worker.device,
            gradients=train_state.gradients,
        )
        broadcast_statistics(train_state.statistics, self.worker.world_size)
        self._prefetch()
        updated = result.updated
        if updated and train_state.ema is not None:
            train_state.ema.update_parameters(train_state.model)
        self.window.scalars.append(result.scalars)
        now_s = time.monotonic()
        done = step + 1
        self.state = replace(
            self.state,
            step=done,
            samples_seen=done * config.total_batch_size,
            epoch=self.run.epoch_at(done),
            metrics={},
            skipped_steps=self.state.skipped_steps + (not updated),
            skipped_in_a_row=0 if updated else self.state.skipped_in_a_row + 1,
            broken_images=self.events.broken_images,
            useful_s=self.state.useful_s + now_s - self.step_ended_s,
            data_fingerprint=self.run.train_set.fingerprint,
            code_commit=self.run.code_commit,
        )
        self.step_ended_s = now_s
        self.recorder.count_step(done)
        if not updated:
            self.events.log_skipped_step(self.state, result, micro_batches)

    def _reset_window(self) -> None:
        self.window = LogWindow()
        self.recorder.blocked_s = 0.0
        self.step_ended_s = time.monotonic()

    # Evaluation and checkpoints

    def _evaluate_and_save(self) -> dict[str, float]:
        """Evaluate, and save the state before and after.

        An evaluation can take longer than the notice of a preemption.
        """
        config, state = self.run.config, self.state
        self._require_equal_weights()
        self.recorder.save(self.train_state, self.state, wait=False)
        self.recorder.log_event("evaluating", step=state.step)
        self.watchdog.heartbeat("evaluating")
        began_s = time.perf_counter()
        evaluation = evaluate_model(
            self.train_state.eval_model,
            self.run.val_set,
            config.data.evaluation_size,
            config.postprocess,
            batch_size=max(1, config.micro_batch_size),
            precision=self.precision,
            worker=self.worker,
            loader_workers=self.num_loader_workers,
            engine=config.evaluation.engine,
            on_batch=self._on_evaluated_batch,
        )
        metrics = _only_finite(evaluation.metrics.percent()) if evaluation is not None else {}
        metrics = broadcast_from_leader(metrics, self.worker)
        now_s = time.monotonic()
        self.state = replace(
            state,
            metrics=metrics,
            best_ap=max(state.best_ap or 0.0, metrics.get("AP", 0.0)),
            ap_history=state.ap_history + ([metrics["AP"]] if "AP" in metrics else []),
            useful_s=state.useful_s + now_s - self.step_ended_s,
        )
        self.step_ended_s = now_s
        seconds = time.perf_counter() - began_s
        if evaluation is not None:
            analysis = self.history.explain(evaluation, self.state.step, seconds)
            self.events.log_evaluation(self.state, evaluation, analysis, seconds)
        self.watchdog.heartbeat("saving")
        self.recorder.save_evaluated(self.train_state, self.state)
        if evaluation is not None:
            self.watchdog.heartbeat("saving")
            self.history.save(evaluation, self.state, seconds)
        if self.worker.world_size > 1:
            # No worker continues, and perhaps fails, before the checkpoint exists.
            dist.barrier(group=self.worker.control)
        if self.on_evaluation is not None:
            step, seen = self.state.step, self.state.samples_seen
            self.on_evaluation(metrics | {"step": step, "samples_seen": seen})
        self._reset_window()
        return metrics

    def _on_evaluated_batch(self, _num_images: int) -> None:
        self.watchdog.heartbeat("evaluating")
        self.recorder.log_saves()
