"""A data set in COCO format: an image folder and an annotation file, read as `Sample`s.

Opening a data set checks everything that needs no decoded pixels, and reports all faults in one
error: the annotation file field by field (`coco_annotations.py`), and the path, header and size of
each image (`image_folder.py`).

There are two modes. Strict, the default, raises `DatasetError` for any fault. Lenient skips some
records and adds a note with a count for each kind: images that are missing, unreadable or of
another size, repeated image records, second ids of a file without its boxes, and annotations of
images that are not listed. It turns boxes round that were drawn backwards. Structural
faults are errors in both modes: missing fields, wrong types, shared ids, unknown categories,
numbers that are not finite, paths out of the folder. An image that fails only when its pixels are
decoded is an error in both modes too: then `dataset[i]` raises.

Odd boxes are not faults: COCO itself has boxes that reach out of the image and two without area.
Training boxes are clipped to the image. Boxes without area, outside the image, or with a side under
0.01 px after clipping are dropped and counted; a set whose boxes are all dropped is refused. What
looks like a mix-up (corners for sizes, normalised boxes, the same box twice) is opened in both
modes, since it is a guess, with a note that begins with `WARNING`.

Crowd regions are not training boxes. The ground truth for evaluation is as pycocotools would read
the file: every annotation of these images, including crowds and dropped boxes, unclipped, with the
file's `area` (even one that contradicts the box). Only the annotation ids are new and start at 1,
because pycocotools reads an id of 0 as "no match".

A class index is the position among the sorted category ids; unused categories count too.
Images are sorted by id, whatever the order of the file.
"""

# N training boxes of one image   I images   A annotations of all images

from __future__ import annotations

import copy
import gc
import hashlib
import json
import logging
import operator
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Self, overload

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from deta.platform.data.coco_annotations import (
    WARNING,
    DatasetError,
    Problems,
    read_coco_file,
)
from deta.platform.data.coco_tables import CocoTables, make_tables
from deta.platform.data.image_decoding import (
    AS_STORED,
    MAX_PIXELS,
    Header,
    ImageError,
    decode_bytes,
    read_file,
    sixteen_bit_values,
)
from deta.platform.data.image_folder import inspect_images, orientation_warnings, size_mismatch
from deta.platform.data.image_sizes import PixelRules
from deta.platform.system.short_list import short_list

logger = logging.getLogger(__name__)

# The range of 16-bit images: from so many images, with so many values of each.
NUM_RANGE_IMAGES, NUM_RANGE_VALUES = 64, 20_000
RANGE_PERCENTILES = (0.1, 99.9)
FEW_LEVELS = 64  # of 256


@dataclass(frozen=True)
class Category:
    """A category of the annotation file."""

    id: int  # as in the annotation file
    name: str


@dataclass(frozen=True)
class ImageRecord:
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


