"""Compares the detections and the speed of an exported file with those of the model."""

# N, M detections in one image

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import deta.model.without_dynamo  # noqa: F401

# isort: split
import torch
from scipy.optimize import linear_sum_assignment
from torch.utils.benchmark import Timer

from deta.model.postprocess import Detections
from deta.platform.evaluation.evaluate_model import detect_batch
from deta.platform.inference.exported_model import PackedImages
from deta.platform.inference.predictor import Predictor

# Sums in another order change float32 scores by about 1e-6, and boxes by 1e-6 of the image; if two
# proposals score almost the same, by up to 1e-4. A wrong operator, mask or normalisation changes
# them by 1e-2 and more.
MAX_SCORE_DIFFERENCE = 1e-3
MAX_BOX_DIFFERENCE = 1e-3  # of the longer side of the image
MAX_LATENCY_BATCH = 16
MEASURED_S = 2.0  # for each batch size


def run_eagerly(predictor: Predictor, packed: PackedImages) -> list[Detections]:
    """Return the detections of the model in packed images, computed as for predictions."""
    padding = torch.ones_like(packed.images[:, 0], dtype=torch.bool)
    for row, (height, width) in zip(padding, packed.sizes_px.tolist(), strict=True):
        row[:height, :width] = False
    return detect_batch(
        predictor.model,
        packed.images,
        padding,
        packed.original_sizes_px.tolist(),
        predictor.config.postprocess,
        precision=torch.float32,
        device=predictor.device,
    )


@dataclass(frozen=True)
class OutputDifference:
    """The difference between two models' detections in the same images."""

    num_images: int = 0
    num_detections: int = 0  # compared
    scores: float = 0.0  # the largest difference
    boxes: float = 0.0  # the largest, of the longer side of the image
    boxes_px: float = 0.0  # the largest, in pixels
    # Detections without a counterpart. The last one of a full list does not count, since it may
    # just be missing at the end of the other list.
    num_unmatched: int = 0

    @property
    def is_small(self) -> bool:
        return (
            self.num_detections > 0
            and self.num_unmatched == 0
            and self.scores <= MAX_SCORE_DIFFERENCE
            and self.boxes <= MAX_BOX_DIFFERENCE
        )

    def __add__(self, other: OutputDifference) -> OutputDifference:
        return OutputDifference(
            self.num_images + other.num_images,
            self.num_detections + other.num_detections,
            max(self.scores, other.scores),
            max(self.boxes, other.boxes),
            max(self.boxes_px, other.boxes_px),
            self.num_unmatched + other.num_unmatched,
        )

    def __str__(self) -> str:
        text = (
            f"scores {self.scores:.1e}, boxes {self.boxes:.1e} of the longer side "
            f"({self.boxes_px:.1e} px), over {self.num_detections} detections in "
            f"{self.num_images} images"
        )
        return text + (f", {self.num_unmatched} UNMATCHED" if self.num_unmatched else "")


def compare_detections(
    expected: Detections, found: Detections, size_px: tuple[int, int], max_detections: int
) -> OutputDifference:
    """Compare the detections of one image with the expected ones.

    Detections of one class are paired so that scores and boxes differ least. One without a near
    counterpart counts as unmatched, unless its score is within the tolerance of the end of a full
    list: rounding decides which of two equal ones is the last.

    Args:
        size_px: (height, width) of the image.
        max_detections: the length of a full list.
    """
    longer_px = max(size_px)
    full = [one.scores[-1] for one in (expected, found) if len(one.scores) == max_detections > 0]
    end_score = max(map(float, full), default=-1.0) + MAX_SCORE_DIFFERENCE
    scores = (expected.scores[:, None] - found.scores).abs()  # N M
    boxes = (expected.boxes_px[:, None] - found.boxes_px).abs().amax(2) / longer_px  # N M
    cost = scores + boxes + 1e3 * (expected.labels[:, None] != found.labels)
    rows, columns = map(torch.from_numpy, linear_sum_assignment(cost.double().numpy()))
    is_near = (scores <= MAX_SCORE_DIFFERENCE) & (boxes <= MAX_BOX_DIFFERENCE)
    is_other = (expected.scores[:, None] > end_score) & (boxes < 0.1)
    kept = ((cost < 1e3) & (is_near | is_other))[rows, columns]
    rows, columns = rows[kept], columns[kept]
    matched = (expected.scores[rows] > end_score).sum() + (found.scores[columns] > end_score).sum()
    counted = (expected.scores > end_score).sum() + (found.scores > end_score).sum()
    box_max = float(boxes[rows, columns].amax()) if len(rows) else 0.0
    return OutputDifference(
        num_images=1,
        num_detections=len(rows),
        scores=float(scores[rows, columns].amax()) if len(rows) else 0.0,
        boxes=box_max,
        boxes_px=box_max * longer_px,
        num_unmatched=int(counted - matched),
    )


@dataclass(frozen=True)
class RuntimeSpeed:
    """Speed of one way to run a model, from images in memory to detections in memory."""

    latency_ms: float  # of one image alone, median
    best_batch: int  # with the most images per second
    images_per_s: float  # with that batch

    def __str__(self) -> str:
        return (
            f"{self.latency_ms:.1f} ms alone, {self.images_per_s:.1f} images/s in batches of "
            f"{self.best_batch}"
        )


def measure_runtime_speed(
    run: Callable[[PackedImages], object], image: PackedImages
) -> RuntimeSpeed:
    """Time one image, then double the batch while that raises the throughput.

    Args:
        image: a batch of one.
    """
    latency_s = _median_s(run, image)
    best_batch, best_rate = 1, 1 / latency_s
    while 2 * best_batch <= MAX_LATENCY_BATCH:
        num_images = 2 * best_batch
        batch = PackedImages(*(part.repeat_interleave(num_images, 0) for part in image))
        if (rate := num_images / _median_s(run, batch)) <= best_rate:
            break
        best_batch, best_rate = num_images, rate
    return RuntimeSpeed(1000 * latency_s, best_batch, best_rate)


def _median_s(run: Callable[[PackedImages], object], batch: PackedImages) -> float:
    timer = Timer(
        "run(batch)",
        timer=time.perf_counter,
        globals={"run": run, "batch": batch},
        num_threads=torch.get_num_threads(),
    )
    return timer.blocked_autorange(min_run_time=MEASURED_S).median  # its warm-up does not count
