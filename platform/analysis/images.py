"""Draw the images of an evaluation's report: small JPEGs with true and predicted boxes."""

# N boxes of one image

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from PIL import Image

from deta.platform.analysis.analysis import Explanation
from deta.platform.analysis.label_errors import LabelError
from deta.platform.data.coco_dataset import CocoDataset
from deta.platform.data.draw_boxes import draw_detections
from deta.platform.data.image_decoding import ImageError
from deta.platform.pages.content import Jpeg

LONGER_PX = 420  # of an image with many errors
CROP_PX = 260
JPEG_QUALITY = 72
MAX_DRAWN = 30  # predicted boxes on one image, by score; more would hide it

# An image by its id, decoded; None where its file is gone or broken.
OpenImage = Callable[[Any], Image.Image | None]


def draw_worst_image(
    explanation: Explanation, image_id: Any, image: Image.Image
) -> tuple[Jpeg, Jpeg]:
    """Draw an image with its true boxes, dashed, and with detections from the operating score."""
    matched = explanation.matched
    names = [one.name for one in explanation.classes]
    rank = matched.image_ids.index(image_id) + 1
    true = np.flatnonzero(matched.true.images == rank)
    found = np.flatnonzero(
        (matched.found.images == rank) & (matched.scores >= explanation.operating_score)
    )
    found = found[np.argsort(-matched.scores[found], kind="stable")][:MAX_DRAWN]
    scale = min(1.0, LONGER_PX / max(image.size))
    small = _resized(image, scale)
    with_true = draw_detections(
        small,
        _corners(matched.true.boxes[true]) * scale,
        matched.true.categories[true] - 1,
        None,
        names,
        dashed=True,
    )
    with_found = draw_detections(
        small,
        _corners(matched.found.boxes[found]) * scale,
        matched.found.categories[found] - 1,
        matched.scores[found],
        names,
    )
    return _jpeg(with_true), _jpeg(with_found)


def draw_label_error(explanation: Explanation, error: LabelError, image: Image.Image) -> Jpeg:
    """Draw the surroundings of a label error: the annotation dashed, the detection solid."""
    matched = explanation.matched
    names = [one.name for one in explanation.classes]
    boxes = [
        _corners(columns.boxes[[place]])[0]
        for columns, place in ((matched.true, error.true), (matched.found, error.found))
        if place is not None
    ]
    low, high = np.min(boxes, 0)[:2], np.max(boxes, 0)[2:]
    side = max(float((high - low).max()) * 1.7, 64.0)
    centre = (low + high) / 2
    left, top = np.floor(np.maximum(0, centre - side / 2)).astype(int).tolist()
    right = min(image.width, round(centre[0] + side / 2))
    bottom = min(image.height, round(centre[1] + side / 2))
    right, bottom = max(right, left + 1), max(bottom, top + 1)
    crop = image.crop((left, top, right, bottom))
    scale = CROP_PX / max(crop.size)
    drawn = _resized(crop, scale)
    shift = np.array([left, top, left, top])
    if error.true is not None:
        drawn = draw_detections(
            drawn,
            (_corners(matched.true.boxes[[error.true]]) - shift) * scale,
            matched.true.categories[[error.true]] - 1,
            None,
            names,
            dashed=True,
        )
    if error.found is not None:
        drawn = draw_detections(
            drawn,
            (_corners(matched.found.boxes[[error.found]]) - shift) * scale,
            matched.found.categories[[error.found]] - 1,
            matched.scores[[error.found]],
            names,
        )
    return _jpeg(drawn)


def choose_label_errors(errors: Sequence[LabelError], most: int) -> list[LabelError]:
    """Return the first ones, at most one of each image while there are others."""
    first: list[LabelError] = []
    later: list[LabelError] = []
    seen = set()
    for error in errors[: 20 * most]:
        (later if error.image_id in seen else first).append(error)
        seen.add(error.image_id)
    chosen = (first + later)[:most]
    return sorted(chosen, key=lambda one: -one.suspicion)


def _corners(boxes: np.ndarray) -> np.ndarray:
    """Convert N 4 from xywh to xyxy."""
    return np.concatenate([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], 1)


def _resized(image: Image.Image, scale: float) -> Image.Image:
    size = [max(1, round(side * scale)) for side in image.size]
    return image.convert("RGB").resize((size[0], size[1]), Image.Resampling.BILINEAR)


def _jpeg(image: Image.Image) -> Jpeg:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=JPEG_QUALITY)
    return Jpeg(buffer.getvalue(), image.size)


def image_opener(dataset: CocoDataset) -> OpenImage:
    """Return a function that decodes an image of a data set; None for one that is unreadable."""
    place = {image_id: i for i, image_id in enumerate(dataset.tables[1]["id"].tolist())}

    def open_image(image_id: Any) -> Image.Image | None:
        try:
            return dataset[place[image_id]].image
        except (ImageError, OSError):
            return None

    return open_image
