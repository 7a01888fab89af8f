"""`python -m deta.ops`: show which kernels are built, check their results, and time them."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable

import torch
from torch import Tensor

from deta.ops import cpu, cuda, plain, triton_kernels
from deta.ops.ms_deform_attn import kernels_for, path
from deta.ops.workload import Workload, make_workload

TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}


def main() -> int:
    print(f"PyTorch {torch.__version__}, {torch.get_num_threads()} threads")
    print(f"CPU:    {cpu.path()}")
    print(f"CUDA:   {cuda.path()}")
    print(f"Triton: {triton_kernels.path()}")
    devices = [torch.device("cpu")]
    devices += [torch.device("cuda", index) for index in range(torch.cuda.device_count())]
    passed = True
    for device in devices:
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
        print(f"\n{name} runs on: {path(device.type)}")
        passed &= self_test(device)
        for stage in ("encoder", "decoder"):
            report_speed(stage, device)
    return 0 if passed else 1


def self_test(device: torch.device) -> bool:
    """Check all four kernels on a small image, against the plain ones in float64."""
    work = make_workload("encoder", (120, 200), images=2)
    locations, weights = work.prepare()
    kernels = kernels_for(device.type)
    passed = True
    for dtype, tolerance in TOLERANCES.items():
        value, grad = work.value.to(dtype), work.grad_output.to(dtype)
        worst = 0.0
        for function, places in (
            ("", (locations, weights)),
            ("fused_", (work.references, work.offsets, work.logits)),
        ):
            given = (value, work.flat_shapes, *places)
            exact = (value.double(), work.flat_shapes, *(place.double() for place in places))
            here = [t.to(device) if isinstance(t, Tensor) else t for t in given]
            found = (
                getattr(kernels, f"{function}forward")(*here),
                *getattr(kernels, f"{function}backward")(grad.to(device), *here),
            )
            expected = (
                getattr(plain, f"{function}forward")(*exact),
                *getattr(plain, f"{function}backward")(grad.double(), *exact),
            )
            for ours, theirs in zip(found, expected, strict=True):
                worst = max(worst, difference(ours.cpu().double(), theirs))
        verdict = "ok" if worst <= tolerance else f"WRONG, above {tolerance}"
        passed &= worst <= tolerance
        print(f"  {str(dtype).removeprefix('torch.'):<9} largest error {worst:.1e}: {verdict}")
    return passed


def difference(found: Tensor, expected: Tensor) -> float:
    """Return the 99.9th percentile of the differences, relative to the largest element.

    Rounding can move a sample to the other side of a pixel centre, where the interpolation has
    another slope. So a few gradients of locations differ, which is correct.
    """
    differences = (found - expected).abs().flatten()
    kept = differences.kthvalue(max(1, int(0.999 * differences.numel()))).values
    return float(kept / expected.abs().max())


def report_speed(stage: str, device: torch.device) -> None:
    """Print the times of one encoder or decoder layer's call."""
    precisions = [torch.float32, torch.bfloat16]
    times = []
    for dtype in precisions:
        work = make_workload(stage).to(device, dtype)  # type: ignore[arg-type]
        forward, both = speed(work, device)
        name = str(dtype).removeprefix("torch.")
        times.append(f"{name} {1e3 * forward:.2f} ms forward, {1e3 * both:.2f} ms with backward")
    print(f"  {stage} of DETA R50, one image of 800 × 1333: {'; '.join(times)}")


def speed(work: Workload, device: torch.device) -> tuple[float, float]:
    """Return the seconds of the fused forward pass, and of forward and backward pass."""
    kernels = kernels_for(device.type)
    inputs = (work.value, work.flat_shapes, work.references, work.offsets, work.logits)

    def both() -> None:
        kernels.fused_forward(*inputs)
        kernels.fused_backward(work.grad_output, *inputs)

    return (
        fastest(lambda: kernels.fused_forward(*inputs), device),
        fastest(both, device),
    )


def fastest(call: Callable[[], object], device: torch.device, repeats: int = 5) -> float:
    """Return the seconds of the fastest of a few calls, after one call to warm up."""
    call()
    seconds = []
    for _ in range(repeats):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        began = time.perf_counter()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - began)
    return min(seconds)


if __name__ == "__main__":
    sys.exit(main())
