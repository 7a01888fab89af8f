"""The operator on a CUDA device; skipped where there is none.

`test_cuda_emulated.py` tests the same kernels without a device, and `test_cuda_code.py` tests
their machine code.
"""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from deta.ops import cuda, plain, triton_kernels
from deta.ops.ms_deform_attn import ms_deform_attn, ms_deform_attn_fused

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")

SHAPES = [(25, 42), (13, 21), (7, 11), (4, 6)]
FLAT = [side for shape in SHAPES for side in shape]
SIZES = torch.tensor(SHAPES).flip(-1)[:, None]  # L 1 2, (width, height)
NUM_PIXELS = sum(h * w for h, w in SHAPES)
# Against float64 arithmetic on the same inputs. Float32 sums have no fixed order.
TOLERANCE = {
    torch.float64: 1e-11,
    torch.float32: 1e-5,
    torch.bfloat16: 1e-2,
    torch.float16: 2e-3,
}
needs_library = pytest.mark.skipif(
    not (torch.cuda.is_available() and cuda.is_available()), reason=f"CUDA kernels: {cuda.path()}"
)


def inputs(dtype, reference_size, queries=NUM_PIXELS, channels=32, device="cuda", points=4):
    """Return value, references or None, places, weights, grad_output; samples are off the knots."""
    generator = torch.Generator().manual_seed(0)
    size = (2, queries, 4, len(SHAPES), points)
    exact = torch.float64 if dtype == torch.float64 else torch.float32
    value = torch.randn(2, NUM_PIXELS, 4, channels, generator=generator).to(dtype)
    grad_output = torch.randn(2, queries, 4 * channels, generator=generator).to(dtype)
    centres = torch.rand(2, queries, len(SHAPES), 1, 2, generator=generator)
    centres = ((centres * SIZES).floor() + 0.5) / SIZES
    steps = torch.randint(-16, 16, (*size, 2), generator=generator) / 4 + 0.125
    weights = torch.randn(size, generator=generator).to(dtype)
    references = None
    if reference_size == 0:
        places = (centres[:, :, None] + steps / SIZES).to(exact)
    else:
        places = steps.to(dtype)
        boxes = (2 * points / SIZES).expand_as(centres)
        references = (centres if reference_size == 2 else torch.cat([centres, boxes], -1)).to(exact)
        references = references.squeeze(3).to(device)
    places.view(-1)[:5] = torch.tensor([math.nan, math.inf, -math.inf, 1e4, -1e4]).to(places.dtype)
    return value.to(device), references, *(x.to(device) for x in (places, weights, grad_output))


def both(kernels, value, references, places, weights, grad_output) -> tuple[Tensor, ...]:
    """Return the output and the three gradients."""
    if references is None:
        arguments = (value, FLAT, places, weights)
        return (kernels.forward(*arguments), *kernels.backward(grad_output, *arguments))
    arguments = (value, FLAT, references, places, weights)
    return (kernels.fused_forward(*arguments), *kernels.fused_backward(grad_output, *arguments))


def widened(arguments):
    return [x.double() if isinstance(x, Tensor) else x for x in arguments]


def assert_close(found, expected, tolerance: float) -> None:
    for one, other in zip(found, expected, strict=True):
        scale = other.abs().max().clamp(min=1e-3)
        assert ((one.double() - other.double()).abs().max() / scale).item() <= tolerance


@needs_library
@pytest.mark.parametrize("channels", [32, 64, 20, 7])
@pytest.mark.parametrize("queries", [NUM_PIXELS, 300, 1])
@pytest.mark.parametrize("reference_size", [0, 2, 4])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_kernels_equal_the_plain_one(dtype, reference_size, queries, channels):
    arguments = inputs(dtype, reference_size, queries, channels)
    expected = both(plain, *widened(arguments))
    assert_close(both(cuda, *arguments), expected, TOLERANCE[dtype])


