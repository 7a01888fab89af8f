"""Summarizes a data set and warns of likely mistakes, before anything expensive begins.

Mistakes in data look like a model that learns badly: a class that only one split has, boxes that
vanish when images are resized, validation images that are training images too. The annotations
show all of this in seconds. Crowd regions and dropped boxes are not counted.
"""

# N boxes of one split   C classes

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from deta.platform.data.coco_dataset import Category, CocoDataset
from deta.platform.data.transforms import resized_size
from deta.platform.pages.number_format import percent_of
from deta.platform.run.config import DataConfig

SMALL_PX2, LARGE_PX2 = 32**2, 96**2  # COCO's borders between small, medium and large
TINY_PX = 8  # stride of the finest feature map
MUCH_TINY = 0.05  # share of all boxes from which on a warning is printed
ELONGATED = 5.0  # longer over shorter side
FEW_BOXES = 20  # of a class in training
AP_DETECTIONS = 100  # per image; COCO's AP uses no more
MAX_CLASS_ROWS = 30
MAX_HASHED_FILES = 2000


@dataclass(frozen=True)
class SplitSummary:
    """Statistics of one split."""

    num_images: int
    num_empty: int  # images without boxes
    image_aspects: np.ndarray  # width over height, of every image
    most_boxes: int  # in one image
    labels: np.ndarray  # N, class index
    images_of_class: np.ndarray  # C, images with a box of it
    boxes_of_class: np.ndarray  # C
    areas_px2: np.ndarray  # N, as in the file
    areas_seen_px2: np.ndarray  # N, at the size the model sees
    sides_seen_px: np.ndarray  # N, the shorter side, at that size
    elongations: np.ndarray  # N, longer over shorter side
    seen_short_edge_px: int

    @property
    def num_boxes(self) -> int:
        return len(self.labels)

    @property
    def num_tiny(self) -> int:
        """Boxes with a side below one pixel of the finest feature map."""
        return int((self.sides_seen_px < TINY_PX).sum())


@dataclass(frozen=True)
class DatasetSummary:
    """Statistics of both splits, and warnings for the user."""

    categories: tuple[Category, ...]
    train: SplitSummary
    val: SplitSummary
    num_shared_images: int  # validation images that are training images, byte for byte

    def lines(self) -> list[str]:
        """Return text for a terminal: tables of the splits and the classes, and the warnings."""
        return [
            *_split_table(self.train, self.val),
            "",
            *_class_table(self.categories, self.train, self.val),
            *(f"! {warning}" for warning in self.warnings()),
        ]

    def warnings(self) -> list[str]:
        """Return warnings: what was found and what to do."""
        train, val = self.train, self.val
        found: list[str] = []
        in_train, in_val = train.boxes_of_class > 0, val.boxes_of_class > 0
        for chosen, text in (
            (
                in_val & ~in_train,
                "only in validation, so they are never learned and their AP stays 0",
            ),
            (in_train & ~in_val, "only in training, so no AP measures how well they are learned"),
            (~in_train & ~in_val, "listed, but in neither split; a head is trained for nothing"),
        ):
            if chosen.any():
                found.append(f"{_classes(self.categories, chosen)}: {text}")
        few = in_train & (train.boxes_of_class < FEW_BOXES)
        if few.any():
            found.append(
                f"{_classes(self.categories, few)}: fewer than {FEW_BOXES} training boxes; expect "
                "a low AP"
            )
        if train.num_boxes and train.num_tiny > MUCH_TINY * train.num_boxes:
            tiny = Counter(train.labels[train.sides_seen_px < TINY_PX].tolist())
            (label, count), *_ = tiny.most_common(1)
            found.append(
                f"{percent_of(train.num_tiny, train.num_boxes)} of the training boxes have a side "
                f"under {TINY_PX} px when images are resized to {train.seen_short_edge_px} px "
                f"(most of {self.categories[label].name}: {count}); the finest feature map has a "
                f"stride of {TINY_PX} px. Larger data.augmentation.short_edges and "
                "data.evaluation_size help, or tiles cut from the images"
            )
        if max(train.most_boxes, val.most_boxes) > AP_DETECTIONS:
            found.append(
                f"an image has {max(train.most_boxes, val.most_boxes)} boxes; AP counts the best "
                f"{AP_DETECTIONS} detections of an image and class"
            )
        if train.num_boxes == 0:
            found.append("no training image has a box: there is nothing to learn")
        elif train.num_empty > train.num_images / 2:
            found.append(
                f"{percent_of(train.num_empty, train.num_images)} of the training images have no "
                "box; if they contain objects without annotations, the model learns to miss them"
            )
        if self.num_shared_images:
            found.append(
                f"{self.num_shared_images} of the validation images are in training too, byte "
                "for byte; AP will be too high"
            )
        return found


