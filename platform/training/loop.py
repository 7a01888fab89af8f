"""A run from its first or last checkpoint to its end, as one of its workers sees it.

Knows no cluster: `worker.py` calls it inside a Ray Train worker, a test or a notebook calls it as
it is. The loop always looks for a checkpoint first, so a new run, a resumed one and one that goes
on after a fault are the same code.

All that happens between two steps happens in one place, `_Loop._between_steps`, at the same step on
all workers. There the run is saved, asked to leave, and compared among its workers.
"""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace

import torch
import torch.distributed as dist
from torch import Tensor

from deta.model.architectures import make_criterion
from deta.platform.data.data_loader import LoadedBatch, train_loader
from deta.platform.data.draw_boxes import write_validation_sheet
from deta.platform.data.sample_order import splitmix64
from deta.platform.evaluation.evaluate_model import Evaluation, evaluate_model
from deta.platform.learning.distributed import (
    DriftError,
    Word,
    Worker,
    agree,
    first_difference,
    from_everyone,
    from_leader,
)
from deta.platform.learning.gradient_sum import share_statistics
from deta.platform.learning.hang_watchdog import Watchdog
from deta.platform.learning.optimizer import set_lr
from deta.platform.learning.train_step import PRECISIONS, StepResult, train_step
from deta.platform.run.run import Run
from deta.platform.run.run_state import RunState
from deta.platform.system.short_list import short_list
from deta.platform.training.energy_meter import EnergyMeter
from deta.platform.training.evaluation_history import EvaluationBook
from deta.platform.training.recorder import Keeper
from deta.platform.training.run_metrics import StepTimes
from deta.platform.training.train_state import Learner, make_learner

logger = logging.getLogger(__name__)


ASK_CLUSTER_EVERY_S = 5.0


class BrokenImagesError(ValueError):
    """More training pictures are broken than `data.max_broken_share` allows."""


@dataclass
class Progress:
    """What has gathered since the last look at the losses."""

    data_wait_s: float = 0.0
    began_s: float = field(default_factory=time.perf_counter)
    scalars: list[dict[str, Tensor]] = field(default_factory=list)


@dataclass(frozen=True)
class _Skipped:
    """What one worker knows of a step that was skipped."""

    rank: int
    images: list[int]  # ids
    not_finite: list[str]  # losses, or the norm of the gradient


def train(
    run: Run,
    worker: Worker,
    on_evaluation: Callable[[dict[str, float]], None] | None = None,
    is_losing_a_node: Callable[[], bool] | None = None,
    on_step: Callable[[StepTimes], None] | None = None,
) -> dict[str, float]:
    """Train to the end, or to where early stopping or a request to stop ends it.

    Args:
        on_evaluation: called on every worker with the metrics after each evaluation, so that a
            cluster's own bookkeeping (a sweep that stops bad trials) can follow.
        is_losing_a_node: called on every worker at the same step, every few seconds; true from when
            the cluster has said that it will take a node away. The run is then saved at every step.
        on_step: called after every step with what this worker measured of it.

    Returns:
        The last metrics, AP and its kin in 0..100; the same on every worker. Empty if the run was
        asked to stop before its first evaluation.

    Raises:
        FloatingPointError: losses or gradients were not finite for too many steps in a row; names
            the images.
        BrokenImagesError: too many training pictures turned out broken; names them.
        DriftError: the workers' weights are no longer equal.
        CheckpointError: the checkpoint to go on from contradicts itself, or the run is at its end
            and its last state cannot be written.
    """
    watchdog = Watchdog(run.folder, worker.rank, run.config.cluster.hang_timeout_s)
    try:
        keeper = Keeper(run, leads=worker.leads)
        resumed = from_leader(keeper.open_newest() if worker.leads else None, worker)
        if resumed is not None:
            resumed.require_consistent()
        learner = make_learner(run, worker, resumed)
        state = resumed.state if resumed else RunState(step=0, samples_seen=0, epoch=0.0)
        with EnergyMeter(_gpus(worker)) as meter:
            loop = _Loop(
                run, worker, learner, keeper, state, watchdog, meter, is_losing_a_node, on_step
            )
            return loop.run_to_end(on_evaluation)
    finally:
        watchdog.close()


