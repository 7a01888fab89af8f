"""A data set in COCO's format: image folder and annotation file in, one `Sample` per index out.

Everything that can be checked without decoding pixels is checked when the data set is opened, and
all of it before the first complaint: the annotation file field by field (`coco_json.py`), and of
each image its path, its header (`images.py`) and that its size is the one annotated.

Two modes. Strict, the default, raises `DatasetError` for any fault. Lenient skips, with one counted
note per kind: images that are missing, unreadable or of another size, image records given twice,
and annotations of images that are not listed. Faults of structure (missing fields, wrong types,
shared ids, unknown categories, numbers that are not finite, paths out of the folder) are errors in
both, and so is a picture that fails only when its pixels are decoded: then `dataset[i]` raises.

Geometry is no fault, for COCO itself has boxes that overhang and two without area. Training boxes
are clipped to the image; those without area, outside, or left with a side under 0.01 px are
dropped with a count. Crowd regions give no training box. The ground truth for evaluation is what
the file says: every annotation of the images here, crowds and dropped boxes too, unclipped and with
the file's `area` (even one that contradicts the box), as pycocotools would read the file. Only the
annotation ids are new, from 1, as pycocotools takes an id of 0 for "no match".

A class index is the position among the sorted category ids; every category counts, used or not.
Images are in the order of their ids, whatever the order of the file.
"""

# N training boxes of one image   I images   A annotations of all images

from __future__ import annotations

import hashlib
import json
import logging
import operator
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar, overload

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from deta.platform.coco_json import (
    CocoFile,
    DatasetError,
    Problems,
    counted_note,
    read_coco_file,
)
from deta.platform.images import (
    MAX_PIXELS,
    Header,
    ImageError,
    ImageFolder,
    OutsideFolderError,
    decode,
    read_header,
)

Item = TypeVar("Item")
Answer = TypeVar("Answer")

logger = logging.getLogger(__name__)

MIN_SIDE_PX = 0.01  # narrower is rounding noise: float32 has steps of 0.0005 at 4096 px
NUM_READERS = 16  # threads that wait for headers; on network storage more than there are cores
IMAGES_PER_TASK = 128
PROGRESS_AFTER_S = 3.0

IMAGE_UNREADABLE = "image missing or unreadable"
IMAGE_OF_OTHER_SIZE = "image of another size than annotated"

# One row per image and per annotation, in arrays: no Python objects to send to a worker, or to be
# copied page by page once a forked worker touches their reference counts.
IMAGE_ROW = np.dtype(
    [
        ("id", "<i8"),
        ("height", "<i8"),
        ("width", "<i8"),
        ("num_bytes", "<i8"),
        ("start", "<i8"),  # its annotations are rows start to end
        ("end", "<i8"),
    ]
)
ANNOTATION_ROW = np.dtype(
    [
        ("bbox", "<f8", 4),  # x, y, width, height in pixels, as in the file
        ("area", "<f8"),
        ("label", "<i8"),  # class index
        ("crowd", "?"),
        ("box_px", "<f4", 4),  # xyxy, clipped to the image
        ("target", "?"),  # whether it is trained on
    ]
)


@dataclass(frozen=True)
class Category:
    id: int  # as in the annotation file
    name: str


@dataclass(frozen=True)
class Record:
    """One image of the data set, not yet decoded."""

    image_id: int
    path: Path
    width: int
    height: int
    boxes_px: np.ndarray  # N 4 float32, xyxy, clipped to the image, positive area, no crowds
    labels: np.ndarray  # N int64, class index


@dataclass(frozen=True)
class Sample:
    """One decoded image and its boxes."""

    image: Image.Image  # 8-bit RGB
    boxes_px: Tensor  # N 4 float32, xyxy in pixels of `image`
    labels: Tensor  # N int64, class index
    image_id: int
    original_size_px: tuple[int, int]  # (height, width) as in the annotation file


