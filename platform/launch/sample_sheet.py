"""Draws a sheet of training images as the model will see them: augmented, resized, with boxes.

The images are samples of the run itself, with the same random flips, crops and sizes as in the
first epoch. They are made from the model's input tensors, converted back to colours. So a box that
misses its object here also misses it in training.
"""

# N boxes of one image

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont

from deta.model.boxes import cxcywh_to_xyxy
from deta.platform.data.data_loader import train_loader
from deta.platform.data.draw_boxes import (
    CAPTION_PX,
    GAP_PX,
    INK,
    LINE_PX,
    PAPER,
    colour_of,
    draw_detections,
    fit_text,
    save_image,
)
from deta.platform.data.sample_order import TrainingOrder
from deta.platform.data.transforms import PIXEL_MEAN, PIXEL_STD
from deta.platform.run.run import Run

NUM_IMAGES = 12
COLUMNS = 4
CELL_PX = 360  # about the longer side of the largest image, once scaled
MAX_NAMED = 8  # if an image has more boxes, only the largest of each class has its name


@dataclass(frozen=True)
class SheetImage:
    """One sample of the run, converted back to an image."""

    image: Image.Image
    boxes_px: torch.Tensor  # N 4, xyxy, in pixels of `image`
    labels: torch.Tensor  # N
    caption: str


def first_epoch_images(run: Run, num_images: int = NUM_IMAGES) -> list[SheetImage]:
    """Return samples of the first epoch that show every class about equally often.

    Raises:
        ImageError: an image cannot be decoded; names the file.
    """
    config, records = run.config, run.train_set.records
    loader = train_loader(
        run.train_set,
        config.data.augmentation,
        seed=config.seed,
        total_batch_size=config.total_batch_size,
        micro_batch_size=config.micro_batch_size,
        end_step=1,
    )
    order = TrainingOrder(config.seed, len(records), config.total_batch_size)
    keys = [order.sample_at(position) for position in range(len(records))]
    labels = [records[key.image_index].labels.tolist() for key in keys]

    samples = []
    for place in _choose(labels, num_images):
        seen = loader.inputs[keys[place]]
        record = records[keys[place].image_index]
        image = to_image(seen.image)
        size_px = torch.tensor([image.width, image.height] * 2)
        lost = len(record.labels) - len(seen.target.labels)
        samples.append(
            SheetImage(
                image,
                cxcywh_to_xyxy(seen.target.boxes) * size_px,
                seen.target.labels,
                f"{record.path.name}, {record.width}x{record.height}\n"
                f"as {image.width}x{image.height}: {_boxes(len(seen.target.labels))}"
                + (f", {lost} cropped away" if lost else ""),
            )
        )
    return samples


def _choose(labels: Sequence[Sequence[int]], num_images: int) -> list[int]:
    """Choose positions in the epoch: each time the first sample of the least shown class."""
    places_of: dict[int, list[int]] = {}
    for place in range(len(labels) - 1, -1, -1):  # reversed, so that pop() returns the first one
        for label in set(labels[place]):
            places_of.setdefault(label, []).append(place)
    shown = dict.fromkeys(sorted(places_of), 0)
    chosen: set[int] = set()
    while shown and len(chosen) < num_images:
        rarest = min(shown, key=lambda label: shown[label])
        while places_of[rarest] and places_of[rarest][-1] in chosen:
            places_of[rarest].pop()
        if not places_of[rarest]:
            del shown[rarest]
            continue
        place = places_of[rarest].pop()
        chosen.add(place)
        for label in set(labels[place]) & shown.keys():
            shown[label] += 1
    empty = (place for place in range(len(labels)) if place not in chosen)
    chosen |= set(islice(empty, num_images - len(chosen)))
    return sorted(chosen)


def to_image(pixels: torch.Tensor) -> Image.Image:
    """Convert a 3 H W tensor, normalised for the model, back to 8-bit RGB."""
    mean, std = (torch.tensor(values)[:, None, None] for values in (PIXEL_MEAN, PIXEL_STD))
    levels = ((pixels * std + mean) * 255).round().clamp(0, 255).to(torch.uint8)
    return Image.fromarray(levels.permute(1, 2, 0).contiguous().numpy())


