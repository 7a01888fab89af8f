"""A model that is ready to answer: opened, warmed up, and with a name that answers carry.

Pictures of one size at the model's input go together in a batch and none is padded, for the reason
given at `predict.batches_of_one_shape`; so an answer does not depend on what else is asked for.
"""

# N detections in one picture

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
    """Which model answered."""

    name: str  # of the registered model, or of the file's place
    version: str  # of the registry; empty where the model is none of it
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
class PreparedPicture:
    """What a model takes of one picture."""

    image: Tensor  # 3 h w, normalised
    size_px: tuple[int, int]  # (height, width) before it was resized

    @property
    def shape(self) -> tuple[int, int]:
        """(height, width) at the model's input."""
        return self.image.shape[1], self.image.shape[2]


class ServedModel:
    """One model in memory. `prepare` may be called by many threads, `detect` by one at a time."""

    def __init__(self, predictor: Predictor, name: ModelName) -> None:
        self.predictor = predictor
        self.name = name
        self.categories = predictor.categories

    def prepare(self, image: Image.Image) -> PreparedPicture:
        """Resize as for an evaluation.

        Args:
            image: 8-bit RGB.
        """
        size_px = image.height, image.width
        sample = Sample(image, NO_TARGET.boxes, NO_TARGET.labels, 0, size_px)
        resized = resize_for_evaluation(sample, self.predictor.config.data.evaluation_size)
        return PreparedPicture(to_model_input(resized)[0], size_px)

    def detect(self, pictures: Sequence[PreparedPicture]) -> list[Detections]:
        """What is in each picture, in pixels of the picture before it was resized, best first.

        Raises:
            ValueError: the pictures have different shapes.
        """
        if len({picture.shape for picture in pictures}) != 1:
            shapes = sorted({picture.shape for picture in pictures})
            raise ValueError(f"pictures of one batch must have one shape, not {shapes}")
        batch = pad_batch([picture.image for picture in pictures], [NO_TARGET] * len(pictures))
        sizes_px = [picture.size_px for picture in pictures]
        loaded = LoadedBatch(batch, list(range(len(pictures))), sizes_px)
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
        """Answer a grey picture, so that no request pays for what happens only once; in seconds.

        On a GPU also a full batch, so that one that does not fit in its memory shows now.
        """
        began_s = time.perf_counter()
        size = self.predictor.config.data.evaluation_size
        long_edge = min(size.max_long_edge, math.ceil(size.short_edge * 4 / 3))
        picture = self.prepare(Image.new("RGB", (long_edge, size.short_edge), (127, 127, 127)))
        self.detect([picture])
        if self.predictor.device.type == "cuda":
            self.detect([picture] * max_batch)
        return time.perf_counter() - began_s

    def as_json(
        self, detections: Detections, *, min_score: float, max_detections: int
    ) -> list[dict[str, Any]]:
        """Detections for people and programs, best first.

        Raises:
            RuntimeError: a score or a box is not a number; the model is broken.
        """
        if not (detections.scores.isfinite().all() and detections.boxes_px.isfinite().all()):
            raise RuntimeError(f"{self.name}: gave a score or a box that is not a number")
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
