"""Summarizes a data set and warns of likely mistakes, before anything expensive begins.

Mistakes in data look like a model that learns badly: a class that only one split has, boxes that
vanish when images are resized, validation images that are training images too. The annotations
show all of this in seconds. Crowd regions and dropped boxes are not counted.
"""

# I images and N boxes of one split   C classes

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from deta.platform.data.coco_annotations import WARNING
from deta.platform.data.coco_dataset import Category, CocoDataset
from deta.platform.data.transforms import resized_size
from deta.platform.pages.number_format import percent_of
from deta.platform.run.config import DataConfig
from deta.platform.system.short_list import short_list

SMALL_PX2, LARGE_PX2 = 32**2, 96**2  # COCO's borders between small, medium and large
TINY_PX = 8  # stride of the finest feature map
MUCH_TINY = 0.05  # share of all boxes from which on a warning is printed
ELONGATED = 5.0  # longer over shorter side
FEW_BOXES = 20  # of a class in training
AP_DETECTIONS = 100  # per image; COCO's AP uses no more
MAX_CLASS_ROWS = 30
NUM_READERS = 16  # threads; network storage keeps more of them busy than cores
NUM_FIRST_BYTES = 8192  # beyond the headers, which all files of a camera may share
MAX_COMPARED = 20_000  # files of a split whose length files of the other have too


@dataclass(frozen=True)
class SplitSummary:
    """Statistics of one split."""

    boxes_of_image: np.ndarray  # I
    image_aspects: np.ndarray  # I, width over height
    labels: np.ndarray  # N, class index
    images_of_class: np.ndarray  # C, images with a box of it
    boxes_of_class: np.ndarray  # C
    sides_px: np.ndarray  # N 2, width and height as in the file
    sides_seen_px: np.ndarray  # N 2, at the size the model sees
    seen_short_edge_px: int

    @property
    def num_boxes(self) -> int:
        return len(self.labels)

    @property
    def is_tiny(self) -> np.ndarray:
        """Whether a side is below one pixel of the finest feature map: N."""
        return self.sides_seen_px.min(1, initial=np.inf) < TINY_PX

    def rows(self) -> dict[str, object]:
        """Return the cells of this split's column in the report."""
        elongated = self.sides_px.max(1, initial=0) > ELONGATED * self.sides_px.min(1, initial=1e9)
        aspects = [f"{end:.2f}" for end in (self.image_aspects.min(), self.image_aspects.max())]
        return {
            "images": len(self.boxes_of_image),
            "  without boxes": (self.boxes_of_image == 0).sum(),
            "  width : height, least to most": " to ".join(dict.fromkeys(aspects)),
            "boxes": self.num_boxes,
            "  most in one image": self.boxes_of_image.max(),
            f"  longer than {ELONGATED:g} : 1": percent_of(elongated.sum(), self.num_boxes),
            "  small, medium, large": _sizes(self.sides_px.prod(1)),
            "    as the model sees them": _sizes(self.sides_seen_px.prod(1)),
            "    at a short edge of": f"{self.seen_short_edge_px} px",
            f"    with a side under {TINY_PX} px": percent_of(self.is_tiny.sum(), self.num_boxes),
        }


@dataclass(frozen=True)
class DatasetSummary:
    """Statistics of both splits, and warnings for the user."""

    categories: tuple[Category, ...]
    train: SplitSummary
    val: SplitSummary
    notes: tuple[str, ...]  # of both data sets, those that warn

    def lines(self) -> list[str]:
        """Return text for a terminal: tables of the splits and the classes, and the warnings."""
        val = self.val.rows()
        cells = [(title, str(one), str(val[title])) for title, one in self.train.rows().items()]
        return [
            *_aligned([("", "training", "validation"), *cells]),
            "",
            *_class_table(self.categories, self.train, self.val),
            *(f"! {warning}" for warning in self.warnings()),
        ]

    def warnings(self) -> list[str]:
        """Return warnings: what was found and what to do."""
        train, val = self.train, self.val
        found = list(self.notes)
        in_train, in_val = train.boxes_of_class > 0, val.boxes_of_class > 0
        few = in_train & (train.boxes_of_class < FEW_BOXES)
        never = "only in validation, so they are never learned and their AP stays 0"
        for chosen, text in (
            (in_val & ~in_train, never),
            (in_train & ~in_val, "only in training, so no AP measures how well they are learned"),
            (~in_train & ~in_val, "listed, but in neither split; a head is trained for nothing"),
            (few, f"fewer than {FEW_BOXES} training boxes; expect a low AP"),
        ):
            if chosen.any():
                found.append(f"{_classes(self.categories, chosen)}: {text}")
        if train.is_tiny.sum() > MUCH_TINY * train.num_boxes:
            counts = np.bincount(train.labels[train.is_tiny])
            found.append(
                f"{percent_of(train.is_tiny.sum(), train.num_boxes)} of the training boxes have a "
                f"side under {TINY_PX} px when images are resized to {train.seen_short_edge_px} px "
                f"(most of {self.categories[counts.argmax()].name}: {counts.max()}); the finest "
                f"feature map has a stride of {TINY_PX} px. Larger data.augmentation.short_edges "
                "and data.evaluation_size help, or tiles cut from the images"
            )
        most = max(train.boxes_of_image.max(), val.boxes_of_image.max())
        if most > AP_DETECTIONS:
            found.append(
                f"an image has {most} boxes; AP counts the best {AP_DETECTIONS} detections of an "
                "image and class"
            )
        num_images, num_empty = len(train.boxes_of_image), (train.boxes_of_image == 0).sum()
        if train.num_boxes == 0:
            found.append("no training image has a box: there is nothing to learn")
        elif num_empty > num_images / 2:
            found.append(
                f"{percent_of(num_empty, num_images)} of the training images have no "
                "box; if they contain objects without annotations, the model learns to miss them"
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
        tuple(
            note.removeprefix(WARNING)
            for note in dict.fromkeys([*train_set.notes, *val_set.notes])
            if note.startswith(WARNING)
        ),
    )


