"""A pickle machine without the means to do anything.

A pickle is a program: it names functions, and loading it calls them. Here every name that a file of
weights needs stands for a function of this file, which notes what was asked for and nothing else;
any other name is refused. So nothing is imported and nothing of torch or numpy is called while a
pickle is read, and no instruction takes memory before the bytes that it claims are there.
"""

from __future__ import annotations

import io
import pickle
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, BinaryIO

import torch

_STORAGES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
    "UntypedStorage": torch.uint8,
}
_NUMPY_TYPES = {
    "f8": torch.float64,
    "f4": torch.float32,
    "f2": torch.float16,
    "i8": torch.int64,
    "i4": torch.int32,
    "i2": torch.int16,
    "i1": torch.int8,
    "u1": torch.uint8,
    "b1": torch.bool,
}


class RefusedName(Exception):
    """A pickle names something that is not among what weights need."""


class Unreadable(Exception):
    """A pickle or its file is damaged, or claims what is not there."""


@dataclass(frozen=True)
class Storage:
    """Bytes of a torch file that several tensors may share."""

    key: str
    dtype: torch.dtype
    num_elements: int


@dataclass(frozen=True)
class TensorNote:
    """What a torch file says of a tensor whose bytes have not been read."""

    storage: Storage
    offset: int  # in elements
    shape: tuple[int, ...]
    stride: tuple[int, ...]


@dataclass
class ArrayNote:
    """A numpy array in a pickle; its bytes are in memory, since they are part of the pickle."""

    dtype: torch.dtype | None = None
    shape: tuple[int, ...] = ()
    data: bytes = b""
    fortran: bool = False


@dataclass
class _Dtype:
    code: str


class _Anything:
    """Stands for what weights do not need, such as the command line of a run or a path."""


class Bounded(io.RawIOBase):
    """A file that refuses to read further than it goes, before it takes memory for that."""

    def __init__(self, file: BinaryIO, size: int) -> None:
        self._file, self._left = file, size

    @classmethod
    def of(cls, content: bytearray) -> Bounded:
        return cls(io.BytesIO(content), len(content))

    def read(self, size: int = -1) -> bytes:
        if size < 0 or size > self._left:
            raise Unreadable("it is cut off, or claims more bytes than it has")
        self._left -= size
        return self._file.read(size)

    def readline(self, size: int | None = -1) -> bytes:
        line = self._file.readline(min(self._left, 2**20))
        self._left -= len(line)
        return line

    def skip(self, size: int) -> None:
        if not 0 <= size <= self._left:
            raise Unreadable("it is cut off, or claims more bytes than it has")
        self._left -= size
        self._file.seek(size, io.SEEK_CUR)


# What the names in a pickle stand for.


def _ordered_dict(*items: Any) -> OrderedDict[Any, Any]:
    return OrderedDict(*items)


def _counter(*counts: Any) -> dict[Any, Any]:
    return dict(*counts)


def _set(*items: Any) -> frozenset[Any]:
    return frozenset(*items)


def _no_bytes(*arguments: object) -> bytes:
    """How pickles of Python 3 in protocol 2 write that there are none."""
    if arguments:
        raise Unreadable("it makes bytes from what is none")
    return b""


def _anything(*_: Any) -> _Anything:
    return _Anything()


def _size(dimensions: Any) -> tuple[Any, ...]:
    return tuple(dimensions)


def _rebuild_tensor(
    storage: Storage, offset: int, shape: Any, stride: Any, *_: object
) -> TensorNote:
    """The rest is whether it is trained, its hooks and its metadata."""
    if not isinstance(storage, Storage):
        raise Unreadable("one of its tensors has no storage")
    return TensorNote(storage, int(offset), _whole_numbers(shape), _whole_numbers(stride))


def _rebuild_parameter(data: object, *_: object) -> object:
    return data


def _reconstruct(*_: object) -> ArrayNote:
    return ArrayNote()


def _from_buffer(data: bytes, dtype: _Dtype, shape: Any, order: str) -> ArrayNote:
    return ArrayNote(_numpy_type(dtype), _whole_numbers(shape), bytes(data), order == "F")


def _dtype(code: object, *_: object) -> _Dtype:
    return _Dtype(str(code))


def _encode(text: str, encoding: str = "latin1") -> bytes:
    """How pickles of Python 3 in protocol 2 write bytes."""
    if encoding not in ("latin1", "latin-1"):
        raise Unreadable(f"it has bytes in the encoding {encoding!r}")
    return text.encode("latin1")


def _numpy_type(dtype: object) -> torch.dtype:
    code = dtype.code if isinstance(dtype, _Dtype) else ""
    if code.lstrip("<|=") not in _NUMPY_TYPES:
        raise Unreadable(f"it has an array of numpy's type {code!r}, which no weights are of")
    return _NUMPY_TYPES[code.lstrip("<|=")]


def _whole_numbers(values: Any) -> tuple[int, ...]:
    numbers = tuple(values)
    if not all(isinstance(number, int) for number in numbers):
        raise Unreadable(f"it has a shape or stride {numbers}")
    return numbers


