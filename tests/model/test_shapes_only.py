"""A model that is built for its shapes has those of the real one."""

from __future__ import annotations

from dataclasses import replace

import torch

from deta.jobs.deta_r50 import demo
from deta.model.architectures import make_detector
from deta.model.shapes_only import shapes_only


def test_shapes_are_those_of_the_real_model_and_values_are_not_there():
    config = replace(demo().model, num_classes=3)
    with shapes_only():
        shapes = make_detector(config).state_dict()
    real = make_detector(config).state_dict()
    assert {name: (value.shape, value.dtype) for name, value in shapes.items()} == {
        name: (value.shape, value.dtype) for name, value in real.items()
    }
    assert all(value.is_meta for value in shapes.values())
    assert not any(value.is_meta for value in real.values())
    assert torch.empty(1).normal_().isfinite()  # outside, all is as ever
