"""Files that may have come from anywhere, read whole only if they are as small as they should be.

A path can be a device that never ends, JSON can be a million open brackets, and a kilobyte of gzip
can be a gigabyte of zeros. Each becomes an error that names the file, before memory is taken.
"""

from __future__ import annotations

import hashlib
import json
import stat
import zlib
from pathlib import Path
from typing import Any

MAX_JSON_BYTES = 64 << 20  # of what describes something: a run, a checkpoint, an evaluation


def read_bounded(path: Path, max_bytes: int) -> bytes:
    """All of a regular file.

    Raises:
        ValueError: it is no file, or larger.
        OSError: it is not there, or cannot be read.
    """
    kind = path.stat().st_mode  # before it is opened: a pipe would wait for a writer
    if not stat.S_ISREG(kind):
        what = "a folder" if stat.S_ISDIR(kind) else "a device or pipe"
        raise ValueError(f"{path}: is {what}, not a file")
    with path.open("rb") as file:
        content = file.read(max_bytes + 1)
    if len(content) > max_bytes:
        raise ValueError(f"{path}: has over {max_bytes:,} bytes, more than such a file may have")
    return content


def read_json(path: Path, max_bytes: int = MAX_JSON_BYTES) -> Any:
    """What a JSON file holds.

    Raises:
        ValueError: as for `read_bounded`; or it is not UTF-8, not JSON, or nested too deeply.
        OSError: it is not there, or cannot be read.
    """
    try:
        return json.loads(read_bounded(path, max_bytes).decode())
    except RecursionError:
        raise ValueError(f"{path}: is nested too deeply") from None


def gunzip(content: bytes, max_bytes: int) -> bytes:
    """What was packed by gzip, in one member.

    Raises:
        ValueError: it is damaged, or larger than `max_bytes` when unpacked.
    """
    unpacker = zlib.decompressobj(wbits=31)
    try:
        unpacked = unpacker.decompress(content, max_bytes + 1)
    except zlib.error as error:
        raise ValueError(f"is no intact gzip ({error})") from error
    if len(unpacked) > max_bytes:
        raise ValueError(f"holds over {max_bytes:,} bytes when unpacked")
    if not unpacker.eof:
        raise ValueError("is no intact gzip: it ends too early")
    return unpacked


def file_sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
