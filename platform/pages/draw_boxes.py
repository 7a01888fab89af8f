"""Draw boxes on one image, or on a sheet of images with true and predicted boxes."""

# N boxes in one image

from __future__ import annotations

import colorsys
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from deta.platform.data.coco_dataset import CocoDataset
from deta.platform.system.atomic_write import replacing

Numbers = Sequence[Any] | np.ndarray | torch.Tensor  # N, or N 4 boxes: xyxy, in pixels
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


def colour_of(label: int) -> Rgb:
    """Return the colour of a class, the same in every image and bright enough for photographs."""
    hue = (0.58 + label * GOLDEN_ANGLE) % 1
    value = (1.0, 0.82)[label // 8 % 2]
    red, green, blue = colorsys.hsv_to_rgb(hue, (0.85, 0.6)[label // 16 % 2], value)
    return round(255 * red), round(255 * green), round(255 * blue)


def draw_detections(
    image: Image.Image,
    boxes_px: Numbers,
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
    boxes, label_of = _to_numpy(boxes_px).reshape(-1, 4), _to_numpy(labels).astype(int).tolist()
    score_of = None if scores is None else _to_numpy(scores)
    num_scores = len(boxes) if score_of is None else len(score_of)
    if not len(boxes) == len(label_of) == num_scores:
        raise ValueError(
            f"{len(boxes)} boxes, {len(label_of)} labels and {num_scores} scores: there must be "
            "one of each per detection"
        )
    drawn = image.convert("RGB")
    draw = ImageDraw.Draw(drawn)
    line_px = 1 + round(min(drawn.size) / 320)
    font = ImageFont.load_default(size=min(MAX_FONT_PX, 9 + min(drawn.size) / 60))
    order = range(len(boxes)) if score_of is None else np.argsort(score_of, kind="stable").tolist()
    for n in order:
        _draw_box(draw, _pixel_box(boxes[n], drawn.size), colour_of(label_of[n]), line_px, dashed)
    placed: list[tuple[Patch, str, int]] = []
    for n in reversed(order):  # the highest score gets its place first
        label = label_of[n]
        text = names[label] if 0 <= label < len(names) else str(label)
        if score_of is not None:
            text = f"{text} {score_of[n]:.2f}"
        if text := fit_text(text, drawn.width - 4, font):
            taken = [patch for patch, *_ in placed]
            box = _pixel_box(boxes[n], drawn.size)
            placed.append((_place_text(text, font, box, drawn.size, taken), text, label))
    for patch, text, label in reversed(placed):
        draw_text(draw, patch, text, colour_of(label), font)
    return drawn


def contact_sheet(
    cells: Sequence[tuple[Image.Image, Sequence[str]]],
    columns: int,
    title: Sequence[str],
    legend: Sequence[tuple[str, Rgb]] = (),
) -> Image.Image:
    """Lay out images in rows, below lines of text and a legend of words on their colours.

    Args:
        cells: each an image and the lines below it, at most two.
    """
    font = ImageFont.load_default(size=CAPTION_PX)
    columns = min(columns, len(cells))
    rows = [cells[start : start + columns] for start in range(0, len(cells), columns)]
    cell_px = max(image.width for image, _ in cells)
    width = columns * (cell_px + GAP_PX) + GAP_PX
    x, y = GAP_PX, GAP_PX + len(title) * LINE_PX
    words: list[tuple[Patch, str, Rgb]] = []
    for text, colour in legend:
        text = fit_text(text, width - 2 * GAP_PX - 4, font)
        length = math.ceil(font.getlength(text)) + 4
        if x > GAP_PX and x + length > width - GAP_PX:
            x, y = GAP_PX, y + LINE_PX
        words.append(((x, y, x + length - 1, y + LINE_PX - 4), text, colour))
        x += length + 4
    y += LINE_PX if legend else 0
    heights = [max(image.height for image, _ in row) + 2 * LINE_PX + GAP_PX for row in rows]

    sheet = Image.new("RGB", (width, y + sum(heights) + GAP_PX), PAPER)
    draw = ImageDraw.Draw(sheet)
    for number, line in enumerate(title):
        text = fit_text(line, width - 2 * GAP_PX, font)
        draw.text((GAP_PX, GAP_PX + number * LINE_PX), text, INK, font)
    for patch, text, colour in words:
        draw_text(draw, patch, text, colour, font)
    y += GAP_PX // 2
    for row, height in zip(rows, heights, strict=True):
        for column, (image, lines) in enumerate(row):
            x = GAP_PX + column * (cell_px + GAP_PX)
            sheet.paste(image, (x, y))
            for number, line in enumerate(lines):
                place = (x, y + image.height + 4 + number * LINE_PX)
                draw.text(place, fit_text(line, cell_px, font), INK, font)
        y += height
    return sheet


def scaled(image: Image.Image, scale: float) -> tuple[Image.Image, float]:
    """Return the resized image and the factor: a whole one above 1, for equally large pixels."""
    scale = float(math.ceil(scale)) if scale > 1 else scale
    width, height = (max(1, round(side * scale)) for side in image.size)
    method = Image.Resampling.NEAREST if scale >= 1 else Image.Resampling.LANCZOS
    return image.resize((width, height), method), scale


def write_validation_sheet(
    path: Path,
    dataset: CocoDataset,
    results: Sequence[Mapping[str, Any]],
    num_images: int,
    *,
    score_threshold: float = 0.3,
) -> None:
    """Write images of a data set, each with its true boxes and beside them the predicted ones.

    The images are spread evenly over the data set, the same ones every time. Small images are
    enlarged and large ones reduced, so that boxes and names are readable.

    Args:
        path: its suffix selects the format; its folder is created. The write is atomic.
        results: COCO results, as for `evaluate_detections`, of any images of the data set.
        num_images: an upper limit; all images are drawn if the data set has fewer.
        score_threshold: predicted boxes of a lower score are not drawn, but counted.
    """
    num_images = min(num_images, len(dataset))
    chosen = [(2 * i + 1) * len(dataset) // (2 * num_images) for i in range(num_images)]
    names = [category.name for category in dataset.categories]
    label_of = {category.id: label for label, category in enumerate(dataset.categories)}
    found: dict[int, list[Mapping[str, Any]]] = {dataset.records[i].image_id: [] for i in chosen}
    for result in results:
        if result["image_id"] in found and result["category_id"] in label_of:
            found[result["image_id"]].append(result)

    cells = []
    for i in chosen:
        sample = dataset[i]
        longer_px = max(sample.image.size)
        image, scale = scaled(
            sample.image, min(max(longer_px, MIN_CELL_PX), MAX_CELL_PX) / longer_px
        )
        own = found[sample.image_id]
        shown = [result for result in own if result["score"] >= score_threshold]
        boxes_px = np.array([result["bbox"] for result in shown], np.float64).reshape(-1, 4)
        boxes_px[:, 2:] += boxes_px[:, :2]  # N 4, xywh to xyxy
        pair = Image.new("RGB", (2 * image.width + GAP_PX // 2, image.height), PAPER)
        pair.paste(
            draw_detections(image, sample.boxes_px * scale, sample.labels, None, names, dashed=True)
        )
        labels = [label_of[result["category_id"]] for result in shown]
        scores = [result["score"] for result in shown]
        pair.paste(
            draw_detections(image, boxes_px * scale, labels, scores, names),
            (image.width + GAP_PX // 2, 0),
        )
        counts = (
            f"{len(sample.labels)} true, {len(shown)} predicted, "
            f"{len(own) - len(shown)} below threshold"
        )
        name = dataset.records[i].path.name
        cells.append((pair, [f"{name}, image {sample.image_id}", counts]))
    title = [
        "left: true boxes, dashed",
        f"right: predicted boxes, score {score_threshold:g} or more",
    ]
    save_image(contact_sheet(cells, 2, title), path)


def save_image(image: Image.Image, path: Path) -> None:
    """Write an image atomically and create its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as unfinished:
        image.save(unfinished, Image.registered_extensions()[path.suffix.lower()])


def _draw_box(
    draw: ImageDraw.ImageDraw, box: Patch, colour: Rgb, line_px: int, dashed: bool
) -> None:
    """Draw the outline of a box, inside of it; dashes leave the image below visible."""
    if not dashed:
        draw.rectangle(box, outline=colour, width=line_px)
        return
    x1, y1, x2, y2 = box
    dash_px = 4 * line_px + 2
    for x in range(x1, x2 + 1, 2 * dash_px):
        end = min(x + dash_px - 1, x2)
        for y in (y1, max(y2 - line_px + 1, y1)):
            draw.rectangle((x, y, end, min(y + line_px - 1, y2)), fill=colour)
    for y in range(y1, y2 + 1, 2 * dash_px):
        end = min(y + dash_px - 1, y2)
        for x in (x1, max(x2 - line_px + 1, x1)):
            draw.rectangle((x, y, min(x + line_px - 1, x2), end), fill=colour)


def _place_text(
    text: str, font: Font, box: Patch, size_px: tuple[int, int], taken: list[Patch]
) -> Patch:
    """Find a place for the name of a box: inside the image, and not on another name if possible."""
    left, top, right, bottom = font.getbbox(text)
    width, height = math.ceil(right - left) + 4, math.ceil(bottom - top) + 4
    x1, y1, x2, y2 = box
    last_x, last_y = max(0, size_px[0] - width), max(0, size_px[1] - height)
    corners = [(x1, y1 - height), (x1, y1), (x1, y2 + 1), (x2 - width + 1, y1 - height)]
    places = [(min(max(x, 0), last_x), y) for x, y in corners if 0 <= y <= last_y]
    patches = [
        (x, y, x + width - 1, y + height - 1)
        for x, y in places or [(min(x1, last_x), min(y1, last_y))]
    ]
    free = (one for one in patches if not any(_overlap(one, other) for other in taken))
    return next(free, patches[0])


def draw_text(draw: ImageDraw.ImageDraw, patch: Patch, text: str, colour: Rgb, font: Font) -> None:
    """Draw text on a patch of a colour, in black or white, whichever is more readable."""
    left, top, _, _ = font.getbbox(text)
    luminance = 0.299 * colour[0] + 0.587 * colour[1] + 0.114 * colour[2]  # ITU-R BT.601
    ink = (0, 0, 0) if luminance > 120 else (255, 255, 255)
    draw.rectangle(patch, fill=colour)
    draw.text((patch[0] + 2 - left, patch[1] + 2 - top), text, ink, font)


def _overlap(one: Patch, other: Patch) -> bool:
    apart = one[2] < other[0] or other[2] < one[0] or one[3] < other[1] or other[3] < one[1]
    return not apart


def _pixel_box(box_px: np.ndarray, size_px: tuple[int, int]) -> Patch:
    """Return the first and last pixels of a box inside the image, at least one pixel."""
    last = np.array(size_px) - 1
    corners = np.nan_to_num(box_px).round().reshape(2, 2)
    low = corners[0].clip(0, last)
    high = np.maximum(corners[1] - 1, low).clip(0, last)
    left, top, right, bottom = map(int, (*low, *high))
    return left, top, right, bottom


def fit_text(text: str, width_px: float, font: Font) -> str:
    """Return the text, or as much of its beginning as fits with an ellipsis."""
    if font.getlength(text) <= width_px:
        return text
    while text and font.getlength(text + "…") > width_px:
        text = text[:-1]
    return text + "…" if text else ""


def _to_numpy(values: Numbers) -> np.ndarray:
    return torch.as_tensor(values).detach().double().cpu().numpy()
