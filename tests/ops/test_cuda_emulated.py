"""The CUDA kernels' own source, compiled by g++ and run on the processor, one fiber per thread.

It computes what a GPU would, without one; `cuda_emulation/` explains how. It shows that the
arithmetic, the indices and the shuffles are right. It shows nothing about speed or about the CUDA
compiler's machine code (`test_cuda_code.py`).
"""

from __future__ import annotations

import ctypes
import math
import mmap
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from deta.ops import cuda, plain

ROOT = Path(__file__).resolve().parents[2]
EMULATION = Path(__file__).parent / "cuda_emulation"
COMPILER = os.environ.get("CXX", "g++")
pytestmark = pytest.mark.skipif(shutil.which(COMPILER) is None, reason="no C++ compiler")

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
# Against float64 arithmetic on the same inputs: rounding of the sums and of the result.
TOLERANCE = {
    torch.float64: 1e-12,
    torch.float32: 1e-5,
    torch.bfloat16: 1e-2,
    torch.float16: 2e-3,
}
#          images queries heads points channels shapes
CASES = {
    "usual head": (2, 5, 2, 4, 32, ((6, 5), (3, 4), (2, 2), (1, 1), (1, 3))),
    "odd": (1, 7, 3, 3, 5, ((6, 5), (3, 4), (1, 1))),
    "encoder": (1, 0, 2, 2, 32, ((9, 10), (5, 3))),
    "wide head": (1, 3, 1, 2, 72, ((4, 4),)),
    "more channels than a warp": (1, 2, 1, 1, 264, ((3, 3),)),
    "narrow head": (2, 9, 2, 1, 8, ((4, 3), (2, 1), (1, 2), (1, 1), (1, 1), (3, 1))),
    "many samples": (1, 2, 1, 37, 16, ((5, 5), (4, 2))),
}


def build(folder: Path, *flags: str) -> Path:
    library = folder / "cuda_emulated.so"
    command = [COMPILER, "-O1", "-std=c++17", "-fPIC", "-shared", "-Wno-unknown-pragmas"]
    command += ["-fno-strict-aliasing", *flags, "-I", str(EMULATION), "-x", "c++"]
    command += [str(ROOT / "ops/csrc/ms_deform_attn_cuda.cu"), "-o", str(library)]
    subprocess.run(command, check=True)
    return library


def load(path: Path) -> ctypes.CDLL:
    library = ctypes.CDLL(str(path))
    library.ms_deform_attn_error.restype = ctypes.c_char_p
    return library


def use(monkeypatch: pytest.MonkeyPatch, library: ctypes.CDLL) -> None:
    def launch(function: str, call: ctypes.Structure, device: torch.device) -> None:
        status = getattr(library, f"ms_deform_attn_{function}")(ctypes.byref(call))
        assert status == 0, f"{function} returned {status}"

    monkeypatch.setattr(cuda, "_launch", launch)


@pytest.fixture(scope="module")
def library(tmp_path_factory) -> ctypes.CDLL:
    return load(build(tmp_path_factory.mktemp("emulated")))


@pytest.fixture
def emulated(library: ctypes.CDLL, monkeypatch) -> Iterator[ctypes.CDLL]:
    use(monkeypatch, library)
    yield library
    torch.use_deterministic_algorithms(False)


def inputs(case: str, dtype: torch.dtype, reference_size: int, seed: int = 0) -> tuple:
    """Return value, flat shapes, references, locations or offsets, weights or logits, grad_output.

    Samples are off the lines between pixel centres, where gradients jump, and some are outside. A
    few locations are not finite.
    """
    images, queries, heads, points, channels, shapes = CASES[case]
    generator = torch.Generator().manual_seed(seed)
    num_pixels = sum(h * w for h, w in shapes)
    queries = queries or num_pixels
    size = (images, queries, heads, len(shapes), points)
    flat = [side for shape in shapes for side in shape]
    sizes = torch.tensor(shapes).flip(-1)[:, None]  # L 1 2, (width, height)

    value = torch.randn(images, num_pixels, heads, channels, generator=generator).to(dtype)
    grad_output = torch.randn(images, queries, heads * channels, generator=generator).to(dtype)
    exact = torch.float64 if dtype == torch.float64 else torch.float32
    # Multiples of 1/4 pixel plus 1/8 need few bits, so that bfloat16 offsets are exact.
    steps = torch.rand(*size, 2, generator=generator, dtype=torch.float64) * (sizes + 3) - 2
    pixels = (steps * 4).floor() / 4 + 0.125
    weights = torch.randn(*size, generator=generator)
    references = None
    if reference_size == 0:
        places = ((pixels + 0.5) / sizes).to(exact)
        weights = weights.abs().to(dtype)
    else:
        # Centres of pixels of every level; boxes whose halves are P pixels of that level.
        centres = torch.rand(images, queries, len(shapes), 1, 2, generator=generator)
        centres = ((centres * sizes).floor() + 0.5) / sizes
        boxes = (2 * points / sizes).expand(images, queries, -1, -1, -1)
        references = (centres if reference_size == 2 else torch.cat([centres, boxes], -1)).to(exact)
        references = references.squeeze(3)
        places = (pixels - (centres * sizes)[:, :, None].floor()).to(dtype)
        weights = weights.to(dtype)
    if places.numel() > 40:
        places.view(-1)[3:40:9] = torch.tensor([math.nan, math.inf, -math.inf, 1e30, -1e30]).to(
            places.dtype
        )[: len(places.view(-1)[3:40:9])]
    return value, flat, references, places, weights, grad_output


