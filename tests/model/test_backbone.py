"""A frozen BatchNorm that its convolution applies changes nothing but rounding and cost."""

from __future__ import annotations

from copy import deepcopy

import pytest
import timm
import torch
from timm.utils.model import freeze_batch_norm_2d
from torch import Tensor, nn
from torchvision.ops import FrozenBatchNorm2d

from deta.model.backbone import Backbone
from deta.model.config import BackboneConfig


def with_statistics(network: nn.Module) -> nn.Module:
    """Give each frozen BatchNorm statistics as after training."""
    torch.manual_seed(1)
    for module in network.modules():
        if isinstance(module, FrozenBatchNorm2d):
            module.weight.uniform_(0.5, 1.5)
            module.bias.normal_(0, 0.1)
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 1.5)
    return network


def gradients(network: nn.Module, features: list[Tensor]) -> dict[str, Tensor]:
    sum((feature.square().mean() for feature in features), torch.zeros(())).backward()
    return {name: p.grad for name, p in network.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("name", ["resnet10t", "resnet18", "resnet26", "resnet26d", "ecaresnet26t"])
def test_features_and_gradients_are_those_of_the_two_modules(name: str):
    config = BackboneConfig(name=name, pretrained=False, frozen_parts=("conv1", "bn1", "layer1"))
    ours = with_statistics(Backbone(config))
    plain = freeze_batch_norm_2d(
        timm.create_model(name, pretrained=False, features_only=True, out_indices=(2, 3, 4))
    )
    state = ours.body.state_dict()
    assert list(state) == list(plain.state_dict())  # checkpoints keep their names
    plain.load_state_dict(state)
    images = torch.randn(2, 3, 65, 98)
    features, expected = ours(images), plain(images)
    for one, other in zip(features, expected, strict=True):
        torch.testing.assert_close(
            one, other, rtol=1e-4, atol=1e-4 * float(other.detach().abs().max())
        )
    found, wanted = gradients(ours.body, features), gradients(plain, expected)
    trained = {name for name in wanted if not name.startswith(config.frozen_parts)}
    assert set(found) == trained
    for name in trained:
        scale = float(wanted[name].abs().max())
        torch.testing.assert_close(found[name], wanted[name], rtol=1e-3, atol=1e-3 * scale)


def test_a_copy_applies_its_own_norms():
    original = with_statistics(Backbone(BackboneConfig(name="resnet18", pretrained=False)))
    images = torch.randn(1, 3, 64, 64)
    before = original(images)[-1]
    copied = deepcopy(original)
    for module in copied.modules():
        if isinstance(module, FrozenBatchNorm2d):
            module.weight.zero_()
    assert torch.equal(original(images)[-1], before)
    assert not torch.equal(copied(images)[-1], before)


def test_maps_have_the_running_precision():
    backbone = Backbone(BackboneConfig(name="resnet18", pretrained=False))
    with torch.autocast("cpu", torch.bfloat16):
        assert {feature.dtype for feature in backbone(torch.randn(1, 3, 64, 64))} == {
            torch.bfloat16
        }