class CocoDataset:
    """Images with boxes, in the order of their ids. Made by `CocoDataset.open`.

    `dataset[i]` decodes image i. Cheap to send to workers and safe to share between threads.
    """

    def __init__(
        self,
        folder: Path,
        file_names: list[str],
        image_rows: np.ndarray,
        annotation_rows: np.ndarray,
        categories: tuple[Category, ...],
        notes: list[str],
        max_pixels: int,
    ) -> None:
        """Tables that `open` has checked: I names, I image rows, A annotation rows."""
        self.folder = folder
        self.categories = categories
        self.notes = notes
        self.max_pixels = max_pixels
        self._file_names = file_names
        self._image_rows = image_rows
        self._annotation_rows = annotation_rows

    @classmethod
    def open(
        cls,
        images: Path,
        annotations: Path,
        *,
        lenient: bool = False,
        max_pixels: int = MAX_PIXELS,
        progress: bool = False,
    ) -> CocoDataset:
        """Check a data set and open it.

        Args:
            images: the folder that every `file_name` is relative to; may itself be a link.
            annotations: JSON in COCO's format.
            lenient: skip, counted in `notes`, what can be skipped.
            max_pixels: the largest image to accept, width times height.
            progress: show a bar on stderr if reading the headers takes long.

        Raises:
            DatasetError: with all faults found, each with its record and field.
        """
        images, annotations = Path(images), Path(annotations)
        if not images.is_dir():
            raise DatasetError(f"{images}: is no folder of images; check data.images")
        problems = Problems(annotations)
        coco = read_coco_file(annotations, problems)
        num_bytes = _inspect_images(images, coco.images, max_pixels, progress, problems)
        problems.raise_if_refused(lenient)

        usable = [i for i in coco.images if i["id"] in num_bytes]
        if not usable:
            raise DatasetError(
                f"{annotations}: none of the {len(coco.images)} images in {images} can be used:\n"
                + "\n".join(problems.notes())
            )
        usable.sort(key=operator.itemgetter("id"))
        ids = sorted(category["id"] for category in coco.categories)
        names = {category["id"]: category["name"] for category in coco.categories}
        categories = tuple(Category(i, names[i]) for i in ids)
        image_rows, annotation_rows, notes = _tables(annotations, coco, usable, ids, num_bytes)

        notes = problems.notes() + notes
        for note in notes:
            logger.warning(note)
        file_names = [str(PurePosixPath(image["file_name"])) for image in usable]
        return cls(images, file_names, image_rows, annotation_rows, categories, notes, max_pixels)

    def __len__(self) -> int:
        return len(self._image_rows)

    def __getitem__(self, index: int) -> Sample:
        """Image `index`, decoded, with its training boxes.

        Raises:
            ImageError: the file does not decode completely, or changed since it was checked.
        """
        record = self.records[index]
        image = decode(record.path, self.max_pixels)
        if image.size != (record.width, record.height):
            annotated = {"width": record.width, "height": record.height}
            raise ImageError(_size_fault(record.path, *image.size, annotated))
        return Sample(
            image,
            torch.from_numpy(record.boxes_px),
            torch.from_numpy(record.labels),
            record.image_id,
            (record.height, record.width),
        )

    @property
    def records(self) -> Records:
        """What is known of each image without decoding it."""
        return Records(self)

    @property
    def ground_truth(self) -> dict[str, Any]:
        """COCO dictionary for evaluation, made anew at each call: images, annotations, categories.

        Holds every annotation of these images, boxes as in the file and category ids as in the
        file, annotations numbered from 1.
        """
        images = [
            {"id": image_id, "file_name": name, "width": width, "height": height}
            for image_id, name, width, height in zip(
                self._image_rows["id"].tolist(),
                self._file_names,
                self._image_rows["width"].tolist(),
                self._image_rows["height"].tolist(),
                strict=True,
            )
        ]
        rows = self._annotation_rows
        counts = self._image_rows["end"] - self._image_rows["start"]
        category_ids = np.array([category.id for category in self.categories], np.int64)
        annotations = [
            {
                "id": number,
                "image_id": image_id,
                "category_id": category_id,
                "bbox": bbox,
                "area": area,
                "iscrowd": crowd,
            }
            for number, image_id, category_id, bbox, area, crowd in zip(
                range(1, len(rows) + 1),
                np.repeat(self._image_rows["id"], counts).tolist(),
                category_ids[rows["label"]].tolist(),
                rows["bbox"].tolist(),
                rows["area"].tolist(),
                rows["crowd"].astype(np.int64).tolist(),
                strict=True,
            )
        ]
        categories = [{"id": category.id, "name": category.name} for category in self.categories]
        return {"images": images, "annotations": annotations, "categories": categories}

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256, in hex, of what training sees; equal on every machine and in any folder.

        Covers the categories and, of each image, id, file name, size, length of the file in bytes,
        training boxes and labels. Pixels are not read: a file exchanged for one of equal length
        goes unseen.
        """
        digest = hashlib.sha256(b"deta coco 1\n")
        digest.update(_line([[category.id, category.name] for category in self.categories]))
        for row, name in zip(self._image_rows.tolist(), self._file_names, strict=True):
            image_id, height, width, num_bytes, start, end = row
            rows = self._annotation_rows[start:end]
            rows = rows[rows["target"]]
            digest.update(_line([image_id, name, width, height, num_bytes, len(rows)]))
            digest.update(rows["box_px"].tobytes())
            digest.update(rows["label"].tobytes())
        return digest.hexdigest()

    def first(self, num_images: int) -> CocoDataset:
        """The images with the lowest ids, as a data set of its own.

        Raises:
            ValueError: fewer than one image is asked for, or more than there are.
        """
        if not 1 <= num_images <= len(self):
            raise ValueError(
                f"cannot take the first {num_images} images of a data set of {len(self)}"
            )
        return self.subset(range(num_images))

    def subset(self, indices: Iterable[int]) -> CocoDataset:
        """Some of the images, as a data set of its own, in the order of their ids.

        All categories stay, so that class indices keep their meaning.

        Raises:
            ValueError: no index, or one twice.
            IndexError: an index outside the data set.
        """
        chosen = sorted(operator.index(i) for i in indices)
        if not chosen or len(set(chosen)) < len(chosen):
            raise ValueError(f"a subset needs one index or more, each once, not {chosen[:10]}")
        if chosen[0] < 0 or chosen[-1] >= len(self):
            raise IndexError(f"indices {chosen[0]} to {chosen[-1]} in a data set of {len(self)}")
        image_rows = self._image_rows[chosen]
        counts = image_rows["end"] - image_rows["start"]
        rows = [
            self._annotation_rows[start:end]
            for start, end in zip(image_rows["start"], image_rows["end"], strict=True)
        ]
        image_rows["end"] = np.cumsum(counts)
        image_rows["start"] = image_rows["end"] - counts
        return CocoDataset(
            self.folder,
            [self._file_names[i] for i in chosen],
            image_rows,
            np.concatenate(rows),
            self.categories,
            [*self.notes, f"{len(chosen)} of {len(self)} images were chosen"],
            self.max_pixels,
        )

    def _record(self, index: int) -> Record:
        image_id, height, width, _, start, end = self._image_rows[index].tolist()
        rows = self._annotation_rows[start:end]
        rows = rows[rows["target"]]
        return Record(
            image_id,
            self.folder / self._file_names[index],
            width,
            height,
            rows["box_px"].copy(),
            rows["label"].copy(),
        )


class Records(Sequence[Record]):
    """The records of a data set, each made when it is asked for."""

    def __init__(self, dataset: CocoDataset) -> None:
        self._dataset = dataset

    def __len__(self) -> int:
        return len(self._dataset)

    @overload
    def __getitem__(self, index: int) -> Record: ...
    @overload
    def __getitem__(self, index: slice) -> list[Record]: ...
    def __getitem__(self, index: int | slice) -> Record | list[Record]:
        if isinstance(index, slice):
            return [self._dataset._record(i) for i in range(*index.indices(len(self)))]
        return self._dataset._record(range(len(self))[index])  # range knows negative indices


def training_boxes(
    bbox: np.ndarray, size_px: np.ndarray
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Boxes clipped to their images, and which of them cannot be trained on.

    Args:
        bbox: A 4 float64, x, y, width, height in pixels.
        size_px: A 2, (height, width) of each box's image.

    Returns:
        A 4 float32, xyxy, clipped; and for each reason to drop a box an A bool mask. A box has
        one reason at most.
    """
    low = np.zeros(2)
    high = size_px[:, ::-1]  # A 2, (width, height)
    with np.errstate(over="ignore"):  # a sum beyond float64 is clipped like any other
        top_left = np.clip(bbox[:, :2], low, high)
        bottom_right = np.clip(bbox[:, :2] + bbox[:, 2:], low, high)
    boxes_px = np.concatenate([top_left, bottom_right], axis=1).astype(np.float32)

    no_area = (bbox[:, 2:] <= 0).any(axis=1)
    outside = (top_left >= bottom_right).any(axis=1) & ~no_area
    too_narrow = (boxes_px[:, 2:] - boxes_px[:, :2] < MIN_SIDE_PX).any(axis=1)
    return boxes_px, {
        "not trained on: box has no area": no_area,
        "not trained on: box is outside the image": outside,
        f"not trained on: box has a side under {MIN_SIDE_PX} px": too_narrow & ~no_area & ~outside,
    }


