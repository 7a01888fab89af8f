"""A loaded model with its name: prepare images, detect, and return detections as JSON.

A batch has images of one size at the model's input, and none is padded. So a detection does not
depend on the other images of its batch; `inference/predictor.py` explains why padding matters.
"""

# N detections in one image

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from deta.model.batch import Target, pad_batch
from deta.model.postprocess import Detections
from deta.platform.data.coco_dataset import Sample
from deta.platform.data.data_loader import LoadedBatch
from deta.platform.data.transforms import resize_for_evaluation, to_model_input
from deta.platform.evaluation.evaluate_model import detect_batches
from deta.platform.inference.predictor import Predictor
from deta.platform.learning.train_step import PRECISIONS

NO_TARGET = Target(boxes=torch.zeros(0, 4), labels=torch.zeros(0, dtype=torch.int64))


@dataclass(frozen=True)
class ModelName:
    """The identity of a model."""

    name: str  # of the registered model, or of the folder
    version: str  # in the registry; empty if it is not registered
    weights_sha256: str

    def as_json(self) -> dict[str, str | None]:
        return {
            "name": self.name,
            "version": self.version or None,
            "weights_sha256": self.weights_sha256,
        }

    def __str__(self) -> str:
        version = f" version {self.version}" if self.version else ""
        return f"{self.name}{version} ({self.weights_sha256[:12]})"


@dataclass(frozen=True)
class PreparedImage:
    """An image at the size of the model's input."""

    pixels: Tensor  # 3 h w, normalised
    size_px: tuple[int, int]  # (height, width) before it was resized

    @property
    def shape(self) -> tuple[int, int]:
        """(height, width) at the model's input."""
        return self.pixels.shape[1], self.pixels.shape[2]


class ServedModel:
    """A model in memory. Any thread may call `prepare`, only one at a time `detect`."""

    def __init__(self, predictor: Predictor, name: ModelName) -> None:
        self.predictor = predictor
        self.name = name
        self.categories = predictor.categories

    def prepare(self, image: Image.Image) -> PreparedImage:
        """Resize and normalise an image as for an evaluation.

        Args:
            image: 8-bit RGB.
        """
        size_px = image.height, image.width
        sample = Sample(image, NO_TARGET.boxes, NO_TARGET.labels, 0, size_px)
        resized = resize_for_evaluation(sample, self.predictor.config.data.evaluation_size)
        return PreparedImage(to_model_input(resized)[0], size_px)

    def detect(self, images: Sequence[PreparedImage]) -> list[Detections]:
        """Return the detections in each image, best first, in pixels before the resize.

        Raises:
            ValueError: the images have different shapes.
        """
        if len({image.shape for image in images}) != 1:
            shapes = sorted({image.shape for image in images})
            raise ValueError(f"images of one batch must have one shape, not {shapes}")
        batch = pad_batch([image.pixels for image in images], [NO_TARGET] * len(images))
        sizes_px = [image.size_px for image in images]
        loaded = LoadedBatch(batch, list(range(len(images))), sizes_px)
        predictor = self.predictor
        found: Iterator[tuple[LoadedBatch, list[Detections]]] = detect_batches(
            predictor.model,
            iter([loaded]),
            predictor.config.postprocess,
            precision=PRECISIONS[predictor.config.precision],
            device=predictor.device,
        )
        [(_, detections)] = found
        return detections

    def warm_up(self, max_batch: int) -> float:
        """Detect in a grey image, so that no request pays for one-time work; return the seconds.

        On a GPU, also run a full batch, so that one that does not fit in memory fails now.
        """
        began_s = time.perf_counter()
        size = self.predictor.config.data.evaluation_size
        long_edge = min(size.max_long_edge, math.ceil(size.short_edge * 4 / 3))
        image = self.prepare(Image.new("RGB", (long_edge, size.short_edge), (127, 127, 127)))
        self.detect([image])
        if self.predictor.device.type == "cuda":
            self.detect([image] * max_batch)
        return time.perf_counter() - began_s

    def as_json(
        self, detections: Detections, *, min_score: float, max_detections: int
    ) -> list[dict[str, Any]]:
        """Return detections as the API has them, best first.

        Raises:
            RuntimeError: a score or a box is not finite, so the model is broken.
        """
        if not (detections.scores.isfinite().all() and detections.boxes_px.isfinite().all()):
            raise RuntimeError(
                f"{self.name}: the model returned a score or a box that is not a number"
            )
        rows = zip(
            detections.scores.tolist(),
            detections.labels.tolist(),
            detections.boxes_px.tolist(),
            strict=True,
        )
        kept = [row for row in rows if row[0] >= min_score][:max_detections]
        return [
            {
                "category_id": self.categories[label].id,
                "category": self.categories[label].name,
                "score": round(score, 6),
                "box": [round(edge_px, 2) for edge_px in box_px],
            }
            for score, label, box_px in kept
        ]
