"""The pictures of an evaluation's report: small JPEGs with true and predicted boxes."""

# N boxes of one image

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from PIL import Image

from deta.platform.analysis.analysis import Explanation
from deta.platform.analysis.label_errors import Suspect
from deta.platform.data.coco_dataset import CocoDataset
from deta.platform.data.draw_boxes import draw_detections
from deta.platform.data.image_decoding import ImageError
from deta.platform.pages.content import Jpeg

LONGER_PX = 420  # of an image with many errors
CROP_PX = 260
JPEG_QUALITY = 72
MAX_DRAWN = 30  # predicted boxes of one picture, the surest; more would hide it

# An image by its id, decoded; None where its file is gone or broken.
OpenImage = Callable[[Any], Image.Image | None]


def worst_pictures(
    explanation: Explanation, image_id: Any, image: Image.Image
) -> tuple[Jpeg, Jpeg]:
    """An image with its true boxes, dashed, and with detections from the operating score on."""
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


def suspect_picture(explanation: Explanation, suspect: Suspect, image: Image.Image) -> Jpeg:
    """The place of a suspect with some room around it: the annotation dashed, the detection not."""
    matched = explanation.matched
    names = [one.name for one in explanation.classes]
    boxes = [
        _corners(columns.boxes[[place]])[0]
        for columns, place in ((matched.true, suspect.true), (matched.found, suspect.found))
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
    if suspect.true is not None:
        drawn = draw_detections(
            drawn,
            (_corners(matched.true.boxes[[suspect.true]]) - shift) * scale,
            matched.true.categories[[suspect.true]] - 1,
            None,
            names,
            dashed=True,
        )
    if suspect.found is not None:
        drawn = draw_detections(
            drawn,
            (_corners(matched.found.boxes[[suspect.found]]) - shift) * scale,
            matched.found.categories[[suspect.found]] - 1,
            matched.scores[[suspect.found]],
            names,
        )
    return _jpeg(drawn)


def chosen_suspects(suspects: Sequence[Suspect], most: int) -> list[Suspect]:
    """The first ones, of each image one at most while others are left."""
    first: list[Suspect] = []
    later: list[Suspect] = []
    seen = set()
    for suspect in suspects[: 20 * most]:
        (later if suspect.image_id in seen else first).append(suspect)
        seen.add(suspect.image_id)
    chosen = (first + later)[:most]
    return sorted(chosen, key=lambda one: -one.suspicion)


def _corners(boxes: np.ndarray) -> np.ndarray:
    """N 4, xywh to xyxy."""
    return np.concatenate([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], 1)


def _resized(image: Image.Image, scale: float) -> Image.Image:
    size = [max(1, round(side * scale)) for side in image.size]
    return image.convert("RGB").resize((size[0], size[1]), Image.Resampling.BILINEAR)


def _jpeg(image: Image.Image) -> Jpeg:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=JPEG_QUALITY)
    return Jpeg(buffer.getvalue(), image.size)


def images_of(dataset: CocoDataset) -> OpenImage:
    """The pictures of a data set; one that cannot be decoded any more is left out."""
    place = {image_id: i for i, image_id in enumerate(dataset.tables[1]["id"].tolist())}

    def open_image(image_id: Any) -> Image.Image | None:
        try:
            return dataset[place[image_id]].image
        except (ImageError, OSError):
            return None

    return open_image
