"""Read pickled weight files without running their code.

There are three formats: `torch.save` since 1.6 (a zip file), `torch.save` before 1.6 (a sequence of
pickles), and a plain pickle of numpy arrays, as detectron2 stores backbones. Every size is compared
with the size of the file before memory is allocated. The checksums of a zip file are verified too,
which torch.load does not do.
"""

from __future__ import annotations

import io
import math
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from deta.platform.weights.restricted_unpickler import (
    ArrayRecord,
    BoundedReader,
    Foreign,
    Storage,
    TensorRecord,
    UnreadableError,
    read_pickle,
)
from deta.platform.weights.restricted_unpickler import outline as outline_pickle
from deta.platform.weights.wrapped_names import weights_key

LEGACY_MAGIC = 0x1950A86A20F9469CFC6C  # torch.save before 1.6 begins with it
MAX_PICKLE_BYTES = 2**30  # without the bytes of tensors; real ones take a megabyte
BIG_ENDIAN = "its numbers are in big-endian order; save it again on a little-endian machine"


def read_pickled_weights(
    path: Path, choose: Callable[[object], Mapping[str, object]]
) -> dict[str, Tensor]:
    """Read the tensors of a file that `torch.save` or `pickle.dump` wrote.

    Args:
        choose: selects the tensors to read from the file's content, where they are TensorRecords
            and ArrayRecords; so the rest of a checkpoint, such as the optimizer, is never read.

    Raises:
        RefusedNameError: the file names a function or class that weights do not need.
        UnreadableError: the file is damaged or has another format; names the part.
    """
    with path.open("rb") as file:
        if file.read(4) == b"PK\x03\x04":
            return _read_zip(file, choose)
        file.seek(0)
        return _read_stream(file, path.stat().st_size, choose)


def outline(path: Path) -> tuple[bool, list[str]]:
    """Return where the weights are in a file that names code: in a module or not, and its keys.

    For `{"ema": module}` that is (True, ["ema"]). Nothing in the file is run. Where the content
    cannot be outlined, the file is taken for plain weights.
    """
    size = path.stat().st_size
    try:
        with path.open("rb") as file:
            if file.read(4) == b"PK\x03\x04":
                with zipfile.ZipFile(file) as archive:
                    name = next(n for n in archive.namelist() if n.endswith("data.pkl"))
                    if archive.getinfo(name).file_size > min(size, MAX_PICKLE_BYTES):
                        return False, []
                    text = archive.read(name)
                content = outline_pickle(BoundedReader(io.BytesIO(text), len(text)))
            else:
                file.seek(0)
                bounded = BoundedReader(file, size)
                content = outline_pickle(bounded)
                if content == LEGACY_MAGIC:  # then version and system come before the content
                    content = [outline_pickle(bounded) for _ in range(3)][-1]
    except (UnreadableError, zipfile.BadZipFile, StopIteration, OSError, NotImplementedError):
        return False, []
    keys: list[str] = []
    while isinstance(content, Mapping) and (key := weights_key(content)) is not None:
        keys.append(key)
        content = content[key]
    return isinstance(content, Foreign) and content.is_module, keys


def _read_zip(
    file: BinaryIO, choose: Callable[[object], Mapping[str, object]]
) -> dict[str, Tensor]:
    """Read a zip file of torch.save: a pickle, the byte order, and a member for each storage."""
    file.seek(0, io.SEEK_END)
    size = file.tell()
    try:
        archive = zipfile.ZipFile(file)
        members = {info.filename: info for info in archive.infolist()}
    except (zipfile.BadZipFile, NotImplementedError, ValueError, OSError) as error:
        raise UnreadableError(f"its zip directory is damaged or cut off ({error})") from error
    for name, info in members.items():
        if name.startswith("/") or "\\" in name or ".." in name.split("/"):
            raise UnreadableError(f"its member {name!r} points outside of the file")
        if info.compress_type != zipfile.ZIP_STORED or info.file_size > size:
            raise UnreadableError(
                f"its member {name!r} declares {info.file_size} bytes, compressed into "
                f"{info.compress_size}; torch.save compresses nothing"
            )
    pickles = [name for name in members if name.rpartition("/")[2] == "data.pkl"]
    if len(pickles) != 1:
        raise UnreadableError(
            f"it is a zip file without weights ({', '.join(list(members)[:5]) or 'empty'}), such "
            "as a TorchScript or an exported program; save the state_dict() of its model"
        )
    root = pickles[0].removesuffix("data.pkl")

    def member(name: str) -> bytearray:
        if root + name not in members:
            raise UnreadableError(f"its member {name} is missing")
        try:
            return bytearray(archive.read(members[root + name]))  # compares the checksum
        except (zipfile.BadZipFile, NotImplementedError, OSError, ValueError, EOFError) as error:
            raise UnreadableError(f"its member {name} is damaged ({error})") from error

    if f"{root}byteorder" in members and member("byteorder") != b"little":
        raise UnreadableError(BIG_ENDIAN)
    if members[pickles[0]].file_size > MAX_PICKLE_BYTES:
        raise UnreadableError("its pickle alone is over a gigabyte")
    text = member("data.pkl")
    content, _ = read_pickle(BoundedReader(io.BytesIO(text), len(text)))
    return _tensors(choose(content), lambda storage: member(f"data/{storage.key}"), size)


