"""A restricted unpickler that runs no code from the file.

A pickle is a program: it names functions, and loading it calls them. Here every name that weight
files need maps to a function of this file that only records its arguments; every other name is
refused. So reading a pickle imports nothing and calls nothing of torch or numpy. No instruction
allocates memory before the bytes that it declares are known to exist.
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
    "DoubleStorage": torch.float64, "FloatStorage": torch.float32, "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16, "LongStorage": torch.int64, "IntStorage": torch.int32,
    "ShortStorage": torch.int16, "CharStorage": torch.int8, "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool, "UntypedStorage": torch.uint8,
}  # fmt: skip
_NUMPY_TYPES = {
    "f8": torch.float64, "f4": torch.float32, "f2": torch.float16, "i8": torch.int64,
    "i4": torch.int32, "i2": torch.int16, "i1": torch.int8, "u1": torch.uint8, "b1": torch.bool,
}  # fmt: skip


class RefusedNameError(Exception):
    """A pickle names a function or class that weights do not need."""


class UnreadableError(Exception):
    """A pickle or its file is damaged, or declares more data than it has."""


@dataclass(frozen=True)
class Storage:
    """A block of bytes in a torch file that several tensors may share."""

    key: str
    dtype: torch.dtype
    num_elements: int


@dataclass(frozen=True)
class TensorRecord:
    """Metadata of a tensor in a torch file, whose bytes have not been read."""

    storage: Storage
    offset: int  # in elements
    shape: tuple[int, ...]
    stride: tuple[int, ...]


@dataclass
class ArrayRecord:
    """A numpy array in a pickle, with its bytes, which are part of the pickle."""

    dtype: torch.dtype | None = None
    shape: tuple[int, ...] = ()
    data: bytes = b""
    fortran: bool = False


@dataclass
class _Dtype:
    """A numpy type, by its code."""

    code: str


class _Ignored:
    """Stands for an object that weights do not need, such as a command line or a path."""

    def __init__(self, *_: object) -> None: ...


class _IgnoredDict(dict[Any, Any]):
    """Stands for a dictionary of settings, such as Lightning's hyperparameters."""

    def __init__(self, *_: object) -> None:
        super().__init__()


class Foreign:
    """Stands for an object of a class that is not read; see `outline`."""

    state: object = None

    @property
    def is_module(self) -> bool:
        """Return True for a torch module, by what all of them keep."""
        return isinstance(self.state, dict) and {"_parameters", "_modules"} <= self.state.keys()

    def __setitem__(self, key: object, value: object) -> None:
        """Take the items of a dictionary of an unknown class."""

    def append(self, value: object) -> None:
        """Take an item of a list of an unknown class."""

    def extend(self, values: object) -> None:
        """Take the items of a list of an unknown class."""


class BoundedReader(io.RawIOBase):
    """A file reader that refuses to read past the end, before it allocates memory."""

    def __init__(self, file: BinaryIO, size: int) -> None:
        self._file, self._left = file, size

    def read(self, size: int = -1) -> bytes:
        self._take(size)
        return self._file.read(size)

    def skip(self, size: int) -> None:
        self._take(size)
        self._file.seek(size, io.SEEK_CUR)

    def readline(self, size: int | None = -1) -> bytes:
        line = self._file.readline(min(self._left, 2**20))
        self._left -= len(line)
        return line

    def _take(self, size: int) -> None:
        if not 0 <= size <= self._left:
            raise UnreadableError("it is cut off, or declares more bytes than it has")
        self._left -= size


def _rebuild_tensor(
    storage: Storage, offset: int, shape: Any, stride: Any, *_: object
) -> TensorRecord:
    """Record a tensor; ignore `requires_grad`, hooks and metadata."""
    if not isinstance(storage, Storage):
        raise UnreadableError("one of its tensors has no storage")
    return TensorRecord(storage, int(offset), _integers(shape), _integers(stride))


def _from_buffer(data: bytes, dtype: _Dtype, shape: Any, order: str) -> ArrayRecord:
    return ArrayRecord(_numpy_type(dtype), _integers(shape), _content(data), order == "F")


def _content(data: bytes) -> bytes:
    return bytes(memoryview(data))  # bytes(10**12) would allocate that many zeros


def _encode(text: str, encoding: str = "latin1") -> bytes:
    """Return bytes, as Python 3 pickles them in protocol 2."""
    return text.encode({"latin1": "latin1", "latin-1": "latin1"}[encoding])


