"""Precision and determinism: what they mean on each device."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Literal

import torch

Precision = Literal["fp32", "tf32", "bf16"]
# The type in which autocast multiplies; float32 switches it off.
AUTOCAST: Mapping[Precision, torch.dtype] = {
    "fp32": torch.float32, "tf32": torch.float32, "bf16": torch.bfloat16,
}  # fmt: skip


def configure_numerics(precision: Precision, *, deterministic: bool) -> None:
    """Set what the whole process does from now on. Call it before CUDA is used.

    PyTorch by itself runs convolutions, but not matrix products, in TF32. Here `fp32` is IEEE
    float32 in both, and `tf32` is TF32 in both (10 bits of mantissa, on Ampere and later). With
    `bf16` autocast chooses bfloat16 for both, and what it leaves in float32 is IEEE.

    Args:
        deterministic: the same input gives the same bits in each run on the same kind of device. An
            operation that cannot do so raises; slower ones are chosen where there is a choice.
    """
    mode = "tf32" if precision == "tf32" else "ieee"
    torch.backends.cuda.matmul.fp32_precision = mode
    torch.backends.cudnn.conv.fp32_precision = mode  # type: ignore[attr-defined]
    torch.backends.cudnn.deterministic = deterministic
    # Kernels are chosen by timing them, so from run to run others may be.
    torch.backends.cudnn.benchmark = False
    if torch.are_deterministic_algorithms_enabled() != deterministic:  # it imports the compiler
        torch.use_deterministic_algorithms(deterministic)
    if deterministic:
        # cuBLAS reads it when CUDA begins; without it, products on several streams vary.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


def describe_numerics(precision: Precision, *, deterministic: bool, on_gpu: bool) -> str:
    """Return, for people, how a training computes."""
    meaning = {
        "fp32": "float32 (IEEE)",
        "tf32": "float32, products in TF32",
        "bf16": "bfloat16 by autocast, weights in float32",
    }[precision]
    if precision == "tf32" and not on_gpu:
        meaning = "float32 (IEEE; TF32 is for GPUs)"
    if not on_gpu:  # the same bits in any case
        return meaning
    return meaning + (", deterministic" if deterministic else ", not deterministic")
