"""Show images with their boxes: found, wrong and missed ones, and annotations to check."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image

from deta.platform.analysis.analysis import Explanation, label_error_row, outcomes
from deta.platform.analysis.label_errors import LEAST_F1, LabelError, is_too_weak
from deta.platform.analysis.tide_errors import NOT_COUNTED
from deta.platform.data.coco_dataset import CocoDataset
from deta.platform.data.image_decoding import ImageError
from deta.platform.pages.content import (
    Box,
    ImageCard,
    ImageGrid,
    Jpeg,
    Number,
    Paragraph,
    Part,
    Section,
    table,
)

NUM_WORST, NUM_LABEL_ERRORS, MAX_ROWS = 12, 24, 100
MAX_IMAGE_BYTES = 1_500_000  # of all images of a page; those beyond are left out
LONGER_PX, CROP_PX = 640, 260  # longer side of an image, and of the surroundings of a label error
JPEG_QUALITY = 74
MAX_BOXES = 40  # on one image: those that another model sees differently, and those of high score
KEY = (
    ("right", "✓ found"),
    ("wrong", "✗ wrong: nothing there, or an inaccurate box"),
    ("missed", "missed"),
)
LABEL_KEY = (("missed", "annotated"), ("wrong", "found"))
WORDS = {"right": "✓", "wrong": "✗", "missed": "missed"}

# An image by its id, decoded; None where its file is gone or broken.
OpenImage = Callable[[Any], Image.Image | None]


def worst_images_section(
    explanation: Explanation, names: Mapping[Any, str], open_image: OpenImage | None
) -> Section:
    """Return the section of images with the most errors."""
    cards, used = [], 0
    for worst in explanation.worst[:NUM_WORST] if open_image else ():
        image = open_image(worst.image_id) if open_image else None
        if image is None or used > MAX_IMAGE_BYTES * 2 // 3:
            continue
        jpeg = small_jpeg(image, LONGER_PX)
        used += len(jpeg.content)
        name = names.get(worst.image_id) or f"image {worst.image_id}"
        lines = [f"{worst.num_false} false, {worst.num_missed} not found"]
        boxes = drawn(boxes_of(explanation, worst.image_id, image.size))
        cards.append(ImageCard(name, lines, jpeg, boxes))
    text = (
        f"{len(explanation.worst)} of {len(names)} images have errors at a score of "
        f"{explanation.operating_score:.2f} or more. These have the most."
    )
    rows = [
        [names.get(one.image_id) or None, str(one.image_id), one.num_false, one.num_missed]
        for one in explanation.worst[:MAX_ROWS]
    ]
    images = table(
        "Images with the most errors", ["Image", "Id", Number("False"), Number("Not found")], rows
    )
    grid = [ImageGrid(cards, KEY)] if cards else []
    return Section("worst", "Worst images", [Paragraph(text), *grid, images])


def boxes_of(
    explanation: Explanation,
    image_id: Any,
    size_px: tuple[int, int],
    found_by_other: np.ndarray | None = None,
) -> list[Box]:
    """Return the detections of one image from the operating score on, and its missed boxes.

    Args:
        size_px: width and height.
        found_by_other: for each true box, whether another model finds it; boxes for which the two
            differ are strong.
    """
    matched, errors = explanation.matched, explanation.errors
    wrong, found = outcomes(matched, errors, explanation.operating_score)
    differs = np.zeros_like(found) if found_by_other is None else found != found_by_other
    rank = matched.image_ids.index(image_id) + 1
    counts = (errors.kind != NOT_COUNTED) & (matched.scores >= explanation.operating_score)
    shown = np.flatnonzero(counts & (matched.found.images == rank))
    missed = np.flatnonzero(~matched.crowd & ~found & (matched.true.images == rank))

    def box(xywh: np.ndarray, category: int, kind: str, score: str, is_strong: bool) -> Box:
        text = f"{WORDS[kind]} {explanation.classes[category - 1].name}{score}"
        return Box(*_shares(xywh, (0, 0, *size_px)), kind, text, bool(is_strong))

    boxes = [
        box(matched.found.boxes[m], matched.found.categories[m], "wrong" if wrong[m] else "right",
            f" {matched.scores[m]:.2f}", not wrong[m] and differs[errors.box[m]])
        for m in shown[np.argsort(-matched.scores[shown], kind="stable")]
    ]  # fmt: skip
    boxes += [
        box(matched.true.boxes[a], matched.true.categories[a], "missed", "", differs[a])
        for a in missed
    ]
    return boxes


def drawn(boxes: Sequence[Box]) -> list[Box]:
    """Return at most `MAX_BOXES`, strong ones above the others."""
    chosen = sorted(boxes, key=lambda one: not one.is_strong)[:MAX_BOXES]
    return sorted(chosen, key=lambda one: one.is_strong)


def label_errors_section(
    explanation: Explanation, names: Mapping[Any, str], open_image: OpenImage | None
) -> Section:
    """Return the section of annotations that are likely wrong."""
    if not explanation.label_errors:
        text = "None."
        if is_too_weak(explanation.best_f1):
            text = (
                f"None are listed: with an F1 of {100 * explanation.best_f1:.0f} the model is "
                "wrong more often than the labels. From an F1 of "
                f"{100 * LEAST_F1:.0f} on its contradictions count."
            )
        return Section("suspects", "Annotations to check", [Paragraph(text)])
    cards, used = [], 0
    for error in choose_label_errors(explanation.label_errors, NUM_LABEL_ERRORS):
        image = open_image(error.image_id) if open_image else None
        if image is not None and used <= MAX_IMAGE_BYTES // 3:
            name = names.get(error.image_id) or f"image {error.image_id}"
            cards.append(label_error_card(explanation, error, image, name))
            used += len(cards[-1].jpeg.content)
    rows = []
    for error in explanation.label_errors[:MAX_ROWS]:
        row = label_error_row(explanation, error)
        box = row.get("annotated_box") or row["found_box"]
        rows.append(
            [names.get(error.image_id) or str(error.image_id), error.kind, error.suspicion,
             row.get("annotated"), row.get("found"), ", ".join(f"{side:.0f}" for side in box)]
        )  # fmt: skip
    errors = table(
        f"The first {len(rows)} of {len(explanation.label_errors)}",
        ["Image", "Kind", Number("Suspicion", "0 to 1", 2), "Annotated as", "Found as",
         Number("Box", "x, y, width, height in pixels")],
        rows,
    )  # fmt: skip
    explained = Paragraph(
        "Places where the model contradicts the annotation most confidently. Check these; a model "
        "repeats what it has learned, wrong labels too."
    )
    grid: list[Part] = [ImageGrid(cards, LABEL_KEY, is_small=True)] if cards else []
    return Section("suspects", "Annotations to check", [explained, *grid, errors])


def label_error_card(
    explanation: Explanation, error: LabelError, image: Image.Image, name: str
) -> ImageCard:
    """Return the surroundings of a label error: the annotation dashed, the detection solid."""
    matched, row = explanation.matched, label_error_row(explanation, error)
    boxes = {}  # kind to text and box, xywh
    if error.true is not None:
        boxes["missed"] = row["annotated"], matched.true.boxes[error.true]
    if error.found is not None:
        score = matched.scores[error.found]
        boxes["wrong"] = f"{row['found']} {score:.2f}", matched.found.boxes[error.found]
    corners = np.array([[*box[:2], *box[:2] + box[2:]] for _, box in boxes.values()])
    low, high = corners.min(0)[:2], corners.max(0)[2:]
    half, centre = max(float((high - low).max()) * 0.85, 32.0), (low + high) / 2
    left, top = np.floor(np.maximum(0, centre - half)).astype(int).tolist()
    right = max(min(image.width, round(centre[0] + half)), left + 1)
    bottom = max(min(image.height, round(centre[1] + half)), top + 1)
    crop = (left, top, right, bottom)
    shown = []
    for kind, (text, box) in boxes.items():
        shown.append(Box(*_shares(box, crop), kind, text))
    lines = [", ".join(f"{key} {row[key]}" for key in ("annotated", "found") if key in row), name]
    jpeg = small_jpeg(image.crop(crop), CROP_PX, may_grow=True)
    return ImageCard(f"{error.kind}, {error.suspicion:.2f}", lines, jpeg, shown)


def _shares(
    xywh: np.ndarray, area: tuple[float, float, float, float]
) -> tuple[float, float, float, float]:
    """Return the part of a box that lies in an area (xyxy), in shares of its width and height."""
    begin, end = np.array(area[:2]), np.array(area[2:])
    low, high = np.clip(((xywh[:2], xywh[:2] + xywh[2:]) - begin) / (end - begin), 0, 1)
    (left, top), (width, height) = low.tolist(), (high - low).tolist()
    return left, top, width, height


def choose_label_errors(errors: Sequence[LabelError], most: int) -> list[LabelError]:
    """Return the first ones, at most one of each image while there are others."""
    first = {error.image_id: error for error in reversed(errors[: 20 * most])}
    later = [error for error in errors[: 20 * most] if error is not first[error.image_id]]
    ordered = sorted(first.values(), key=lambda one: -one.suspicion) + later
    return sorted(ordered[:most], key=lambda one: -one.suspicion)


def small_jpeg(image: Image.Image, longer_px: int, *, may_grow: bool = False) -> Jpeg:
    """Return the image with a longer side of at most `longer_px`."""
    scale = longer_px / max(image.size)
    scale = scale if may_grow else min(1.0, scale)
    size = max(1, round(image.width * scale)), max(1, round(image.height * scale))
    buffer = io.BytesIO()
    small = image.convert("RGB").resize(size, Image.Resampling.BILINEAR)
    small.save(buffer, "JPEG", quality=JPEG_QUALITY)
    return Jpeg(buffer.getvalue(), size)


def image_opener(dataset: CocoDataset) -> OpenImage:
    """Return a function that decodes an image of a data set; None for one that is unreadable."""
    place = {image_id: i for i, image_id in enumerate(dataset.tables[1]["id"].tolist())}

    def open_image(image_id: Any) -> Image.Image | None:
        try:
            return dataset[place[image_id]].image
        except (ImageError, OSError):
            return None

    return open_image
