"""What surrounds an export: how small pictures may be, what is compared, and how.

tests/jobs/test_export.py exports a model, which takes its time, and runs what comes out.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from deta.model.detector import ModelConfig
from deta.model.postprocess import Detections
from deta.platform.data.transforms import EvaluationSize
from deta.platform.inference.export import foreign_operators, least_side_px
from deta.platform.inference.export_check import Difference, compare, measure_speed
from deta.platform.inference.exported_model import Packed, open_program, pack, unpack


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


def test_pictures_are_packed_at_the_top_left():
    grey = [Image.new("RGB", (40, 20), (200, 200, 200)), Image.new("RGB", (30, 60), (9, 9, 9))]

    packed = pack(grey, EvaluationSize(short_edge=10, max_long_edge=16), least_side_px=18)

    assert packed.sizes_px.tolist() == [[8, 16], [16, 8]]
    assert packed.original_sizes_px.tolist() == [[20, 40], [60, 30]]
    assert packed.images.shape == (2, 3, 18, 18)
    assert packed.images[0].sum() == 3 * 8 * 16 * 200
    assert (packed.images[1, :, :16, :8] == 9).all()


def test_a_program_is_opened_and_its_empty_places_are_left_out(tmp_path):
    class Finding(nn.Module):
        def forward(
            self, images: Tensor, sizes_px: Tensor, original_sizes_px: Tensor
        ) -> tuple[Tensor, Tensor, Tensor]:
            labels = torch.tensor([[4, 2, -1], [3, -1, -1]])
            boxes_px = original_sizes_px[:, None].repeat(1, 3, 2).float()
            return images[:, 0, 0, :3].float() / 255, labels, boxes_px

    packed = pack([Image.new("RGB", (8, 9), (51, 0, 0))] * 2, EvaluationSize(short_edge=8), 1)
    program = torch.export.export(Finding(), tuple(packed))
    torch.export.save(program, tmp_path / "model.pt2")

    first, second = unpack(*open_program(tmp_path / "model.pt2")(packed))

    assert first.scores.tolist() == pytest.approx([0.2, 0.2])
    assert first.labels.tolist() == [4, 2]
    assert second.boxes_px.tolist() == [[9, 8, 9, 8]]


DETECTIONS = Detections(
    scores=torch.tensor([0.9, 0.8, 0.3, 0.1]),
    labels=torch.tensor([0, 1, 0, 2]),
    boxes_px=torch.tensor([[0.0, 0, 50, 50], [10, 10, 90, 90], [60, 0, 99, 40], [5, 5, 9, 9]]),
)


def changed(place: int, score: float = 0.0, shift_px: float = 0.0) -> Detections:
    scores, boxes_px = DETECTIONS.scores.clone(), DETECTIONS.boxes_px.clone()
    scores[place] += score
    boxes_px[place, 2] += shift_px
    return replace(DETECTIONS, scores=scores, boxes_px=boxes_px)


def test_equal_detections_differ_by_nothing_in_any_order():
    order = torch.tensor([1, 0, 3, 2])
    other = Detections(
        DETECTIONS.scores[order], DETECTIONS.labels[order], DETECTIONS.boxes_px[order]
    )

    assert compare(DETECTIONS, other, (100, 200), 100) == Difference(1, 4)


def test_differences_are_measured():
    score = compare(DETECTIONS, changed(1, score=0.0005), (100, 200), 100)
    box = compare(DETECTIONS, changed(2, shift_px=0.1), (100, 200), 100)

    assert score.scores == pytest.approx(0.0005, abs=1e-6)
    assert score.is_small
    assert box.boxes == pytest.approx(0.0005, abs=1e-6)
    assert box.boxes_px == pytest.approx(0.1, abs=1e-4)
    assert (score + box).boxes == box.boxes
    assert (score + box).num_images == 2


@pytest.mark.parametrize(
    "other",
    [
        changed(0, score=-0.01),
        changed(1, shift_px=2.0),
        changed(1, shift_px=90.0),
        replace(DETECTIONS, labels=torch.tensor([0, 2, 0, 2])),
        Detections(DETECTIONS.scores[:3], DETECTIONS.labels[:3], DETECTIONS.boxes_px[:3]),
    ],
)
def test_other_detections_are_refused(other):
    assert not compare(DETECTIONS, other, (100, 200), 100).is_small
    assert not compare(other, DETECTIONS, (100, 200), 100).is_small


def test_the_last_one_of_a_full_list_may_be_another():
    other = replace(changed(3, score=0.0002), labels=torch.tensor([0, 1, 0, 1]))

    assert compare(DETECTIONS, other, (100, 200), 4) == Difference(1, 3)
    assert not compare(DETECTIONS, other, (100, 200), 100).is_small


def test_nothing_compared_is_no_proof():
    assert not Difference().is_small


def test_batches_are_doubled_while_that_is_faster(monkeypatch):
    now_s = 0.0
    cost_s = {1: 0.4, 2: 0.5, 4: 0.7, 8: 2.0}

    def run(batch: Packed) -> None:
        nonlocal now_s
        now_s += cost_s[len(batch.images)]

    monkeypatch.setattr("time.perf_counter", lambda: now_s)
    one = Packed(torch.zeros(1, 3, 8, 8), torch.tensor([[8, 8]]), torch.tensor([[8, 8]]))

    speed = measure_speed(run, one)

    assert speed.latency_ms == pytest.approx(400)
    assert (speed.best_batch, speed.images_per_s) == (4, pytest.approx(4 / 0.7))
