"""Runs a model over a data set, shared among the workers, and computes its COCO AP."""

# B images   H W height and width of the padded images

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from deta.model.batch import normalise
from deta.model.config import PostprocessConfig
from deta.model.postprocess import Detections, detect_objects
from deta.platform.data.coco_dataset import CocoDataset
from deta.platform.data.data_loader import evaluation_loader
from deta.platform.data.image_sizes import EvaluationSize
from deta.platform.evaluation.coco_metrics import (
    CocoMetrics,
    evaluate_detections,
    merge_shards,
    to_coco_results,
)
from deta.platform.learning.distributed import Worker
from deta.platform.run.config import Engine


def detect_batch(
    model: nn.Module,
    images: Tensor,
    padding: Tensor,
    sizes_px: Sequence[tuple[int, int]],
    postprocess: PostprocessConfig,
    *,
    precision: torch.dtype,
    device: torch.device,
) -> list[Detections]:
    """Return the detections in each image, on the host. The model must be in evaluation mode.

    Args:
        images: B 3 H W, uint8 or normalised; what is padded becomes zero.
        padding: B H W, true where there is no image.
        sizes_px: B (height, width), of each image before it was resized.
    """
    with torch.inference_mode():
        padding = padding.to(device, non_blocking=True)
        images = normalise(images.to(device, non_blocking=True), padding)
        with torch.autocast(device.type, precision, enabled=precision != torch.float32):
            outputs = model(images, padding)
    return [found.cpu() for found in detect_objects(outputs, torch.tensor(sizes_px), postprocess)]


@dataclass(frozen=True)
class EvaluationResult:
    """Metrics and detections of an evaluation, on the leading worker."""

    metrics: CocoMetrics
    results: list[dict[str, Any]]  # COCO results, in the order of the data set


def evaluate_model(
    model: nn.Module,
    dataset: CocoDataset,
    size: EvaluationSize,
    postprocess: PostprocessConfig,
    *,
    batch_size: int,
    precision: torch.dtype,
    worker: Worker,
    loader_workers: int = 0,
    engine: Engine = "hotcoco",
    on_batch: Any = None,
) -> EvaluationResult | None:
    """Compute COCO AP over all workers. Every worker must call it; the leading one gets the result.

    Args:
        engine: the program that computes AP; see `EvaluationConfig`.
        on_batch: called with the number of images after each batch, to show progress.
    """
    category_ids = [category.id for category in dataset.categories]
    batches = evaluation_loader(
        dataset,
        size,
        batch_size=batch_size,
        rank=worker.rank,
        world_size=worker.world_size,
        num_loader_workers=loader_workers,
        pin_memory=worker.device.type == "cuda",
    )
    shard: dict[int, list[dict[str, Any]]] = {}
    was_training = model.training
    model.eval()
    try:
        for loaded in batches:
            detections = detect_batch(
                model, loaded.batch.images, loaded.batch.padding, loaded.original_sizes_px,
                postprocess, precision=precision, device=worker.device,
            )  # fmt: skip
            for image_id, found in zip(loaded.image_ids, detections, strict=True):
                shard[image_id] = to_coco_results(found, image_id, category_ids)
            if on_batch is not None:
                on_batch(len(loaded))
    finally:
        model.train(was_training)
    shards: list[Any] | None = [shard]
    if worker.world_size > 1:
        shards = [None] * worker.world_size if worker.is_leader else None
        dist.gather_object(shard, shards, group=worker.control)
    if not worker.is_leader:
        return None
    assert shards is not None
    ground_truth = dataset.ground_truth  # built at each access
    results = merge_shards(shards, (image["id"] for image in ground_truth["images"]))
    return EvaluationResult(evaluate_detections(ground_truth, results, engine), results)
