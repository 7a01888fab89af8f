"""Draws a sheet of training images as the model will see them: augmented, resized, with boxes.

The images are samples of the run itself, with the same random flips, crops and sizes as in the
first epoch. They are made from the model's input tensors, converted back to colours. So a box that
misses its object here also misses it in training.
"""

# N boxes of one image

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import torch
from PIL import Image
from torchvision.transforms.v2 import functional

from deta.model.boxes import cxcywh_to_xyxy
from deta.platform.data.data_loader import train_loader
from deta.platform.data.sample_order import TrainingOrder
from deta.platform.pages.draw_boxes import (
    colour_of,
    contact_sheet,
    draw_detections,
    save_image,
    scaled,
)
from deta.platform.run.run import Run

NUM_IMAGES = 12
COLUMNS = 4
CELL_PX = 360  # about the longer side of the largest image, once scaled
MAX_NAMED = 8  # if an image has more boxes, only the largest of each class has its name


class SheetImage(NamedTuple):
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
        image = functional.to_pil_image(seen.image)
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
    shown = dict.fromkeys(sorted({label for each in labels for label in each}), 0)
    left = dict(enumerate(labels))
    while shown and len(labels) - len(left) < num_images:
        rarest = min(shown, key=lambda label: shown[label])
        place = next((place for place, each in left.items() if rarest in each), None)
        if place is None:
            del shown[rarest]
            continue
        for label in set(left.pop(place)) & shown.keys():
            shown[label] += 1
    chosen = set(range(len(labels))) - left.keys()
    return sorted(chosen | set(islice(left, num_images - len(chosen))))


def write_training_sheet(path: Path, run: Run) -> None:
    """Write the sheet of a run atomically; the suffix of `path` gives the format.

    Raises:
        ImageError: an image cannot be decoded; names the file.
    """
    names = [category.name for category in run.train_set.categories]
    samples = first_epoch_images(run)
    scale = CELL_PX / max(max(sample.image.size) for sample in samples)
    cells = [(_drawn(sample, names, scale), sample.caption.splitlines()) for sample in samples]
    counts = Counter(label for sample in samples for label in sample.labels.tolist())
    legend = [
        (f"{names[label]} {count}", colour_of(label)) for label, count in sorted(counts.items())
    ]
    title = f"{run.config.name}: training images as the model sees them in the first epoch"
    save_image(contact_sheet(cells, COLUMNS, [title], legend), path)


def _drawn(sample: SheetImage, names: Sequence[str], scale: float) -> Image.Image:
    image, scale = scaled(sample.image, scale)
    labels = sample.labels.tolist()
    # Many names would hide the image, so only the largest box of each class has its name.
    areas_px2 = (sample.boxes_px[:, 2:] - sample.boxes_px[:, :2]).prod(1)
    largest = {labels[n]: n for n in areas_px2.argsort().tolist()}
    named = range(len(labels)) if len(labels) <= MAX_NAMED else sorted(largest.values())
    quiet = sorted(set(range(len(labels))) - set(named))
    for part, texts in ((quiet, [""] * len(names)), (list(named), names)):
        boxes_px = sample.boxes_px[part] * scale
        image = draw_detections(image, boxes_px, sample.labels[part], None, texts)
    return image


def _boxes(count: int) -> str:
    return f"{count} box{'es' * (count != 1)}"
