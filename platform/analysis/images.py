"""Show the images of an evaluation's report: small JPEGs with true and predicted boxes."""

# N boxes of one image

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image

from deta.platform.analysis.analysis import Explanation, label_error_row
from deta.platform.analysis.label_errors import LabelError
from deta.platform.data.coco_dataset import CocoDataset
from deta.platform.data.draw_boxes import draw_detections
from deta.platform.data.image_decoding import ImageError
from deta.platform.pages.content import (
    Column,
    ImageCard,
    ImageGrid,
    Jpeg,
    Paragraph,
    Part,
    Section,
    Table,
)

NUM_WORST, NUM_LABEL_ERRORS, MAX_ROWS = 12, 24, 100
MAX_IMAGE_BYTES = 1_500_000  # of all images of a page; those beyond are left out
MIN_SUSPICION = 0.1  # of a label error that is shown as an image
LONGER_PX = 420  # of an image with many errors
CROP_PX = 260
JPEG_QUALITY = 72
MAX_DRAWN = 30  # predicted boxes on one image, by score; more would hide it

# An image by its id, decoded; None where its file is gone or broken.
OpenImage = Callable[[Any], Image.Image | None]


def worst_images_section(
    explanation: Explanation, names: Mapping[Any, str], open_image: OpenImage | None
) -> Section:
    """Return the section of images with the most errors."""
    cards, used = [], 0
    for worst in explanation.worst[:NUM_WORST] if open_image is not None else ():
        image = open_image(worst.image_id) if open_image is not None else None
        if image is None or used > MAX_IMAGE_BYTES * 2 // 3:
            continue
        drawn = draw_worst_image(explanation, worst.image_id, image)
        used += sum(len(one.content) for one in drawn)
        name = names.get(worst.image_id) or f"image {worst.image_id}"
        lines = [f"{worst.num_false} false, {worst.num_missed} not found"]
        cards.append(ImageCard(name, lines, drawn))
    text = (
        f"{len(explanation.worst)} of {len(names)} images have errors at a score of "
        f"{explanation.operating_score:.2f} or more. These have the most: true boxes first, "
        "dashed, then detections."
    )
    table = Table(
        caption="Images with the most errors",
        columns=[
            Column(title="Image"),
            Column(title="Id"),
            Column(title="False", is_number=True),
            Column(title="Not found", is_number=True),
        ],
        rows=[
            [
                names.get(one.image_id) or "-",
                str(one.image_id),
                str(one.num_false),
                str(one.num_missed),
            ]
            for one in explanation.worst[:MAX_ROWS]
        ],
    )
    grid = [ImageGrid(cards)] if cards else []
    return Section(name="worst", title="Worst images", parts=[Paragraph(text), *grid, table])


def label_errors_section(
    explanation: Explanation, names: Mapping[Any, str], open_image: OpenImage | None
) -> Section:
    """Return the section of annotations that are likely wrong."""
    cards, used = [], 0
    shown = [one for one in explanation.label_errors if one.suspicion >= MIN_SUSPICION]
    for error in choose_label_errors(shown, NUM_LABEL_ERRORS):
        image = open_image(error.image_id) if open_image is not None else None
        if image is None or used > MAX_IMAGE_BYTES // 3:
            continue
        drawn = draw_label_error(explanation, error, image)
        used += len(drawn.content)
        row = label_error_row(explanation, error)
        lines = [
            ", ".join(f"{key} {row[key]}" for key in ("annotated", "found") if key in row),
            names.get(error.image_id) or f"image {error.image_id}",
        ]
        cards.append(ImageCard(f"{error.kind}, {error.suspicion:.2f}", lines, [drawn]))
    rows = []
    for error in explanation.label_errors[:MAX_ROWS]:
        row = label_error_row(explanation, error)
        box = row.get("annotated_box") or row["found_box"]
        rows.append(
            [
                names.get(error.image_id) or str(error.image_id),
                error.kind,
                f"{error.suspicion:.2f}",
                row.get("annotated", "-"),
                row.get("found", "-"),
                ", ".join(f"{number:.0f}" for number in box),
            ]
        )
    table = Table(
        caption=f"The first {len(rows)} of {len(explanation.label_errors)}",
        columns=[
            Column(title="Image"),
            Column(title="Kind"),
            Column(title="Suspicion", unit="0 to 1", is_number=True),
            Column(title="Annotated as"),
            Column(title="Found as"),
            Column(title="Box", unit="x, y, width, height in pixels", is_number=True),
        ],
        rows=rows,
    )
    text = Paragraph(
        "Places where the model contradicts the annotation most confidently: the annotation is "
        "dashed, the detection has its score. Check these; a model repeats what it has learned, "
        "wrong labels too."
    )
    grid = [ImageGrid(cards, is_small=True)] if cards else []
    parts: list[Part] = [text, *grid, table] if rows else [Paragraph("None.")]
    return Section(name="suspects", title="Annotations to check", parts=parts)


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
