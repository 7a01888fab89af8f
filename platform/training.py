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
import os
import socket
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import AdamW
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from deta.model.architectures import Detector, make_criterion, make_detector, without_download
from deta.platform.agreement import (
    DriftError,
    Word,
    agree,
    first_difference,
    from_everyone,
    from_leader,
    names_of,
)
from deta.platform.checkpoint import (
    Checkpoint,
    CheckpointError,
    RunState,
    clean_leftovers,
    load_optimizer_state,
    newest_checkpoint,
    optimizer_state,
)
from deta.platform.checkpoint_writer import CheckpointWriter, Snapshot, take_snapshot
from deta.platform.detect import Evaluation, Worker, evaluate_model
from deta.platform.initial import load_backbone, load_initial_weights
from deta.platform.journal import FILE_NAME, Journal, read_events
from deta.platform.loader import LoadedBatch, train_loader
from deta.platform.lock import Fence, FencedOffError
from deta.platform.optim import freeze, make_optimizer, set_lr
from deta.platform.order import splitmix64
from deta.platform.pictures import write_validation_sheet
from deta.platform.run import Run
from deta.platform.step import StepResult, train_step
from deta.platform.watchdog import Watchdog

logger = logging.getLogger(__name__)

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}

STOP_FILE = "stop"  # in the run's folder: save and leave at the next step
LOOK_FOR_STOP_EVERY_S = 0.5
ASK_CLUSTER_EVERY_S = 5.0
TRIES_AT_THE_END, SECONDS_BETWEEN_TRIES = 5, 10.0  # for the last checkpoint on a full disk


class BrokenImagesError(ValueError):
    """More training pictures are broken than `data.max_broken_share` allows."""


@dataclass
class Progress:
    """What has gathered since the last look at the losses."""

    data_wait_s: float = 0.0
    blocked_s: float = 0.0  # by saving
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
) -> dict[str, float]:
    """Train to the end, or to where early stopping or a request to stop ends it.

    Args:
        on_evaluation: called on every worker with the metrics after each evaluation, so that a
            cluster's own bookkeeping (a sweep that stops bad trials) can follow.
        is_losing_a_node: called on every worker at the same step, every few seconds; true from when
            the cluster has said that it will take a node away. The run is then saved at every step.

    Returns:
        The last metrics, AP and its kin in 0..100; the same on every worker. Empty if the run was
        asked to stop before its first evaluation.

    Raises:
        FloatingPointError: losses or gradients were not finite for too many steps in a row; names
            the images.
        BrokenImagesError: too many training pictures turned out broken; names them.
        DriftError: the workers' weights are no longer equal.
        CheckpointError: the run is at its end and its last state cannot be written.
    """
    config, device = run.config, worker.device
    watchdog = Watchdog(run.folder, worker.rank, config.cluster.hang_timeout_s)
    try:
        torch.manual_seed(config.seed)  # all workers start from the same weights
        fence = journal = None
        if worker.leads:
            fence = Fence.claim(run.folder, f"{socket.gethostname()}:{os.getpid()}")
            clean_leftovers(run.checkpoints)
            journal = Journal(run.folder, fence)
        resumed = _open_newest(run, journal) if worker.leads else None
        if journal is not None:
            journal.write("starting", step=resumed.state.step if resumed else 0)
        resumed = from_leader(resumed, worker)

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
        lr = config.optim.lr_for(config.total_batch_size)
        optimizer = make_optimizer(model, config.optim, lr)
        state = RunState(step=0, samples_seen=0, epoch=0.0)
        if resumed is not None:
            state = resumed.state
            _load(resumed, model, average, optimizer)

        parallel: nn.Module = model
        if worker.world_size > 1:
            parallel = DistributedDataParallel(
                model, device_ids=[device.index] if device.type == "cuda" else None
            )
        learner = _Learner(model, parallel, average, optimizer)
        loop = _Loop(run, worker, learner, state, watchdog, journal, fence, is_losing_a_node)
        return loop.run_to_end(on_evaluation)
    finally:
        watchdog.close()


def _open_newest(run: Run, journal: Journal | None) -> Checkpoint | None:
    def tell(message: str) -> None:
        if journal is not None:
            journal.write("damaged", message=message)

    return newest_checkpoint(run.checkpoints, tell)


def _load(
    resumed: Checkpoint, model: nn.Module, average: AveragedModel | None, optimizer: AdamW
) -> None:
    tensors = resumed.training_state()
    evaluated = resumed.model_state()
    own = {n[len("weights/") :]: t for n, t in tensors.items() if n.startswith("weights/")}
    model.load_state_dict(own or evaluated)
    if average is not None:
        average.module.load_state_dict(evaluated)
        average.n_averaged.copy_(tensors["num_averaged"])
    load_optimizer_state(optimizer, model, tensors)


@dataclass
class _Learner:
    """What learns."""

    model: Detector
    parallel: nn.Module  # the model, or DDP around it
    average: AveragedModel | None
    optimizer: AdamW

    @property
    def evaluated(self) -> nn.Module:
        return self.model if self.average is None else self.average.module


