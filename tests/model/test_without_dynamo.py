"""The compiler is imported by what compiles, and by nothing else."""

from __future__ import annotations

import subprocess
import sys

TRAIN = """
import sys
from dataclasses import replace
import torch
from deta.model.architectures import make_detector
from deta.jobs.deta_r50 import demo
from deta.platform.learning.optimizer import make_optimizer, set_lr

model = make_detector(replace(demo().model, num_classes=2))
optimizer = make_optimizer(model, demo().optim)
sum(p.square().sum() for p in model.parameters()).backward()
optimizer.step()
optimizer.zero_grad()
optimizer.load_state_dict(optimizer.state_dict())
assert "torch._dynamo" not in sys.modules
"""
COMPILE = """
import torchvision, timm.models.naflexvit as naflex
assert torch.compile(lambda x: 2 * x, backend="eager", fullgraph=True)(torch.ones(1)) == 2
boxes = [torch.tensor([[0.0, 0.0, 4.0, 4.0]])]
assert torchvision.ops.roi_align(torch.ones(1, 1, 8, 8), boxes, 2).shape == (1, 1, 2, 2)
assert torch._dynamo.__file__ and naflex.NaFlexRopeIterator
optimizer.step()
"""


def run(code: str) -> None:
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_a_model_and_its_optimizer_do_not_import_the_compiler():
    run(TRAIN)


def test_what_compiles_finds_the_compiler_as_ever():
    run(TRAIN + COMPILE)