def _numpy_type(dtype: object) -> torch.dtype:
    code = dtype.code if isinstance(dtype, _Dtype) else ""
    if code.lstrip("<|=") not in _NUMPY_TYPES:
        raise UnreadableError(f"it has an array of numpy's type {code!r}, which weights do not use")
    return _NUMPY_TYPES[code.lstrip("<|=")]


def _integers(values: Any) -> tuple[int, ...]:
    numbers = tuple(values)
    if not all(isinstance(number, int) for number in numbers):
        raise UnreadableError(f"it has a shape or stride {numbers}")
    return numbers


# The types of Python among them build only what their arguments hold already.
_FUNCTIONS: dict[tuple[str, str], Callable[..., object]] = {
    ("collections", "OrderedDict"): OrderedDict,
    ("collections", "Counter"): dict,
    ("builtins", "set"): frozenset,
    ("__builtin__", "set"): frozenset,
    ("builtins", "bytes"): lambda: b"",  # in protocol 2
    ("__builtin__", "bytes"): lambda: b"",
    ("argparse", "Namespace"): _Ignored,
    # Settings in checkpoints of Lightning and others.
    ("collections", "defaultdict"): _IgnoredDict,
    ("pytorch_lightning.utilities.parsing", "AttributeDict"): _IgnoredDict,
    ("lightning.pytorch.utilities.parsing", "AttributeDict"): _IgnoredDict,
    ("lightning_fabric.utilities.data", "AttributeDict"): _IgnoredDict,
    ("lightning.fabric.utilities.data", "AttributeDict"): _IgnoredDict,
    ("torch.torch_version", "TorchVersion"): _Ignored,
    ("datetime", "datetime"): _Ignored,
    ("datetime", "timedelta"): _Ignored,
    ("pathlib", "PosixPath"): _Ignored,
    ("pathlib", "WindowsPath"): _Ignored,
    ("torch", "device"): _Ignored,
    ("torch", "Size"): tuple,
    ("torch._utils", "_rebuild_tensor"): _rebuild_tensor,
    ("torch._utils", "_rebuild_tensor_v2"): _rebuild_tensor,
    ("torch._utils", "_rebuild_parameter"): lambda data, *_: data,
    ("torch._utils", "_rebuild_parameter_with_state"): lambda data, *_: data,
    ("_codecs", "encode"): _encode,
    ("numpy", "dtype"): lambda code, *_: _Dtype(str(code)),
}
for _core in ("numpy.core", "numpy._core"):
    _FUNCTIONS[f"{_core}.multiarray", "_reconstruct"] = lambda *_: ArrayRecord()
    _FUNCTIONS[f"{_core}.multiarray", "scalar"] = _Ignored
    _FUNCTIONS[f"{_core}.numeric", "_frombuffer"] = _from_buffer
# Names that a pickle passes on as the type of a storage or array, and never calls.
_TYPE_NAMES: dict[tuple[str, str], object] = {("numpy", "ndarray"): None}
for _name, _type in _STORAGES.items():
    _TYPE_NAMES["torch", _name] = _TYPE_NAMES["torch.storage", _name] = _type
for _type in (*_STORAGES.values(), *_NUMPY_TYPES.values()):
    _TYPE_NAMES["torch", str(_type).removeprefix("torch.")] = _type
_NAMES: dict[tuple[str, str], object] = {**_FUNCTIONS, **_TYPE_NAMES}
_CALLABLE = frozenset(_FUNCTIONS.values())


