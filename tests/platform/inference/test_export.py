"""How small images may be, and which operators a program contains.

tests/jobs/test_export.py exports a model, which takes its time, and runs the result.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from deta.model.config import ModelConfig
from deta.platform.inference.export import foreign_operators, least_side_px


@pytest.mark.parametrize("num_levels", [3, 4, 5])
@pytest.mark.parametrize("num_queries", [1, 300, 900])
def test_the_least_side_has_levels_and_pixels_enough(num_levels, num_queries):
    def is_enough(side: int) -> bool:
        images = torch.zeros(1, 1, side, side)
        edges = [len(images[0, 0, ::stride]) for stride in (8, 16, 32, 64, 128)[:num_levels]]
        return min(edges) >= 2 and sum(edge**2 for edge in edges) >= num_queries

    side = least_side_px(ModelConfig(num_levels=num_levels, num_queries=num_queries))

    assert is_enough(side)
    assert not is_enough(side - 1)


def test_an_operator_of_ours_is_found_even_in_a_loop():
    from torch._higher_order_ops.while_loop import while_loop

    class Looping(nn.Module):
        def forward(self, value: Tensor) -> Tensor:
            def step(turn: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
                locations = value.new_full((1, 1, 1, 1, 1, 2), 0.5)
                read = torch.ops.deta.ms_deform_attn(
                    value, [1, 1], locations, torch.ones(1, 1, 1, 1, 1)
                )
                return turn + 1, read.view(1, 1, 1, 2)

            return while_loop(lambda turn, _: turn < 2, step, (torch.tensor(0), value))[1]

    program = torch.export.export(Looping(), (torch.ones(1, 1, 1, 2),))

    assert foreign_operators(program) == {"deta.ms_deform_attn.default"}