def both(run, value, flat, references, places, weights, grad_output) -> tuple[Tensor, ...]:
    """Return the output and the three gradients."""
    if references is None:
        arguments = (value, flat, places, weights)
        return (run.forward(*arguments), *run.backward(grad_output, *arguments))
    arguments = (value, flat, references, places, weights)
    return (run.fused_forward(*arguments), *run.fused_backward(grad_output, *arguments))


def widened(arguments: tuple) -> tuple:
    return tuple(x.double() if isinstance(x, Tensor) else x for x in arguments)


def assert_close(found: tuple[Tensor, ...], expected: tuple[Tensor, ...], tolerance: float) -> None:
    names = ("output", "grad_value", "grad of the places", "grad of the weights")
    for name, one, other in zip(names, found, expected, strict=True):
        assert one.shape == other.shape
        scale = other.abs().max().clamp(min=1e-3)
        difference = (one.double() - other.double()).abs().max() / scale
        assert difference <= tolerance, f"{name} differs by {difference:.2e}"


@pytest.mark.parametrize("reference_size", [0, 2, 4])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES)
def test_kernels_equal_the_plain_one(emulated, case, dtype, reference_size):
    arguments = inputs(case, dtype, reference_size)
    found = both(cuda, *arguments)
    assert found[0].dtype == found[1].dtype == dtype
    assert_close(found, both(plain, *widened(arguments)), TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("reference_size", [0, 4])
def test_half_values_can_have_float32_weights(emulated, dtype, reference_size):
    arguments = inputs("usual head", dtype, reference_size)
    arguments = (*arguments[:3], *(x.float() for x in arguments[3:5]), arguments[5])
    found = both(cuda, *arguments)
    assert found[2].dtype == found[3].dtype == torch.float32
    assert_close(found, both(plain, *widened(arguments)), TOLERANCE[dtype])


@pytest.mark.parametrize("reference_size", [0, 2])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", ["usual head", "odd"])
def test_deterministic_mode_gives_the_same_bits_in_any_order(emulated, case, dtype, reference_size):
    arguments = inputs(case, dtype, reference_size)
    torch.use_deterministic_algorithms(True)
    results = []
    for seed in range(3):  # for the order of blocks and lanes
        emulated.emulation_seed(seed)
        results.append(both(cuda, *arguments))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))
    assert_close(results[0], both(plain, *widened(arguments)), max(TOLERANCE[dtype], 1e-11))


@pytest.mark.parametrize("scale", [1e-30, 1e-6, 1e30])
def test_deterministic_mode_scales_to_gradients_of_any_size(emulated, scale):
    *arguments, grad_output = inputs("usual head", torch.float32, 2)
    torch.use_deterministic_algorithms(True)
    found = both(cuda, *arguments, grad_output * scale)[1] / scale
    expected = both(plain, *widened(tuple(arguments)), grad_output.double())[1]
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-6)


def test_deterministic_mode_survives_the_worst_sum(emulated):
    """Put all samples of all queries on one pixel, with the largest gradient."""
    value = torch.zeros(1, 1, 1, 4)
    locations = torch.full((1, 300, 1, 1, 7, 2), 0.5)
    weights = torch.ones(1, 300, 1, 1, 7)
    grad_output = torch.full((1, 300, 4), 1e35)
    torch.use_deterministic_algorithms(True)
    grad_value, _, _ = cuda.backward(grad_output, value, [1, 1], locations, weights)
    torch.testing.assert_close(
        grad_value, torch.full_like(value, 300 * 7 * 1e35), rtol=1e-6, atol=0
    )


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_gradient_that_is_not_finite_is_not_hidden(emulated, bad):
    *arguments, grad_output = inputs("usual head", torch.float32, 2)
    grad_output[0, 0, 0] = bad
    torch.use_deterministic_algorithms(True)
    assert both(cuda, *arguments, grad_output)[1].isnan().all()


