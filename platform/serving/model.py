"""A loaded model with its name: warm it up, and return its detections as JSON.

A batch has images of one size at the model's input, and none is padded. So a detection does not
depend on the other images of its batch; `inference/batching.py` explains why padding matters.
"""

# N detections in one image

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from typing import Any

from PIL import Image

from deta.model.postprocess import Detections
from deta.platform.inference.predictor import Predictor


@dataclass(frozen=True)
class ModelName:
    """The identity of a model."""

    name: str  # of the registered model, or of the folder
    version: str  # in the registry; empty if it is not registered
    weights_sha256: str

    def as_json(self) -> dict[str, str | None]:
        return vars(self) | {"version": self.version or None}

    def labels(self) -> dict[str, str]:
        """Return the labels of the metric `deta_serving_model_info`."""
        return {"name": self.name, "version": self.version, "sha256": self.weights_sha256}

    def __str__(self) -> str:
        version = f" version {self.version}" if self.version else ""
        return f"{self.name}{version} ({self.weights_sha256[:12]})"


@dataclass(frozen=True, eq=False)
class ServedModel:
    """A model in memory, and its name."""

    predictor: Predictor
    name: ModelName

    def warm_up(self, max_batch: int) -> float:
        """Detect in a grey image, so that no request pays for one-time work; return the seconds.

        On a GPU, also run a full batch, so that one that does not fit in memory fails now.
        """
        began_s = time.perf_counter()
        size = self.predictor.config.data.evaluation_size
        long_edge = min(size.max_long_edge, math.ceil(size.short_edge * 4 / 3))
        grey = Image.new("RGB", (long_edge, size.short_edge), (127, 127, 127))
        image = self.predictor.prepare(grey)
        self.predictor.detect([image])
        if self.predictor.device.type == "cuda":
            self.predictor.detect([image] * max_batch)
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
        categories = self.predictor.categories
        found = zip(
            detections.scores.tolist(),
            detections.labels.tolist(),
            detections.boxes_px.tolist(),
            strict=True,
        )
        return [
            {
                "category_id": categories[label].id,
                "category": categories[label].name,
                "score": round(score, 6),
                "box": [round(edge_px, 2) for edge_px in box_px],
            }
            for score, label, box_px in found
            if score >= min_score
        ][:max_detections]
