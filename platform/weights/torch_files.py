"""Files of weights that were made by pickling: where their parts lie, and that the parts agree.

Three formats: what `torch.save` has written since 1.6 (a zip file), what it wrote before (pickles
one behind the other), and a plain pickle of numpy arrays, as detectron2 stores backbones. Every
size is compared with what the file has before memory is taken, and so are the checksums of a zip
file, which torch.load passes over.
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
    ArrayNote,
    Bounded,
    Storage,
    TensorNote,
    Unreadable,
    read_pickle,
)

LEGACY_MAGIC = 0x1950A86A20F9469CFC6C  # torch.save before 1.6 begins with it
MAX_PICKLE_BYTES = 2**30  # without the tensors' bytes, which follow it; real ones take a megabyte


def read_pickled_weights(
    path: Path, choose: Callable[[object], Mapping[str, object]]
) -> dict[str, Tensor]:
    """Tensors of a file that `torch.save` or `pickle.dump` wrote.

    Args:
        choose: picks the tensors to read from what the file holds, where they are TensorNotes and
            ArrayNotes; so what a checkpoint holds besides the model is never read.

    Raises:
        RefusedName: the file names a function or class that weights do not need.
        Unreadable: damaged, or no file of these formats; says which part.
    """
    with path.open("rb") as file:
        if file.read(4) == b"PK\x03\x04":
            return _read_zip(file, choose)
        file.seek(0)
        return _read_stream(file, path.stat().st_size, choose)


def _read_zip(
    file: BinaryIO, choose: Callable[[object], Mapping[str, object]]
) -> dict[str, Tensor]:
    """What torch.save writes: pickle, byte order, and one member for each storage."""
    file.seek(0, io.SEEK_END)
    size = file.tell()
    try:
        archive = zipfile.ZipFile(file)
        members = {info.filename: info for info in archive.infolist()}
    except (zipfile.BadZipFile, NotImplementedError, ValueError, OSError) as error:
        raise Unreadable(f"its zip directory is damaged or cut off ({error})") from error
    for name, info in members.items():
        if name.startswith("/") or "\\" in name or ".." in name.split("/"):
            raise Unreadable(f"its member {name!r} points outside of the file")
        if info.compress_type != zipfile.ZIP_STORED or info.file_size > size:
            raise Unreadable(
                f"its member {name!r} claims {info.file_size} bytes, packed into "
                f"{info.compress_size}; torch.save packs nothing"
            )
    pickles = [name for name in members if name.rpartition("/")[2] == "data.pkl"]
    if len(pickles) != 1:
        raise Unreadable(_other_archive(members))
    root = pickles[0].removesuffix("data.pkl")

    def member(name: str) -> bytearray:
        if root + name not in members:
            raise Unreadable(f"its member {name} is missing")
        try:
            with archive.open(members[root + name]) as stream:
                content = bytearray(members[root + name].file_size)
                num_read = stream.readinto(content)  # type: ignore[attr-defined]
                stream.read(1)  # reaching the end compares the checksum
        except (zipfile.BadZipFile, NotImplementedError, OSError, ValueError, EOFError) as error:
            raise Unreadable(f"its member {name} is damaged ({error})") from error
        if num_read != len(content):
            raise Unreadable(f"its member {name} is cut off")
        return content

    if f"{root}byteorder" in members and member("byteorder") != b"little":
        raise Unreadable("its numbers are in big-endian order; save it again on a common machine")
    if members[pickles[0]].file_size > MAX_PICKLE_BYTES:
        raise Unreadable("its pickle alone is over a gigabyte")
    content, _ = read_pickle(Bounded.of(member("data.pkl")))
    return _tensors(choose(content), lambda storage: member(f"data/{storage.key}"), size)


def _other_archive(members: Mapping[str, object]) -> str:
    names = list(members)
    last_parts = {name.rpartition("/")[2] for name in names}
    if "constants.pkl" in last_parts or any("/code/" in name for name in names):
        return "it is a TorchScript program, not weights; save the model's state_dict()"
    if last_parts & {"archive_format", "serialized_exported_program.json"}:
        return "it is a program exported by torch.export, not weights; convert what it came from"
    return f"it is a zip file without weights ({', '.join(names[:5]) or 'empty'})"


def _read_stream(
    file: BinaryIO, size: int, choose: Callable[[object], Mapping[str, object]]
) -> dict[str, Tensor]:
    """What torch.save wrote before 1.6, or a plain pickle."""
    bounded = Bounded(file, size)
    first, _ = read_pickle(bounded)
    if first != LEGACY_MAGIC:
        return _tensors(choose(first), _no_storage, size)
    read_pickle(bounded)  # the version of the format
    system, _ = read_pickle(bounded)
    if not isinstance(system, dict) or system.get("little_endian") is not True:
        raise Unreadable("its numbers are in big-endian order; save it again on a common machine")
    content, storages = read_pickle(bounded)
    wanted = choose(content)
    needed = {note.storage.key for note in wanted.values() if isinstance(note, TensorNote)}
    keys, _ = read_pickle(bounded)
    if not isinstance(keys, list):
        raise Unreadable("it has no list of its storages")
    found: dict[str, bytearray] = {}
    for key in map(str, keys):
        num_elements = int.from_bytes(bounded.read(8), "little", signed=True)
        storage = storages.get(key)
        if storage is None or num_elements != storage.num_elements:
            raise Unreadable(f"its storage {key} has {num_elements} elements, not what is noted")
        num_bytes = num_elements * storage.dtype.itemsize
        if key in needed:
            found[key] = bytearray(bounded.read(num_bytes))
        else:
            bounded.skip(num_bytes)
    return _tensors(wanted, lambda storage: found.get(storage.key, bytearray()), size)


def _no_storage(storage: Storage) -> bytearray:
    raise Unreadable(f"its storage {storage.key} is not in it")


def _tensors(
    notes: Mapping[str, object], read: Callable[[Storage], bytearray], file_bytes: int
) -> dict[str, Tensor]:
    """The tensors that notes tell of; those that shared memory share it again."""
    whole: dict[str, Tensor] = {}
    tensors: dict[str, Tensor] = {}
    for name, note in notes.items():
        if isinstance(note, ArrayNote):
            tensors[name] = _array(name, note)
            continue
        assert isinstance(note, TensorNote)
        storage, shape = note.storage, note.shape
        num_bytes = storage.num_elements * storage.dtype.itemsize
        count = math.prod(shape)
        furthest = note.offset + sum((n - 1) * s for n, s in zip(shape, note.stride, strict=True))
        if (
            min((*shape, *note.stride, note.offset, storage.num_elements), default=0) < 0
            or num_bytes > file_bytes
            or count > storage.num_elements
            or (count > 0 and furthest >= storage.num_elements)
        ):
            raise Unreadable(
                f"its tensor {name} claims shape {shape} of a storage of {num_bytes} bytes, in a "
                f"file of {file_bytes}"
            )
        if storage.key not in whole:
            data = read(storage)
            if len(data) != num_bytes:
                raise Unreadable(
                    f"its tensor {name} claims {num_bytes} bytes of a storage of {len(data)}"
                )
            whole[storage.key] = _from_bytes(data, storage.dtype)
        tensors[name] = whole[storage.key].as_strided(shape, note.stride, note.offset)
    return tensors


def _array(name: str, note: ArrayNote) -> Tensor:
    if note.dtype is None or math.prod(note.shape) * note.dtype.itemsize != len(note.data):
        raise Unreadable(
            f"its array {name} claims shape {note.shape} and has {len(note.data)} bytes"
        )
    tensor = _from_bytes(bytearray(note.data), note.dtype)
    if note.fortran:
        return tensor.reshape(note.shape[::-1]).permute(*range(len(note.shape))[::-1]).contiguous()
    return tensor.reshape(note.shape)


def _from_bytes(data: bytearray, dtype: torch.dtype) -> Tensor:
    return torch.frombuffer(data, dtype=dtype) if data else torch.empty(0, dtype=dtype)