@pytest.mark.skipif(not triton_kernels.is_available(), reason="no Triton")
@pytest.mark.parametrize("reference_size", [0, 2, 4])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("is_deterministic", [False, True])
def test_triton_equals_the_plain_one(dtype, reference_size, is_deterministic):
    arguments = inputs(dtype, reference_size, queries=300)
    expected = both(plain, *widened(arguments))
    torch.use_deterministic_algorithms(is_deterministic)
    try:
        found = both(triton_kernels, *arguments)
    finally:
        torch.use_deterministic_algorithms(False)
    assert_close(found, expected, TOLERANCE[dtype])


@needs_library
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_deterministic_mode_gives_the_same_bits_every_time(dtype):
    arguments = inputs(dtype, 2)
    expected = both(plain, *widened(arguments))
    torch.use_deterministic_algorithms(True)
    try:
        results = [both(cuda, *arguments) for _ in range(5)]
    finally:
        torch.use_deterministic_algorithms(False)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))
    assert_close(results[0], expected, TOLERANCE[dtype])


def loss(value, references, places, weights) -> Tensor:
    if references is None:
        return ms_deform_attn(value, SHAPES, places, weights).square().sum()
    return ms_deform_attn_fused(value, SHAPES, references, places, weights).square().sum()


def differentiable(arguments) -> list[Tensor]:
    return [x.requires_grad_() for x in arguments if x is not None]


@pytest.mark.parametrize("reference_size", [0, 2])
def test_compiles_into_one_graph(reference_size):
    *arguments, _ = inputs(torch.float32, reference_size, queries=300)
    leaves = differentiable(arguments)
    compiled = torch.compile(loss, fullgraph=True)
    found = torch.autograd.grad(compiled(*arguments), leaves)
    expected = torch.autograd.grad(loss(*arguments), leaves)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)


@needs_library
def test_can_be_captured_in_a_cuda_graph():
    *arguments, grad_output = inputs(torch.bfloat16, 2)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        both(cuda, *arguments, grad_output)  # loads the library
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = both(cuda, *arguments, grad_output)
    arguments[0].normal_()  # the graph's input changes after the capture
    graph.replay()
    assert_close(found, both(plain, *widened((*arguments, grad_output))), 1e-2)


@needs_library
def test_runs_on_the_current_stream():
    *arguments, grad_output = inputs(torch.float32, 2)
    expected = both(plain, *widened((*arguments, grad_output)))
    stream = torch.cuda.Stream()
    late = arguments[0].clone()
    arguments[0].zero_()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        arguments[0].copy_(late)  # a kernel on another stream would still read zeros
        found = both(cuda, *arguments, grad_output)
    stream.synchronize()
    assert_close(found, expected, 1e-5)


@needs_library
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one CUDA device")
def test_runs_on_a_device_that_is_not_the_current_one():
    arguments = inputs(torch.float32, 2, device="cuda:1")
    assert torch.cuda.current_device() == 0
    assert_close(both(cuda, *arguments), both(plain, *widened(arguments)), 1e-5)
    assert torch.cuda.current_device() == 0


@pytest.mark.parametrize("reference_size", [0, 2])
def test_the_operator_passes_pytorchs_checks(reference_size):
    value, references, places, weights, grad_output = inputs(torch.float64, reference_size, 30)
    places = places.nan_to_num(0, 0, 0)
    name = "ms_deform_attn" if references is None else "ms_deform_attn_fused"
    others = [x for x in (references, places, weights) if x is not None]
    leaves = [x.detach().clone().requires_grad_() for x in (value, places, weights)]
    with_gradients = [leaves[0], *([] if references is None else [references]), *leaves[1:]]
    operator = getattr(torch.ops.deta, name).default
    torch.library.opcheck(operator, (with_gradients[0], FLAT, *with_gradients[1:]))
    backward = getattr(torch.ops.deta, f"{name}_backward").default
    torch.library.opcheck(
        backward,
        (grad_output, value, FLAT, *others),
        test_utils=("test_schema", "test_faketensor"),
    )


@needs_library
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_nothing_waits_for_the_device(dtype):
    arguments = inputs(dtype, 2)
    both(cuda, *arguments)
    torch.cuda.set_sync_debug_mode("error")
    try:
        both(cuda, *arguments)
    finally:
        torch.cuda.set_sync_debug_mode("default")
