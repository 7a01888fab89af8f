"""Draw boxes on one image, or on a sheet of images with true and predicted boxes."""

# N boxes in one image

from __future__ import annotations

import colorsys
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from deta.platform.data.coco_dataset import CocoDataset
from deta.platform.system.atomic_write import replacing

Boxes = np.ndarray | torch.Tensor  # N 4, xyxy, in pixels of the image
Numbers = Sequence[float] | np.ndarray | torch.Tensor  # N
Rgb = tuple[int, int, int]
Font = ImageFont.FreeTypeFont | ImageFont.ImageFont
Patch = tuple[int, int, int, int]  # xyxy in whole pixels, the last ones included

MAX_FONT_PX = 40
GOLDEN_ANGLE = 0.618034  # of the hue circle: neighbouring labels get hues far apart

# The sheet.
MIN_CELL_PX, MAX_CELL_PX = 320, 480  # longer side of one image, after scaling
GAP_PX = 12
CAPTION_PX = 15  # font
LINE_PX = CAPTION_PX + 7
PAPER: Rgb = (250, 250, 248)
INK: Rgb = (40, 40, 44)


@dataclass(frozen=True)
class SheetItem:
    """One image of a validation sheet, with true and predicted boxes."""

    image: Image.Image
    true_boxes_px: Boxes  # N 4, xyxy
    true_labels: Numbers  # N
    boxes_px: Boxes  # N 4, xyxy
    labels: Numbers  # N
    scores: Numbers  # N, in 0..1
    caption: str = ""


