"""Read untrusted files with limits on size and nesting.

A path can be an endless device, JSON can be a million open brackets, and a kilobyte of gzip can
expand to a gigabyte of zeros. Each raises an error that names the file, before memory is used.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import stat
import zlib
from pathlib import Path
from typing import Any

MAX_JSON_BYTES = 64 << 20  # of a file that describes a run, a checkpoint or an evaluation


def read_bounded(path: Path, max_bytes: int) -> bytes:
    """Return the content of a regular file.

    Raises:
        ValueError: it is not a regular file, or larger than `max_bytes`.
        OSError: it does not exist, or cannot be read.
    """
    if not stat.S_ISREG(path.stat().st_mode):  # before opening: a pipe would wait for a writer
        raise ValueError(f"{path}: is a folder, a device or a pipe, not a file")
    with path.open("rb") as file:
        content = file.read(max_bytes + 1)
    if len(content) > max_bytes:
        raise ValueError(f"{path}: has over {max_bytes:,} bytes, the limit for such a file")
    return content


def read_json(path: Path, max_bytes: int = MAX_JSON_BYTES) -> Any:
    """Return the content of a JSON file.

    Raises:
        ValueError: as for `read_bounded`; or it is not UTF-8, not JSON, or nested too deeply.
        OSError: it does not exist, or cannot be read.
    """
    try:
        return json.loads(read_bounded(path, max_bytes).decode())
    except RecursionError:
        raise ValueError(f"{path}: is nested too deeply") from None


def gunzip(content: bytes, max_bytes: int) -> bytes:
    """Decompress gzip data.

    Raises:
        ValueError: it is damaged, or larger than `max_bytes` when decompressed.
    """
    try:
        unpacked = gzip.GzipFile(fileobj=io.BytesIO(content)).read(max_bytes + 1)
    except EOFError as error:
        raise ValueError("is not intact gzip data: it ends too early") from error
    except (OSError, zlib.error) as error:
        raise ValueError(f"is not intact gzip data ({error})") from error
    if len(unpacked) > max_bytes:
        raise ValueError(f"holds over {max_bytes:,} bytes when decompressed")
    return unpacked


def file_sha256(path: Path) -> str:
    """Return the SHA-256 of a file, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
