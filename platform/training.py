"""A run from its first or last checkpoint to its end, as one of its workers sees it.

Knows no cluster: `worker.py` calls it inside a Ray Train worker, a test or a notebook calls it as
it is. The loop always looks for a checkpoint first, so a new run, a resumed one and one that goes
on after a fault are the same code.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import AdamW
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from deta.model.architectures import Detector, make_criterion, make_detector, without_download
from deta.platform.checkpoint import (
    RunState,
    keep_newest_and_best,
    load_optimizer_state,
    newest_checkpoint,
    optimizer_state,
    write_checkpoint,
)
from deta.platform.coco import CocoDataset
from deta.platform.config import RunConfig
from deta.platform.detect import Evaluation, Worker, evaluate_model
from deta.platform.initial import load_backbone, load_initial_weights
from deta.platform.journal import Journal
from deta.platform.loader import LoadedBatch, train_loader
from deta.platform.optim import freeze, make_optimizer, set_lr
from deta.platform.order import TrainingOrder, splitmix64
from deta.platform.pictures import write_validation_sheet
from deta.platform.step import train_step

logger = logging.getLogger(__name__)

T = TypeVar("T")

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Run:
    """What the workers of a run are given."""

    config: RunConfig
    folder: Path  # of this run; the same for all workers
    train_set: CocoDataset
    val_set: CocoDataset
    code_commit: str = ""
    notes: tuple[str, ...] = ()  # what to say of the weights that it starts from

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
        """After how many steps the model is evaluated and a checkpoint written."""
        epochs, every = self.config.schedule.epochs, self.config.evaluate_every_epochs
        ends = {self.order.first_step_of_epoch(epoch) for epoch in range(every, epochs + 1, every)}
        return ends | {self.num_steps}

    def reason_to_stop(self, state: RunState) -> str:
        """Why a run in this state ends before its last step; nothing while it goes on."""
        schedule = self.config.schedule
        if state.step >= self.num_steps or not schedule.is_exhausted(state.ap_history):
            return ""
        return (
            f"stopped early after step {state.step} of {self.num_steps}: none of the last "
            f"{schedule.patience} evaluations had an AP more than {schedule.min_delta:g} above the "
            f"best before them, {max(state.ap_history):.1f} in all (schedule.patience)"
        )


@dataclass
class Progress:
    """What has gathered since the last look at the losses."""

    steps: int = 0
    data_wait_s: float = 0.0
    began_s: float = field(default_factory=time.perf_counter)
    scalars: list[dict[str, Tensor]] = field(default_factory=list)
    image_ids: list[list[int]] = field(default_factory=list)


def train(
    run: Run, worker: Worker, on_evaluation: Callable[[dict[str, float]], None] | None = None
) -> dict[str, float]:
    """Train to the end, or to where early stopping ends it.

    Args:
        on_evaluation: called on every worker with the metrics after each evaluation, so that a
            cluster's own bookkeeping (a sweep that stops bad trials) can follow.

    Returns:
        The last metrics, AP and its kin in 0..100; the same on every worker.

    Raises:
        FloatingPointError: a loss or gradient is not finite; names the images of that step.
    """
    config, device = run.config, worker.device
    torch.manual_seed(config.seed)  # all workers start from the same weights
    resumed = newest_checkpoint(run.checkpoints) if worker.leads else None
    resumed = _from_leader(resumed, worker)

    is_filled = bool(resumed or config.init_checkpoint or config.init_backbone)
    model = make_detector(without_download(config.model) if is_filled else config.model)
    if resumed is None and config.init_checkpoint is not None:
        load_initial_weights(
            model, Path(config.init_checkpoint), run.train_set.categories, config.init_classes
        )
    elif resumed is None and config.init_backbone is not None:
        load_backbone(model, Path(config.init_backbone))
    freeze(model, config.optim.freeze)
    model.to(device)
    average = None
    if config.ema_decay is not None:
        average = AveragedModel(
            model, multi_avg_fn=get_ema_multi_avg_fn(config.ema_decay), use_buffers=True
        )
    optimizer = make_optimizer(model, config.optim, config.optim.lr_for(config.total_batch_size))
    state = RunState(step=0, samples_seen=0, epoch=0.0)
    if resumed is not None:
        state = resumed.state
        tensors = resumed.training_state()
        evaluated = resumed.model_state()
        own = {n[len("weights/") :]: t for n, t in tensors.items() if n.startswith("weights/")}
        model.load_state_dict(own or evaluated)
        if average is not None:
            average.module.load_state_dict(evaluated)
            average.n_averaged.copy_(tensors["num_averaged"])
        load_optimizer_state(optimizer, model, tensors)

    parallel: nn.Module = model
    if worker.world_size > 1:
        parallel = DistributedDataParallel(
            model, device_ids=[device.index] if device.type == "cuda" else None
        )
    loop = _Loop(run, worker, model, parallel, average, optimizer, state)
    return loop.run_to_end(on_evaluation)


class _Loop:
    def __init__(
        self,
        run: Run,
        worker: Worker,
        model: Detector,
        parallel: nn.Module,
        average: AveragedModel | None,
        optimizer: AdamW,
        state: RunState,
    ) -> None:
        self.run, self.worker = run, worker
        self.model, self.parallel, self.average = model, parallel, average
        self.optimizer, self.state = optimizer, state
        self.criterion = make_criterion(run.config.criterion, run.config.model)
        self.precision = PRECISIONS[run.config.precision]
        self.journal = Journal(run.folder) if worker.leads else None

    def run_to_end(
        self, on_evaluation: Callable[[dict[str, float]], None] | None
    ) -> dict[str, float]:
        run, config = self.run, self.run.config
        self._tell("begin", step=self.state.step, num_steps=run.num_steps)
        evaluation_steps = run.evaluation_steps()
        metrics = dict(self.state.metrics)
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
        progress = Progress()
        steps = iter(loader) if len(loader) > 0 else iter(())
        for step in range(self.state.step, run.num_steps):
            if run.reason_to_stop(self.state):  # also where a stopped run is resumed
                break
            asked_s = time.perf_counter()
            micro_batches = next(steps)
            progress.data_wait_s += time.perf_counter() - asked_s
            self._update(step, micro_batches, progress)
            done = step + 1
            is_evaluation = done in evaluation_steps
            if done % config.log_every_steps == 0 or is_evaluation:
                self._look(done, progress)
                progress = Progress()
            if is_evaluation:
                metrics = self._evaluate_and_save(done)
                if on_evaluation is not None:
                    on_evaluation(metrics | {"step": done, "samples_seen": self.state.samples_seen})
                progress = Progress()
        reason = run.reason_to_stop(self.state)
        self._tell("end", step=self.state.step, metrics=metrics, reason=reason)
        if self.journal is not None:
            self.journal.close()
        return metrics

    def _update(self, step: int, micro_batches: list[LoadedBatch], progress: Progress) -> None:
        config = self.run.config
        # Dropout and stochastic depth: a function of the position, so that nothing has to be saved.
        torch.manual_seed(splitmix64(splitmix64(config.seed, step), self.worker.rank) >> 1)
        set_lr(self.optimizer, config.schedule.lr_factor(self.run.epoch_at(step)))
        scalars = train_step(
            self.parallel,
            self.criterion,
            [loaded.batch for loaded in micro_batches],
            self.optimizer,
            max_grad_norm=config.optim.max_grad_norm,
            precision=self.precision,
            device=self.worker.device,
        )
        if self.average is not None:
            self.average.update_parameters(self.model)
        progress.steps += 1
        progress.scalars.append(scalars)
        progress.image_ids.append([i for loaded in micro_batches for i in loaded.image_ids])

    def _look(self, step: int, progress: Progress) -> None:
        """Read the losses since the last look, on all workers: the only wait for the device."""
        names = list(progress.scalars[0])
        table = torch.stack(
            [torch.stack([row[name].float() for name in names]) for row in progress.scalars]
        )  # steps, scalars
        self._stop_unless_finite(step, table, progress)
        if self.worker.world_size > 1:
            dist.all_reduce(table)
            table /= self.worker.world_size
        means = dict(zip(names, table.mean(0).tolist(), strict=True))
        elapsed_s = time.perf_counter() - progress.began_s
        images_per_s = progress.steps * self.run.config.total_batch_size / elapsed_s
        remaining = (self.run.num_steps - step) * self.run.config.total_batch_size
        metrics = {f"train/{name}": value for name, value in means.items()}
        metrics |= {
            "train/lr": self.optimizer.param_groups[0]["lr"],
            "train/epoch": self.run.epoch_at(step),
            "train/images_per_s": images_per_s,
            "train/data_wait_share": progress.data_wait_s / elapsed_s,
        }
        if self.worker.device.type == "cuda":
            metrics["train/gpu_memory_gib"] = torch.cuda.max_memory_allocated() / 2**30
        self._tell(
            "progress",
            step=step,
            num_steps=self.run.num_steps,
            losses=table[:, names.index("loss")].tolist(),
            metrics=metrics,
            remaining_s=remaining / images_per_s,
        )

    def _stop_unless_finite(self, step: int, table: Tensor, progress: Progress) -> None:
        bad = (~table.isfinite()).any(1).int()  # steps
        if self.worker.world_size > 1:
            # Gradients are shared, so from that step on all workers are bad; the first step counts.
            dist.all_reduce(bad, op=dist.ReduceOp.MAX)
        if not bad.any():
            return
        row = int(bad.argmax())
        own: dict[str, list] = {
            "images": progress.image_ids[row],
            "not_finite": [
                name
                for name, value in zip(progress.scalars[0], table[row].tolist(), strict=True)
                if not torch.tensor(value).isfinite()
            ],
        }
        everyone = [own]
        if self.worker.world_size > 1:
            everyone = [own] * self.worker.world_size
            dist.all_gather_object(everyone, own)
        # Where one worker's loss is bad, its images are to blame; a bad gradient is everybody's.
        guilty = [one for one in everyone if "loss" in one["not_finite"]] or everyone
        images = [image for one in guilty for image in one["images"]]
        names = sorted({name for one in guilty for name in one["not_finite"]})
        bad_step = step - progress.steps + row + 1
        message = (
            f"step {bad_step}: {', '.join(names)} not finite, with the images of ids {images}. The "
            "last checkpoint is from before it. Look at these images and their boxes; else lower "
            "optim.lr, or use precision=fp32."
        )
        self._tell("not_finite", step=bad_step, message=message)
        raise FloatingPointError(message)

    def _evaluate_and_save(self, step: int) -> dict[str, float]:
        config = self.run.config
        began_s = time.perf_counter()
        evaluated: nn.Module = self.model if self.average is None else self.average.module
        evaluation = evaluate_model(
            evaluated,
            self.run.val_set,
            config.data.evaluation_size,
            config.postprocess,
            batch_size=max(1, config.micro_batch_size),
            precision=self.precision,
            worker=self.worker,
            loader_workers=config.data.loader_workers,
        )
        metrics = evaluation.metrics.percent() if evaluation is not None else {}
        metrics = _from_leader(metrics, self.worker)
        self.state = RunState(
            step=step,
            samples_seen=step * config.total_batch_size,
            epoch=self.run.epoch_at(step),
            metrics=metrics,
            best_ap=max(self.state.best_ap or 0.0, metrics.get("AP", 0.0)),
            ap_history=self.state.ap_history + ([metrics["AP"]] if "AP" in metrics else []),
            data_fingerprint=self.run.train_set.fingerprint,
            code_commit=self.run.code_commit,
        )
        if evaluation is not None:
            self._tell_evaluation(step, evaluation, metrics, time.perf_counter() - began_s)
            self._save(evaluated)
        if self.worker.world_size > 1:
            dist.barrier()  # nobody goes on, and perhaps fails, before the checkpoint is whole
        return metrics

    def _tell_evaluation(
        self, step: int, evaluation: Evaluation, metrics: dict[str, float], seconds: float
    ) -> None:
        val_set = self.run.val_set
        names = {category.id: category.name for category in val_set.categories}
        by_class = {
            f"AP_of_class/{names[category_id]}": 100 * ap
            for category_id, ap in evaluation.metrics.ap_per_category.items()
        }
        self._tell(
            "evaluation",
            step=step,
            metrics={f"val/{name}": value for name, value in metrics.items()}
            | by_class
            | {"val/epoch": self.run.epoch_at(step), "val/seconds": seconds},
            table=evaluation.metrics.table(val_set.categories),
        )
        if self.run.config.num_pictures > 0:
            picture = self.run.folder / "pictures" / f"validation-step-{step:08d}.png"
            write_validation_sheet(
                picture, val_set, evaluation.results, self.run.config.num_pictures
            )
            self._tell("picture", step=step, path=str(picture.relative_to(self.run.folder)))

    def _save(self, evaluated: nn.Module) -> None:
        tensors = optimizer_state(self.optimizer, self.model)
        if self.average is not None:
            tensors |= {f"weights/{n}": t for n, t in self.model.state_dict().items()}
            tensors["num_averaged"] = self.average.n_averaged
        path = write_checkpoint(
            self.run.checkpoints,
            model_state=evaluated.state_dict(),
            training_state=tensors,
            state=self.state,
            config=self.run.config,
            categories=self.run.train_set.categories,
        )
        keep_newest_and_best(self.run.checkpoints)
        self._tell("checkpoint", step=self.state.step, path=str(path.relative_to(self.run.folder)))

    def _tell(self, kind: str, **values: object) -> None:
        if self.journal is not None:
            self.journal.write(kind, **values)


def _from_leader(value: T, worker: Worker) -> T:
    """Rank 0's value, on every worker."""
    if worker.world_size == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box)
    return box[0]
