"""The compiled CUDA kernels: find the library, check that the devices can run it, and call it.

The library in `_deta_ops` does not depend on PyTorch, so one build fits every version of it. It is
loaded when the first CUDA tensor arrives, or when its state is queried. This file can be imported
without a driver, and with a PyTorch without CUDA.
"""

# B images   Q queries   H heads   L feature levels   P points per head and level
# S pixels of all levels, flattened   D channels per head   R numbers of a reference, 2 or 4

from __future__ import annotations

import ctypes
import importlib.util
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from deta.ops.plain import accumulation_dtype

_DTYPES = {torch.float64: 0, torch.float32: 1, torch.float16: 2, torch.bfloat16: 3}
_MAX_LEVELS = 32


class _Call(ctypes.Structure):
    """The struct `Call` of csrc/ms_deform_attn_cuda.cu, field by field; unset fields are zero."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("images", "pixels", "heads", "channels")),
        *((name, ctypes.c_int64) for name in ("queries", "levels", "points")),
        *((name, ctypes.c_int64) for name in ("reference_size", "dtype", "is_narrow", "device")),
        ("stream", ctypes.c_void_p),
        ("shapes", ctypes.c_int64 * (2 * _MAX_LEVELS)),
        *((name, ctypes.c_void_p) for name in ("value", "references", "locations", "weights")),
        *((name, ctypes.c_void_p) for name in ("output", "grad_output")),
        *((name, ctypes.c_void_p) for name in ("grad_value", "grad_locations", "grad_weights")),
        *((name, ctypes.c_void_p) for name in ("bound", "rounded")),
    )


@cache
def _library() -> ctypes.CDLL | None:
    package = importlib.util.find_spec("_deta_ops")
    if package is None or not package.submodule_search_locations:
        return None
    for place in package.submodule_search_locations:
        for path in sorted(Path(place).glob("cuda*.so")):
            library = ctypes.CDLL(str(path))
            library.ms_deform_attn_error.restype = ctypes.c_char_p
            return library
    return None


def is_built() -> bool:
    """Return whether the library was built. Needs neither a device nor a driver."""
    return _library() is not None


@cache
def _probe(device: int) -> str:
    """Return why a device cannot run the library, or nothing if it can."""
    library = _library()
    assert library is not None
    error = library.ms_deform_attn_probe(device)
    return library.ms_deform_attn_error(error).decode() if error else ""


def is_available(device: torch.device | None = None) -> bool:
    """Return whether a device, by default the current one, can run the library."""
    if not is_built() or not torch.cuda.is_available():
        return False
    index = None if device is None else device.index
    return not _probe(torch.cuda.current_device() if index is None else index)


def path() -> str:
    """Describe the library, or why CUDA devices do not run it."""
    if not is_built():
        return "not compiled"
    if not torch.cuda.is_available():
        return "compiled (sm_80, sm_90, PTX); no CUDA device"
    problem = _probe(torch.cuda.current_device())
    return f"compiled, but {problem}" if problem else "compiled (sm_80, sm_90, PTX)"


def _launch(function: str, call: _Call, device: torch.device) -> None:
    """Call the library on the tensors' own device and its current stream."""
    library = _library()
    assert library is not None, "the library was not built"
    with torch.cuda.device(device):
        call.device = torch.cuda.current_device()
        call.stream = torch.cuda.current_stream().cuda_stream
        status = getattr(library, f"ms_deform_attn_{function}")(ctypes.byref(call))
    if status > 0:
        raise RuntimeError(
            f"the CUDA kernel of ms_deform_attn ({function}) could not be launched on {device}: "
            f"{library.ms_deform_attn_error(status).decode()}; test it with `python -m deta.ops`"
        )
    if status < 0:
        raise ValueError(
            f"too large for the CUDA kernel of ms_deform_attn ({function}): {call.images} images, "
            f"{call.queries} queries, {call.pixels} pixels, {call.heads} heads of "
            f"{call.channels} channels, {call.levels} levels of {call.points} points; "
            "DETA_OPS=plain selects the plain kernel, which takes any size"
        )


