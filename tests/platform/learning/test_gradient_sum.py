"""The sum of gradients does not depend on how the batch is split."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from deta.platform.learning.distributed import Worker
from deta.platform.learning.gradient_sum import (
    ALIGNMENT,
    GradientSum,
    batch_norm_statistics,
    broadcast_statistics,
)
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


@pytest.mark.parametrize(("num_workers", "accumulates"), [(1, True), (2, False), (3, True)])
def test_the_sum_lies_in_one_aligned_block_of_the_promised_size(
    num_workers: int, accumulates: bool
):
    """Whole gradients of 33, 32 and 1 elements begin at multiples of 32 elements."""
    parameters = [nn.Parameter(torch.zeros(size)) for size in (33, 32, 1)]
    gradients = GradientSum(parameters, num_workers, accumulates=accumulates)
    places = [(one.data_ptr() - gradients._block.data_ptr()) // 4 for one in gradients._gradients]
    assert places == [0, 64, 96]
    part = num_workers * ALIGNMENT
    length = -(-128 // part) * part
    assert len(gradients._block) == length
    assert gradients._block.dtype == torch.float32
    sums = gradients._sum
    assert (sums is None) == (not accumulates)
    if sums is not None:
        assert (len(sums), sums.dtype) == (length, torch.float64)
    assert len(gradients._parts) == (length if num_workers > 1 else 0)
    assert gradients._parts.dtype == (torch.float64 if accumulates else torch.float32)
    assert gradients._counts.tolist() == [0, 0, 0]
    assert gradients._counts.dtype == torch.int32


def test_the_buffers_are_where_the_parameters_are():
    parameters = [nn.Parameter(torch.zeros(5, device="meta"))]
    gradients = GradientSum(parameters, 2, accumulates=True)
    assert gradients._sum is not None
    for buffer in (gradients._block, gradients._sum, gradients._parts):
        assert buffer.device.type == "meta"
    assert gradients._counts.device.type == "cpu"  # travels beside the device's


def test_a_second_micro_batch_needs_a_sum_to_go_to():
    model = layers()
    gradients = GradientSum(model.parameters(), 2, accumulates=False)
    for is_first in (True, False):
        model(torch.ones(1, 40)).sum().backward()
        if is_first:
            gradients.add()
            assert all(parameter.grad is None for parameter in model.parameters())
        else:
            with pytest.raises(AssertionError):
                gradients.add()


def test_a_gradient_of_an_earlier_micro_batch_is_not_added_twice():
    """The second micro-batch does not use the last layer."""
    model = layers()
    gradients = GradientSum(model.parameters(), 1, accumulates=True)
    model(torch.ones(1, 40)).sum().backward()
    gradients.add()
    model[0](torch.ones(1, 40)).sum().backward()
    gradients.add()
    gradients.all_reduce()
    assert model[2].bias.grad is not None
    assert model[2].bias.grad.tolist() == [1.0]


def test_statistics_of_all_batch_norms_that_track_them_are_found():
    model = nn.Sequential(
        nn.BatchNorm1d(3), nn.Linear(3, 2), nn.BatchNorm1d(2, track_running_stats=False),
        nn.Sequential(nn.BatchNorm2d(4)), nn.GroupNorm(1, 2),
    )  # fmt: skip
    found = batch_norm_statistics(model)
    assert [one.numel() for one in found] == [3, 3, 1, 4, 4, 1]
    assert found[0] is model[0].running_mean


def test_all_workers_get_the_statistics_of_the_first():
    def copied(worker: Worker) -> list[float]:
        statistics = [torch.full((2,), float(worker.rank + 1)), torch.tensor([10.0 + worker.rank])]
        broadcast_statistics(statistics, worker.world_size)
        return torch.cat(statistics).tolist()

    assert on_two(copied) == [[1.0, 1.0, 10.0]] * 2
    alone = torch.ones(1)
    broadcast_statistics([alone], 1)  # needs no process group
    assert alone.item() == 1.0
