"""Published parameter groups and schedules, early stopping, frozen parts, optimizer state."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from deta.model.architectures import make_detector
from deta.model.config import BackboneConfig, ModelConfig
from deta.model.detector import DETA
from deta.platform.learning.optimizer import (
    FixedStatsBatchNorm2d,
    freeze,
    load_optimizer_state,
    make_optimizer,
    optimizer_state,
    set_lr,
)
from deta.platform.learning.schedule import OptimConfig


@pytest.fixture(scope="module")
def published_model() -> DETA:
    with torch.device("meta"):
        return DETA(ModelConfig(backbone=BackboneConfig(pretrained=False)))


def test_groups_are_those_of_the_official_code(published_model: DETA):
    optimizer = make_optimizer(published_model, OptimConfig())
    by_lr = {g["lr"]: sum(p.numel() for p in g["params"]) for g in optimizer.param_groups}
    backbone = sum(
        p.numel() for p in published_model.pyramid.backbone.parameters() if p.requires_grad
    )
    # 6 encoder and 6 decoder layers, each 320 x 256 weights and 320 biases
    slow = backbone + 12 * 320 * 257
    assert list(by_lr) == pytest.approx([2e-4, 2e-5])
    assert list(by_lr.values()) == [sum(by_lr.values()) - slow, slow]
    assert {g["weight_decay"] for g in optimizer.param_groups} == {1e-4}


def test_every_trainable_weight_is_in_exactly_one_group(published_model: DETA):
    optimizer = make_optimizer(published_model, OptimConfig(decay_norms=False))
    listed = [id(p) for g in optimizer.param_groups for p in g["params"]]
    assert sorted(listed) == sorted(id(p) for p in published_model.parameters() if p.requires_grad)


def test_norms_are_spared_weight_decay_when_asked(published_model: DETA):
    optimizer = make_optimizer(published_model, OptimConfig(decay_norms=False, weight_decay=0.1))
    spared = {id(p) for g in optimizer.param_groups if g["weight_decay"] == 0 for p in g["params"]}
    norms = {
        id(p)
        for module in published_model.modules()
        if isinstance(module, (torch.nn.LayerNorm, torch.nn.GroupNorm))
        for p in module.parameters()
    }
    assert spared == norms


def test_set_lr_multiplies_each_group_by_itself(published_model: DETA):
    optimizer = make_optimizer(published_model, OptimConfig())
    set_lr(optimizer, 0.1)
    set_lr(optimizer, 0.5)  # of the base, not of what it was
    assert sorted(g["lr"] for g in optimizer.param_groups) == pytest.approx([1e-5, 1e-4])


TINY_MODEL = ModelConfig(
    backbone=BackboneConfig(
        name="resnet10t", pretrained=False, norm="group", frozen_parts=(), width=0.25
    ),
    num_classes=5,
    num_levels=4,
    dim=16,
    num_heads=2,
    num_points=1,
    encoder_layers=1,
    decoder_layers=1,
    ffn_dim=16,
    num_queries=10,
)


def frozen_model(parts: tuple[str, ...], norm: str = "group") -> nn.Module:
    torch.manual_seed(0)
    backbone = replace(TINY_MODEL.backbone, norm=norm)  # type: ignore[arg-type]
    model = make_detector(replace(TINY_MODEL, backbone=backbone))
    freeze(model, parts)
    return model


@pytest.mark.parametrize(
    ("parts", "trains", "rests"),
    [
        (("backbone",), ["encoder", "decoder", "class_heads", "pyramid.projections"],
         ["pyramid.backbone"]),
        (("backbone", "encoder"), ["first_stage", "decoder"], ["pyramid.backbone", "encoder"]),
        (("decoder.layers.0",), ["encoder", "box_heads"], ["decoder.layers.0"]),
        (("all-but-heads",), ["class_heads", "box_heads"],
         ["pyramid", "encoder", "first_stage", "decoder", "level_embedding"]),
    ],
)  # fmt: skip
def test_the_parts_that_are_named_do_not_train(parts, trains, rests):
    model = frozen_model(parts)
    for name, parameter in model.named_parameters():
        if name.startswith(tuple(rests)):
            assert not parameter.requires_grad, name
        if name.startswith(tuple(trains)):
            assert parameter.requires_grad, name
    optimizer = make_optimizer(model, OptimConfig())
    listed = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert listed == {id(p) for p in model.parameters() if p.requires_grad}


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        (("backbon",), "no part 'backbon'; use one of .*pyramid.*all-but-heads"),
        (("pyramid", "encoder", "first_stage", "decoder", "level_embedding", "class_heads",
          "box_heads"), "leaves nothing to train"),
    ],
)  # fmt: skip
def test_a_part_that_is_not_there_is_refused_by_name(parts, message):
    with pytest.raises(ValueError, match=message):
        frozen_model(parts)


def test_frozen_batch_norm_keeps_its_statistics_while_the_model_trains():
    model = frozen_model(("backbone",), norm="batch")
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    model.train()
    model(torch.randn(2, 3, 64, 64), torch.zeros(2, 64, 64, dtype=torch.bool))
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    assert norms
    assert all(isinstance(norm, FixedStatsBatchNorm2d) and not norm.training for norm in norms)
    assert all(torch.equal(buffer, before[name]) for name, buffer in model.named_buffers())
    assert model.state_dict().keys() == frozen_model((), norm="batch").state_dict().keys()


def test_optimizer_state_survives_another_order_of_parameters():
    model = torch.nn.ModuleDict({"a": torch.nn.Linear(2, 2), "b": torch.nn.Linear(2, 1)})
    optimizer = torch.optim.AdamW(model.parameters())
    model["b"](model["a"](torch.ones(1, 2))).sum().backward()
    optimizer.step()
    tensors = optimizer_state(optimizer, model)

    other = torch.nn.ModuleDict({"b": torch.nn.Linear(2, 1), "a": torch.nn.Linear(2, 2)})
    restored = torch.optim.AdamW(other.parameters())
    load_optimizer_state(restored, other, tensors)
    again = optimizer_state(restored, other)
    assert again.keys() == tensors.keys()
    assert all(torch.equal(again[name], tensors[name]) for name in tensors)
