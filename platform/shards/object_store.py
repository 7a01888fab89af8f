"""Read and write the files of one folder, local or in any object store that `pyarrow.fs` supports.

An address is `s3://bucket/path`, `gs://…`, `abfs://…`, `hdfs://…` or `file:///…`, with optional
pyarrow settings (`?endpoint_override=…&region=…`). A password in it is an error, since addresses
end up in logs and configurations. Credentials come from the environment, as for the object store's
own tools.

A store is cheap to pickle: each process opens a file when it first reads it.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import pyarrow as pa
from pyarrow import fs

from deta.platform.data.coco_annotations import DatasetError
from deta.platform.system.atomic_write import write_atomic
from deta.platform.system.redaction import holds_secret

MAX_OPEN_FILES = 64


def is_address(location: str | Path) -> bool:
    """Return True for an address of an object store, False for a path."""
    return "://" in str(location)


class _Connection(NamedTuple):
    """What one process has opened."""

    process: int
    filesystem: fs.FileSystem
    open_file: Callable[[str], Any]  # keeps the files that were read last


class ObjectStore:
    """One folder of files. Reads are thread-safe, and safe after a fork."""

    def __init__(self, location: str | Path) -> None:
        """Open a local folder (it need not exist) or an address.

        Raises:
            DatasetError: the address contains a password.
        """
        self.shown = self._address = str(location)  # `shown` never contains a secret
        self._connection: _Connection | None = None
        self._local: Path | None = None
        if not is_address(location):
            self._local = Path(location).expanduser().absolute()
            return
        parts = urlsplit(self._address)
        host = parts.netloc.rpartition("@")[2]
        self.shown = f"{parts.scheme}://{host}{parts.path}".rstrip("/")
        if holds_secret(self._address):
            raise DatasetError(
                f"{self.shown}: the address contains a password, which would end up in logs "
                "and configurations; set it in the environment (AWS_ACCESS_KEY_ID and "
                "AWS_SECRET_ACCESS_KEY for S3, or a credentials file)"
            )
        if parts.scheme == "file":
            self._local = Path(parts.path)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_connection": None}

    def name_of(self, file: str) -> str:
        """Return the name of a file for messages."""
        return f"{self.shown}/{file}"

    def sizes(self) -> dict[str, int]:
        """Return name -> size in bytes of all files; empty if there is no folder.

        Raises:
            DatasetError: the store cannot be listed.
        """
        try:
            found = self._connect().filesystem.get_file_info(
                fs.FileSelector("", allow_not_found=True)
            )
        except (OSError, pa.ArrowException) as error:
            raise DatasetError(f"{self.shown}: cannot be listed: {error}") from None
        return {info.base_name: info.size for info in found if info.type == fs.FileType.File}

    def read(self, file: str) -> bytes:
        """Read a complete file. Like every method, it raises OSError if the storage fails."""
        with self._connect().filesystem.open_input_stream(file) as stream:
            return bytes(stream.read())

    def read_at(self, file: str, offset: int, num_bytes: int) -> bytes:
        """Read a part of a file; shorter if the file ends before.

        Local files are read, not mapped: truncating a mapped file kills the process.
        """
        return bytes(self._connect().open_file(file).read_at(num_bytes, offset))

    def write(self, file: str, content: bytes | memoryview) -> None:
        """Write a complete file: a reader sees all of it, or the file as it was before."""
        if self._local is not None:
            self._local.mkdir(parents=True, exist_ok=True)
            write_atomic(self._local / file, content, durable=True)
            return
        # Object stores publish only complete objects.
        with self._connect().filesystem.open_output_stream(file) as stream:
            stream.write(content)

    def delete(self, file: str) -> None:
        self._connect().filesystem.delete_file(file)

    def _connect(self) -> _Connection:
        # A forked process must not use its parent's connections, or a lock that may be held.
        connection = self._connection
        if connection is not None and connection.process == os.getpid():
            return connection
        try:
            filesystem, root = (
                (fs.LocalFileSystem(), str(self._local))
                if self._local is not None
                else fs.FileSystem.from_uri(self._address)
            )
        except (OSError, ValueError, pa.ArrowException, ImportError) as error:
            # Leave out the error's text and cause: they may repeat the complete address.
            raise DatasetError(
                f"{self.shown}: pyarrow cannot open this address ({type(error).__name__}); "
                "give s3://bucket/folder, gs://, abfs://, hdfs:// or file:///folder"
            ) from None
        folder = fs.SubTreeFileSystem(root, filesystem)
        open_file = lru_cache(MAX_OPEN_FILES)(folder.open_input_file)
        self._connection = _Connection(os.getpid(), folder, open_file)
        return self._connection
