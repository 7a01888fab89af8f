"""Replace files atomically: a reader finds the old or the new content, never a part of it."""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

LEFTOVER_SUFFIX = ".unfinished"  # end of the names of files that a killed process may leave behind


def write_atomic(
    path: Path, content: str | bytes | memoryview, *, durable: bool = False, mode: int = 0o666
) -> None:
    """Write a file, or leave it as it is. Its folder must exist.

    Args:
        durable: force file and name to the disk, so that they survive a power failure. Without
            it, they survive the end of this process.
        mode: permissions of the file from its first byte on, less the umask.

    Raises:
        OSError: the disk is full, read-only or broken.
    """
    with replacing(path, durable=durable) as unfinished:
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL
        with os.fdopen(os.open(unfinished, flags, mode), "wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)


def write_json(
    path: Path, content: Any, *, indent: int | None = None, durable: bool = False
) -> None:
    """Write a JSON file as `write_atomic` does."""
    write_atomic(path, json.dumps(content, indent=indent), durable=durable)


@contextmanager
def replacing(path: Path, *, durable: bool = False) -> Iterator[Path]:
    """Yield a name beside `path` to write to. It becomes `path` at the end of the block.

    After an error, the new file is removed and `path` is as before.

    with replacing(path) as unfinished:
        image.save(unfinished)
    """
    unfinished = path.with_name(f".{path.name}.{secrets.token_hex(4)}{LEFTOVER_SUFFIX}")
    try:
        yield unfinished
        if durable:
            force_to_disk(unfinished)
        unfinished.replace(path)
    except BaseException:
        unfinished.unlink(missing_ok=True)
        raise
    if durable:
        force_to_disk(path.parent)


def make_folder(path: Path) -> None:
    """Create a folder and what is missing above it, and force their names to the disk.

    Raises:
        OSError: it cannot be created.
    """
    missing = [folder for folder in (path, *path.parents) if not folder.exists()]
    path.mkdir(parents=True, exist_ok=True)
    for folder in missing:
        with suppress(PermissionError):  # a folder in which one may create, and not read
            force_to_disk(folder.parent)


def force_to_disk(path: Path) -> None:
    """Wait until the bytes of a file, or the names in a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