class _RestrictedUnpickler(pickle._Unpickler):  # in Python: allocates no declared sizes
    """An unpickler that calls only the functions of this file."""

    def __init__(self, file: BoundedReader) -> None:
        super().__init__(file, encoding="latin1")
        self.storages: dict[str, Storage] = {}

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _NAMES:
            raise RefusedNameError(f"{module}.{name}")
        return _NAMES[module, name]

    def persistent_load(self, pid: Any) -> Storage:
        kind, dtype, key, _, num_elements = pid[:5]
        if kind != "storage" or not isinstance(dtype, torch.dtype) or pid[5:] not in ((), (None,)):
            raise UnreadableError(f"it refers to {str(kind)[:40]!r}, not to a plain storage")
        if not isinstance(num_elements, int) or num_elements < 0:
            raise UnreadableError(f"its storage {key!s:.40} declares {num_elements!r:.40} elements")
        storage = Storage(str(key), dtype, num_elements)
        if self.storages.setdefault(storage.key, storage) != storage:
            raise UnreadableError(f"its storage {key!s:.40} is described twice, differently")
        return storage

    def load_reduce(self) -> None:
        arguments, function = self.stack.pop(), self.stack[-1]  # type: ignore[attr-defined]
        if function not in _CALLABLE:
            raise UnreadableError("it calls something that weights do not need")
        self.stack[-1] = function(*arguments)  # type: ignore[attr-defined]

    def load_build(self) -> None:
        """Set the state of an array or its type; ignore the state of other objects."""
        state, built = self.stack.pop(), self.stack[-1]  # type: ignore[attr-defined]
        if isinstance(built, ArrayRecord):
            _, shape, dtype, fortran, data = state
            built.dtype, built.shape = _numpy_type(dtype), _integers(shape)
            built.data = _content(data.encode("latin1") if isinstance(data, str) else data)
            built.fortran = bool(fortran)
        elif isinstance(built, _Dtype):
            built.code = {"<": "<", "|": "|", "=": "="}[state[1]] + built.code.lstrip("<|=")

    def load_bytearray8(self) -> None:
        """Read a bytearray as bytes; the original allocates memory before it reads the content."""
        num_bytes = int.from_bytes(self.read(8), "little")  # type: ignore[attr-defined]
        self.append(self.read(num_bytes))  # type: ignore[attr-defined]


_REFUSED = (
    pickle.INST, pickle.OBJ, pickle.NEWOBJ_EX, pickle.EXT1, pickle.EXT2, pickle.EXT4,
    pickle.NEXT_BUFFER, pickle.READONLY_BUFFER,
)  # fmt: skip
_INSTRUCTIONS: dict[int, Callable[[Any], None]] = {
    **{k: do for k, do in pickle._Unpickler.dispatch.items() if bytes([k]) not in _REFUSED},
    pickle.REDUCE[0]: _RestrictedUnpickler.load_reduce,
    pickle.NEWOBJ[0]: _RestrictedUnpickler.load_reduce,
    pickle.BUILD[0]: _RestrictedUnpickler.load_build,
    pickle.BYTEARRAY8[0]: _RestrictedUnpickler.load_bytearray8,
}
_RestrictedUnpickler.dispatch = _INSTRUCTIONS


class _OutlineUnpickler(_RestrictedUnpickler):
    """An unpickler that puts an inert `Foreign` in the place of every object it does not know."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _NAMES:
            return _NAMES[module, name]
        return Foreign

    def persistent_load(self, pid: Any) -> Any:
        if pid[0] == "module":  # of torch.save before 1.6: a class with its source
            return pid[1]
        return super().persistent_load(pid)

    def load_reduce(self) -> None:
        if self.stack[-2] is Foreign:  # type: ignore[attr-defined]
            self.stack[-2:] = [Foreign()]  # type: ignore[attr-defined]
        else:
            super().load_reduce()

    def load_build(self) -> None:
        if isinstance(self.stack[-2], Foreign):  # type: ignore[attr-defined]
            state = self.stack.pop()  # type: ignore[attr-defined]
            self.stack[-1].state = state  # type: ignore[attr-defined]
        else:
            super().load_build()


_OutlineUnpickler.dispatch = _INSTRUCTIONS | {
    pickle.REDUCE[0]: _OutlineUnpickler.load_reduce,
    pickle.NEWOBJ[0]: _OutlineUnpickler.load_reduce,
    pickle.BUILD[0]: _OutlineUnpickler.load_build,
}


def outline(file: BoundedReader) -> object:
    """Return what the next pickle holds, with inert objects for all that is not read.

    It runs no code either: it only serves to say what a refused file is.

    Raises:
        UnreadableError: as for `read_pickle`.
    """
    return _load(_OutlineUnpickler(file))


def read_pickle(file: BoundedReader) -> tuple[object, dict[str, Storage]]:
    """Read the next pickle of a file and return its content and its storages by key.

    Raises:
        RefusedNameError: it names a function or class that weights do not need.
        UnreadableError: it is damaged, or declares more data than it has.
    """
    reader = _RestrictedUnpickler(file)
    return _load(reader), reader.storages


def _load(reader: _RestrictedUnpickler) -> object:
    try:
        return reader.load()
    except (RefusedNameError, UnreadableError):
        raise
    except Exception as error:  # damaged pickles raise errors of every type
        raise UnreadableError(
            "it is damaged, cut off, not a pickle, or uses an instruction that weight files do "
            f"not need ({type(error).__name__}: {error})"
        ) from error