def _dense(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the tensor contiguous, in `dtype`, and aligned for 128-bit accesses."""
    tensor = tensor.to(dtype).contiguous()
    return tensor if tensor.data_ptr() % 16 == 0 else tensor.clone()


def _prepare(
    value: Tensor,
    shapes: Sequence[int],
    references: Tensor | None,
    locations: Tensor,
    weights: Tensor,
) -> tuple[_Call, tuple[Tensor, ...]]:
    """Return the call without its results, and its tensors, which must live until the launch.

    References and locations are in the dtype of the arithmetic: float32, or float64 for float64.
    Weights, and offsets and logits, may also be in the dtype of `value`.
    """
    if value.dtype not in _DTYPES:
        raise TypeError(
            f"ms_deform_attn takes float64, float32, float16 or bfloat16 values, not {value.dtype}"
        )
    if len(shapes) > 2 * _MAX_LEVELS:
        raise ValueError(
            f"the CUDA kernels of ms_deform_attn take at most {_MAX_LEVELS} levels, not "
            f"{len(shapes) // 2}; DETA_OPS=plain selects the plain kernel, which takes any number"
        )
    exact = accumulation_dtype(value)
    given = {weights.dtype} if references is None else {weights.dtype, locations.dtype}
    narrow = value.dtype if given == {value.dtype} else exact
    value, weights = _dense(value, value.dtype), _dense(weights, narrow)
    locations = _dense(locations, exact if references is None else narrow)
    images, pixels, heads, channels = value.shape
    _, queries, _, levels, points = weights.shape
    call = _Call(
        images=images,
        pixels=pixels,
        heads=heads,
        channels=channels,
        queries=queries,
        levels=levels,
        points=points,
        dtype=_DTYPES[value.dtype],
        is_narrow=narrow != exact,
        value=value.data_ptr(),
        locations=locations.data_ptr(),
        weights=weights.data_ptr(),
    )
    call.shapes[: len(shapes)] = shapes
    if references is None:
        return call, (value, locations, weights)
    references = _dense(references, exact)
    call.reference_size, call.references = references.shape[-1], references.data_ptr()
    return call, (value, locations, weights, references)


def forward(
    value: Tensor,
    shapes: Sequence[int],
    locations: Tensor,
    weights: Tensor,
    references: Tensor | None = None,
) -> Tensor:
    """Sample at locations with weights; given references, at offsets with logits. B Q H·D."""
    images, _, heads, channels = value.shape
    if weights.numel() == 0 or value.numel() == 0:
        return value.new_zeros(images, weights.shape[1], heads * channels)
    output = value.new_empty(images, weights.shape[1], heads * channels)
    call, inputs = _prepare(value, shapes, references, locations, weights)
    call.output = output.data_ptr()
    _launch("forward", call, value.device)
    del inputs  # not before the launch
    return output


def backward(
    grad_output: Tensor,
    value: Tensor,
    shapes: Sequence[int],
    locations: Tensor,
    weights: Tensor,
    references: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of value, locations and weights, each in the dtype of its tensor."""
    if weights.numel() == 0 or value.numel() == 0:
        return (
            value.new_zeros(value.shape),
            locations.new_zeros(locations.shape),
            weights.new_zeros(weights.shape),
        )
    call, inputs = _prepare(value, shapes, references, locations, weights)
    grad_output = _dense(grad_output, value.dtype)
    grad_locations, grad_weights = torch.empty_like(inputs[1]), torch.empty_like(inputs[2])
    call.grad_output = grad_output.data_ptr()
    call.grad_locations, call.grad_weights = grad_locations.data_ptr(), grad_weights.data_ptr()
    if torch.are_deterministic_algorithms_enabled():
        grad_value = _fixed_point_backward(call, grad_output, *inputs[:3])
    else:
        sums = torch.zeros_like(inputs[0], dtype=accumulation_dtype(value))
        call.grad_value = sums.data_ptr()
        _launch("backward", call, value.device)
        grad_value = sums.to(value.dtype)
    del inputs  # not before the launch
    return grad_value, grad_locations.to(locations.dtype), grad_weights.to(weights.dtype)


def _fixed_point_backward(
    call: _Call, grad_output: Tensor, value: Tensor, _locations: Tensor, weights: Tensor
) -> Tensor:
    """Return the gradient of the value, summed in integers, whose sum is the same in any order.

    The unit follows from the largest possible addend, `bound`. With 2^61 units for the sum of all
    addends, sums are finer than float32 at any scale of the gradients. If the bound is infinite or
    NaN, all of the gradient is NaN.
    """
    bound = torch.linalg.vector_norm(grad_output, torch.inf, dtype=torch.float64)
    if call.reference_size == 0:  # weights of a softmax are 1 at most
        bound = bound * torch.linalg.vector_norm(weights, torch.inf, dtype=torch.float64)
    sums = torch.zeros_like(value, dtype=torch.int64)
    rounded = torch.empty_like(value)
    call.bound, call.grad_value = bound.data_ptr(), sums.data_ptr()
    call.rounded = rounded.data_ptr()
    _launch("backward", call, value.device)
    _launch("round", call, value.device)
    return rounded


def fused_forward(
    value: Tensor, shapes: Sequence[int], references: Tensor, offsets: Tensor, logits: Tensor
) -> Tensor:
    """Sample at references plus offsets, weighted by the softmax of the logits. B Q H·D."""
    return forward(value, shapes, offsets, logits, references)


def fused_backward(
    grad_output: Tensor,
    value: Tensor,
    shapes: Sequence[int],
    references: Tensor,
    offsets: Tensor,
    logits: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of value, offsets and logits, each in the dtype of its tensor."""
    return backward(grad_output, value, shapes, offsets, logits, references)