class _Loop:
    def __init__(
        self,
        run: Run,
        worker: Worker,
        learner: _Learner,
        state: RunState,
        watchdog: Watchdog,
        journal: Journal | None,
        fence: Fence | None,
        is_losing_a_node: Callable[[], bool] | None,
    ) -> None:
        self.run, self.worker, self.learner, self.state = run, worker, learner, state
        self.watchdog, self.journal = watchdog, journal
        self.is_losing_a_node = is_losing_a_node
        self.criterion = make_criterion(run.config.criterion, run.config.model)
        self.precision = PRECISIONS[run.config.precision]
        keep, store = run.config.checkpoint.keep, run.config.checkpoint.store
        self.writer = (
            CheckpointWriter(run.checkpoints, keep=keep, store=store, fence=fence)
            if worker.leads
            else None
        )
        self.broken_images = dict(state.broken_images)
        self.progress = Progress()
        self.step_ended_s = self.saved_s = self.looked_for_stop_s = self.asked_s = time.monotonic()
        self.owed = False  # a checkpoint, by `checkpoint.every_steps`
        # A run that is cut off more often than it saves would never get on; so it saves sooner.
        self.starts_here = 1
        self.node_goes = False

    def run_to_end(
        self, on_evaluation: Callable[[dict[str, float]], None] | None
    ) -> dict[str, float]:
        run, config = self.run, self.run.config
        self._tell_begin()
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
            self.progress.data_wait_s += time.perf_counter() - asked_s
            self.watchdog.beat("step")
            word = agree(self._word(micro_batches), self.worker)
            if self._between_steps(word, micro_batches):
                self._tell("stopping", step=step, reason="asked to stop")
                self._close(timeout_s=5)  # whoever asked will not wait for a store
                return metrics
            self._update(step, micro_batches, word.num_boxes)
            is_evaluation = step + 1 in evaluation_steps
            if (step + 1) % config.log_every_steps == 0 or is_evaluation:
                self._look()
            if is_evaluation:
                metrics = self._evaluate_and_save(on_evaluation)
        self._tell("end", step=self.state.step, metrics=metrics,
                   reason=run.reason_to_stop(self.state))  # fmt: skip
        self._close(timeout_s=600)
        return metrics

    # Between two steps

    def _word(self, micro_batches: list[LoadedBatch]) -> Word:
        """What this worker has to say before a step."""
        now_s = time.monotonic()
        stop = save = ask = False
        if self.worker.leads:
            assert self.writer is not None
            if now_s - self.looked_for_stop_s > LOOK_FOR_STOP_EVERY_S:
                self.looked_for_stop_s = now_s
                stop = (self.run.folder / STOP_FILE).exists()
            every_s = 60 * (self.run.config.checkpoint.every_minutes or float("inf"))
            every_s /= 4.0 ** (self.starts_here - 1)
            is_due = self.node_goes or self.owed or now_s - self.saved_s >= every_s
            save = is_due and not self.writer.is_busy
            if self.is_losing_a_node is not None and now_s - self.asked_s > ASK_CLUSTER_EVERY_S:
                self.asked_s, ask = now_s, True
        return Word(
            num_boxes=sum(loaded.batch.num_boxes for loaded in micro_batches),
            stop=stop,
            save=save,
            ask_cluster=ask,
            num_replaced=sum(len(loaded.replaced) for loaded in micro_batches),
        )

    def _between_steps(self, word: Word, micro_batches: list[LoadedBatch]) -> bool:
        """All that is due before the next step; true if the run is to leave."""
        step, config = self.state.step, self.run.config
        if word.num_replaced:
            self._note_broken_images(micro_batches)
        if word.ask_cluster and self.is_losing_a_node is not None and self.is_losing_a_node():
            self.node_goes = True
        if word.save or word.stop or step % config.compare_weights_every_steps == 0:
            self._require_equal_weights()
        if word.save or word.stop:
            self.watchdog.beat("saving")
            self._save(wait=word.stop)
            self.watchdog.beat("step")
        self._tell_saved()
        return word.stop

    def _require_equal_weights(self) -> None:
        different = first_difference(self.learner.model, self.worker)
        if different is not None:
            self._tell("drift", step=self.state.step, parameter=different)
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
            self._tell(
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
        )
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
        every_steps = config.checkpoint.every_steps
        self.owed = self.owed or bool(every_steps and done % every_steps == 0)
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
        self._tell("skipped", step=state.step, images=images, not_finite=names,
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
            f"the images of ids {names_of(images)} (all in {dump.name}). Look at these images and "
            "their boxes; else lower optim.lr, or use precision=fp32. The last checkpoint is from "
            "before it."
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
            "train/checkpoint_blocked_share": progress.blocked_s / elapsed_s,
            "train/skipped_steps": self.state.skipped_steps,
            "train/broken_images": len(self.broken_images),
        }
        if self.worker.device.type == "cuda":
            metrics["train/gpu_memory_gib"] = torch.cuda.max_memory_allocated() / 2**30
        self._tell(
            "progress",
            step=step,
            num_steps=self.run.num_steps,
            losses=[loss if ok else None for loss, ok in zip(losses, finite.tolist(), strict=True)],
            metrics=metrics,
            remaining_s=remaining / images_per_s,
        )
        self._forget()

    # Evaluation and checkpoints

    def _evaluate_and_save(
        self, on_evaluation: Callable[[dict[str, float]], None] | None
    ) -> dict[str, float]:
        """The state is saved before and after: an evaluation can take longer than a notice."""
        config, state = self.run.config, self.state
        self._require_equal_weights()
        self._save(wait=False)
        self._tell("evaluating", step=state.step)
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
        metrics = evaluation.metrics.percent() if evaluation is not None else {}
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
        if evaluation is not None:
            self._tell_evaluation(evaluation, metrics, time.perf_counter() - began_s)
        self.watchdog.beat("saving")
        self._save_evaluated()
        if self.worker.world_size > 1:
            dist.barrier()  # nobody goes on, and perhaps fails, before the checkpoint is whole
        if on_evaluation is not None:
            step, seen = self.state.step, self.state.samples_seen
            on_evaluation(metrics | {"step": step, "samples_seen": seen})
        self._forget()
        return metrics

    def _on_evaluated_batch(self, _num_images: int) -> None:
        self.watchdog.beat("evaluating")
        self._tell_saved()

    def _tell_evaluation(
        self, evaluation: Evaluation, metrics: dict[str, float], seconds: float
    ) -> None:
        val_set, step = self.run.val_set, self.state.step
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
            | {
                "val/epoch": self.run.epoch_at(step),
                "val/samples_seen": self.state.samples_seen,
                "val/seconds": seconds,
            },
            table=evaluation.metrics.table(val_set.categories),
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
            self._tell("picture", step=step, path=str(picture.relative_to(self.run.folder)))

    def _save(self, *, wait: bool) -> None:
        if self.writer is None:
            return
        began_s = time.perf_counter()
        if self.writer.save(self._snapshot, wait=wait):
            self.saved_s, self.owed = time.monotonic(), False
        self.progress.blocked_s += time.perf_counter() - began_s

    def _snapshot(self, into: Snapshot | None) -> Snapshot:
        learner = self.learner
        tensors = optimizer_state(learner.optimizer, learner.model)
        if learner.average is not None:
            tensors |= {f"weights/{n}": t for n, t in learner.model.state_dict().items()}
            tensors["num_averaged"] = learner.average.n_averaged
        return take_snapshot(
            self.state,
            self.run.config,
            self.run.train_set.categories,
            learner.evaluated.state_dict(),
            tensors,
            into,
        )

    def _save_evaluated(self) -> None:
        """The last state must not be lost: try for a while, then say so."""
        self._save(wait=True)
        error = self._tell_saved()
        for _ in range(TRIES_AT_THE_END if self.run.is_done(self.state) else 0):
            if not error:
                return
            time.sleep(SECONDS_BETWEEN_TRIES)
            self._save(wait=True)
            error = self._tell_saved()
        if error and self.run.is_done(self.state):
            raise CheckpointError(
                f"the training is done, but its last checkpoint cannot be written: {error}. Make "
                "room, and --resume goes on from the one before."
            )

    def _tell_saved(self) -> str:
        """What the writer has done since, into the journal; returns why the last save failed.

        Raises:
            FencedOffError: another group of workers has taken the run over.
        """
        error = ""
        for outcome in self.writer.poll() if self.writer is not None else ():
            if outcome.fenced_off:
                raise FencedOffError(outcome.error)
            if outcome.error is not None:
                self._tell("checkpoint_failed", step=outcome.step, message=outcome.error)
            if outcome.place == "store":  # the disk has it; the copy is made up for later
                continue
            error = outcome.error or ""
            if outcome.path is not None:
                path = str(outcome.path.relative_to(self.run.folder))
                self._tell("checkpoint", step=outcome.step, path=path,
                           blocked_s=outcome.blocked_s, seconds=outcome.seconds)  # fmt: skip
        return error

    def _tell_begin(self) -> None:
        if self.journal is None:
            return
        step, last = self.state.step, None
        journal = self.run.folder / FILE_NAME
        tail = max(0, journal.stat().st_size - 65536) if journal.exists() else 0
        starts_here = 0
        for event, _ in read_events(self.run.folder, tail):
            if event["kind"] in ("progress", "evaluation", "checkpoint"):
                last = event
            elif event["kind"] == "starting":
                starts_here += event["step"] == step
        self.starts_here = max(1, starts_here)
        lost = {}
        if last is not None and step > 0:
            lost = {
                "wasted_steps": max(0, last["step"] - step),
                "restart_s": time.time() - last["time_s"],
            }
        self._tell("begin", step=step, num_steps=self.run.num_steps,
                   world_size=self.worker.world_size, **lost)  # fmt: skip

    def _tell(self, kind: str, **values: object) -> None:
        if self.journal is not None:
            self.journal.write(kind, **values)

    def _forget(self) -> None:
        self.progress = Progress()
        self.step_ended_s = time.monotonic()

    def _close(self, timeout_s: float) -> None:
        if self.writer is not None:
            self.writer.close(timeout_s)
            self._tell_saved()
        if self.journal is not None:
            self.journal.close()
