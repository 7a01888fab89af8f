"""A data set in COCO's format: image folder and annotation file in, one `Sample` per index out.

Everything that can be checked without decoding pixels is checked when the data set is opened, and
all of it before the first complaint: the annotation file field by field (`coco_json.py`), and of
each image its path, its header and its size (`image_folder.py`).

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
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any, overload

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from deta.platform.data.coco_annotations import DatasetError, Problems, read_coco_file
from deta.platform.data.coco_tables import make_tables
from deta.platform.data.image_decoding import MAX_PIXELS, ImageError, decode_bytes, read_file
from deta.platform.data.image_folder import inspect_images, size_fault

logger = logging.getLogger(__name__)


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
        num_bytes = inspect_images(images, coco.images, max_pixels, progress, problems)
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
        image_rows, annotation_rows, notes = make_tables(annotations, coco, usable, ids, num_bytes)

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
        image = decode_bytes(self.content(index), record.path, self.max_pixels)
        if image.size != (record.width, record.height):
            raise ImageError(size_fault(record.path, image.size, (record.width, record.height)))
        return Sample(
            image,
            torch.from_numpy(record.boxes_px),
            torch.from_numpy(record.labels),
            record.image_id,
            (record.height, record.width),
        )

    def content(self, index: int) -> bytes:
        """The file of image `index` as it is stored.

        Raises:
            ImageError: it is missing, or cannot be read.
        """
        return read_file(self.records[index].path, self.max_pixels)

    @property
    def tables(self) -> tuple[list[str], np.ndarray, np.ndarray]:
        """File names, image rows and annotation rows (`coco_tables.py`), not to be written to."""
        return self._file_names, self._image_rows, self._annotation_rows

    @property
    def num_bytes(self) -> np.ndarray:
        """Length of each image's file: I int64."""
        return self._image_rows["num_bytes"].copy()

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
        notes = [*self.notes, f"{len(chosen)} of {len(self)} images were chosen"]
        return self._with_images(chosen, image_rows, np.concatenate(rows), notes)

    def _with_images(
        self,
        chosen: list[int],
        image_rows: np.ndarray,
        annotation_rows: np.ndarray,
        notes: list[str],
    ) -> CocoDataset:
        """The data set of the images at some indices, whose rows these are."""
        return CocoDataset(
            self.folder,
            [self._file_names[i] for i in chosen],
            image_rows,
            annotation_rows,
            self.categories,
            notes,
            self.max_pixels,
        )

    def _path(self, index: int) -> Path:
        return self.folder / self._file_names[index]

    def _record(self, index: int) -> Record:
        image_id, height, width, _, start, end = self._image_rows[index].tolist()
        rows = self._annotation_rows[start:end]
        rows = rows[rows["target"]]
        return Record(
            image_id,
            self._path(index),
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


def _line(values: object) -> bytes:
    return json.dumps(values).encode() + b"\n"
