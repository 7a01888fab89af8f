"""Check that image files lie in the image folder, and that their headers match the annotations."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path, PurePosixPath
from typing import Any

from deta.platform.data.coco_annotations import DatasetError, Problems
from deta.platform.data.image_decoding import Header, ImageError, read_header
from deta.platform.system.progress import progress_bar

NUM_READERS = 16  # threads that read headers; network storage keeps more of them busy than cores
IMAGES_PER_TASK = 128

IMAGE_UNREADABLE = "image missing or unreadable"
IMAGE_OF_OTHER_SIZE = "image of another size than annotated"


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

    `problems` receives a fault for every other image, also for one of over `max_pixels`.

    Raises:
        DatasetError: no image file exists.
    """
    image_folder = ImageFolder(folder)

    def inspect(chunk: list[dict[str, Any]]) -> list[Header | ValueError]:
        found: list[Header | ValueError] = []
        for image in chunk:
            try:
                found.append(read_header(image_folder.path(image["file_name"]), max_pixels))
            except (ImageError, OutsideFolderError) as error:
                found.append(error)
        return found

    num_bytes = {}
    starts = range(0, len(images), IMAGES_PER_TASK)
    chunks = [images[start : start + IMAGES_PER_TASK] for start in starts]
    with (
        ThreadPoolExecutor(NUM_READERS) as pool,
        progress_bar("image headers", len(images), show=progress) as advance,
    ):
        for chunk, results in zip(chunks, pool.map(inspect, chunks), strict=True):
            for image, found in zip(chunk, results, strict=True):
                image_id, annotated = image["id"], (image["width"], image["height"])
                if isinstance(found, OutsideFolderError):
                    problems.add_error(f"image {image_id}", "file_name", str(found))
                elif isinstance(found, ValueError):
                    text = f"image {image_id}, file_name: {found}"
                    problems.add_skippable(IMAGE_UNREADABLE, image_id, text)
                elif found[:2] != annotated:
                    fault = size_mismatch(folder / image["file_name"], found[:2], annotated)
                    field = "width" if found.width != image["width"] else "height"
                    text = f"image {image_id}, {field}: {fault}"
                    problems.add_skippable(IMAGE_OF_OTHER_SIZE, image_id, text)
                else:
                    num_bytes[image_id] = found.num_bytes
            advance(len(chunk))
    if images and not num_bytes:
        _require_any(folder, images, problems.path)
    return num_bytes


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


def size_mismatch(path: Path, found: tuple[int, int], annotated: tuple[int, int]) -> str:
    """Return the message for a file whose (width, height) in pixels is not the annotated one."""
    return (
        f"{path}: has {found[0]} x {found[1]} pixels as stored, but {annotated[0]} x "
        f"{annotated[1]} are annotated; if its EXIF orientation rotates it, rotate the pixels"
    )
