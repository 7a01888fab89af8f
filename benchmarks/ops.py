#!/usr/bin/env python
"""Compare the operator with all other ways to compute it, in one run.

  python benchmarks/ops.py [--threads 2] [--device cuda] [--images 1] [--repeats 5]

Shapes are those of DETA R50 5-scale on an image of 800 × 1333. Timed calls start with references,
offsets and logits, as a network predicts them; `prepared` rows start with locations and weights,
and are compared with each other. Rounds are interleaved, so that a slow phase of the machine
affects all of them; the median counts. Hugging Face's DETA needs `pip install
transformers==4.57.6`, preferably in a separate environment. On a GPU, `mmcv` is measured too if it
is installed. What is not installed is omitted, with a message.
"""

from __future__ import annotations

import argparse
import importlib.util
import statistics
from collections.abc import Callable

import torch
import torch.nn.functional as F
from measuring import measure_bandwidth, peak_memory, processor, timed
from torch import Tensor

from deta.ops.ms_deform_attn import ms_deform_attn, ms_deform_attn_fused, path
from deta.ops.workload import Workload, make_workload

Operator = Callable[[Workload, Tensor, Tensor, Tensor, Tensor], Tensor]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--images", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--size", type=int, nargs=2, default=(800, 1333), metavar=("H", "W"))
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    device = torch.device(arguments.device)
    size, repeats = tuple(arguments.size), arguments.repeats

    name = torch.cuda.get_device_name(device) if device.type == "cuda" else processor()
    bandwidth = measure_bandwidth(device)
    print(f"{name}, {arguments.threads} threads, PyTorch {torch.__version__}")
    print(f"our kernels: {path(device.type)}; a copy runs at {bandwidth / 1e9:.1f} GB/s\n")
    for missing in ("transformers", *(["mmcv"] if device.type == "cuda" else [])):
        if importlib.util.find_spec(missing) is None:
            print(f"{missing} is not installed: omitted\n")

    for stage in ("encoder", "decoder"):
        work = make_workload(stage, size, arguments.images).to(device, torch.float32)
        print(f"**{stage}**, {work.value.shape[1]:,} pixels, {work.offsets.shape[1]:,} queries\n")
        print("| path | forward ms | ratio | forward + backward ms | ratio | memory MB | floor |")
        print("|---|---|---|---|---|---|---|")
        for group, candidates in (("", operators(device)), ("prepared: ", prepared(device))):
            measured = measure(candidates, work, repeats)
            slowest = measured["grid_sample, as in DETA"]
            for label, (forward, both, memory) in measured.items():
                floor = (work.bytes_touched(False) + work.bytes_touched(True)) / bandwidth
                print(
                    f"| {group}{label} | {1e3 * forward:.1f} | {slowest[0] / forward:.1f}× "
                    f"| {1e3 * both:.1f} | {slowest[1] / both:.1f}× | {memory / 1e6:.0f} "
                    f"| {both / floor:.1f}× |"
                )
        print()
    print(
        "ratio: speed relative to grid_sample. memory: peak of forward and backward. "
        "floor: time of forward and backward relative to moving each tensor of the fused form once."
    )


# The candidates. Each takes the workload and its four differentiable tensors.


def operators(device: torch.device) -> dict[str, Operator]:
    """Return the candidates that start with references, offsets and logits."""

    def fused(work: Workload, value: Tensor, *others: Tensor) -> Tensor:
        return ms_deform_attn_fused(value, work.shapes, *others)

    def fused_bf16(work: Workload, value: Tensor, *others: Tensor) -> Tensor:
        return ms_deform_attn_fused(value.bfloat16(), work.shapes, *others)

    def unfused(work: Workload, value: Tensor, *others: Tensor) -> Tensor:
        return ms_deform_attn(value, work.shapes, *eager_preparation(work, *others))

    def sampled(work: Workload, value: Tensor, *others: Tensor) -> Tensor:
        return grid_sample(work, value, *eager_preparation(work, *others))

    found: dict[str, Operator] = {
        "grid_sample, as in DETA": sampled,
        "ours, after preparation in PyTorch": unfused,
        "ours, fused": fused,
        "ours, fused, features in bfloat16": fused_bf16,
    }
    huggingface = find_huggingface()
    if huggingface is not None:
        found["Hugging Face DETA"] = lambda work, value, *others: huggingface(
            work, value, *eager_preparation(work, *others)
        )
    return found