def _read_stream(
    file: BinaryIO, size: int, choose: Callable[[object], Mapping[str, object]]
) -> dict[str, Tensor]:
    """Read a file of torch.save before 1.6, or a plain pickle."""
    bounded = BoundedReader(file, size)
    first, _ = read_pickle(bounded)
    if first != LEGACY_MAGIC:  # a plain pickle has no storages
        return _tensors(choose(first), lambda _: bytearray(), size)
    read_pickle(bounded)  # the version of the format
    system, _ = read_pickle(bounded)
    if not isinstance(system, dict) or system.get("little_endian") is not True:
        raise UnreadableError(BIG_ENDIAN)
    content, storages = read_pickle(bounded)
    wanted = choose(content)
    needed = {record.storage.key for record in wanted.values() if isinstance(record, TensorRecord)}
    keys, _ = read_pickle(bounded)
    if not isinstance(keys, list):
        raise UnreadableError("it has no list of its storages")
    found: dict[str, bytearray] = {}
    for key in map(str, keys):
        num_elements = int.from_bytes(bounded.read(8), "little", signed=True)
        storage = storages.get(key)
        if storage is None or num_elements != storage.num_elements:
            raise UnreadableError(
                f"its storage {key} has {num_elements} elements, unlike its description"
            )
        num_bytes = num_elements * storage.dtype.itemsize
        if key in needed:
            found[key] = bytearray(bounded.read(num_bytes))
        else:
            bounded.skip(num_bytes)
    return _tensors(wanted, lambda storage: found.get(storage.key, bytearray()), size)


def _tensors(
    records: Mapping[str, object], read: Callable[[Storage], bytearray], file_bytes: int
) -> dict[str, Tensor]:
    """Build the tensors of the records; those that shared memory share it again."""
    storages: dict[str, Tensor] = {}
    tensors: dict[str, Tensor] = {}
    for name, record in records.items():
        if isinstance(record, ArrayRecord):
            tensors[name] = _array_tensor(name, record)
            continue
        assert isinstance(record, TensorRecord)
        storage, shape = record.storage, record.shape
        num_bytes = storage.num_elements * storage.dtype.itemsize
        count = math.prod(shape)
        furthest = record.offset + sum(
            (n - 1) * s for n, s in zip(shape, record.stride, strict=True)
        )
        if (
            min((*shape, *record.stride, record.offset, storage.num_elements), default=0) < 0
            or num_bytes > file_bytes
            or count > storage.num_elements
            or (count > 0 and furthest >= storage.num_elements)
        ):
            raise UnreadableError(
                f"its tensor {name} declares shape {shape} of a storage of {num_bytes} bytes, in "
                f"a file of {file_bytes}"
            )
        if storage.key not in storages:
            data = read(storage)
            if len(data) != num_bytes:
                raise UnreadableError(
                    f"its tensor {name} declares {num_bytes} bytes of a storage of {len(data)}"
                )
            storages[storage.key] = _from_bytes(data, storage.dtype)
        tensors[name] = storages[storage.key].as_strided(shape, record.stride, record.offset)
    return tensors


def _array_tensor(name: str, record: ArrayRecord) -> Tensor:
    if record.dtype is None or math.prod(record.shape) * record.dtype.itemsize != len(record.data):
        raise UnreadableError(
            f"its array {name} declares shape {record.shape} and has {len(record.data)} bytes"
        )
    tensor = _from_bytes(bytearray(record.data), record.dtype)
    if record.fortran:
        axes = range(len(record.shape))[::-1]
        return tensor.reshape(record.shape[::-1]).permute(*axes).contiguous()
    return tensor.reshape(record.shape)


def _from_bytes(data: bytearray, dtype: torch.dtype) -> Tensor:
    return torch.frombuffer(data, dtype=dtype) if data else torch.empty(0, dtype=dtype)
