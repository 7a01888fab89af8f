"""One update: independent of the split into micro-batches, skipped if not finite, clipped."""

from __future__ import annotations

import contextlib
from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from deta.model import proposals
from deta.model.architectures import make_criterion, make_detector
from deta.model.batch import Batch, Target, pad_batch, pad_targets
from deta.model.config import BackboneConfig, CriterionConfig, ModelConfig
from deta.platform.learning.gradient_sum import GradientSum
from deta.platform.learning.train_step import StepResult, train_step

CPU = torch.device("cpu")


class Model(nn.Module):
    """One number per image."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(3 * 4 * 4, 1)

    def forward(self, images: Tensor, padding: Tensor) -> Tensor:
        return self.layer(images.flatten(1))  # B 1


class Criterion(nn.Module):
    """A sum over images, divided by the number of boxes, as the detectors' losses are."""

    def forward(self, outputs: Tensor, batch: Batch, num_boxes: Tensor) -> dict[str, Tensor]:
        return {"square": outputs.square().sum() / num_boxes, "size": outputs.sum() / num_boxes}

    def total(self, losses: dict[str, Tensor]) -> Tensor:
        return 2 * losses["square"] + losses["size"]


class NoUpdate(torch.optim.Optimizer):
    """For the meta device, which fused optimizers have no kernels for."""

    def step(self, closure: Any = None) -> None:
        pass


def batch_of(images: Tensor) -> Batch:
    one = Target(torch.tensor([[0.5, 0.5, 0.2, 0.2]]), torch.tensor([0]))
    size = len(images)
    return Batch(
        images,
        torch.zeros(size, 4, 4, dtype=torch.bool),
        pad_targets([one] * size),
        torch.arange(size),
    )


def step(images: list[Tensor], max_grad_norm: float | None = None) -> tuple[Model, StepResult]:
    model = Model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, fused=True)
    result = train_step(
        model,
        Criterion(),  # type: ignore[arg-type]
        [batch_of(part) for part in images],
        optimizer,
        num_boxes=sum(len(part) for part in images),
        seeds=range(len(images)),
        max_grad_norm=max_grad_norm,
        precision=torch.float32,
        device=CPU,
        gradients=GradientSum(model.parameters(), 1, accumulates=True),
    )
    return model, result


def images_of(size: int) -> Tensor:
    return torch.randn(size, 3, 4, 4, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("sizes", [[6], [3, 3], [1, 2, 3], [1] * 6])
def test_the_update_does_not_depend_on_the_micro_batches(sizes: list[int]):
    whole, expected = step([images_of(6)])
    model, result = step(list(images_of(6).split(sizes)))

    assert result.updated
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter, whole.get_parameter(name), msg=name)
    for name, value in expected.scalars.items():
        torch.testing.assert_close(result.scalars[name], value, msg=name)
    assert set(result.scalars) == {"square", "size", "loss", "grad_norm"}
    assert not any(value.requires_grad for value in result.scalars.values())


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_changes_no_weight(bad: float):
    images = images_of(4)
    images[2, 0, 0, 0] = bad
    model, result = step([images[:2], images[2:]])

    assert not result.updated
    assert not result.scalars["loss"].isfinite()
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, Model().get_parameter(name)), name


def test_gradients_are_clipped_and_reported_before_clipping():
    _, free = step([images_of(4)])
    model, clipped = step([images_of(4)], max_grad_norm=0.01)

    assert clipped.scalars["grad_norm"] == free.scalars["grad_norm"] > 0.01
    moved = [p - Model().get_parameter(name) for name, p in model.named_parameters()]
    length = torch.cat([part.flatten() for part in moved]).norm()
    assert length.item() == pytest.approx(0.1 * 0.01, rel=1e-3)  # learning rate times limit


@pytest.mark.parametrize("num_micro_batches", [1, 2])
def test_a_step_waits_for_the_device_in_suppression_and_nowhere_else(
    monkeypatch: pytest.MonkeyPatch, num_micro_batches: int
):
    """Run on the meta device, whose tensors have no values, and count who asks for one."""
    waits: Counter[str] = Counter()

    def keep_all(boxes: Tensor, scores: Tensor, iou: float) -> Tensor:
        waits["nms"] += 1
        return torch.arange(len(scores), device=scores.device)

    def count(name: str, answer: Any) -> None:
        real = getattr(Tensor, name)

        def asked(tensor: Tensor, *arguments: Any, **named: Any) -> Any:
            if tensor.device.type != "meta":
                return real(tensor, *arguments, **named)
            waits[name] += 1
            return answer(tensor)

        monkeypatch.setattr(Tensor, name, asked)

    real_to = Tensor.to

    def to(tensor: Tensor, *arguments: Any, **named: Any) -> Tensor:
        moved = real_to(tensor, *arguments, **named)
        if moved.device != tensor.device and not named.get("non_blocking"):
            waits[f"copy {tensor.device.type} to {moved.device.type}"] += 1
        return moved

    monkeypatch.setattr(torch, "autocast", lambda *_, **__: contextlib.nullcontext())
    monkeypatch.setattr(proposals, "nms", keep_all)
    count("tolist", lambda tensor: [1] * tensor.numel())
    count("item", lambda tensor: 1.0)
    count("__bool__", lambda tensor: True)
    count("cpu", lambda tensor: torch.zeros(tensor.shape, dtype=tensor.dtype))
    backbone = BackboneConfig(name="resnet10t", pretrained=False, norm="group", frozen_parts=())
    config = ModelConfig(
        backbone=backbone, num_classes=3, num_levels=4, dim=16, num_heads=2, num_points=1,
        encoder_layers=1, decoder_layers=2, ffn_dim=16, num_queries=10,
    )  # fmt: skip
    model = make_detector(config).to("meta")
    target = Target(torch.tensor([[0.5, 0.5, 0.2, 0.2]]), torch.tensor([1]))
    micro_batch = pad_batch([torch.zeros(3, 64, 96), torch.zeros(3, 60, 64)], [target] * 2)
    monkeypatch.setattr(Tensor, "to", to)

    result = train_step(
        model,
        make_criterion(CriterionConfig(), config),
        [micro_batch] * num_micro_batches,
        NoUpdate(model.parameters(), {}),
        num_boxes=2 * num_micro_batches,
        seeds=range(num_micro_batches),
        max_grad_norm=0.1,
        precision=torch.float32,
        device=torch.device("meta"),
        gradients=GradientSum(model.parameters(), 1, accumulates=True),
    )

    assert waits == {"nms": num_micro_batches}
    assert result.updated
    assert waits == {"nms": num_micro_batches, "__bool__": 1}