@dataclass(eq=False, repr=False)
class CocoDataset:
    """Images with boxes, sorted by image id. Made by `CocoDataset.open`.

    `dataset[i]` decodes image i. It is cheap to pickle and safe to share between threads.
    """

    folder: Path
    tables: CocoTables
    categories: tuple[Category, ...]
    notes: list[str]
    max_pixels: int
    rules: PixelRules = AS_STORED

    @classmethod
    def open(
        cls,
        images: Path,
        annotations: Path,
        *,
        lenient: bool = False,
        max_pixels: int = MAX_PIXELS,
        rules: PixelRules = AS_STORED,
        progress: bool = False,
    ) -> CocoDataset:
        """Check a data set and open it.

        Args:
            images: the folder that every `file_name` is relative to; may itself be a link.
            annotations: JSON in COCO's format.
            lenient: skip records that can be skipped, and count them in `notes`.
            max_pixels: the largest image to accept, width times height.
            rules: how pixels are read; with `exif="apply"`, boxes are of the upright images.
            progress: show a bar on stderr if reading the headers takes long.

        Raises:
            DatasetError: lists all faults, each with its record and field.
        """
        images, annotations = Path(images), Path(annotations)
        if not images.is_dir():
            raise DatasetError(
                f"{images}: is not a folder; give the folder of images (data.train_images, "
                "data.val_images, or --images)"
            )
        with _without_collector():
            return cls._open(images, annotations, lenient, max_pixels, rules, progress)

    @classmethod
    def _open(
        cls,
        images: Path,
        annotations: Path,
        lenient: bool,
        max_pixels: int,
        rules: PixelRules,
        progress: bool,
    ) -> Self:
        problems = Problems(annotations)
        coco = read_coco_file(annotations, problems)
        headers = inspect_images(images, coco.images, max_pixels, progress, problems, rules)
        num_bytes = {image_id: header.num_bytes for image_id, header in headers.items()}
        problems.raise_errors(lenient, all_skipped=bool(coco.images) and not num_bytes)

        # The annotated size may be the stored one of a picture that is turned.
        usable = sorted(
            (
                i | {"width": headers[i["id"]].width, "height": headers[i["id"]].height}
                for i in coco.images
                if i["id"] in headers
            ),
            key=operator.itemgetter("id"),
        )
        if not usable:
            raise DatasetError(
                f"{annotations}: none of the {len(coco.images)} images in {images} can be used:\n"
                + "\n".join(problems.notes())
            )
        names = {category["id"]: category["name"] for category in coco.categories}
        ids = sorted(names)
        categories = tuple(Category(i, names[i]) for i in ids)
        tables, notes = make_tables(annotations, coco, usable, ids, num_bytes)

        about = orientation_warnings(annotations, coco, usable, headers, rules)
        notes = about + problems.notes() + notes
        for note in notes:
            logger.warning(note)
        dataset = cls(images, tables, categories, notes, max_pixels, rules)
        if warning := dataset.sixteen_bit_warning(headers):
            logger.warning(warning)
            dataset.notes.insert(0, warning)
        return dataset

    def __len__(self) -> int:
        return len(self.tables.images)

    def __getitem__(self, index: int) -> Sample:
        """Decode image `index` and return it with its training boxes.

        Raises:
            ImageError: the file does not decode completely, or changed since it was checked.
        """
        record = self.records[index]
        image = decode_bytes(self.content(index), record.path, self.max_pixels, self.rules)
        if image.size != (record.width, record.height):
            found = Header(*image.size, num_bytes=0)
            raise ImageError(size_mismatch(record.path, found, (record.width, record.height)))
        return Sample(
            image,
            torch.from_numpy(record.boxes_px),
            torch.from_numpy(record.labels),
            record.image_id,
            (record.height, record.width),
        )

    def content(self, index: int) -> bytes:
        """Return the stored bytes of image `index`.

        Raises:
            ImageError: the file is missing or cannot be read.
        """
        return read_file(self.records[index].path, self.max_pixels)

    def beginning(self, index: int, num_bytes: int) -> bytes:
        """Return the first stored bytes of image `index`, fewer if it is shorter.

        Raises:
            OSError: the file is missing or cannot be read.
        """
        with open(self.records[index].path, "rb") as file:
            return file.read(num_bytes)

    @property
    def num_bytes(self) -> np.ndarray:
        """Size of each image file in bytes: I int64."""
        return self.tables.images["num_bytes"].copy()

    @property
    def records(self) -> ImageRecords:
        """The record of each image, without decoding it."""
        return ImageRecords(self)

    @property
    def ground_truth(self) -> dict[str, Any]:
        """COCO dictionary for evaluation, built at each access: images, annotations, categories.

        It has every annotation of these images, with boxes and category ids as in the file.
        Annotations are numbered from 1.
        """
        file_names, image_rows, rows = self.tables
        category_ids = np.array([category.id for category in self.categories], np.int64)
        images = {
            "id": image_rows["id"].tolist(),
            "file_name": file_names,
            "width": image_rows["width"].tolist(),
            "height": image_rows["height"].tolist(),
        }
        annotations = {
            "id": range(1, len(rows) + 1),
            "image_id": np.repeat(
                image_rows["id"], image_rows["end"] - image_rows["start"]
            ).tolist(),
            "category_id": category_ids[rows["label"]].tolist(),
            "bbox": rows["bbox"].tolist(),
            "area": rows["area"].tolist(),
            "iscrowd": rows["crowd"].astype(np.int64).tolist(),
        }
        categories = [{"id": category.id, "name": category.name} for category in self.categories]
        return {
            "images": _records(images),
            "annotations": _records(annotations),
            "categories": categories,
        }

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 (hex) of the training data; the same on every machine and in every folder.

        It covers the categories and each image's id, file name, size, file size in bytes,
        training boxes and labels. It does not cover pixels: a file replaced by another of equal
        length goes unnoticed.
        """
        digest = hashlib.sha256(b"deta coco 1\n")
        digest.update(_line([[category.id, category.name] for category in self.categories]))
        for row, name in zip(self.tables.images.tolist(), self.tables.file_names, strict=True):
            image_id, height, width, num_bytes, start, end = row
            rows = self._targets(start, end)
            digest.update(_line([image_id, name, width, height, num_bytes, len(rows)]))
            digest.update(rows["box_px"].tobytes())
            digest.update(rows["label"].tobytes())
        return digest.hexdigest()

    def sixteen_bit_range(self, indices: Sequence[int] | None = None) -> tuple[int, int] | None:
        """Return the range of values that 16-bit grey images use, or None if there are none.

        The ends are the 0.1 and 99.9 percentiles over some of the images, always the same ones.

        Args:
            indices: of 16-bit images, if known; otherwise some of all images are looked at.
        """
        indices = range(len(self)) if indices is None else indices
        step = max(1, len(indices) // NUM_RANGE_IMAGES)
        values: list[np.ndarray] = []
        for index in indices[::step]:
            path = self.records[index].path
            with suppress(ImageError):  # told where it is trained on
                found = sixteen_bit_values(self.content(index), path, self.max_pixels).ravel()
                values.append(found[:: max(1, len(found) // NUM_RANGE_VALUES)])
        pooled = np.concatenate(values) if values else np.zeros(0)
        if not len(pooled):
            return None
        least, most = np.percentile(pooled, RANGE_PERCENTILES).round().astype(int).tolist()
        return (least, most) if least < most else (min(least, 65534), min(least, 65534) + 1)

    def sixteen_bit_warning(self, headers: Mapping[int, Header]) -> str | None:
        """Return a warning if 16-bit images use so little of their range that 8 bits lose much."""
        own = [headers[image_id] for image_id in self.tables.images["id"].tolist()]
        grey = [index for index, header in enumerate(own) if header.is_sixteen_bit]
        colour = [index for index, header in enumerate(own) if header.is_deep_colour]
        if grey and self.rules.sixteen_bit == "full" and (found := self.sixteen_bit_range(grey)):
            least, most = found
            deep, advice = grey, "data.sixteen_bit=stretch uses all levels"
        elif colour:
            values = [np.array([0, 255], np.uint8)]
            for index in colour[:NUM_RANGE_IMAGES]:
                with suppress(ImageError):  # told where it is trained on
                    values.append(np.asarray(self[index].image).ravel()[::7])
            levels = np.concatenate(values[1:] or values)
            least, most = (257 * np.percentile(levels, RANGE_PERCENTILES)).astype(int).tolist()
            deep, advice = colour, "export them with 8 bits a channel, brightened"
        else:
            return None
        num_levels = (most + 128) // 257 - (least + 128) // 257 + 1
        if num_levels > FEW_LEVELS:
            return None
        ids = self.tables.images["id"][deep].tolist()
        return (
            f"{WARNING}{self.folder}: {len(deep)} of {len(self)} images have 16 bits, and their "
            f"values lie in {least} .. {most} of 0 .. 65535, so at most {num_levels} of 256 "
            f"levels are left (ids {short_list(ids)}); {advice}"
        )

    def first(self, num_images: int) -> Self:
        """Return a data set of the images with the lowest ids.

        Raises:
            ValueError: there are not as many, or fewer than one are requested.
        """
        if not 1 <= num_images <= len(self):
            raise ValueError(
                f"cannot take the first {num_images} images of a data set of {len(self)}"
            )
        return self.subset(range(num_images))

    def subset(self, indices: Iterable[int]) -> Self:
        """Return a data set of some of the images, sorted by id.

        All categories stay, so class indices keep their meaning.

        Raises:
            ValueError: there is no index, or one is repeated.
            IndexError: an index outside the data set.
        """
        chosen = sorted(operator.index(i) for i in indices)
        if not chosen or len(set(chosen)) < len(chosen):
            raise ValueError(f"a subset needs one index or more, each once, not {chosen[:10]}")
        if chosen[0] < 0 or chosen[-1] >= len(self):
            raise IndexError(f"indices {chosen[0]} to {chosen[-1]} in a data set of {len(self)}")
        part = copy.copy(self)
        part.__dict__.pop("fingerprint", None)
        part.tables = self.tables.take(chosen)
        part.notes = [*self.notes, f"{len(chosen)} of {len(self)} images were chosen"]
        return part

    def _path(self, index: int) -> Path:
        return self.folder / self.tables.file_names[index]

    def _targets(self, start: int, end: int) -> np.ndarray:
        rows = self.tables.annotations[start:end]
        return rows[rows["target"]]

    def _record(self, index: int) -> ImageRecord:
        image_id, height, width, _, start, end = self.tables.images[index].tolist()
        rows = self._targets(start, end)
        boxes_px, labels = rows["box_px"].copy(), rows["label"].copy()
        return ImageRecord(image_id, self._path(index), width, height, boxes_px, labels)


@contextmanager
def _without_collector() -> Iterator[None]:
    """Pause the garbage collector: it would look through millions of new records, again and again.

    They hold no cycles, so they are freed without it.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


class ImageRecords(Sequence[ImageRecord]):
    """The records of a data set, each built on access."""

    def __init__(self, dataset: CocoDataset) -> None:
        self._dataset = dataset

    def __len__(self) -> int:
        return len(self._dataset)

    @overload
    def __getitem__(self, index: int) -> ImageRecord: ...
    @overload
    def __getitem__(self, index: slice) -> list[ImageRecord]: ...
    def __getitem__(self, index: int | slice) -> ImageRecord | list[ImageRecord]:
        if isinstance(index, slice):
            return [self._dataset._record(i) for i in range(*index.indices(len(self)))]
        return self._dataset._record(range(len(self))[index])  # range handles negative indices


def _records(columns: dict[str, Sequence[Any]]) -> list[dict[str, Any]]:
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


def _line(values: object) -> bytes:
    return json.dumps(values).encode() + b"\n"
