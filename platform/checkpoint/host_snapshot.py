"""Copies of tensors in host memory, laid out as the safetensors file that will hold them.

Such a copy can be written while training continues. It is one block of memory. So the next copy
can reuse it (most of the time of a copy goes into touching new pages), and writing takes few large
calls, during which other threads run.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

CHUNK_BYTES = 4 * 2**20  # hashed and written together, while in the CPU cache

# https://github.com/huggingface/safetensors#format
DTYPES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2", torch.complex64: "C64",
    torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8",
    torch.uint64: "U64", torch.uint32: "U32", torch.uint16: "U16", torch.uint8: "U8",
    torch.bool: "BOOL",
}  # fmt: skip


@dataclass(frozen=True)
class WrittenFile:
    """Size and hash of a written file."""

    num_bytes: int
    sha256: str


@dataclass(frozen=True)
class HostTensors:
    """The content of a safetensors file."""

    header: bytes  # its length, and the layout
    data: Tensor  # uint8, contiguous, on the host; pinned where the tensors came from a GPU
    block: Tensor  # uint8, the memory that `data` is the start of

    @property
    def num_bytes(self) -> int:
        return len(self.header) + len(self.data)

    @property
    def parts(self) -> list[memoryview]:
        """Return the bytes of the file."""
        return [memoryview(self.header), self.data.numpy().data]


def copy_tensors(tensors: Mapping[str, Tensor], into: HostTensors | None = None) -> HostTensors:
    """Copy tensors to host memory.

    From a GPU, the copy is only started here: synchronize its stream before reading the result.

    Args:
        into: an earlier copy that is not needed any more; its memory is reused if large enough.

    Raises:
        ValueError: safetensors does not support the type of a tensor.
    """
    for name, tensor in tensors.items():
        if tensor.dtype not in DTYPES:
            raise ValueError(f"{name}: safetensors has no type for {tensor.dtype}; convert it")
    # Wide types first, so that every tensor starts at a multiple of the size of its type.
    names = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    layout: dict[str, object] = {"__metadata__": {"format": "pt"}}
    begins, end = {}, 0
    for name in names:
        begins[name], end = end, end + tensors[name].nbytes
        layout[name] = {
            "dtype": DTYPES[tensors[name].dtype],
            "shape": list(tensors[name].shape),
            "data_offsets": [begins[name], end],
        }
    text = json.dumps(layout, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)

    pinned = any(tensor.is_cuda for tensor in tensors.values())
    block = into.block if into is not None else None
    if block is None or len(block) < end or (pinned and not block.is_pinned()):
        block = torch.empty(end, dtype=torch.uint8, pin_memory=pinned)
    data = block[:end]
    with torch.no_grad():
        for name in names:
            tensor = tensors[name]
            place = data[begins[name] : begins[name] + tensor.nbytes].view(tensor.dtype)
            place.view(tensor.shape).copy_(tensor, non_blocking=True)
    return HostTensors(len(text).to_bytes(8, "little") + text, data, block)


def write_file(path: Path, parts: Iterable[memoryview] | str) -> WrittenFile:
    """Write and hash a text or bytes, and force them to the disk.

    Other threads run while a chunk is hashed or written.

    Raises:
        OSError: the disk is full, read-only or broken.
    """
    digest, num_bytes = hashlib.sha256(), 0
    if isinstance(parts, str):
        parts = [memoryview(parts.encode())]
    with path.open("wb", buffering=0) as file:
        for part in parts:
            for start in range(0, len(part), CHUNK_BYTES):
                chunk = part[start : start + CHUNK_BYTES]
                digest.update(chunk)
                num_bytes += len(chunk)
                while chunk:  # a nearly full disk accepts a part and refuses the next
                    chunk = chunk[file.write(chunk) :]
        os.fsync(file.fileno())
    return WrittenFile(num_bytes, digest.hexdigest())