def _count(dataset: CocoDataset, short_edge: int, max_long_edge: int) -> SplitSummary:
    _, images, rows = dataset.tables
    image_of = np.repeat(np.arange(len(images)), images["end"] - images["start"])[rows["target"]]
    rows = rows[rows["target"]]  # N
    sizes_px = np.stack([images["width"], images["height"]], axis=1)  # I 2
    seen_px = [
        resized_size(height, width, short_edge, max_long_edge)[::-1]
        for width, height in sizes_px.tolist()
    ]
    sides_px = (rows["box_px"][:, 2:] - rows["box_px"][:, :2]).astype(np.float64)  # N 2
    num_classes = len(dataset.categories)
    pairs = np.unique(np.stack([image_of, rows["label"]]), axis=1)  # (image, class), each once
    return SplitSummary(
        boxes_of_image=np.bincount(image_of, minlength=len(images)),
        image_aspects=sizes_px[:, 0] / sizes_px[:, 1],
        labels=rows["label"],
        images_of_class=np.bincount(pairs[1], minlength=num_classes),
        boxes_of_class=np.bincount(rows["label"], minlength=num_classes),
        sides_px=sides_px,
        sides_seen_px=sides_px * (np.array(seen_px) / sizes_px)[image_of],
        seen_short_edge_px=short_edge,
    )


def shared_images_note(train_set: CocoDataset, val_set: CocoDataset) -> str | None:
    """Return a warning with the validation images that are training images too, byte for byte.

    Lengths are compared first, then the first bytes, and the whole files only where these agree;
    at most `MAX_COMPARED` files are looked into.
    """
    lengths = train_set.num_bytes, val_set.num_bytes
    pairs = [np.flatnonzero(np.isin(*both)).tolist() for both in (lengths, lengths[::-1])]
    likely = [indices[:MAX_COMPARED] for indices in pairs]
    if not all(likely):
        return None

    def keys(which: int, indices: list[int], whole: bool) -> dict[int, bytes]:
        dataset = (train_set, val_set)[which]

        def key(index: int) -> bytes | None:
            try:
                if whole:
                    return hashlib.sha256(dataset.content(index)).digest()
                length = int(lengths[which][index])
                return b"%d " % length + dataset.beginning(index, NUM_FIRST_BYTES)
            except (ValueError, OSError):  # unreadable images are told elsewhere
                return None

        with ThreadPoolExecutor(NUM_READERS) as pool:
            found = zip(indices, pool.map(key, indices), strict=True)
            return {index: key for index, key in found if key is not None}

    for whole in (False, True):
        found = [keys(which, likely[which], whole) for which in range(2)]
        common = set(found[0].values()) & set(found[1].values())
        likely = [[index for index, key in one.items() if key in common] for one in found]
    if not likely[1]:
        return None
    ids = val_set.tables.images["id"][likely[1]].tolist()
    least = "at least " * any(len(indices) > MAX_COMPARED for indices in pairs)
    return (
        f"{WARNING}{least}{len(ids)} of the {len(val_set)} validation images are in training too, "
        f"byte for byte (ids {short_list(ids)}); AP will be too high. Split the data without them"
    )


def _class_table(
    categories: Sequence[Category], train: SplitSummary, val: SplitSummary
) -> list[str]:
    """Return boxes and images of each class; of many classes the most and the least frequent."""
    order = np.argsort(-train.boxes_of_class, kind="stable").tolist()
    half = MAX_CLASS_ROWS // 2
    hidden = len(order) - 2 * half if len(order) > MAX_CLASS_ROWS else 0
    shown = order[:half] + order[-half:] if hidden else order
    rows = [("class", "training boxes", "in images", "validation boxes", "in images", "")]
    flags = {(True, False): "! not in validation", (False, True): "! not in training"}
    for label in shown:
        boxes = train.boxes_of_class[label], val.boxes_of_class[label]
        flag = flags.get((boxes[0] > 0, boxes[1] > 0), "" if any(boxes) else "! no box")
        images = train.images_of_class[label], val.images_of_class[label]
        cells = map(str, (boxes[0], images[0], boxes[1], images[1]))
        rows.append((categories[label].name[:40], *cells, flag))
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


def _classes(categories: Sequence[Category], chosen: np.ndarray, limit: int = 6) -> str:
    """Return `class dog`, or `3 classes (dog, cat, bird)`."""
    names = [categories[label].name for label in np.flatnonzero(chosen).tolist()]
    if len(names) == 1:
        return f"class {names[0]}"
    return f"{len(names)} classes ({', '.join(names[:limit])}{', …' * (len(names) > limit)})"