def colour_of(label: int) -> Rgb:
    """Return the colour of a class, the same in every image and bright enough for photographs."""
    hue = (0.58 + label * GOLDEN_ANGLE) % 1
    value = (1.0, 0.82)[label // 8 % 2]
    red, green, blue = colorsys.hsv_to_rgb(hue, (0.85, 0.6)[label // 16 % 2], value)
    return round(255 * red), round(255 * green), round(255 * blue)


def draw_detections(
    image: Image.Image,
    boxes_px: Boxes,
    labels: Numbers,
    scores: Numbers | None,
    names: Sequence[str],
    *,
    dashed: bool = False,
) -> Image.Image:
    """Return a copy of the image with its boxes, each with class name and score.

    Boxes are drawn from the lowest score to the highest, so the highest is on top, and names
    above all boxes. Line width and font size grow with the image.

    Args:
        boxes_px: N 4, xyxy; clipped to the image.
        labels: N, class indices.
        scores: N, in 0..1, or None for true boxes.
        names: the name of each class index. A label without a name is shown as its number.

    Raises:
        ValueError: boxes, labels and scores differ in number.
    """
    boxes = np.asarray(_to_numpy(boxes_px), np.float64).reshape(-1, 4)
    label_of = _to_numpy(labels).astype(int)
    score_of = None if scores is None else _to_numpy(scores)
    num_scores = len(boxes) if score_of is None else len(score_of)
    if not len(boxes) == len(label_of) == num_scores:
        raise ValueError(
            f"{len(boxes)} boxes, {len(label_of)} labels and {num_scores} scores: there must be "
            "one of each per detection"
        )

    drawn = image.convert("RGB").copy()
    draw = ImageDraw.Draw(drawn)
    short_px = min(drawn.size)
    line_px = 1 + round(short_px / 320)
    font = ImageFont.load_default(size=min(MAX_FONT_PX, 9 + short_px / 60))

    order = range(len(boxes)) if score_of is None else np.argsort(score_of, kind="stable").tolist()
    for n in order:
        colour = colour_of(int(label_of[n]))
        _draw_box(draw, drawn.size, boxes[n], colour, line_px, dashed)
    texts: dict[int, str] = {}
    patches: dict[int, Patch] = {}
    for n in reversed(order):  # the highest score gets its place first
        label = int(label_of[n])
        text = names[label] if 0 <= label < len(names) else str(label)
        if score_of is not None:
            text = f"{text} {score_of[n]:.2f}"
        texts[n] = fit_text(text, drawn.width - 4, font)
        patches[n] = _place_text(texts[n], font, boxes[n], drawn.size, list(patches.values()))
    for n in order:
        if texts[n]:
            _draw_text(draw, patches[n], texts[n], colour_of(int(label_of[n])), font)
    return drawn


def validation_sheet(
    items: Sequence[SheetItem],
    names: Sequence[str],
    *,
    columns: int = 2,
    score_threshold: float = 0.3,
) -> Image.Image:
    """Draw a sheet that shows each image twice: true boxes on the left, predicted on the right.

    Small images are enlarged and large ones reduced, so that boxes and names are readable.

    Args:
        columns: pairs of images side by side.
        score_threshold: predicted boxes of a lower score are not drawn, but counted in the caption.

    Raises:
        ValueError: no items, or fewer than one column.
    """
    if not items or columns < 1:
        raise ValueError(
            f"a sheet of {len(items)} images in {columns} columns cannot be drawn; "
            "give at least one of each"
        )
    font = ImageFont.load_default(size=CAPTION_PX)
    pairs = [_pair(item, names, score_threshold) for item in items]
    columns = min(columns, len(pairs))
    rows = [pairs[start : start + columns] for start in range(0, len(pairs), columns)]

    cell_width = max(left.width for left, _, _ in pairs)
    legend_height = 2 * LINE_PX
    row_heights = [max(left.height for left, _, _ in row) + 2 * LINE_PX for row in rows]
    pair_width = 2 * cell_width + GAP_PX // 2
    width = columns * pair_width + (columns + 1) * 2 * GAP_PX
    height = legend_height + sum(row_heights) + (len(rows) + 2) * GAP_PX

    sheet = Image.new("RGB", (width, height), PAPER)
    draw = ImageDraw.Draw(sheet)
    _draw_legend(draw, 2 * GAP_PX, GAP_PX, width - 4 * GAP_PX, score_threshold)
    y = legend_height + GAP_PX
    for row, row_height in zip(rows, row_heights, strict=True):
        for column, (left, right, lines) in enumerate(row):
            x = 2 * GAP_PX + column * (pair_width + 2 * GAP_PX)
            sheet.paste(left, (x, y))
            sheet.paste(right, (x + left.width + GAP_PX // 2, y))
            for number, line in enumerate(lines):
                text = fit_text(line, pair_width, font)
                draw.text((x, y + left.height + 4 + number * LINE_PX), text, INK, font)
        y += row_height + GAP_PX
    return sheet


def write_validation_sheet(
    path: Path,
    dataset: CocoDataset,
    results: Sequence[Mapping[str, Any]],
    num_images: int,
    *,
    score_threshold: float = 0.3,
) -> None:
    """Write a sheet of images spread evenly over a data set, the same ones every time.

    Args:
        path: its suffix selects the format; its folder is created. The write is atomic.
        results: COCO results, as for `evaluate_detections`, of any images of the data set.
        num_images: an upper limit; all images are drawn if the data set has fewer.
    """
    num_images = min(num_images, len(dataset))
    chosen = [(2 * i + 1) * len(dataset) // (2 * num_images) for i in range(num_images)]
    label_of = {category.id: label for label, category in enumerate(dataset.categories)}
    found: dict[int, list[Mapping[str, Any]]] = {dataset.records[i].image_id: [] for i in chosen}
    for result in results:
        if result["image_id"] in found and result["category_id"] in label_of:
            found[result["image_id"]].append(result)

    items = []
    for i in chosen:
        sample, record = dataset[i], dataset.records[i]
        own = found[sample.image_id]
        boxes_px = np.array([result["bbox"] for result in own], np.float64).reshape(-1, 4)
        boxes_px[:, 2:] += boxes_px[:, :2]  # N 4, xywh to xyxy
        items.append(
            SheetItem(
                sample.image,
                sample.boxes_px,
                sample.labels,
                boxes_px,
                [label_of[result["category_id"]] for result in own],
                [result["score"] for result in own],
                caption=f"{record.path.name}, image {sample.image_id}",
            )
        )
    names = [category.name for category in dataset.categories]
    sheet = validation_sheet(items, names, score_threshold=score_threshold)
    save_image(sheet, path)


def save_image(image: Image.Image, path: Path) -> None:
    """Write an image atomically and create its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as unfinished:
        image.save(unfinished, Image.registered_extensions()[path.suffix.lower()])


def _pair(
    item: SheetItem, names: Sequence[str], score_threshold: float
) -> tuple[Image.Image, Image.Image, list[str]]:
    """Return the two images of an item at the sheet's size, and the caption lines."""
    longer_px = max(item.image.size)
    scale = min(max(longer_px, MIN_CELL_PX), MAX_CELL_PX) / longer_px
    if scale > 1:
        scale = math.ceil(scale)  # a whole number, so that every pixel is equally large
    size = tuple(max(1, round(side * scale)) for side in item.image.size)
    image = item.image.convert("RGB").resize((size[0], size[1]), Image.Resampling.LANCZOS)

    scores, labels = _to_numpy(item.scores), _to_numpy(item.labels)
    shown = scores >= score_threshold
    true_boxes = _to_numpy(item.true_boxes_px).reshape(-1, 4)
    boxes = _to_numpy(item.boxes_px).reshape(-1, 4)
    left = draw_detections(image, true_boxes * scale, item.true_labels, None, names, dashed=True)
    right = draw_detections(image, boxes[shown] * scale, labels[shown], scores[shown], names)
    counts = f"{len(true_boxes)} true, {shown.sum()} predicted, {(~shown).sum()} below threshold"
    return left, right, [item.caption, counts] if item.caption else [counts]


def _draw_legend(
    draw: ImageDraw.ImageDraw, x: int, y: int, width: int, score_threshold: float
) -> None:
    """Draw the legend of the two halves, on two lines if one is too short."""
    font = ImageFont.load_default(size=CAPTION_PX)
    swatch_px, end, start = 26, x + width, x
    for dashed, text in (
        (True, "left: true boxes"),
        (False, f"right: predicted boxes, score {score_threshold:g} or more"),
    ):
        if x > start and x + swatch_px + 8 + font.getlength(text) > end:
            x, y = start, y + LINE_PX
        box = np.array([x, y + 2, x + swatch_px, y + 2 + CAPTION_PX])
        _draw_box(draw, (end, y + 100), box, INK, 2, dashed)
        x += swatch_px + 8
        draw.text((x, y), fit_text(text, end - x, font), INK, font)
        x += round(font.getlength(text)) + 3 * GAP_PX


def _draw_box(
    draw: ImageDraw.ImageDraw,
    size_px: tuple[int, int],
    box_px: np.ndarray,
    colour: Rgb,
    line_px: int,
    dashed: bool,
) -> None:
    """Draw the outline of a box, inside of it; dashes leave the image below visible."""
    x1, y1, x2, y2 = _pixel_box(box_px, size_px)
    if not dashed:
        draw.rectangle((x1, y1, x2, y2), outline=colour, width=line_px)
        return
    dash_px = 4 * line_px + 2
    for x in range(x1, x2 + 1, 2 * dash_px):
        end = min(x + dash_px - 1, x2)
        draw.rectangle((x, y1, end, min(y1 + line_px - 1, y2)), fill=colour)
        draw.rectangle((x, max(y2 - line_px + 1, y1), end, y2), fill=colour)
    for y in range(y1, y2 + 1, 2 * dash_px):
        end = min(y + dash_px - 1, y2)
        draw.rectangle((x1, y, min(x1 + line_px - 1, x2), end), fill=colour)
        draw.rectangle((max(x2 - line_px + 1, x1), y, x2, end), fill=colour)


def _place_text(
    text: str, font: Font, box_px: np.ndarray, size_px: tuple[int, int], taken: list[Patch]
) -> Patch:
    """Find a place for the name of a box: inside the image, and not on another name if possible."""
    x1, y1, x2, y2 = _pixel_box(box_px, size_px)
    left, top, right, bottom = font.getbbox(text or " ")
    width, height = math.ceil(right - left) + 4, math.ceil(bottom - top) + 4
    last_x, last_y = max(0, size_px[0] - width), max(0, size_px[1] - height)

    corners = [(x1, y1 - height), (x1, y1), (x1, y2 + 1), (x2 - width + 1, y1 - height)]
    inside = [(min(max(x, 0), last_x), y) for x, y in corners if 0 <= y <= last_y]
    places = inside or [(min(x1, last_x), min(y1, last_y))]
    patches = [(x, y, x + width - 1, y + height - 1) for x, y in places]
    free = [patch for patch in patches if not any(_overlap(patch, other) for other in taken)]
    return (free or patches)[0]


def _draw_text(draw: ImageDraw.ImageDraw, patch: Patch, text: str, colour: Rgb, font: Font) -> None:
    """Draw text on a patch of the box's colour, in black or white, whichever is more readable."""
    left, top, _, _ = font.getbbox(text or " ")
    luminance = 0.299 * colour[0] + 0.587 * colour[1] + 0.114 * colour[2]  # ITU-R BT.601
    ink = (0, 0, 0) if luminance > 120 else (255, 255, 255)
    draw.rectangle(patch, fill=colour)
    draw.text((patch[0] + 2 - left, patch[1] + 2 - top), text, ink, font)


def _overlap(one: Patch, other: Patch) -> bool:
    apart = one[2] < other[0] or other[2] < one[0] or one[3] < other[1] or other[3] < one[1]
    return not apart


def _pixel_box(box_px: np.ndarray, size_px: tuple[int, int]) -> tuple[int, int, int, int]:
    """Return the first and last pixels of a box inside the image, at least one pixel."""
    width, height = size_px
    x1, y1, x2, y2 = np.nan_to_num(box_px).tolist()
    left, top = min(max(round(x1), 0), width - 1), min(max(round(y1), 0), height - 1)
    right, bottom = (
        min(max(round(x2) - 1, left), width - 1),
        min(max(round(y2) - 1, top), height - 1),
    )
    return left, top, right, bottom


def fit_text(text: str, width_px: float, font: Font) -> str:
    """Return the text, or as much of its beginning as fits with an ellipsis."""
    if font.getlength(text) <= width_px:
        return text
    while text and font.getlength(text + "…") > width_px:
        text = text[:-1]
    return text + "…" if text else ""


def _to_numpy(values: Boxes | Numbers) -> np.ndarray:
    if isinstance(values, torch.Tensor):
        return values.detach().cpu().float().numpy()
    return np.asarray(values, np.float64)
