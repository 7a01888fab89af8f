"""The compiled CPU kernels: all instruction sets against the plain kernels, memory, threads."""

from __future__ import annotations

import math
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from deta.ops import cpu, plain

pytestmark = pytest.mark.skipif(not cpu.is_available(), reason="the kernels were not compiled")

_CAPABILITIES = {"base": (), "avx2": ("avx2", "fma"), "avx512": ("avx512f", "avx512bw")}


def instruction_sets() -> list[str]:
    """Return the instruction sets of this processor."""
    information = Path("/proc/cpuinfo")
    flags = information.read_text().split() if information.exists() else []
    return [name for name, needed in _CAPABILITIES.items() if all(flag in flags for flag in needed)]


def random_case(shapes, images, queries, heads, points, channels, reference_size, seed, dtype):
    """Return random arguments of a kernel, with samples off the knots of the interpolation."""
    generator = torch.Generator().manual_seed(seed)
    size = (images, queries, heads, len(shapes), points)
    num_pixels = sum(h * w for h, w in shapes)
    value = torch.randn(images, num_pixels, heads, channels, generator=generator)
    attention = torch.randn(size, generator=generator)
    sides = torch.tensor([(w, h) for h, w in shapes]).float()
    # In pixels, up to two pixels outside, and never within 0.05 of a pixel centre.
    pixel = torch.rand(*size, 2, generator=generator) * (sides[:, None] + 4) - 2.5
    pixel = pixel.floor() + (pixel - pixel.floor()).clamp(0.05, 0.95)
    flat = [side for shape in shapes for side in shape]
    if reference_size == 0:
        return value.to(dtype), flat, ((pixel + 0.5) / sides[:, None],), attention
    references = torch.rand(images, queries, len(shapes), reference_size, generator=generator) + 0.1
    unit = 1.0
    if reference_size == 4:
        unit = references[:, :, None, :, None, 2:] * (0.5 / points) * sides[:, None]
    origin = references[:, :, None, :, None, :2] * sides[:, None] - 0.5
    return value.to(dtype), flat, (references, (pixel - origin) / unit), attention


def run(kernels, grad_output: Tensor, value: Tensor, flat, places, attention) -> tuple[Tensor, ...]:
    """Return the output and all gradients, in the form that `places` is given in."""
    arguments = (value, flat, *places, attention)
    if len(places) == 1:
        return kernels.forward(*arguments), *kernels.backward(grad_output, *arguments)
    return kernels.fused_forward(*arguments), *kernels.fused_backward(grad_output, *arguments)


def exact(value: Tensor, flat, places, attention, grad_output: Tensor) -> tuple[Tensor, ...]:
    """Return the same from the plain kernels in float64."""
    return run(
        plain,
        grad_output.double(),
        value.double(),
        flat,
        tuple(place.double() for place in places),
        attention.double(),
    )


def assert_close(found: Tensor, expected: Tensor, tolerance: float) -> None:
    """Assert that tensors agree, relative to the largest element."""
    scale = expected.abs().max().clamp(min=1e-3) if expected.numel() else 1.0
    torch.testing.assert_close(found.double() / scale, expected / scale, rtol=0, atol=tolerance)


shapes_of_levels = st.lists(st.tuples(st.integers(1, 6), st.integers(1, 6)), min_size=1, max_size=4)


