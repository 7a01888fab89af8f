"""Collectives between two real processes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from deta.platform.learning.distributed import (
    StepVote,
    Worker,
    broadcast_from_leader,
    first_different_tensor,
    gather_from_all,
    sum_votes,
)
from tests.platform.learning.two_workers import on_two


def test_flags_are_ored_and_counts_are_summed():
    def act(worker: Worker) -> StepVote:
        return sum_votes(
            StepVote(3 + worker.rank, stop=worker.rank == 1, num_replaced=worker.rank), worker
        )

    one, other = on_two(act)
    assert one == other == StepVote(7, stop=True, num_replaced=1)
    alone = StepVote(5, save=True)
    assert sum_votes(alone, Worker()) == alone


def test_values_are_broadcast_and_gathered():
    def act(worker: Worker) -> Any:
        return broadcast_from_leader(f"from {worker.rank}", worker), gather_from_all(
            worker.rank, worker
        )

    assert on_two(act) == [("from 0", [0, 1]), ("from 0", [0, 1])]


def _model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(40, 30), nn.BatchNorm1d(30), nn.Linear(30, 5))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_one_flipped_bit_on_one_worker_is_found_and_named(dtype):
    def act(worker: Worker) -> Any:
        model = _model().to(dtype)
        before = first_different_tensor(model, worker)
        weight = model[2].weight.detach().view(torch.uint8)
        found = []
        for place in range(0, weight.numel(), max(1, weight.numel() // 40)):
            bit = 1 << (place % 8)
            if worker.rank == 1:
                weight.view(-1)[place] ^= bit
            found.append(first_different_tensor(model, worker))
            if worker.rank == 1:
                weight.view(-1)[place] ^= bit
        return before, set(found)

    assert on_two(act) == [(None, {"2.weight"})] * 2
