"""Check that image files lie in the image folder, and that their headers match the annotations."""

from __future__ import annotations

import multiprocessing
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

from deta.platform.data.coco_annotations import (
    WARNING,
    CocoFile,
    DatasetError,
    Problems,
)
from deta.platform.data.image_decoding import AS_STORED, Header, ImageError, read_header
from deta.platform.data.image_sizes import PixelRules
from deta.platform.system.progress import progress_bar
from deta.platform.system.short_list import short_list

# Threads of a process that read headers. A network's storage keeps more of them busy than a core
# does; with many more, they mostly wait for Python's lock.
NUM_READERS = 4
IMAGES_PER_TASK = 256
MANY_IMAGES = 5_000  # from so many on, each core reads headers, in a process of its own

IMAGE_UNREADABLE = "image missing or unreadable"
IMAGE_OF_OTHER_SIZE = "image of another size than annotated"


class OutsideFolderError(ValueError):
    """A file name that leads out of the image folder through a link."""


class ImageFolder:
    """Paths of the files in one folder. It may be a link; links in it may not lead out of it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._root = os.path.realpath(folder)
        self._inside: dict[str, bool] = {}  # few subfolders, many files

    def path(self, file_name: str) -> Path:
        """Return the path of a file.

        Args:
            file_name: relative, with / and without .. (see `coco_annotations.file_name_fault`).

        Raises:
            OutsideFolderError: a link in the path leads out of the folder.
        """
        name = PurePosixPath(file_name)
        path = self.folder / name
        parent = str(name.parent)
        if parent not in self._inside:
            self._inside[parent] = self._resolves_inside(parent)
        if self._inside[parent] and (not os.path.islink(path) or self._resolves_inside(str(name))):
            return path
        raise OutsideFolderError(
            f"{path} is reached through a link out of the image folder; copy it into the folder, "
            "or make the folder itself the link"
        )

    def _resolves_inside(self, name: str) -> bool:
        real = os.path.realpath(os.path.join(self._root, name))
        return real == self._root or real.startswith(self._root.rstrip(os.sep) + os.sep)


def inspect_images(
    folder: Path,
    images: list[dict[str, Any]],
    max_pixels: int,
    progress: bool,
    problems: Problems,
    rules: PixelRules = AS_STORED,
) -> dict[int, Header]:
    """Return the header of each image by its id, where path, header and size are valid.

    With `rules.exif` "apply", a picture that is turned may be annotated with either of its sizes,
    since some tools write the stored size beside boxes of the upright picture.

    `problems` receives a fault for every other image, also for one of over `max_pixels`.

    Raises:
        DatasetError: no image file exists.
    """
    headers = {}
    starts = range(0, len(images), IMAGES_PER_TASK)
    chunks = [images[start : start + IMAGES_PER_TASK] for start in starts]
    names = [[image["file_name"] for image in chunk] for chunk in chunks]
    read = partial(_read_headers, ImageFolder(folder), max_pixels, rules)
    with (
        _map_on_cores(len(images) >= MANY_IMAGES) as map_on_cores,
        progress_bar("image headers", len(images), show=progress) as advance,
    ):
        for chunk, results in zip(chunks, map_on_cores(read, names), strict=True):
            for image, found in zip(chunk, results, strict=True):
                image_id, annotated = image["id"], (image["width"], image["height"])
                if isinstance(found, OutsideFolderError):
                    problems.add_error(f"image {image_id}", "file_name", str(found))
                elif isinstance(found, ValueError):
                    text = f"image {image_id}, file_name: {found}"
                    problems.add_skippable(IMAGE_UNREADABLE, image_id, text)
                elif annotated not in (
                    (found[:2], found.turned) if rules.exif == "apply" else (found[:2],)
                ):
                    fault = size_mismatch(folder / image["file_name"], found, annotated)
                    field = "width" if found.width != image["width"] else "height"
                    text = f"image {image_id}, {field}: {fault}"
                    problems.add_skippable(IMAGE_OF_OTHER_SIZE, image_id, text)
                else:
                    headers[image_id] = found
            advance(len(chunk))
    if images and not headers:
        _require_any(folder, images, problems.path)
    return headers


def _read_headers(
    folder: ImageFolder, max_pixels: int, rules: PixelRules, names: list[str]
) -> list[Header | ValueError]:
    """Read the headers of some files, or find why they cannot be used, in a few threads."""

    def read(name: str) -> Header | ValueError:
        try:
            return read_header(folder.path(name), max_pixels, rules)
        except (ImageError, OutsideFolderError) as error:
            return error

    size = -(-len(names) // NUM_READERS)
    parts = [names[start : start + size] for start in range(0, len(names), size)]
    with ThreadPoolExecutor(NUM_READERS) as pool:
        return [one for part in pool.map(lambda part: [*map(read, part)], parts) for one in part]


@contextmanager
def _map_on_cores(is_much: bool) -> Iterator[Callable[..., Iterable[Any]]]:
    """Yield `map`, or one like it that uses a process for each core.

    The processes are forks. Others would import the program of the user again.
    """
    num_cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1
    if not is_much or num_cores == 1:
        yield map
        return
    with ProcessPoolExecutor(num_cores, multiprocessing.get_context("fork")) as pool:
        yield pool.map


def _require_any(folder: Path, images: list[dict[str, Any]], annotations: Path) -> None:
    """Raise one error if the folder has none of the images, instead of one for each."""
    names = [str(PurePosixPath(image["file_name"])) for image in images]
    if any(os.path.lexists(folder / name) for name in names):
        return
    found = sum(1 for path in folder.iterdir() if not path.name.startswith("."))
    first = names[0]
    likely = [
        place
        for place, name in (
            *((parent, first) for parent in folder.resolve().parents[:3]),
            *((path, first) for path in sorted(folder.iterdir()) if path.is_dir()),
        )
        if (place / name).is_file()
    ]
    advice = "wrong folder?"
    if likely:
        advice = f"the images are in {likely[0]}; give that folder"
    elif (folder / PurePosixPath(first).name).is_file():
        advice = (
            f"it has {PurePosixPath(first).name}: take the folders off the file names in "
            f"{annotations.name}"
        )
    raise DatasetError(
        f"{folder}: has 0 of the {len(names)} images of {annotations}, such as {first} (it has "
        f"{found} other entries); {advice}"
    )


def size_mismatch(path: Path, found: Header, annotated: tuple[int, int]) -> str:
    """Return the message for a file whose size is not the annotated (width, height) in pixels."""
    said = (
        f"{path}: has {found.width} x {found.height} pixels, but {annotated[0]} x {annotated[1]} "
        "are annotated"
    )
    if annotated == found.turned:
        return (
            f"{said}, which is its size after turning it by its EXIF orientation, "
            f"{found.orientation}: boxes are of the upright picture; set data.exif=apply"
        )
    return said


def orientation_warnings(
    annotations: Path,
    coco: CocoFile,
    images: list[dict[str, Any]],
    headers: Mapping[int, Header],
    rules: PixelRules,
) -> list[str]:
    """Return warnings of images that are shown in another way than they are stored.

    Args:
        images: those that are used, with their sizes as they are decoded.
    """
    turned = {image["id"]: image for image in images if headers[image["id"]].orientation != 1}
    if not turned:
        return []
    kinds = Counter(headers[image_id].orientation for image_id in turned)
    each = ", ".join(f"{count} with {kind}" for kind, count in sorted(kinds.items()))
    note = (
        f"{annotations}: {len(turned)} of {len(images)} images have an EXIF orientation other than "
        f"1: {each} (ids {short_list(sorted(turned))})"
    )
    inside = {True: 0, False: 0}  # boxes that fit the image as it is decoded, and the other way
    boxes = [a for a in coco.annotations if a["image_id"] in turned]
    for annotation in boxes:
        x, y, width, height = annotation["bbox"]
        for as_decoded in inside:
            sizes = headers[annotation["image_id"]]
            size = sizes[:2] if as_decoded else sizes.turned
            inside[as_decoded] += x + width <= size[0] + 1 and y + height <= size[1] + 1
    fits = (
        f"{inside[True]} of their {len(boxes)} boxes fit the image that way, {inside[False]} the "
        "other way"
    )
    if rules.exif == "apply":
        note += f". They are turned upright (data.exif=apply): {fits}"
        return [WARNING + note if inside[False] > inside[True] else note]
    return [
        f"{WARNING}{note}. Boxes are taken to be of the stored pixels: {fits}. If the annotation "
        "tool showed the images upright, set data.exif=apply"
    ]
