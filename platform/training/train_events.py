"""The journal events of a training: progress, skipped steps, broken images and evaluations.

All workers call these methods at the same step, since some of them gather values from all workers.
Only rank 0 writes to the journal (`Recorder.log_event`).
"""

from __future__ import annotations

import json
import logging
import time
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from deta.platform.data.data_loader import LoadedBatch
from deta.platform.evaluation.evaluate_model import EvaluationResult
from deta.platform.learning.distributed import Worker, gather_from_all
from deta.platform.learning.train_step import StepResult
from deta.platform.pages.draw_boxes import write_validation_sheet
from deta.platform.run.run import Run
from deta.platform.run.run_state import RunState
from deta.platform.system.short_list import short_list
from deta.platform.training.recorder import Recorder

logger = logging.getLogger(__name__)


class BrokenImagesError(ValueError):
    """More training images are broken than `data.max_broken_share` allows."""


@dataclass
class LogWindow:
    """Measurements of the steps since the last progress event."""

    data_wait_s: float = 0.0
    began_s: float = field(default_factory=time.perf_counter)
    scalars: list[dict[str, Tensor]] = field(default_factory=list)  # of each step, on the device


class TrainEvents:
    """Writes the events of one worker group; each worker makes one."""

    def __init__(
        self, run: Run, worker: Worker, recorder: Recorder, broken_images: dict[str, str]
    ) -> None:
        """
        Args:
            broken_images: image ids as text, and what is wrong with each; grows as more are found.
        """
        self.run, self.worker, self.recorder = run, worker, recorder
        self.broken_images = broken_images

    def log_progress(self, state: RunState, window: LogWindow, lr: float) -> None:
        """Read the losses of the window on all workers. This is the only wait for the device."""
        config, step = self.run.config, state.step
        names = list(window.scalars[0])
        table = torch.stack(
            [torch.stack([row[name].float() for name in names]) for row in window.scalars]
        ).cpu()  # steps, scalars
        if self.worker.world_size > 1:
            dist.all_reduce(table, group=self.worker.control)
            table /= self.worker.world_size
        finite = table.isfinite().all(1)  # steps that were not skipped
        means = dict(zip(names, table[finite].mean(0).tolist(), strict=True))
        losses = table[:, names.index("loss")].tolist()  # of each step
        elapsed_s = time.perf_counter() - window.began_s
        images_per_s = len(window.scalars) * config.total_batch_size / elapsed_s
        remaining = (self.run.num_steps - step) * config.total_batch_size
        metrics = {f"train/{name}": value for name, value in means.items()} | {
            "train/lr": lr,
            "train/epoch": self.run.epoch_at(step),
            "train/samples_seen": state.samples_seen,
            "train/images_per_s": images_per_s,
            "train/data_wait_share": window.data_wait_s / elapsed_s,
            "train/checkpoint_blocked_share": self.recorder.blocked_s / elapsed_s,
            "train/skipped_steps": state.skipped_steps,
            "train/broken_images": len(self.broken_images),
        }
        if self.worker.device.type == "cuda":
            metrics["train/gpu_memory_gib"] = torch.cuda.max_memory_allocated() / 2**30
        self.recorder.log_event(
            "progress",
            step=step,
            num_steps=self.run.num_steps,
            losses=[loss if ok else None for loss, ok in zip(losses, finite.tolist(), strict=True)],
            metrics=metrics,
            remaining_s=remaining / images_per_s,
            useful_s=state.useful_s,
        )

    def log_broken_images(self, state: RunState, micro_batches: list[LoadedBatch]) -> None:
        """Log the images that were replaced in this step.

        Raises:
            BrokenImagesError: there are more than `data.max_broken_share` allows.
        """
        own = [one for loaded in micro_batches for one in loaded.replaced]
        replaced = [one for part in gather_from_all(own, self.worker) for one in part]
        num_before = len(self.broken_images)
        for one in replaced:
            self.broken_images.setdefault(str(one.image_id), one.reason)
        if len(self.broken_images) > num_before:
            images = [one._asdict() for one in replaced]
            self.recorder.log_event("replaced", step=state.step, images=images)
        share, num_images = self.run.config.data.max_broken_share, len(self.run.train_set)
        if len(self.broken_images) > max(1, int(share * num_images)):
            listed = "\n".join(f"  {reason}" for reason in list(self.broken_images.values())[:20])
            raise BrokenImagesError(
                f"{len(self.broken_images)} of {num_images} training images are broken, more than "
                f"data.max_broken_share={share} allows:\n{listed}\nRepair or remove them, or "
                "raise data.max_broken_share; then continue the run with --resume."
            )

    def log_skipped_step(
        self, state: RunState, result: StepResult, micro_batches: list[LoadedBatch]
    ) -> None:
        """Log a step without an update. Gradients are shared, so all workers skip the same step.

        Raises:
            FloatingPointError: `max_skipped_steps` were skipped in a row; names the images.
        """
        own: dict[str, Any] = {
            "rank": self.worker.rank,
            "images": [i for loaded in micro_batches for i in loaded.image_ids],
            "not_finite": [n for n, value in result.scalars.items() if not value.isfinite()],
        }
        everyone = gather_from_all(own, self.worker)
        # A loss that is not finite comes from that worker's images; a bad gradient from any.
        guilty = [one for one in everyone if "loss" in one["not_finite"]] or everyone
        images = [image for one in guilty for image in one["images"]]
        names = sorted({name for one in guilty for name in one["not_finite"]})
        self.recorder.log_event(
            "skipped",
            step=state.step,
            images=images,
            not_finite=names,
            in_a_row=state.skipped_in_a_row,
            total=state.skipped_steps,
        )
        if state.skipped_in_a_row < self.run.config.max_skipped_steps:
            return
        dump = self.run.folder / f"not-finite-step-{state.step:08d}.json"
        if self.worker.is_leader:
            dump.write_text(json.dumps({"step": state.step, "workers": everyone}, indent=2))
        raise FloatingPointError(
            f"step {state.step}: {', '.join(names)} not finite; {state.skipped_in_a_row} steps in "
            f"a row were skipped for this. The last step had the images {short_list(images, 20)} "
            f"(all ids in {dump.name}). Check these images and their boxes, or lower optim.lr, or "
            "use precision=fp32. The last checkpoint is from before these steps."
        )

    def log_evaluation(
        self,
        state: RunState,
        evaluation: EvaluationResult,
        analysis: dict[str, float],
        seconds: float,
    ) -> None:
        """Log the metrics of an evaluation, and draw some validation images; rank 0 only.

        Args:
            state: after the evaluation, with its metrics.
            analysis: further metrics, from `EvaluationHistory.explain`.
            seconds: duration of the evaluation.
        """
        val_set, step = self.run.val_set, state.step
        names = {category.id: category.name for category in val_set.categories}
        by_class = {
            f"AP_of_class/{names[category_id]}": 100 * ap
            for category_id, ap in evaluation.metrics.ap_per_category.items()
        }
        self.recorder.log_event(
            "evaluation",
            step=step,
            metrics={f"val/{name}": value for name, value in state.metrics.items()}
            | by_class
            | analysis
            | {
                "val/epoch": self.run.epoch_at(step),
                "val/samples_seen": state.samples_seen,
                "val/seconds": seconds,
            },
            table=evaluation.metrics.table(val_set.categories),
            useful_s=state.useful_s,
        )
        if self.run.config.num_pictures > 0:
            sheet = self.run.folder / "pictures" / f"validation-step-{step:08d}.png"
            num_images = self.run.config.num_pictures
            try:
                write_validation_sheet(sheet, val_set, evaluation.results, num_images)
            except OSError as error:  # a full disk; the metrics are saved
                logger.warning("%s: the image was not written: %s", sheet, error)
                return
            path = str(sheet.relative_to(self.run.folder))
            self.recorder.log_event("picture", step=step, path=path)
