"""Finds image files by path, folder or pattern, and reads which images an annotation file lists."""

from __future__ import annotations

import glob
import os
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

# Slow to import, and not needed to find files.
if TYPE_CHECKING:
    from deta.platform.data.coco_dataset import Category

# Suffixes of images in a folder or by a pattern. A file given by its own path may have any name.
IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff"})


@dataclass(frozen=True)
class ImageFile:
    path: Path
    name: str  # relative to the given folder, or to the fixed part of the pattern


def find_images(texts: Sequence[str], echo: Callable[[str], None] = print) -> list[ImageFile]:
    """Return each image file once, in the order of the arguments; sorted within a folder.

    Args:
        texts: paths of files or folders (searched recursively), or patterns with `*`, `?`, `[…]`
            and `**` for any number of folders. An existing path is never read as a pattern.
        echo: prints how many files were left out because of their suffix.

    Raises:
        ValueError: a path does not exist, or contains no image.
    """
    found: dict[str, ImageFile] = {}  # by absolute path
    for text in texts:
        path = Path(text)
        if path.is_dir():
            chosen = _in_folder(path, sorted(path.rglob("*")), text, echo)
        elif path.exists():
            chosen = [ImageFile(path, path.name)]
        elif glob.has_magic(text):
            matches = sorted(glob.glob(os.path.expanduser(text), recursive=True))
            if not matches:
                raise ValueError(f"{text}: no file matches this pattern; quote it for the shell")
            chosen = _in_folder(_fixed_part(text), map(Path, matches), text, echo)
        else:
            raise ValueError(f"{text}: there is no such file or folder")
        for image in chosen:
            found.setdefault(os.path.abspath(image.path), image)
    return list(found.values())


def read_listing(annotations: Path) -> tuple[tuple[Category, ...], dict[str, int]]:
    """Read the categories and the images that an annotation file in COCO's format lists.

    Returns:
        The categories in ascending order of their ids, and the id of each image by `file_name`.

    Raises:
        DatasetError: the file is broken, or two images have the same file name.
    """
    from deta.platform.data.coco_annotations import Problems, read_coco_file
    from deta.platform.data.coco_dataset import Category

    problems = Problems(annotations)
    coco = read_coco_file(annotations, problems, needs_annotations=False)
    image_ids: dict[str, int] = {}
    for image in coco.images:
        other = image_ids.setdefault(image["file_name"], image["id"])
        if other != image["id"]:
            what = f"{image['file_name']!r} is already the name of image {other}"
            problems.add_error(f"image {image['id']}", "file_name", what)
    problems.raise_errors(lenient=True)
    categories = [Category(category["id"], category["name"]) for category in coco.categories]
    return tuple(sorted(categories, key=lambda category: category.id)), image_ids


def _in_folder(
    folder: Path, files: Iterable[Path], text: str, echo: Callable[[str], None]
) -> list[ImageFile]:
    """Return the files that have the suffix of an image."""
    visible = [file for file in files if file.is_file() and not file.name.startswith(".")]
    chosen = [file for file in visible if file.suffix.lower() in IMAGE_SUFFIXES]
    if not chosen:
        raise ValueError(f"{text}: no file in it ends in {', '.join(sorted(IMAGE_SUFFIXES))}")
    if others := Counter(file.suffix for file in visible if file not in set(chosen)):
        kinds = ", ".join(f"{n} {suffix or 'without suffix'}" for suffix, n in others.items())
        noun = "file" if others.total() == 1 else "files"
        echo(f"{text}: {others.total()} other {noun} left out ({kinds})")
    return [ImageFile(file, file.relative_to(folder).as_posix()) for file in chosen]


def _fixed_part(pattern: str) -> Path:
    """Return the folder above the first part of a pattern that has a wildcard."""
    parts = Path(os.path.expanduser(pattern)).parts
    first = next(i for i, part in enumerate(parts) if glob.has_magic(part))
    return Path(*parts[:first])
