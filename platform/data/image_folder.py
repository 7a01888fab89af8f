"""Check that image files lie in the image folder, and that their headers match the annotations."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar

from deta.platform.data.coco_annotations import Problems
from deta.platform.data.image_decoding import PROGRESS_AFTER_S, Header, ImageError, read_header

NUM_READERS = 16  # threads that read headers; network storage keeps more of them busy than cores
IMAGES_PER_TASK = 128

IMAGE_UNREADABLE = "image missing or unreadable"
IMAGE_OF_OTHER_SIZE = "image of another size than annotated"

Item = TypeVar("Item")
Result = TypeVar("Result")


class OutsideFolderError(ValueError):
    """A file name that leads out of the image folder through a link."""


class ImageFolder:
    """Paths of the files in one folder. It may be a link; links in it may not lead out of it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._root = os.path.realpath(folder)
        self._is_inside = cache(self._resolves_inside)  # few subfolders, many files

    def path(self, file_name: str) -> Path:
        """Return the path of a file.

        Args:
            file_name: relative, with / and without .. (see `coco_annotations.file_name_fault`).

        Raises:
            OutsideFolderError: a link in the path leads out of the folder.
        """
        name = PurePosixPath(file_name)
        path = self.folder / name
        if self._is_inside(str(name.parent)) and (
            not os.path.islink(path) or self._resolves_inside(str(name))
        ):
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
) -> dict[int, int]:
    """Return image id -> file size in bytes, for each image with a valid path and header.

    Args:
        folder: the image folder.
        images: image records of the annotation file.
        max_pixels: the largest image to accept, width times height.
        progress: show a bar on stderr if it takes long.
        problems: receives a fault for every other image.
    """
    image_folder = ImageFolder(folder)

    def inspect(chunk: list[dict[str, Any]]) -> list[Header | ImageError | OutsideFolderError]:
        found: list[Header | ImageError | OutsideFolderError] = []
        for image in chunk:
            try:
                found.append(read_header(image_folder.path(image["file_name"]), max_pixels))
            except (ImageError, OutsideFolderError) as error:
                found.append(error)
        return found

    num_bytes = {}
    for image, found in zip(images, _in_threads(inspect, images, progress), strict=True):
        image_id = image["id"]
        if isinstance(found, OutsideFolderError):
            problems.add_error(f"image {image_id}", "file_name", str(found))
        elif isinstance(found, ImageError):
            text = f"image {image_id}, file_name: {found}"
            problems.add_skippable(IMAGE_UNREADABLE, image_id, text)
        elif (found.width, found.height) != (image["width"], image["height"]):
            annotated = image["width"], image["height"]
            fault = size_mismatch(folder / image["file_name"], found[:2], annotated)
            field = "width" if found.width != image["width"] else "height"
            problems.add_skippable(
                IMAGE_OF_OTHER_SIZE, image_id, f"image {image_id}, {field}: {fault}"
            )
        else:
            num_bytes[image_id] = found.num_bytes
    return num_bytes


def _in_threads(
    work: Callable[[list[Item]], list[Result]], items: list[Item], progress: bool
) -> Iterator[Result]:
    """Yield the results for all items in order, computed in chunks by several threads."""
    starts = range(0, len(items), IMAGES_PER_TASK)
    with ThreadPoolExecutor(NUM_READERS) as pool:
        results = pool.map(lambda start: work(items[start : start + IMAGES_PER_TASK]), starts)
        if progress:
            from tqdm import tqdm

            results = tqdm(
                results,
                "image headers",
                total=len(starts),
                unit=" images",
                unit_scale=IMAGES_PER_TASK,
                mininterval=1.0,
                delay=PROGRESS_AFTER_S,
                file=sys.stderr,
            )
        for chunk in results:
            yield from chunk


def size_mismatch(path: Path, found: tuple[int, int], annotated: tuple[int, int]) -> str:
    """Return the message for a file whose (width, height) in pixels is not the annotated one."""
    return (
        f"{path}: has {found[0]} x {found[1]} pixels as stored, but {annotated[0]} x "
        f"{annotated[1]} are annotated; if its EXIF orientation rotates it, rotate the pixels"
    )