def _tables(
    path: Path,
    coco: CocoFile,
    images: list[dict[str, Any]],
    category_ids: list[int],
    num_bytes: dict[int, int],
) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """Image rows, annotation rows sorted by image, and notes on what is odd in them."""
    place_of = {image["id"]: place for place, image in enumerate(images)}
    label_of = {category_id: label for label, category_id in enumerate(category_ids)}
    annotations = [a for a in coco.annotations if a["image_id"] in place_of]
    places = np.array([place_of[a["image_id"]] for a in annotations], np.int64)  # A
    by_image = np.argsort(places, kind="stable")  # the order of the file within an image
    places = places[by_image]

    image_rows = np.zeros(len(images), IMAGE_ROW)
    image_rows["id"] = [image["id"] for image in images]
    image_rows["height"] = [image["height"] for image in images]
    image_rows["width"] = [image["width"] for image in images]
    image_rows["num_bytes"] = [num_bytes[image["id"]] for image in images]
    counts = np.bincount(places, minlength=len(images))
    image_rows["end"] = np.cumsum(counts)
    image_rows["start"] = image_rows["end"] - counts

    rows = np.zeros(len(annotations), ANNOTATION_ROW)
    numbers = chain.from_iterable(a["bbox"] for a in annotations)
    rows["bbox"] = np.fromiter(numbers, np.float64, 4 * len(annotations)).reshape(-1, 4)
    rows["area"] = [a["area"] if "area" in a else _box_area(a["bbox"]) for a in annotations]
    rows["label"] = [label_of[a["category_id"]] for a in annotations]
    rows["crowd"] = [a.get("iscrowd", 0) for a in annotations]
    ids = np.array([a["id"] for a in annotations], np.int64)[by_image]
    rows = rows[by_image]

    size_px = np.stack([image_rows["height"], image_rows["width"]], axis=1)[places]  # A 2
    rows["box_px"], reasons = training_boxes(rows["bbox"], size_px)
    rows["target"] = ~rows["crowd"] & ~np.logical_or.reduce(list(reasons.values()))

    notes = []
    for reason, dropped in reasons.items():
        dropped = dropped & ~rows["crowd"]
        if dropped.any():
            notes.append(counted_note(path, reason, ids[dropped].tolist()))
    return image_rows, rows, notes + _warnings(path, coco, image_rows, rows)