def training_sheet(
    samples: Sequence[SheetImage],
    names: Sequence[str],
    *,
    title: str = "",
    columns: int = COLUMNS,
) -> Image.Image:
    """Draw the images side by side, all at one scale, so that their sizes can be compared.

    Raises:
        ValueError: there are no images.
    """
    if not samples:
        raise ValueError("a sheet needs at least one image")
    scale = CELL_PX / max(max(sample.image.size) for sample in samples)
    if scale > 1:
        scale = float(round(scale))  # an integer, so that all pixels are equally large
    drawn = [_drawn(sample, names, scale) for sample in samples]
    columns = min(columns, len(drawn))
    rows = [
        range(start, min(start + columns, len(drawn))) for start in range(0, len(drawn), columns)
    ]
    cell_width = max(image.width for image in drawn)
    width = columns * (cell_width + GAP_PX) + GAP_PX
    counts = Counter(label for sample in samples for label in sample.labels.tolist())
    legend = _legend(counts, names, width - 2 * GAP_PX)
    title_px = LINE_PX + GAP_PX // 2 if title else 0
    row_heights = [max(drawn[i].height for i in row) + 2 * LINE_PX + GAP_PX for row in rows]
    sheet = Image.new(
        "RGB", (width, title_px + legend.height + sum(row_heights) + 2 * GAP_PX), PAPER
    )
    draw = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(size=CAPTION_PX)
    if title:
        draw.text((GAP_PX, GAP_PX), fit_text(title, width - 2 * GAP_PX, font), INK, font)
    sheet.paste(legend, (GAP_PX, GAP_PX + title_px))
    y = 2 * GAP_PX + title_px + legend.height
    for row, row_height in zip(rows, row_heights, strict=True):
        for column, i in enumerate(row):
            x = GAP_PX + column * (cell_width + GAP_PX)
            sheet.paste(drawn[i], (x, y))
            for number, line in enumerate(samples[i].caption.splitlines()[:2]):
                text = fit_text(line, cell_width, font)
                draw.text((x, y + drawn[i].height + 4 + number * LINE_PX), text, INK, font)
        y += row_height
    return sheet


def write_training_sheet(path: Path, run: Run) -> None:
    """Write the sheet of a run atomically; the suffix of `path` gives the format.

    Raises:
        ImageError: an image cannot be decoded; names the file.
    """
    names = [category.name for category in run.train_set.categories]
    title = f"{run.config.name}: training images as the model sees them in the first epoch"
    save_image(training_sheet(first_epoch_images(run), names, title=title), path)


def _drawn(sample: SheetImage, names: Sequence[str], scale: float) -> Image.Image:
    size = [max(1, round(side * scale)) for side in sample.image.size]
    resample = Image.Resampling.NEAREST if scale >= 1 else Image.Resampling.LANCZOS
    image = sample.image.resize((size[0], size[1]), resample)
    labels = sample.labels.tolist()
    if len(labels) <= MAX_NAMED:
        return draw_detections(image, sample.boxes_px * scale, labels, None, names)
    # Many names would hide the image, so only the largest box of each class has its name.
    sides_px = sample.boxes_px[:, 2:] - sample.boxes_px[:, :2]
    largest: dict[int, int] = {}
    for n in sides_px.prod(1).argsort().tolist():
        largest[labels[n]] = n
    named = set(largest.values())
    quiet = [n for n in range(len(labels)) if n not in named]
    for part, texts in ((quiet, [""] * len(names)), (sorted(named), names)):
        image = draw_detections(
            image, sample.boxes_px[part] * scale, sample.labels[part], None, texts
        )
    return image


def _boxes(count: int) -> str:
    return f"{count} box{'es' * (count != 1)}"


def _legend(counts: Counter[int], names: Sequence[str], width: int) -> Image.Image:
    """Draw colour, name and number of boxes of each class, in as many lines as needed."""
    font = ImageFont.load_default(size=CAPTION_PX)
    places, x, y = [], 0, 0
    for label, count in sorted(counts.items()):
        text = fit_text(f"{names[label]} {count}", width / 2, font)
        length = CAPTION_PX + 6 + math.ceil(font.getlength(text))
        if x and x + length > width:
            x, y = 0, y + LINE_PX
        places.append((x, y, label, text))
        x += length + GAP_PX
    legend = Image.new("RGB", (width, y + LINE_PX), PAPER)
    draw = ImageDraw.Draw(legend)
    for x, y, label, text in places:
        draw.rectangle((x, y + 3, x + CAPTION_PX - 2, y + CAPTION_PX + 1), fill=colour_of(label))
        draw.text((x + CAPTION_PX + 6, y), text, INK, font)
    return legend