def summarize_datasets(
    train_set: CocoDataset, val_set: CocoDataset, data: DataConfig
) -> DatasetSummary:
    """Count both splits, which must have the same categories.

    The sizes that the model sees are computed without crops: in training with the middle one of
    `data.augmentation.short_edges`, in validation with `data.evaluation_size`.
    """
    edges = sorted(data.augmentation.short_edges)
    size = data.evaluation_size
    return DatasetSummary(
        train_set.categories,
        _count(train_set, edges[len(edges) // 2], data.augmentation.max_long_edge),
        _count(val_set, size.short_edge, size.max_long_edge),
        num_shared_images(train_set, val_set),
    )


def _count(dataset: CocoDataset, short_edge: int, max_long_edge: int) -> SplitSummary:
    num_classes = len(dataset.categories)
    images_of_class = np.zeros(num_classes, np.int64)
    counts, aspects = [], []
    labels, sides, seen = [np.zeros(0, np.int64)], [np.zeros((0, 2))], [np.zeros((0, 2))]
    for record in dataset.records:
        counts.append(len(record.labels))
        aspects.append(record.width / record.height)
        images_of_class[np.unique(record.labels)] += 1
        height, width = resized_size(record.height, record.width, short_edge, max_long_edge)
        sides_px = (record.boxes_px[:, 2:] - record.boxes_px[:, :2]).astype(np.float64)  # N 2, w h
        labels.append(record.labels)
        sides.append(sides_px)
        seen.append(sides_px * [width / record.width, height / record.height])
    all_labels = np.concatenate(labels)  # N
    all_sides, all_seen = np.concatenate(sides), np.concatenate(seen)  # N 2
    return SplitSummary(
        num_images=len(counts),
        num_empty=counts.count(0),
        image_aspects=np.array(aspects),
        most_boxes=max(counts),
        labels=all_labels,
        images_of_class=images_of_class,
        boxes_of_class=np.bincount(all_labels, minlength=num_classes),
        areas_px2=all_sides.prod(1),
        areas_seen_px2=all_seen.prod(1),
        sides_seen_px=all_seen.min(1, initial=np.inf),
        elongations=all_sides.max(1, initial=0) / all_sides.min(1, initial=np.inf),
        seen_short_edge_px=short_edge,
    )


def num_shared_images(train_set: CocoDataset, val_set: CocoDataset) -> int:
    """Return how many validation files are, byte for byte, training files too.

    Only files of equal length are read, and at most the first `MAX_HASHED_FILES` of them.
    """
    by_length: dict[int, list[int]] = defaultdict(list)
    for index, length in enumerate(train_set.num_bytes.tolist()):
        by_length[length].append(index)

    hashes: dict[int, bytes] = {}

    def hash_of(index: int) -> bytes:
        if index not in hashes:
            hashes[index] = hashlib.sha256(train_set.content(index)).digest()
        return hashes[index]

    shared = 0
    for index, length in enumerate(val_set.num_bytes.tolist()):
        likely = by_length.get(length, [])
        if len(hashes) + len(likely) > MAX_HASHED_FILES:
            break
        if likely:
            own = hashlib.sha256(val_set.content(index)).digest()
            shared += any(hash_of(other) == own for other in likely)
    return shared


def _split_table(train: SplitSummary, val: SplitSummary) -> list[str]:
    rows = [("", "training", "validation")]

    def row(title: str, *cells: object) -> None:
        rows.append((title, *map(str, cells)))  # type: ignore[arg-type]

    splits = (train, val)
    row("images", *(split.num_images for split in splits))
    row("  without boxes", *(split.num_empty for split in splits))
    row("  width : height, least to most", *(_range(split.image_aspects) for split in splits))
    row("boxes", *(split.num_boxes for split in splits))
    row("  most in one image", *(split.most_boxes for split in splits))
    row(
        f"  longer than {ELONGATED:g} : 1",
        *(percent_of((s.elongations > ELONGATED).sum(), s.num_boxes) for s in splits),
    )
    row("  small, medium, large", *(_sizes(split.areas_px2) for split in splits))
    row(
        "    as the model sees them",
        *(_sizes(split.areas_seen_px2) for split in splits),
    )
    row("    at a short edge of", *(f"{split.seen_short_edge_px} px" for split in splits))
    row(
        f"    with a side under {TINY_PX} px",
        *(percent_of(split.num_tiny, split.num_boxes) for split in splits),
    )
    return _aligned(rows)


def _class_table(
    categories: Sequence[Category], train: SplitSummary, val: SplitSummary
) -> list[str]:
    """Return boxes and images of each class; of many classes the most and the least frequent."""
    order = np.argsort(-train.boxes_of_class, kind="stable").tolist()
    half = MAX_CLASS_ROWS // 2
    hidden = len(order) - 2 * half if len(order) > MAX_CLASS_ROWS else 0
    shown = order[:half] + order[-half:] if hidden else order
    rows = [("class", "training boxes", "in images", "validation boxes", "in images", "")]
    for label in shown:
        boxes = int(train.boxes_of_class[label]), int(val.boxes_of_class[label])
        flag = {(True, False): "! not in validation", (False, True): "! not in training"}.get(
            (boxes[0] > 0, boxes[1] > 0), "" if any(boxes) else "! no box"
        )
        rows.append(
            (
                categories[label].name[:40],
                str(boxes[0]),
                str(train.images_of_class[label]),
                str(boxes[1]),
                str(val.images_of_class[label]),
                flag,
            )
        )
    lines = _aligned(rows)
    if hidden:
        lines.insert(1 + half, f"  … {hidden} more classes in between …")
    return lines


def _aligned(rows: Sequence[tuple[str, ...]]) -> list[str]:
    """Align the first column left and all others right, except flags."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = []
    for first, *others in rows:
        cells = [
            cell if cell.startswith("!") else f"{cell:>{width}}"
            for cell, width in zip(others, widths[1:], strict=True)
        ]
        lines.append("   ".join([f"{first:<{widths[0]}}", *cells]).rstrip())
    return lines


def _sizes(areas_px2: np.ndarray) -> str:
    if not len(areas_px2):
        return "-"
    small, large = (areas_px2 < SMALL_PX2).mean(), (areas_px2 >= LARGE_PX2).mean()
    return f"{100 * small:.0f}, {100 * (1 - small - large):.0f}, {100 * large:.0f} %"


def _range(values: np.ndarray) -> str:
    least, most = f"{values.min():.2f}", f"{values.max():.2f}"
    return least if least == most else f"{least} to {most}"


def _classes(categories: Sequence[Category], chosen: np.ndarray, limit: int = 6) -> str:
    """Return `class dog`, or `3 classes (dog, cat, bird)`."""
    names = [category.name for category, is_chosen in zip(categories, chosen, strict=True)
             if is_chosen]  # fmt: skip
    if len(names) == 1:
        return f"class {names[0]}"
    return f"{len(names)} classes ({', '.join(names[:limit])}{', …' * (len(names) > limit)})"
