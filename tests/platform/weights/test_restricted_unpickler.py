"""Test `restricted_unpickler.py`: it calls nothing from a pickle and trusts no size in it."""

from __future__ import annotations

import io
import os
import pickle
import tracemalloc
from collections import OrderedDict

import numpy as np
import pytest
import torch

from deta.platform.weights.restricted_unpickler import (
    ArrayRecord,
    BoundedReader,
    RefusedNameError,
    UnreadableError,
    read_pickle,
)


class MakesFolder:
    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


def read(content: bytes) -> object:
    return read_pickle(BoundedReader(io.BytesIO(content), len(content)))[0]


def test_plain_values_and_arrays_are_read():
    array = np.arange(6, dtype=np.float32).reshape(2, 3)

    found = read(pickle.dumps(OrderedDict(a=array, b=[1, "x", None])))

    assert isinstance(found, dict)
    record = found["a"]
    assert isinstance(record, ArrayRecord)
    assert (record.dtype, record.shape, record.data) == (torch.float32, (2, 3), array.tobytes())
    assert found["b"] == [1, "x", None]


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_a_name_that_weights_do_not_need_is_refused_and_not_called(tmp_path, protocol):
    content = pickle.dumps({"model": MakesFolder(str(tmp_path / "made"))}, protocol)

    with pytest.raises(RefusedNameError, match="mkdir"):
        read(content)
    assert not (tmp_path / "made").exists()


DECLARED = [
    pickle.PROTO + b"\x05" + opcode + (1 << 40).to_bytes(8, "little") + b"abc."
    for opcode in (pickle.BINBYTES8, pickle.BINUNICODE8, pickle.BYTEARRAY8)
]
# An array whose content is a number: bytes(number) would be as many zeros.
ZEROS = b"cnumpy._core.numeric\n_frombuffer\n(I1000000000\ncnumpy\ndtype\n(Vf4\ntR(I1\ntVC\ntR."


@pytest.mark.parametrize("content", [*DECLARED, ZEROS])
def test_a_declared_size_is_compared_with_the_file_before_memory_is_allocated(content):
    tracemalloc.start()
    try:
        with pytest.raises(UnreadableError, match=r"declares more bytes|memoryview"):
            read(content)
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


def test_an_object_of_a_refused_kind_of_instruction_is_unreadable():
    with pytest.raises(UnreadableError, match="instruction"):
        read(b"(ios\nsystem\n.")
