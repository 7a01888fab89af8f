"""The sum of gradients does not depend on how the batch is split."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from deta.platform.learning.distributed import Worker
from deta.platform.learning.gradient_sum import GradientSum
from tests.platform.learning.two_workers import on_two


def layers() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(40, 60), nn.Tanh(), nn.Linear(60, 1))


def summed(order: list[int], exact: bool) -> torch.Tensor:
    """Return the gradient over parts of very different scale, added in this order."""
    model = layers()
    gradients = GradientSum(model.parameters(), 1, accumulates=True)
    for part in order:
        data = torch.randn(16, 40, generator=torch.Generator().manual_seed(part)) * 3.0**part
        model(data).square().mean().backward()
        if exact:
            gradients.add()
    if exact:
        gradients.all_reduce()
    return torch.cat([parameter.grad.flatten() for parameter in model.parameters()])


def test_the_order_of_the_parts_does_not_matter():
    first, second = ([0, 1, 2, 3, 4, 5, 6, 7], [5, 2, 7, 0, 3, 6, 1, 4])
    assert torch.equal(summed(first, exact=True), summed(second, exact=True))
    assert not torch.equal(summed(first, exact=False), summed(second, exact=False))


def test_the_result_is_the_sum():
    order = list(range(8))
    assert torch.allclose(summed(order, exact=True), summed(order, exact=False), rtol=1e-4)


def test_a_step_begins_with_an_empty_sum():
    model = layers()
    gradients = GradientSum(model.parameters(), 1, accumulates=True)
    for _ in range(2):
        model.zero_grad()
        model(torch.ones(1, 40)).sum().backward()
        gradients.add()
        gradients.all_reduce()
        found = model[2].bias.grad
        assert found is not None
        assert found.item() == 1.0


def test_an_unused_parameter_gets_no_gradient_and_so_does_not_decay():
    model = layers()
    unused = nn.Parameter(torch.ones(3))
    gradients = GradientSum([*model.parameters(), unused], 1, accumulates=True)
    model(torch.ones(1, 40)).sum().backward()
    gradients.add()
    gradients.all_reduce()
    assert unused.grad is None
    assert model[0].weight.grad is not None


def test_a_value_that_is_not_finite_stays_so():
    model = layers()
    gradients = GradientSum(model.parameters(), 1, accumulates=True)
    for factor in (1.0, float("nan")):
        (model(torch.ones(1, 40)).sum() * factor).backward()
        gradients.add()
    gradients.all_reduce()
    assert model[2].bias.grad is not None
    assert model[2].bias.grad.isnan().all()


@pytest.mark.parametrize("accumulates", [False, True])
def test_two_workers_get_the_sum_that_one_gets(accumulates: bool):
    """Also the parameters that only one of them used, and the one that none used."""

    def gradients_of(rank: int, model: nn.Module) -> None:
        generator = torch.Generator().manual_seed(rank)
        data = torch.randn(16, 40, generator=generator) * 30.0**rank
        hidden = model[1](model[0](data))
        (model[2](hidden) if rank == 0 else hidden).square().mean().backward()

    def summed_by(worker: Worker) -> list[Any]:
        model, unused = layers(), nn.Parameter(torch.ones(3))
        parameters = [*model.parameters(), unused]
        gradients = GradientSum(parameters, worker.world_size, accumulates=accumulates)
        for _ in range(2):  # the second step is not the sum of both
            model.zero_grad()
            gradients_of(worker.rank, model)
            gradients.add()
            gradients.all_reduce()
        return [None if p.grad is None else p.grad.tolist() for p in parameters]

    alone = layers()
    expected = GradientSum(alone.parameters(), 1, accumulates=True)
    for rank in (0, 1):
        gradients_of(rank, alone)
        expected.add()
    expected.all_reduce()

    for found in on_two(summed_by):
        *used, unused = found
        assert unused is None
        for gradient, parameter in zip(used, alone.parameters(), strict=True):
            assert gradient is not None
            assert torch.equal(torch.tensor(gradient), parameter.grad)


def test_one_gradient_of_one_worker_needs_no_sum():
    assert not GradientSum(layers().parameters(), 1, accumulates=False).is_needed
    assert GradientSum(layers().parameters(), 2, accumulates=False).is_needed
    assert GradientSum(layers().parameters(), 1, accumulates=True).is_needed
