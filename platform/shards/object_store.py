"""Read and write the files of one folder, local or in any object store that `pyarrow.fs` supports.

An address is `s3://bucket/path`, `gs://…`, `abfs://…`, `hdfs://…` or `file:///…`, with optional
pyarrow settings (`?endpoint_override=…&region=…`). A password in it is an error, since addresses
end up in logs and configurations. Credentials come from the environment, as for the object store's
own tools.

A store is cheap to pickle: each process opens a file when it first reads it.
"""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, urlsplit

import pyarrow as pa
from pyarrow import fs

from deta.platform.data.coco_annotations import DatasetError
from deta.platform.system.atomic_write import write_atomic

MAX_OPEN_FILES = 64
SECRET_WORDS = ("secret", "password", "token", "signature", "account_key")


def is_address(location: str | Path) -> bool:
    """Return True for an address of an object store, False for a path."""
    return "://" in str(location)


class ObjectStore:
    """One folder of files. Reads are thread-safe, and safe after a fork."""

    def __init__(self, location: str | Path) -> None:
        """Open a local folder (it need not exist) or an address.

        Raises:
            DatasetError: the address contains a password.
        """
        text = str(location)
        self.shown = text  # for messages: never contains a secret
        self._local: Path | None = None
        self._address = ""
        if is_address(text):
            parts = urlsplit(text)
            host = parts.netloc.rpartition("@")[2]
            self.shown = f"{parts.scheme}://{host}{parts.path}".rstrip("/")
            keys = [key.lower() for key, _ in parse_qsl(parts.query, keep_blank_values=True)]
            if ":" in parts.netloc.rpartition("@")[0] or any(
                word in key for key in keys for word in SECRET_WORDS
            ):
                raise DatasetError(
                    f"{self.shown}: the address contains a password, which would end up in logs "
                    "and configurations; set it in the environment (AWS_ACCESS_KEY_ID and "
                    "AWS_SECRET_ACCESS_KEY for S3, or a credentials file)"
                )
            self._address = text
            if parts.scheme == "file":
                self._local = Path(parts.path)
        else:
            self._local = Path(text).expanduser()
        self._reset()

    def _reset(self) -> None:
        self._process = os.getpid()
        self._lock = threading.Lock()
        self._filesystem: fs.FileSystem | None = None
        self._open: OrderedDict[str, Any] = OrderedDict()

    def __getstate__(self) -> dict[str, Any]:
        names = ("shown", "_local", "_address")
        return {name: self.__dict__[name] for name in names}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._reset()

    def __repr__(self) -> str:
        return f"ObjectStore({self.shown!r})"

    @property
    def is_local(self) -> bool:
        return self._local is not None

    def name_of(self, file: str) -> str:
        """Return the name of a file for messages."""
        return f"{self.shown}/{file}"

    def sizes(self) -> dict[str, int]:
        """Return name -> size in bytes of all files; empty if there is no folder.

        Raises:
            DatasetError: the store cannot be listed.
        """
        if self._local is not None:
            if not self._local.is_dir():
                return {}
            entries = [entry for entry in os.scandir(self._local) if entry.is_file()]
            return {entry.name: entry.stat().st_size for entry in entries}
        try:
            found = self._remote().get_file_info(fs.FileSelector("", allow_not_found=True))
        except (OSError, pa.ArrowException) as error:
            raise DatasetError(f"{self.shown}: cannot be listed: {error}") from None
        return {info.base_name: info.size for info in found if info.type == fs.FileType.File}

    def read(self, file: str) -> bytes:
        """Read a complete file.

        Raises:
            OSError: there is no such file, or the storage failed.
        """
        if self._local is not None:
            return (self._local / file).read_bytes()
        with self._remote().open_input_stream(file) as stream:
            content: bytes = stream.read()
        return content

    def read_at(self, file: str, offset: int, num_bytes: int) -> bytes:
        """Read a part of a file; shorter if the file ends before.

        Local files are read, not mapped: truncating a mapped file kills the process.

        Raises:
            OSError: there is no such file, or the storage failed.
        """
        opened = self._open_file(file)
        if self._local is not None:
            return os.pread(opened.fileno(), num_bytes, offset)
        content: bytes = opened.read_at(num_bytes, offset)
        return content

    def write(self, file: str, content: bytes | memoryview) -> None:
        """Write a file atomically.

        Raises:
            OSError: the storage failed.
        """
        if self._local is None:  # object stores publish only complete objects
            with self._remote().open_output_stream(file) as stream:
                stream.write(content)
            return
        self._local.mkdir(parents=True, exist_ok=True)
        write_atomic(self._local / file, content, durable=True)

    def delete(self, file: str) -> None:
        """Delete a file."""
        if self._local is not None:
            (self._local / file).unlink(missing_ok=True)
        else:
            self._remote().delete_file(file)

    def _open_file(self, file: str) -> Any:
        """Open a file once per process; the most recently read files stay open."""
        self._reset_after_fork()
        with self._lock:
            opened = self._open.pop(file, None)
            if opened is None:
                if self._local is not None:
                    opened = open(self._local / file, "rb", buffering=0)  # noqa: SIM115
                else:
                    opened = self._connect().open_input_file(file)
                if len(self._open) >= MAX_OPEN_FILES:
                    self._open.popitem(last=False)  # its last reader closes it
            self._open[file] = opened
            return opened

    def _remote(self) -> fs.FileSystem:
        self._reset_after_fork()
        with self._lock:
            return self._connect()

    def _reset_after_fork(self) -> None:
        # A forked process must not use its parent's connections, or a lock that may be held.
        if self._process != os.getpid():
            self._reset()

    def _connect(self) -> fs.FileSystem:
        if self._filesystem is None:
            try:
                filesystem, root = fs.FileSystem.from_uri(self._address)
            except (OSError, ValueError, pa.ArrowException, ImportError) as error:
                # Leave out the error's text and cause: they may repeat the complete address.
                raise DatasetError(
                    f"{self.shown}: pyarrow cannot open this address ({type(error).__name__}); "
                    "give s3://bucket/folder, gs://, abfs://, hdfs:// or file:///folder"
                ) from None
            self._filesystem = fs.SubTreeFileSystem(root, filesystem)
        return self._filesystem