def _warnings(path: Path, coco: CocoFile, image_rows: np.ndarray, rows: np.ndarray) -> list[str]:
    """Notes on what is allowed but looks like a mistake."""
    notes = []
    name, count = Counter(category["name"] for category in coco.categories).most_common(1)[0]
    if count > 1:
        notes.append(f"{path}: {count} categories of different ids share the name {name!r}")
    if not rows["target"].any():
        notes.append(f"{path}: has no box to train on, in any of {len(image_rows)} images")
    sizes_px = rows["bbox"][~rows["crowd"], 2:]
    large_images = max(image_rows["height"].max(), image_rows["width"].max()) > 1
    if len(sizes_px) and large_images and (sizes_px <= 1).all():
        notes.append(f"{path}: every box is smaller than 1 px; normalised boxes? COCO has pixels")
    return notes


def _box_area(bbox: list[float]) -> float:
    """Area in px² of an annotation that gives none."""
    area = float(max(bbox[2], 0)) * float(max(bbox[3], 0))
    return min(area, sys.float_info.max)


def _inspect_images(
    folder: Path,
    images: list[dict[str, Any]],
    max_pixels: int,
    progress: bool,
    problems: Problems,
) -> dict[int, int]:
    """Image id -> length of its file in bytes, for each image whose path and header are right."""
    image_folder = ImageFolder(folder)

    def inspect(some: list[dict[str, Any]]) -> list[Header | ImageError | OutsideFolderError]:
        found: list[Header | ImageError | OutsideFolderError] = []
        for image in some:
            try:
                found.append(read_header(image_folder.path(image["file_name"]), max_pixels))
            except (ImageError, OutsideFolderError) as error:
                found.append(error)
        return found

    num_bytes = {}
    for image, found in zip(images, _in_threads(inspect, images, progress), strict=True):
        image_id, width, height = image["id"], image["width"], image["height"]
        if isinstance(found, OutsideFolderError):
            problems.refuse(f"image {image_id}", "file_name", str(found))
        elif isinstance(found, ImageError):
            text = f"image {image_id}, file_name: {found}"
            problems.skip(IMAGE_UNREADABLE, image_id, text)
        elif (found.width, found.height) != (width, height):
            fault = _size_fault(folder / image["file_name"], found.width, found.height, image)
            field = "width" if found.width != width else "height"
            problems.skip(IMAGE_OF_OTHER_SIZE, image_id, f"image {image_id}, {field}: {fault}")
        else:
            num_bytes[image_id] = found.num_bytes
    return num_bytes


def _in_threads(
    work: Callable[[list[Item]], list[Answer]], items: list[Item], progress: bool
) -> Iterator[Answer]:
    """Answers to all items in their order, worked on a few at a time by several threads."""
    starts = range(0, len(items), IMAGES_PER_TASK)
    with ThreadPoolExecutor(NUM_READERS) as pool:
        answers = pool.map(lambda start: work(items[start : start + IMAGES_PER_TASK]), starts)
        if progress:
            from tqdm import tqdm

            answers = tqdm(
                answers,
                "image headers",
                total=len(starts),
                unit=f" x {IMAGES_PER_TASK}",
                delay=PROGRESS_AFTER_S,
                file=sys.stderr,
            )
        for some in answers:
            yield from some


def _size_fault(path: Path, width: int, height: int, annotated: dict[str, Any]) -> str:
    return (
        f"{path}: has {width} x {height} pixels as stored, but {annotated['width']} x "
        f"{annotated['height']} are annotated; if its EXIF orientation turns it, turn the pixels"
    )


def _line(values: object) -> bytes:
    return json.dumps(values).encode() + b"\n"