def test_a_value_outside_of_a_sample_does_not_matter(emulated):
    """Even NaN does not: a value outside is not read, rather than multiplied by zero."""
    value, flat, _, places, weights, _ = inputs("usual head", torch.float32, 0)
    value[:] = math.nan
    places[:] = 5.0
    assert torch.equal(cuda.forward(value, flat, places, weights), torch.zeros(2, 5, 64))


@pytest.mark.parametrize("reference_size", [0, 4])
def test_a_level_without_pixels_contributes_nothing(emulated, reference_size):
    value, flat, *others = inputs("usual head", torch.float32, reference_size)
    flat[4:6] = [0, 2]
    value = torch.cat([value[:, :42], value[:, 46:]], 1)
    arguments = (value, flat, *others)
    assert_close(both(cuda, *arguments), both(plain, *widened(arguments)), 1e-5)


def test_strided_and_misaligned_tensors_are_copied(emulated):
    arguments = inputs("usual head", torch.float32, 2)

    def misaligned(tensor: Tensor) -> Tensor:
        room = tensor.new_empty(tensor.numel() + 1)[1:]
        return room.copy_(tensor.flatten()).view(tensor.shape)

    moved = tuple(misaligned(x) if isinstance(x, Tensor) else x for x in arguments)
    strided = tuple(
        torch.stack([x, x], -1)[..., 0] if isinstance(x, Tensor) else x for x in arguments
    )
    torch.use_deterministic_algorithms(True)
    expected = both(cuda, *arguments)
    for other in (moved, strided):
        assert all(torch.equal(a, b) for a, b in zip(expected, both(cuda, *other), strict=True))


def test_empty_inputs_give_empty_outputs(emulated):
    value, flat, _, places, weights, grad_output = inputs("odd", torch.float32, 0)
    for few in (slice(0, 0), slice(0, 7)):
        arguments = (value[:0], flat, places[:0, few], weights[:0, few])
        assert cuda.forward(*arguments).shape == (0, len(weights[0, few]), 15)
    for gradient in cuda.backward(grad_output[:, :0], value, flat, places[:, :0], weights[:, :0]):
        assert not gradient.any()


def test_too_many_levels_are_refused_with_an_alternative():
    with pytest.raises(ValueError, match="DETA_OPS=plain"):
        cuda.forward(
            torch.zeros(1, 33, 1, 4),
            [1, 1] * 33,
            torch.zeros(1, 1, 1, 33, 1, 2),
            torch.zeros(1, 1, 1, 33, 1),
        )


# Memory: every tensor ends where a protected page begins, or starts behind one.


def guarded(tensor: Tensor, at_end: bool) -> Tensor:
    page = mmap.PAGESIZE
    size = max(tensor.numel() * tensor.element_size(), 1)
    room = -(-size // page) * page
    memory = mmap.mmap(-1, room + 2 * page)
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    mprotect = ctypes.CDLL(None, use_errno=True).mprotect
    for start in (address, address + page + room):
        assert mprotect(ctypes.c_void_p(start), ctypes.c_size_t(page), 0) == 0
    offset = page + (room - size if at_end else 0)
    view = torch.frombuffer(memory, dtype=tensor.dtype, count=tensor.numel(), offset=offset)
    return view.view(tensor.shape).copy_(tensor)


def run_guarded() -> None:
    """Run all cases with guarded tensors; an access outside of a tensor kills this process."""
    library = load(Path(sys.argv[1]))
    with pytest.MonkeyPatch.context() as monkeypatch:
        use(monkeypatch, library)
        monkeypatch.setattr(cuda, "_dense", lambda tensor, dtype: tensor.to(dtype))
        for case, dtype, size in (
            (case, dtype, size) for case in CASES for dtype in DTYPES for size in (0, 2, 4)
        ):
            for at_end in (True, False):
                arguments = tuple(
                    guarded(x, at_end) if isinstance(x, Tensor) else x
                    for x in inputs(case, dtype, size, seed=1)
                )
                if any(isinstance(x, Tensor) and x.data_ptr() % 16 for x in arguments):
                    continue  # a misaligned tensor would be copied
                found = both(cuda, *arguments)
                if at_end:
                    assert_close(found, both(plain, *widened(arguments)), TOLERANCE[dtype])


@pytest.mark.skipif(sys.platform != "linux", reason="pages are protected by Linux's mprotect")
def test_nothing_is_read_or_written_outside_of_a_tensor(tmp_path):
    # The code for devices before 9.0, whose additions differ.
    flags = ["-D__CUDA_ARCH__=800", "-fsanitize=undefined", "-fno-sanitize-recover=all"]
    library = build(tmp_path, *flags)
    command = [sys.executable, __file__, str(library)]
    finished = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert finished.returncode == 0, finished.stderr[-3000:]


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    run_guarded()