def prepared(device: torch.device) -> dict[str, Operator]:
    """Return those that start with locations and weights instead of offsets and logits."""

    def ours(work: Workload, value: Tensor, _: Tensor, locations: Tensor, weights: Tensor):
        return ms_deform_attn(value, work.shapes, locations, weights)

    def sampled(work: Workload, value: Tensor, _: Tensor, locations: Tensor, weights: Tensor):
        return grid_sample(work, value, locations, weights)

    found: dict[str, Operator] = {"grid_sample, as in DETA": sampled, "ours": ours}
    if device.type == "cuda" and importlib.util.find_spec("mmcv") is not None:
        from mmcv.ops.multi_scale_deform_attn import MultiScaleDeformableAttnFunction

        def mmcv(work: Workload, value: Tensor, _: Tensor, locations: Tensor, weights: Tensor):
            shapes = torch.tensor(work.shapes, device=value.device)
            areas = shapes.prod(1)
            return MultiScaleDeformableAttnFunction.apply(
                value, shapes, areas.cumsum(0) - areas, locations, weights, 64
            )

        found["mmcv, the original CUDA kernel"] = mmcv
    return found


def eager_preparation(
    work: Workload, references: Tensor, offsets: Tensor, logits: Tensor
) -> tuple[Tensor, Tensor]:
    """Compute softmax and sampling locations as DETA's modules do."""
    weights = logits.flatten(3).softmax(-1).view_as(logits)
    if references.shape[-1] == 2:
        sides = torch.tensor([(w, h) for h, w in work.shapes], device=offsets.device)
        locations = references[:, :, None, :, None] + offsets / sides[:, None]
    else:
        boxes = references[:, :, None, :, None]
        locations = boxes[..., :2] + offsets / offsets.shape[4] * boxes[..., 2:] * 0.5
    return locations, weights


def grid_sample(work: Workload, value: Tensor, locations: Tensor, weights: Tensor) -> Tensor:
    """Compute as DETA does without its CUDA kernel: sample all levels, stack and weight them."""
    images, _, heads, channels = value.shape
    queries = locations.shape[1]
    grids = 2 * locations - 1
    sampled = []
    levels = value.split([h * w for h, w in work.shapes], 1)
    for level, ((height, width), features) in enumerate(zip(work.shapes, levels, strict=True)):
        features = features.flatten(2).transpose(1, 2).reshape(-1, channels, height, width)
        grid = grids[:, :, :, level].transpose(1, 2).flatten(0, 1)
        sampled.append(F.grid_sample(features, grid, padding_mode="zeros", align_corners=False))
    weights = weights.transpose(1, 2).reshape(images * heads, 1, queries, -1)
    output = (torch.stack(sampled, -2).flatten(-2) * weights).sum(-1)
    return output.view(images, heads * channels, queries).transpose(1, 2).contiguous()


def find_huggingface() -> Operator | None:
    if importlib.util.find_spec("transformers") is None:
        return None
    from transformers.models.deprecated.deta.modeling_deta import multi_scale_deformable_attention

    def operator(work: Workload, value: Tensor, locations: Tensor, weights: Tensor) -> Tensor:
        return multi_scale_deformable_attention(
            value, torch.tensor(work.shapes), locations, weights
        )

    return operator


# Measurement.


def measure(
    candidates: dict[str, Operator], work: Workload, repeats: int
) -> dict[str, tuple[float, float, float]]:
    """Return for each candidate: seconds of the forward pass, and seconds and bytes of both passes.

    All candidates must agree before they are timed.
    """
    given = (work.value, work.references, work.offsets, work.logits)
    if "ours" in candidates:
        given = (work.value, work.references, *work.prepare())
    device = work.value.device
    expected, seconds, memory = None, {}, {}
    for label, operator in candidates.items():
        output = operator(work, *given).float()
        expected = output if expected is None else expected
        tolerance = 1e-2 if "bfloat16" in label else 1e-4
        error = float((output - expected).abs().max() / expected.abs().max())
        assert error < tolerance, f"{label} has an error of {error:.1e}"
        seconds[label] = ([], [])
        memory[label] = peak_memory(lambda op=operator: both_ways(op, work, given), device)
    for _ in range(repeats):
        for label, operator in candidates.items():
            with torch.no_grad():
                seconds[label][0].append(timed(lambda op=operator: op(work, *given), device))
            seconds[label][1].append(timed(lambda op=operator: both_ways(op, work, given), device))
    return {
        label: (statistics.median(forward), statistics.median(both), memory[label])
        for label, (forward, both) in seconds.items()
    }


def both_ways(operator: Operator, work: Workload, given: tuple[Tensor, ...]) -> None:
    value, references, *others = given
    leaves = [tensor.detach().requires_grad_() for tensor in (value, *others)]
    output = operator(work, leaves[0], references, *leaves[1:])
    torch.autograd.grad(output, leaves, work.grad_output.to(output.dtype))


if __name__ == "__main__":
    main()