_CALLED: dict[tuple[str, str], Callable[..., object]] = {
    ("collections", "OrderedDict"): _ordered_dict,
    ("collections", "Counter"): _counter,
    ("builtins", "set"): _set,
    ("__builtin__", "set"): _set,
    ("builtins", "bytes"): _no_bytes,
    ("__builtin__", "bytes"): _no_bytes,
    ("argparse", "Namespace"): _anything,
    ("pathlib", "PosixPath"): _anything,
    ("pathlib", "WindowsPath"): _anything,
    ("torch", "device"): _anything,
    ("torch", "Size"): _size,
    ("torch._utils", "_rebuild_tensor"): _rebuild_tensor,
    ("torch._utils", "_rebuild_tensor_v2"): _rebuild_tensor,
    ("torch._utils", "_rebuild_parameter"): _rebuild_parameter,
    ("torch._utils", "_rebuild_parameter_with_state"): _rebuild_parameter,
    ("_codecs", "encode"): _encode,
    ("numpy", "dtype"): _dtype,
    **{
        (f"numpy.{core}.{module}", name): function
        for core in ("core", "_core")
        for module, name, function in (
            ("multiarray", "_reconstruct", _reconstruct),
            ("multiarray", "scalar", _anything),
            ("numeric", "_frombuffer", _from_buffer),
        )
    },
}
# These are only handed on, as the type of a storage or array.
_MENTIONED: dict[tuple[str, str], object] = {
    ("numpy", "ndarray"): None,
    **{("torch", name): dtype for name, dtype in _STORAGES.items()},
    **{("torch.storage", name): dtype for name, dtype in _STORAGES.items()},
    **{
        ("torch", str(dtype).removeprefix("torch.")): dtype
        for dtype in {*_STORAGES.values(), *_NUMPY_TYPES.values()}
    },
}
_CALLABLE = frozenset(_CALLED.values())


class _Reader(pickle._Unpickler):  # the one in Python: its memory does not grow with a claim
    """A pickle machine without the means to do anything."""

    def __init__(self, file: Bounded) -> None:
        super().__init__(file, encoding="latin1")
        self.storages: dict[str, Storage] = {}

    def find_class(self, module: str, name: str) -> Any:
        for table in (_CALLED, _MENTIONED):
            if (module, name) in table:
                return table[module, name]
        raise RefusedName(f"{module}.{name}")

    def persistent_load(self, pid: Any) -> Storage:
        kind, dtype, key, _, num_elements = pid[:5]
        if kind != "storage" or not isinstance(dtype, torch.dtype) or pid[5:] not in ((), (None,)):
            raise Unreadable(f"it refers to {str(kind)[:40]!r}, not to a plain storage")
        if not isinstance(num_elements, int) or num_elements < 0:
            raise Unreadable(f"its storage {key!s:.40} claims {num_elements!r:.40} elements")
        storage = Storage(str(key), dtype, num_elements)
        if self.storages.setdefault(storage.key, storage) != storage:
            raise Unreadable(f"its storage {key!s:.40} is described twice, differently")
        return storage

    def load_reduce(self) -> None:
        arguments, function = self.stack.pop(), self.stack[-1]  # type: ignore[attr-defined]
        if function not in _CALLABLE:
            raise Unreadable("it calls what is no function of weights")
        self.stack[-1] = function(*arguments)  # type: ignore[attr-defined]

    def load_build(self) -> None:
        """Fill in an object; what is not an array or its type needs no filling in."""
        state, built = self.stack.pop(), self.stack[-1]  # type: ignore[attr-defined]
        if isinstance(built, ArrayNote):
            _, shape, dtype, fortran, data = state
            built.dtype, built.shape = _numpy_type(dtype), _whole_numbers(shape)
            built.data = data.encode("latin1") if isinstance(data, str) else bytes(data)
            built.fortran = bool(fortran)
        elif isinstance(built, _Dtype):
            built.code = {"<": "<", "|": "|", "=": "="}[state[1]] + built.code.lstrip("<|=")

    def load_bytearray8(self) -> None:
        """As bytes: the original makes room first and looks for the content afterwards."""
        num_bytes = int.from_bytes(self.read(8), "little")  # type: ignore[attr-defined]
        self.append(self.read(num_bytes))  # type: ignore[attr-defined]

    def load_forbidden(self) -> None:
        raise Unreadable("it uses a pickle instruction that no file of weights needs")


_INSTRUCTIONS: dict[int, Callable[[Any], None]] = {
    pickle.REDUCE[0]: _Reader.load_reduce,
    pickle.NEWOBJ[0]: _Reader.load_reduce,
    pickle.BUILD[0]: _Reader.load_build,
    pickle.BYTEARRAY8[0]: _Reader.load_bytearray8,
    **{
        instruction[0]: _Reader.load_forbidden
        for instruction in (
            pickle.INST, pickle.OBJ, pickle.NEWOBJ_EX, pickle.EXT1, pickle.EXT2, pickle.EXT4,
            pickle.NEXT_BUFFER, pickle.READONLY_BUFFER,
        )
    },
}  # fmt: skip
_Reader.dispatch = {**pickle._Unpickler.dispatch, **_INSTRUCTIONS}


def read_pickle(file: Bounded) -> tuple[object, dict[str, Storage]]:
    """The next pickle of a file: what it holds, and by key the storages that it refers to.

    Raises:
        RefusedName: it names a function or class that weights do not need.
        Unreadable: it is damaged, or claims what is not there.
    """
    reader = _Reader(file)
    try:
        return reader.load(), reader.storages
    except (RefusedName, Unreadable):
        raise
    except Exception as error:  # damaged pickles fail in as many ways as there are instructions
        raise Unreadable(
            f"it is damaged, cut off, or no pickle ({type(error).__name__}: {error})"
        ) from error
