"""Precision and determinism are what their keys say, for the whole process."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from deta.platform.learning.numerics import AUTOCAST, describe_numerics

ROOT = Path(__file__).resolve().parents[3]
SHOW = """
import os, sys, torch
from deta.platform.learning.numerics import configure_numerics
configure_numerics(sys.argv[1], deterministic=sys.argv[2] == "True")
print(
    torch.backends.cuda.matmul.fp32_precision, torch.backends.cudnn.conv.fp32_precision,
    torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.deterministic,
    os.environ.get("CUBLAS_WORKSPACE_CONFIG"),
)
"""


@pytest.mark.parametrize(
    ("precision", "deterministic", "expected"),
    [
        ("fp32", False, "ieee ieee False False None"),
        ("tf32", False, "tf32 tf32 False False None"),
        ("bf16", True, "ieee ieee True True :4096:8"),
    ],
)
def test_both_products_and_convolutions_follow_the_key(
    precision: str, deterministic: bool, expected: str
):
    environment = {k: v for k, v in os.environ.items() if k != "CUBLAS_WORKSPACE_CONFIG"}
    command = [sys.executable, "-c", SHOW, precision, str(deterministic)]
    shown = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True
    )
    assert shown.stdout.strip() == expected


def test_only_bf16_uses_autocast():
    assert {"fp32": torch.float32, "tf32": torch.float32, "bf16": torch.bfloat16} == AUTOCAST


def test_the_description_promises_no_more_than_holds():
    on_gpu = describe_numerics("bf16", deterministic=False, on_gpu=True)
    assert on_gpu == "bfloat16 by autocast, weights in float32, not deterministic"
    assert "IEEE" in describe_numerics("tf32", deterministic=False, on_gpu=False)
    assert describe_numerics("fp32", deterministic=True, on_gpu=True).endswith(", deterministic")