def _gpus(worker: Worker) -> list[str]:
    """What the driver calls the GPU that this worker computes on; none without one."""
    if worker.device.type != "cuda":
        return []
    return [f"GPU-{torch.cuda.get_device_properties(worker.device).uuid}"]


def _only_numbers(metrics: Mapping[str, float | None]) -> dict[str, float]:
    """What can be compared: a NaN or an infinite AP would be best, or break what ranks by it."""
    return {n: float(v) for n, v in metrics.items() if v is not None and math.isfinite(v)}


class _Loop:
    def __init__(
        self,
        run: Run,
        worker: Worker,
        learner: Learner,
        keeper: Keeper,
        state: RunState,
        watchdog: Watchdog,
        meter: EnergyMeter,
        is_losing_a_node: Callable[[], bool] | None,
        on_step: Callable[[StepTimes], None] | None,
    ) -> None:
        self.run, self.worker, self.learner, self.keeper = run, worker, learner, keeper
        self.state, self.watchdog, self.is_losing_a_node = state, watchdog, is_losing_a_node
        self.meter = meter
        self.on_step = on_step
        self.book = EvaluationBook(run, keeper.tell)
        self.criterion = make_criterion(run.config.criterion, run.config.model)
        self.precision = PRECISIONS[run.config.precision]
        self.broken_images = dict(state.broken_images)
        self.progress = Progress()
        self.step_ended_s = self.asked_s = time.monotonic()
        self.node_goes = False

    def run_to_end(
        self, on_evaluation: Callable[[dict[str, float]], None] | None
    ) -> dict[str, float]:
        run, config = self.run, self.run.config
        num_parameters = sum(one.numel() for one in self.learner.model.parameters())
        self.keeper.tell_begin(self.state, self.worker.world_size, num_parameters)
        evaluation_steps = run.evaluation_steps()
        if self.state.step in evaluation_steps and not self.state.metrics:
            self._evaluate_and_save(on_evaluation)  # it was interrupted here
        loader = train_loader(
            run.train_set,
            config.data.augmentation,
            seed=config.seed,
            total_batch_size=config.total_batch_size,
            micro_batch_size=config.micro_batch_size,
            rank=self.worker.rank,
            world_size=self.worker.world_size,
            start_step=self.state.step,
            end_step=run.num_steps,
            num_loader_workers=config.data.loader_workers,
            pin_memory=self.worker.device.type == "cuda",
        )
        steps = iter(loader) if len(loader) > 0 else iter(())
        metrics = dict(self.state.metrics)
        self._forget()
        for step in range(self.state.step, run.num_steps):
            if run.reason_to_stop(self.state):  # also where a stopped run is resumed
                break
            self.watchdog.beat("data")
            asked_s = time.perf_counter()
            micro_batches = next(steps)
            data_wait_s = time.perf_counter() - asked_s
            self.progress.data_wait_s += data_wait_s
            self.watchdog.beat("step")
            word = agree(self._word(micro_batches), self.worker)
            if self._between_steps(word, micro_batches):
                self.keeper.tell("stopping", step=step, reason="asked to stop")
                self.keeper.close(timeout_s=5)  # whoever asked will not wait for a store
                return metrics
            began_s = time.perf_counter()
            self._update(step, micro_batches, word.num_boxes)
            if self.on_step is not None:
                num_images = sum(len(loaded) for loaded in micro_batches)
                self.on_step(StepTimes(num_images, data_wait_s, time.perf_counter() - began_s))
            is_evaluation = step + 1 in evaluation_steps
            if (step + 1) % config.log_every_steps == 0 or is_evaluation:
                self._look()
            if is_evaluation:
                metrics = self._evaluate_and_save(on_evaluation)
        self.keeper.tell("end", step=self.state.step, metrics=metrics,
                   reason=run.reason_to_stop(self.state))  # fmt: skip
        self.keeper.close(timeout_s=600)
        return metrics

    # Between two steps

    def _word(self, micro_batches: list[LoadedBatch]) -> Word:
        """What this worker has to say before a step."""
        ask = False
        if self.worker.leads and self.is_losing_a_node is not None:
            ask = time.monotonic() - self.asked_s > ASK_CLUSTER_EVERY_S
        return Word(
            num_boxes=sum(loaded.batch.num_boxes for loaded in micro_batches),
            stop=self.keeper.is_asked_to_stop(),
            save=self.keeper.is_save_due(at_once=self.node_goes),
            ask_cluster=ask,
            num_replaced=sum(len(loaded.replaced) for loaded in micro_batches),
        )

    def _between_steps(self, word: Word, micro_batches: list[LoadedBatch]) -> bool:
        """All that is due before the next step; true if the run is to leave."""
        step, config = self.state.step, self.run.config
        if word.num_replaced:
            self._note_broken_images(micro_batches)
        if word.ask_cluster and self.is_losing_a_node is not None:
            self.asked_s = time.monotonic()
            self.node_goes = self.is_losing_a_node()
        if word.save or word.stop or step % config.compare_weights_every_steps == 0:
            self._require_equal_weights()
        if word.save or word.stop:
            self.watchdog.beat("saving")
            self.keeper.save(self.learner, self.state, wait=word.stop)
            self.watchdog.beat("step")
        self.keeper.tell_saved()
        return word.stop

    def _require_equal_weights(self) -> None:
        different = first_difference(self.learner.model, self.worker)
        if different is not None:
            self.keeper.tell("drift", step=self.state.step, parameter=different)
            raise DriftError(
                f"step {self.state.step}: {different} is not the same on all "
                f"{self.worker.world_size} workers, as it must be; going on from a checkpoint "
                "that is older. If it happens again on one machine, look at its memory"
            )

    def _note_broken_images(self, micro_batches: list[LoadedBatch]) -> None:
        own = [one for loaded in micro_batches for one in loaded.replaced]
        everyone = [one for part in from_everyone(own, self.worker) for one in part]
        new = {
            str(one.image_id): one.reason
            for one in everyone
            if str(one.image_id) not in self.broken_images
        }
        self.broken_images |= new
        if new:
            self.keeper.tell(
                "replaced",
                step=self.state.step,
                images=[one._asdict() for one in everyone],
            )
        share, num_images = self.run.config.data.max_broken_share, len(self.run.train_set)
        if len(self.broken_images) > max(1, int(share * num_images)):
            listed = "\n".join(f"  {reason}" for reason in list(self.broken_images.values())[:20])
            raise BrokenImagesError(
                f"{len(self.broken_images)} of {num_images} training images are broken, more than "
                f"data.max_broken_share={share} allows:\n{listed}\nRepair or remove them, or "
                "raise data.max_broken_share; then --resume goes on."
            )

    # A step

    def _update(self, step: int, micro_batches: list[LoadedBatch], num_boxes: int) -> None:
        config, learner = self.run.config, self.learner
        set_lr(learner.optimizer, config.schedule.lr_factor(self.run.epoch_at(step)))
        result = train_step(
            learner.parallel,
            self.criterion,
            [loaded.batch for loaded in micro_batches],
            learner.optimizer,
            num_boxes=num_boxes,
            # Dropout and stochastic depth: a function of the position, for any number of workers.
            seeds=[splitmix64(config.seed, loaded.first_position) for loaded in micro_batches],
            max_grad_norm=config.optim.max_grad_norm,
            precision=self.precision,
            device=self.worker.device,
            gradients=learner.gradients,
        )
        share_statistics(learner.statistics, self.worker.world_size)
        if result.updated and learner.average is not None:
            learner.average.update_parameters(learner.model)
        self.progress.scalars.append(result.scalars)
        now_s = time.monotonic()
        done = step + 1
        self.state = RunState(
            step=done,
            samples_seen=done * config.total_batch_size,
            epoch=self.run.epoch_at(done),
            best_ap=self.state.best_ap,
            ap_history=self.state.ap_history,
            skipped_steps=self.state.skipped_steps + (not result.updated),
            skipped_in_a_row=0 if result.updated else self.state.skipped_in_a_row + 1,
            broken_images=self.broken_images,
            useful_s=self.state.useful_s + now_s - self.step_ended_s,
            data_fingerprint=self.run.train_set.fingerprint,
            code_commit=self.run.code_commit,
        )
        self.step_ended_s = now_s
        self.keeper.note_step(done)
        if not result.updated:
            self._note_skipped(result, micro_batches)

    def _note_skipped(self, result: StepResult, micro_batches: list[LoadedBatch]) -> None:
        """Gradients are shared, so all workers come here at the same step."""
        own = _Skipped(
            rank=self.worker.rank,
            images=[i for loaded in micro_batches for i in loaded.image_ids],
            not_finite=[n for n, value in result.scalars.items() if not value.isfinite()],
        )
        everyone = from_everyone(own, self.worker)
        # Where one worker's loss is bad, its images are to blame; a bad gradient is everybody's.
        guilty = [one for one in everyone if "loss" in one.not_finite] or everyone
        images = [image for one in guilty for image in one.images]
        names = sorted({name for one in guilty for name in one.not_finite})
        state = self.state
        self.keeper.tell("skipped", step=state.step, images=images, not_finite=names,
                   in_a_row=state.skipped_in_a_row, total=state.skipped_steps)  # fmt: skip
        if state.skipped_in_a_row < self.run.config.max_skipped_steps:
            return
        dump = self.run.folder / f"not-finite-step-{state.step:08d}.json"
        if self.worker.leads:
            workers = [asdict(one) for one in everyone]
            dump.write_text(json.dumps({"step": state.step, "workers": workers}, indent=2))
        raise FloatingPointError(
            f"step {state.step}: {', '.join(names)} not finite, and so for "
            f"{state.skipped_in_a_row} steps in a row, each of which was skipped; the last with "
            f"the images of ids {short_list(images, 20)} (all in {dump.name}). Check these "
            "images and their boxes, or lower optim.lr, or use precision=fp32. The last checkpoint "
            "is from before it."
        )

    def _look(self) -> None:
        """Read the losses since the last look, on all workers: the only wait for the device."""
        progress, config, step = self.progress, self.run.config, self.state.step
        names = list(progress.scalars[0])
        table = torch.stack(
            [torch.stack([row[name].float() for name in names]) for row in progress.scalars]
        )  # steps, scalars
        if self.worker.world_size > 1:
            dist.all_reduce(table)
            table /= self.worker.world_size
        finite = table.isfinite().all(1)  # steps that were not skipped
        means = dict(zip(names, table[finite].mean(0).tolist(), strict=True))
        losses = table[:, names.index("loss")].tolist()
        elapsed_s = time.perf_counter() - progress.began_s
        images_per_s = len(progress.scalars) * config.total_batch_size / elapsed_s
        remaining = (self.run.num_steps - step) * config.total_batch_size
        metrics = {f"train/{name}": value for name, value in means.items()}
        metrics |= {
            "train/lr": self.learner.optimizer.param_groups[0]["lr"],
            "train/epoch": self.run.epoch_at(step),
            "train/samples_seen": self.state.samples_seen,
            "train/images_per_s": images_per_s,
            "train/data_wait_share": progress.data_wait_s / elapsed_s,
            "train/checkpoint_blocked_share": self.keeper.blocked_s / elapsed_s,
            "train/skipped_steps": self.state.skipped_steps,
            "train/broken_images": len(self.broken_images),
        }
        if self.worker.device.type == "cuda":
            metrics["train/gpu_memory_gib"] = torch.cuda.max_memory_allocated() / 2**30
        self.keeper.tell(
            "progress",
            step=step,
            num_steps=self.run.num_steps,
            losses=[loss if ok else None for loss, ok in zip(losses, finite.tolist(), strict=True)],
            metrics=metrics,
            remaining_s=remaining / images_per_s,
            useful_s=self.state.useful_s,
        )
        self._forget()

    # Evaluation and checkpoints

    def _evaluate_and_save(
        self, on_evaluation: Callable[[dict[str, float]], None] | None
    ) -> dict[str, float]:
        """The state is saved before and after: an evaluation can take longer than a notice."""
        config, state = self.run.config, self.state
        self._require_equal_weights()
        self.keeper.save(self.learner, self.state, wait=False)
        self.keeper.tell("evaluating", step=state.step)
        self.watchdog.beat("evaluating")
        began_s = time.perf_counter()
        evaluation = evaluate_model(
            self.learner.evaluated,
            self.run.val_set,
            config.data.evaluation_size,
            config.postprocess,
            batch_size=max(1, config.micro_batch_size),
            precision=self.precision,
            worker=self.worker,
            loader_workers=config.data.loader_workers,
            on_batch=self._on_evaluated_batch,
        )
        metrics = _only_numbers(evaluation.metrics.percent()) if evaluation is not None else {}
        metrics = from_leader(metrics, self.worker)
        now_s = time.monotonic()
        self.state = replace(
            state,
            metrics=metrics,
            best_ap=max(state.best_ap or 0.0, metrics.get("AP", 0.0)),
            ap_history=state.ap_history + ([metrics["AP"]] if "AP" in metrics else []),
            useful_s=state.useful_s + now_s - self.step_ended_s,
        )
        self.step_ended_s = now_s
        self._tell_energy()
        evaluated_s = time.perf_counter() - began_s
        if evaluation is not None:
            self._tell_evaluation(evaluation, metrics, evaluated_s)
        self.watchdog.beat("saving")
        self.keeper.save_evaluated(self.learner, self.state)
        if evaluation is not None:
            self.watchdog.beat("saving")
            self.book.keep(evaluation, self.state, evaluated_s)
        if self.worker.world_size > 1:
            dist.barrier()  # nobody goes on, and perhaps fails, before the checkpoint is whole
        if on_evaluation is not None:
            step, seen = self.state.step, self.state.samples_seen
            on_evaluation(metrics | {"step": step, "samples_seen": seen})
        self._forget()
        return metrics

    def _tell_energy(self) -> None:
        """What the workers' GPUs have taken up since this start, if any driver counts it."""
        if self.worker.device.type == "cuda":
            known = [kwh for kwh in from_everyone(self.meter.kwh(), self.worker) if kwh is not None]
            if known:
                self.keeper.tell("energy", step=self.state.step, kwh=sum(known))

    def _on_evaluated_batch(self, _num_images: int) -> None:
        self.watchdog.beat("evaluating")
        self.keeper.tell_saved()

    def _tell_evaluation(
        self, evaluation: Evaluation, metrics: dict[str, float], seconds: float
    ) -> None:
        val_set, step = self.run.val_set, self.state.step
        names = {category.id: category.name for category in val_set.categories}
        by_class = {
            f"AP_of_class/{names[category_id]}": 100 * ap
            for category_id, ap in evaluation.metrics.ap_per_category.items()
        }
        self.keeper.tell(
            "evaluation",
            step=step,
            metrics={f"val/{name}": value for name, value in metrics.items()}
            | by_class
            | self.book.explain(evaluation, step, seconds)
            | {
                "val/epoch": self.run.epoch_at(step),
                "val/samples_seen": self.state.samples_seen,
                "val/seconds": seconds,
            },
            table=evaluation.metrics.table(val_set.categories),
            useful_s=self.state.useful_s,
        )
        if self.run.config.num_pictures > 0:
            picture = self.run.folder / "pictures" / f"validation-step-{step:08d}.png"
            try:
                write_validation_sheet(
                    picture, val_set, evaluation.results, self.run.config.num_pictures
                )
            except OSError as error:  # a full disk; the numbers are safe
                logger.warning("%s: the picture was not written: %s", picture, error)
                return
            self.keeper.tell("picture", step=step, path=str(picture.relative_to(self.run.folder)))

    def _forget(self) -> None:
        self.progress = Progress()
        self.keeper.blocked_s = 0.0
        self.step_ended_s = time.monotonic()
