"""Which picture files a person means: files, folders, and patterns such as `'street/**/*.jpg'`."""

from __future__ import annotations

import glob
import os
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

# Of files in a folder or by a pattern; a file that is named itself may be called anything.
PICTURE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff"})


@dataclass(frozen=True)
class PictureFile:
    path: Path
    name: str  # below the folder that was given, or below the fixed part of the pattern


def find_pictures(texts: Sequence[str], note: Callable[[str], None] = print) -> list[PictureFile]:
    """Each picture file once, in the order in which it was asked for; sorted within a folder.

    Args:
        texts: paths of files or folders (with all folders below), or patterns with `*`, `?`, `[…]`
            and `**` for any number of folders. A text that is the path of something is no pattern.
        note: is told what was left out because of its name.

    Raises:
        ValueError: something is not there, or holds no picture.
    """
    found: dict[str, PictureFile] = {}  # by absolute path
    for text in texts:
        path = Path(text)
        if path.is_dir():
            chosen = _in_folder(path, sorted(path.rglob("*")), text, note)
        elif path.exists():
            chosen = [PictureFile(path, path.name)]
        elif glob.has_magic(text):
            matches = sorted(glob.glob(os.path.expanduser(text), recursive=True))
            if not matches:
                raise ValueError(f"{text}: no file is of this pattern; quote it for the shell")
            chosen = _in_folder(_fixed_part(text), map(Path, matches), text, note)
        else:
            raise ValueError(f"{text}: there is no such file or folder")
        for picture in chosen:
            found.setdefault(os.path.abspath(picture.path), picture)
    return list(found.values())


def _in_folder(
    folder: Path, files: Iterable[Path], text: str, note: Callable[[str], None]
) -> list[PictureFile]:
    """Those of the files that are pictures by their names."""
    visible = [file for file in files if file.is_file() and not file.name.startswith(".")]
    chosen = [file for file in visible if file.suffix.lower() in PICTURE_SUFFIXES]
    if not chosen:
        raise ValueError(f"{text}: no file in it ends in {', '.join(sorted(PICTURE_SUFFIXES))}")
    if others := Counter(file.suffix for file in visible if file not in set(chosen)):
        kinds = ", ".join(f"{n} {suffix or 'without suffix'}" for suffix, n in others.items())
        noun = "file" if others.total() == 1 else "files"
        note(f"{text}: {others.total()} other {noun} left out ({kinds})")
    return [PictureFile(file, file.relative_to(folder).as_posix()) for file in chosen]


def _fixed_part(pattern: str) -> Path:
    """The folder above the first part of a pattern that has a wildcard."""
    parts = Path(os.path.expanduser(pattern)).parts
    first = next(i for i, part in enumerate(parts) if glob.has_magic(part))
    return Path(*parts[:first])