@settings(max_examples=60, deadline=None)
@given(
    shapes=shapes_of_levels,
    images=st.integers(0, 2),
    queries=st.integers(0, 9),
    heads=st.integers(1, 3),
    points=st.integers(1, 5),
    channels=st.integers(1, 40),
    reference_size=st.sampled_from([0, 2, 4]),
    seed=st.integers(0, 1000),
    threads=st.integers(1, 9),
)
def test_any_shape_equals_the_plain_kernels(
    shapes, images, queries, heads, points, channels, reference_size, seed, threads
):
    value, flat, places, attention = random_case(
        shapes, images, queries, heads, points, channels, reference_size, seed, torch.float64
    )
    places, attention = tuple(place.double() for place in places), attention.double()
    if places[-1].numel() > 0:
        places[-1].view(-1)[seed % places[-1].numel()] = (math.nan, math.inf, 1e30)[seed % 3]
    grad_output = torch.randn(images, queries, heads * channels).double()
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        found = run(cpu, grad_output, value, flat, places, attention)
    finally:
        torch.set_num_threads(before)
    expected = run(plain, grad_output, value, flat, places, attention)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("instruction_set", instruction_sets())
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 1e-2), (torch.float16, 2e-3)]
)
@settings(max_examples=15, deadline=None)
@given(
    shapes=shapes_of_levels,
    queries=st.integers(1, 30),
    each_pixel=st.booleans(),
    heads=st.integers(1, 3),
    points=st.integers(1, 5),
    channels=st.sampled_from([16, 32, 64, 5, 48]),
    reference_size=st.sampled_from([0, 2, 4]),
    seed=st.integers(0, 1000),
)
def test_every_instruction_set_in_every_precision(
    instruction_set, dtype, tolerance, shapes, queries, each_pixel, heads, points, channels,
    reference_size, seed,
):  # fmt: skip
    if each_pixel:  # then queries are processed in tiles
        queries = sum(h * w for h, w in shapes)
    value, flat, places, attention = random_case(
        shapes, 2, queries, heads, points, channels, reference_size, seed, dtype
    )
    grad_output = torch.randn(2, queries, heads * channels).to(dtype)
    before, cpu.INSTRUCTION_SET = cpu.INSTRUCTION_SET, instruction_set
    try:
        found = run(cpu, grad_output, value, flat, places, attention)
    finally:
        cpu.INSTRUCTION_SET = before
    expected = exact(value, flat, places, attention, grad_output)
    assert found[0].dtype == found[1].dtype == dtype
    for ours, theirs in zip(found, expected, strict=True):
        assert_close(ours, theirs, tolerance)


@pytest.mark.parametrize("reference_size", [0, 2, 4])
@pytest.mark.parametrize("queries", [80, 320])  # heads in place, and rearranged by head
def test_the_same_bits_on_any_number_of_threads(queries: int, reference_size: int):
    shapes = [(16, 16), (8, 8)]
    value, flat, places, attention = random_case(
        shapes, 2, queries, 2, 4, 32, reference_size, 0, torch.float32
    )
    grad_output = torch.randn(2, queries, 64)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3, 9):  # 9: more than heads, so levels are divided too
            torch.set_num_threads(threads)
            results.append(run(cpu, grad_output, value, flat, places, attention))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_pixels_that_no_sample_touches_do_not_matter():
    """Such pixels may even be NaN or infinite."""
    value, flat, _, attention = random_case([(4, 4)], 1, 3, 1, 1, 16, 0, 0, torch.float32)
    inner = torch.full((1, 3, 1, 1, 1, 2), 0.5)  # between the four pixels in the middle
    expected = cpu.forward(value, flat, inner, attention)
    edge = value.clone().view(1, 4, 4, 1, 16)
    edge[:, [0, 3]] = math.nan
    edge[:, :, [0, 3]] = math.inf
    assert torch.equal(cpu.forward(edge.view_as(value), flat, inner, attention), expected)


def test_a_level_without_pixels_contributes_nothing():
    value, _, (locations,), attention = random_case([(3, 4)], 1, 5, 2, 2, 16, 0, 0, torch.float32)
    locations = locations.expand(-1, -1, -1, 3, -1, -1).contiguous()
    attention = attention.expand(-1, -1, -1, 3, -1).contiguous()
    flat = [0, 7, 3, 4, 5, 0]
    grad_output = torch.randn(1, 5, 32)
    found = run(cpu, grad_output, value, flat, (locations,), attention)
    expected = run(plain, grad_output, value, flat, (locations,), attention)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.skipif(shutil.which("g++") is None, reason="no g++")
def test_sanitizers_find_nothing(tmp_path: Path):
    """Run random shapes and extreme locations under the address and UB sanitizers."""
    source = Path(__file__).with_name("sanitize_cpu.cpp")
    kernels = Path(__file__).resolve().parents[2] / "ops" / "csrc"
    program = tmp_path / "sanitize"
    native = ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma"]
    subprocess.run(
        [
            *("g++", "-std=c++17", "-O0", "-pthread", "-fopenmp-simd", "-Wno-psabi"),
            *("-fsanitize=address,undefined", "-fno-sanitize-recover=all"),
            *(native if "avx512" in instruction_sets() else []),
            *(f"-I{kernels}", str(source), "-o", str(program)),
        ],
        check=True,
    )
    result = subprocess.run([str(program)], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr[-3000:]
    assert "200 cases" in result.stdout
