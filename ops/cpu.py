"""The compiled CPU kernels: find the library, choose this processor's version, and call it.

`ms_deform_attn.py` uses them if they were built, and plain PyTorch otherwise; `path` shows which.
"""

# B images   Q queries   H heads   L feature levels   P points   S pixels of all levels   D channels

from __future__ import annotations

import ctypes
import importlib.util
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

_INSTRUCTION_SETS = {"AVX512": "avx512", "AVX2": "avx2"}  # PyTorch's names -> ours
_DTYPES = {torch.float32: "float32", torch.float64: "float64", torch.bfloat16: "bfloat16"}


def _find_library() -> ctypes.CDLL | None:
    package = importlib.util.find_spec("_deta_ops")
    if package is None or not package.submodule_search_locations:
        return None
    libraries = [
        library
        for place in package.submodule_search_locations
        for library in Path(place).glob("cpu.*")
    ]
    return ctypes.CDLL(str(libraries[0])) if libraries else None


def _find_parallel_for() -> ctypes.c_void_p:
    """Return the address of PyTorch's parallel-for function, or null if PyTorch has none.

    It is part of PyTorch's stable C interface since 2.10. Without it the kernels start threads.
    """
    for library in (Path(torch.__file__).parent / "lib").glob("*torch_cpu.*"):
        if library.suffix in (".so", ".dylib", ".dll"):
            function = getattr(ctypes.CDLL(str(library)), "torch_parallel_for", None)
            if function is not None:
                return ctypes.cast(function, ctypes.c_void_p)
    return ctypes.c_void_p(None)


_LIBRARY = _find_library()
_PARALLEL_FOR = _find_parallel_for()
_CAPABILITY = torch.backends.cpu.get_cpu_capability()  # respects ATEN_CPU_CAPABILITY
INSTRUCTION_SET = _INSTRUCTION_SETS.get(_CAPABILITY, "base")


def is_available() -> bool:
    return _LIBRARY is not None


def path() -> str:
    """Describe the kernels that run on the CPU."""
    return "plain PyTorch" if _LIBRARY is None else f"compiled ({INSTRUCTION_SET})"


def forward(
    value: Tensor,
    shapes: Sequence[int],
    places: Tensor,
    attention: Tensor,
    references: Tensor | None = None,
) -> Tensor:
    """Sample at locations with weights; given references, at offsets with logits. B Q H·D."""
    images, _, heads, channels = value.shape
    output = value.new_empty(images, places.shape[1], heads * channels)
    if output.numel() == 0 or places.numel() == 0 or value.numel() == 0:
        return output.zero_()
    kernel_value, other = _kernel_dtypes(value)
    kernel_output = output if kernel_value == output.dtype else output.to(kernel_value)
    _call(
        "forward",
        (value.to(kernel_value).contiguous(),),
        shapes,
        (
            _as(references, other),
            _as(places, other),
            _as(attention, other),
            kernel_output,
        ),
        _sizes(value, places, references),
    )
    return kernel_output.to(output.dtype)


def backward(
    grad_output: Tensor,
    value: Tensor,
    shapes: Sequence[int],
    places: Tensor,
    attention: Tensor,
    references: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of value, places and attention, each in the dtype of its tensor."""
    kernel_value, other = _kernel_dtypes(value)
    grad_value = torch.empty(value.shape, dtype=kernel_value)
    grad_places = torch.empty(places.shape, dtype=other)
    grad_attention = torch.empty(attention.shape, dtype=other)
    if grad_output.numel() == 0 or places.numel() == 0 or value.numel() == 0:
        for gradient in (grad_value, grad_places, grad_attention):
            gradient.zero_()
    else:
        _call(
            "backward",
            (grad_output.to(kernel_value).contiguous(), value.to(kernel_value).contiguous()),
            shapes,
            (
                _as(references, other),
                _as(places, other),
                _as(attention, other),
                grad_value,
                grad_places,
                grad_attention,
            ),
            _sizes(value, places, references),
        )
    return (
        grad_value.to(value.dtype),
        grad_places.to(places.dtype),
        grad_attention.to(attention.dtype),
    )


def fused_forward(
    value: Tensor, shapes: Sequence[int], references: Tensor, offsets: Tensor, logits: Tensor
) -> Tensor:
    return forward(value, shapes, offsets, logits, references)


def fused_backward(
    grad_output: Tensor,
    value: Tensor,
    shapes: Sequence[int],
    references: Tensor,
    offsets: Tensor,
    logits: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    return backward(grad_output, value, shapes, offsets, logits, references)


def _kernel_dtypes(value: Tensor) -> tuple[torch.dtype, torch.dtype]:
    """Return the dtypes in the kernels: of the value, and of the arithmetic and all else."""
    if value.dtype == torch.float64:
        return torch.float64, torch.float64
    return (torch.bfloat16 if value.dtype == torch.bfloat16 else torch.float32), torch.float32


def _as(tensor: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if tensor is None else tensor.to(dtype).contiguous()


def _sizes(value: Tensor, places: Tensor, references: Tensor | None) -> ctypes.Array:
    images, pixels, heads, channels = value.shape
    _, queries, _, levels, points, _ = places.shape
    if pixels >= 2**31 or queries >= 2**31:
        raise ValueError(
            f"too large for the CPU kernels of ms_deform_attn: {pixels} pixels, {queries} queries; "
            "DETA_OPS=plain selects the plain kernel, which takes any size"
        )
    reference_size = 0 if references is None else references.shape[-1]
    return (ctypes.c_int64 * 8)(
        images, pixels, heads, channels, queries, levels, points, reference_size
    )


def _call(
    direction: str,
    before_shapes: Sequence[Tensor],
    shapes: Sequence[int],
    after_shapes: Sequence[Tensor | None],
    sizes: ctypes.Array,
) -> None:
    """Call a kernel with the addresses of the tensors."""
    kernel = getattr(_LIBRARY, f"{direction}_{_DTYPES[before_shapes[-1].dtype]}_{INSTRUCTION_SET}")
    failed = kernel(
        *(ctypes.c_void_p(tensor.data_ptr()) for tensor in before_shapes),
        (ctypes.c_int64 * len(shapes))(*shapes),
        *(ctypes.c_void_p(None if t is None else t.data_ptr()) for t in after_shapes),
        sizes,
        ctypes.c_int64(torch.get_num_threads()),
        _PARALLEL_FOR,
    )
    if failed:
        raise MemoryError(f"ms_deform_attn {direction} on the CPU: not enough memory")
