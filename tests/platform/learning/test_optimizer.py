"""Published parameter groups and schedules."""

from __future__ import annotations

import pytest
import torch

from deta.model.backbone import BackboneConfig
from deta.model.detector import DETA, ModelConfig
from deta.platform.learning.optimizer import OptimConfig, ScheduleConfig, make_optimizer, set_lr


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


def test_the_rate_drops_tenfold_when_its_epoch_begins():
    schedule = ScheduleConfig(epochs=12, lr_drop_epochs=(10.0,))
    factors = [schedule.lr_factor(epoch) for epoch in (0, 9.9999, 10, 11.9)]
    assert factors == pytest.approx([1, 1, 0.1, 0.1])


def test_cosine_falls_from_one_to_nothing_after_its_warm_up():
    schedule = ScheduleConfig(epochs=10, lr_drop_epochs=(), warmup_epochs=2.0, shape="cosine")
    factors = [schedule.lr_factor(epoch) for epoch in (0, 1, 2, 6, 10)]
    assert factors == pytest.approx([0, 0.5, 1, 0.5, 0])


def test_set_lr_multiplies_each_group_by_itself(published_model: DETA):
    optimizer = make_optimizer(published_model, OptimConfig())
    set_lr(optimizer, 0.1)
    set_lr(optimizer, 0.5)  # of the base, not of what it was
    assert sorted(g["lr"] for g in optimizer.param_groups) == pytest.approx([1e-5, 1e-4])
