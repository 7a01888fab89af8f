"""The Triton kernels, run by Triton's interpreter on the processor and compiled for sm_90."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from deta.ops import plain, triton_kernels

pytest.importorskip("triton")
ROOT = Path(__file__).resolve().parents[2]
SHAPES = [3, 4, 2, 2, 1, 1]
# Against float64 arithmetic on the same inputs: rounding of the sums and of the result.
TOLERANCE = {torch.float64: 1e-11, torch.float32: 1e-5, torch.bfloat16: 1e-2}


def inputs(dtype: torch.dtype, channels: int, reference_size: int) -> tuple:
    generator = torch.Generator().manual_seed(0)
    size = (1, 3, 2, 3, 2)  # B Q H L P
    exact = torch.float64 if dtype == torch.float64 else torch.float32
    value = torch.randn(1, 17, 2, channels, generator=generator).to(dtype)
    weights = torch.randn(size, generator=generator).to(dtype)
    grad_output = torch.randn(1, 3, 2 * channels, generator=generator).to(dtype)
    references = torch.rand(1, 3, 3, reference_size, generator=generator).to(exact)
    # Away from the lines between pixel centres, where gradients jump.
    places = (torch.randint(-8, 16, (*size, 2), generator=generator) / 4 + 0.125).to(exact)
    if reference_size == 0:
        places = (places + 0.5) / torch.tensor(SHAPES).view(3, 2).flip(1)[:, None]
        places = places.to(exact)
    places[0, 0, 0, :, 0, 0] = torch.tensor([math.nan, math.inf, -1e30])
    return value, references, places, weights, grad_output


def both(kernels, value, references, places, weights, grad_output) -> tuple[Tensor, ...]:
    """Return the output and the three gradients."""
    if references.shape[-1] == 0:
        arguments = (value, SHAPES, places, weights)
        return (kernels.forward(*arguments), *kernels.backward(grad_output, *arguments))
    arguments = (value, SHAPES, references, places, weights)
    return (kernels.fused_forward(*arguments), *kernels.fused_backward(grad_output, *arguments))


def check_all() -> None:
    """Check all cases in a separate process, since Triton reads TRITON_INTERPRET at its import."""
    for dtype, channels, reference_size in (
        (torch.float32, 8, 0),
        (torch.float32, 5, 2),
        (torch.float64, 3, 4),
        (torch.bfloat16, 8, 2),
    ):
        arguments = inputs(dtype, channels, reference_size)
        expected = both(plain, *(tensor.double() for tensor in arguments))
        for is_deterministic in (False, True):
            torch.use_deterministic_algorithms(is_deterministic)
            found = both(triton_kernels, *arguments)
            assert found[0].dtype == found[1].dtype == dtype
            for one, other in zip(found, expected, strict=True):
                scale = other.abs().max().clamp(min=1e-3)
                assert (one.double() - other).abs().max() / scale < TOLERANCE[dtype]
    torch.use_deterministic_algorithms(True)
    value, _, places, weights, grad_output = inputs(torch.float32, 4, 0)
    grad_output[0, 0, 0] = math.nan
    grad_value, _, _ = triton_kernels.backward(grad_output, value, SHAPES, places, weights)
    assert grad_value.isnan().all(), "a gradient that is not finite must not be hidden"
    assert triton_kernels.forward(value, SHAPES, places[:, :0], weights[:, :0]).shape == (1, 0, 8)


def in_a_process(what: str, **env: str) -> None:
    command = [sys.executable, __file__, what]
    finished = subprocess.run(
        command, cwd=ROOT, env=os.environ | env, capture_output=True, text=True
    )
    assert finished.returncode == 0, finished.stderr[-3000:]


def test_kernels_equal_the_plain_one():
    in_a_process("check_all", TRITON_INTERPRET="1")


def compile_all() -> None:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from deta.ops import triton_source

    tensors = {"value": "*bf16", "weights": "*bf16", "grad_output": "*bf16", "unit": "*fp64"}
    constants = {"HEADS": 8, "D": 32, "QUERIES": 32, "CHANNELS": 32, "SUM": triton.language.float32}
    for function, extra in (
        (triton_source.forward_level, {}),
        (triton_source.backward_level, {"FIXED_POINT": False}),
        (triton_source.backward_level, {"FIXED_POINT": True}),
    ):
        fixed = constants | extra
        signature = {}
        for name in function.arg_names:
            default = "i32" if name in triton_source.SIZES else "*fp32"
            signature[name] = "constexpr" if name in fixed else tensors.get(name, default)
        if fixed.get("FIXED_POINT"):
            signature["grad_value"] = "*i64"
        source = ASTSource(function, signature, fixed)
        compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32))
        assert compiled.asm["cubin"]


def test_kernels_compile_for_sm_90_without_a_gpu():
    in_a_process("compile_all")


if __name__ == "__main__":
    globals()[sys.argv[1]]()
