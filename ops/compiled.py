"""The compiled CPU kernels: found, chosen for this processor, called.

`ms_deform_attn.py` takes them where they are there and its plain PyTorch kernel where not;
`cpu_path` says which.
"""

from __future__ import annotations

import ctypes
import importlib.util
import os
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

_INSTRUCTION_SETS = {"AVX512": "avx512", "AVX2": "avx2"}  # PyTorch's name to ours


def _find_library() -> ctypes.CDLL | None:
    if os.environ.get("DETA_PLAIN_OPS"):  # to compare, or to rule the kernels out
        return None
    package = importlib.util.find_spec("_deta_ops")
    if package is None or not package.submodule_search_locations:
        return None
    libraries = [
        library
        for place in package.submodule_search_locations
        for library in Path(place).glob("cpu.*")
    ]
    return ctypes.CDLL(str(libraries[0])) if libraries else None


_LIBRARY = _find_library()
_INSTRUCTION_SET = _INSTRUCTION_SETS.get(torch.backends.cpu.get_cpu_capability(), "base")


def is_available() -> bool:
    return _LIBRARY is not None


def cpu_path() -> str:
    """Which kernel runs on the CPU, in words."""
    if _LIBRARY is None:
        return "plain PyTorch"
    return f"compiled ({_INSTRUCTION_SET})"


def _prepare(value: Tensor, *others: Tensor) -> tuple[Tensor, ...]:
    """Contiguous, and all in the precision of the arithmetic: float32, or float64 for float64."""
    dtype = torch.float64 if value.dtype == torch.float64 else torch.float32
    return tuple(tensor.to(dtype).contiguous() for tensor in (value, *others))


def _sizes(value: Tensor, locations: Tensor) -> ctypes.Array:
    images, pixels, heads, channels = value.shape
    _, queries, _, levels, points, _ = locations.shape
    return (ctypes.c_int64 * 7)(images, pixels, heads, channels, queries, levels, points)


def _call(
    direction: str,
    shapes: Sequence[int],
    tensors: Sequence[Tensor],
    place: int,
    sizes: ctypes.Array,
) -> None:
    """Call a kernel with the tensors' addresses, those of the shapes put in at `place`."""
    dtype = "float64" if tensors[0].dtype == torch.float64 else "float32"
    kernel = getattr(_LIBRARY, f"{direction}_{dtype}_{_INSTRUCTION_SET}")
    pointers: list = [ctypes.c_void_p(tensor.data_ptr()) for tensor in tensors]
    pointers.insert(place, (ctypes.c_int64 * len(shapes))(*shapes))
    kernel(*pointers, sizes, ctypes.c_int64(torch.get_num_threads()))


def forward(value: Tensor, shapes: Sequence[int], locations: Tensor, weights: Tensor) -> Tensor:
    dtype = value.dtype
    value, locations, weights = _prepare(value, locations, weights)
    images, _, heads, channels = value.shape
    output = value.new_empty(images, locations.shape[1], heads * channels)
    _call("forward", shapes, (value, locations, weights, output), 1, _sizes(value, locations))
    return output.to(dtype)


def backward(
    grad_output: Tensor, value: Tensor, shapes: Sequence[int], locations: Tensor, weights: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    dtypes = value.dtype, locations.dtype, weights.dtype
    value, grad_output, locations, weights = _prepare(value, grad_output, locations, weights)
    gradients = [torch.zeros_like(tensor) for tensor in (value, locations, weights)]
    _call(
        "backward",
        shapes,
        (grad_output, value, locations, weights, *gradients),
        2,
        _sizes(value, locations),
    )
    grad_value, grad_locations, grad_weights = (
        gradient.to(dtype) for gradient, dtype in zip(gradients, dtypes, strict=True)
    )
    return grad_value, grad_locations, grad_weights
