"""Anchors and the selection of proposals, against published numbers and a plain reference."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torchvision.ops import box_iou

from deta.model.boxes import cxcywh_to_xyxy
from deta.model.proposals import make_anchors, select_highest, select_spread
from deta.model.transformer import Levels

SHARED = Path(
    os.environ.get("DETA_SHARED", Path(__file__).resolve().parents[2] / "../shared")
).resolve()
GEOMETRY_CASES = [
    (path, name)
    for path in sorted((SHARED / "parity").glob("*/functions/functions*.safetensors"))
    for name in sorted({key.split(".")[0] for key in load_file(path)})
    if name.startswith("geom")
]
SELECTION_CASES = [
    (path, case)
    for path in sorted((SHARED / "parity").glob("*/nms/selection*.json"))
    for case in json.loads(path.read_text())
]
TIE = 2e-6  # scores closer than this may swap between two correct programs


@pytest.mark.parametrize(
    ("path", "name"), GEOMETRY_CASES, ids=[f"{path.stem}-{name}" for path, name in GEOMETRY_CASES]
)
def test_parity_of_anchors(path: Path, name: str, compare):
    case = {key.removeprefix(f"{name}."): value for key, value in load_file(path).items()}
    num_levels = len(case["spatial_shapes"])
    levels = Levels.of([case[f"mask{level}"] for level in range(num_levels)])
    logits, used = make_anchors(levels)
    compare("functions", "anchor logits", logits, case["anchors_unactivated"], 1e-6)
    compare("functions", "anchors", logits.sigmoid(), case["anchors"], 1e-6)
    assert torch.equal(used, case["anchors_unactivated"].isfinite().all(-1))


@pytest.mark.parametrize(
    ("path", "case"),
    SELECTION_CASES,
    ids=[f"{path.stem}-{case['case']}" for path, case in SELECTION_CASES],
)
def test_parity_of_selection(path: Path, case: dict, record_property):
    tensors = load_file(path.with_suffix(".safetensors"))
    logits, boxes_logits, expected = (
        tensors[f"{case['case']}.{key}"] for key in ("logits", "boxes_unactivated", "selected")
    )
    if case["assign_first_stage"]:
        found = select_spread(
            logits,
            boxes_logits.sigmoid(),
            [tuple(shape) for shape in case["spatial_shapes"]],
            case["num_proposals"],
        )
    else:
        found = select_highest(logits, case["num_proposals"])
    assert found.shape == expected.shape
    missing = sum(
        len(set(theirs.tolist()) - set(ours.tolist()))
        for ours, theirs in zip(found, expected, strict=True)
    )
    record_property("difference", ("nms", "share of other proposals", missing / expected.numel()))
    assert missing == 0
    swapped = found != expected
    gap = (logits.gather(1, found) - logits.gather(1, expected)).abs()
    assert (gap[swapped] <= TIE).all()


def select_spread_plainly(
    scores: Tensor, boxes: Tensor, shapes: list[tuple[int, int]], num_proposals: int
) -> list[int]:
    """Select one image's proposals by DETA's definition, one pixel at a time."""
    boxes = cxcywh_to_xyxy(boxes).clamp(0, 1).double()
    survivors, level_of = [], {}
    start = 0
    for level, (height, width) in enumerate(shapes):
        pixels = range(start, start + height * width)
        start += height * width
        kept: list[int] = []
        for pixel in sorted(pixels, key=lambda pixel: -scores[pixel])[:1000]:
            level_of[pixel] = level
            if not kept or box_iou(boxes[pixel : pixel + 1], boxes[kept]).max() <= 0.9:
                kept.append(pixel)
        survivors += kept
    if len(survivors) < num_proposals:
        return sorted(range(start), key=lambda pixel: -scores[pixel])[:num_proposals]
    survivors.sort(key=lambda pixel: -scores[pixel])
    share, counts = [], [0] * len(shapes)
    for pixel in survivors:
        if counts[level_of[pixel]] < num_proposals // len(shapes):
            counts[level_of[pixel]] += 1
            share.append(pixel)
    rest = [pixel for pixel in survivors if pixel not in share]
    chosen = share + rest[: num_proposals - len(share)]
    return sorted(chosen, key=lambda pixel: -scores[pixel])


def random_stage(
    shapes: list[tuple[int, int]], seed: int, num_distinct: int | None = None
) -> tuple[Tensor, Tensor]:
    """Return scores and boxes of two images, with only `num_distinct` different boxes if given."""
    generator = torch.Generator().manual_seed(seed)
    num_pixels = sum(height * width for height, width in shapes)
    scores = torch.randn(2, num_pixels, generator=generator)
    boxes = torch.rand(2, num_pixels, 4, generator=generator) * 0.5 + 0.1
    if num_distinct is not None:
        boxes = boxes[:, torch.randint(num_distinct, (num_pixels,), generator=generator)]
    return scores, boxes


@pytest.mark.parametrize("num_proposals", [1, 4, 10, 37])
@pytest.mark.parametrize("num_distinct", [None, 15, 1])
@pytest.mark.parametrize("shapes", [[(8, 9), (4, 5), (2, 3)], [(6, 6), (1, 1)], [(7, 7)]])
def test_spread_selection_equals_its_definition(shapes, num_distinct, num_proposals):
    scores, boxes = random_stage(shapes, num_proposals, num_distinct)
    found = select_spread(scores, boxes, shapes, num_proposals)
    for image in range(2):
        expected = select_spread_plainly(scores[image], boxes[image], shapes, num_proposals)
        assert found[image].tolist() == expected


def test_a_level_gives_no_more_than_1000_candidates():
    shapes = [(40, 40), (2, 2)]
    scores, boxes = random_stage(shapes, seed=5)
    found = select_spread(scores, boxes, shapes, 1003)
    best = scores[0, :1600].topk(1000).indices
    outside = set(range(1600)) - set(best.tolist())
    assert not outside & set(found[0].tolist())


@pytest.mark.parametrize("select", ["spread", "highest"])
def test_fewer_pixels_than_proposals_give_all_of_them(select: str):
    shapes = [(2, 2), (1, 1)]
    scores, boxes = random_stage(shapes, seed=0)
    if select == "spread":
        found = select_spread(scores, boxes, shapes, 900)
    else:
        found = select_highest(scores, 900)
    assert torch.equal(found, scores.argsort(1, descending=True))


def test_an_image_gets_the_same_selection_alone_and_in_a_batch():
    shapes = [(8, 9), (4, 5)]
    scores, boxes = random_stage(shapes, seed=1, num_distinct=60)
    together = select_spread(scores, boxes, shapes, 20)
    for image in range(2):
        alone = select_spread(scores[image, None], boxes[image, None], shapes, 20)
        assert torch.equal(alone[0], together[image])


def test_unused_pixels_have_no_anchor_and_their_boxes_stay_at_one():
    padding = torch.zeros(1, 4, 4, dtype=torch.bool)
    padding[:, 3] = True
    levels = Levels.of([padding, torch.zeros(1, 1, 1, dtype=torch.bool)])
    logits, used = make_anchors(levels)
    assert used[0, :12].all()
    assert not used[0, 12:16].any()
    assert ((logits + 3.0).sigmoid()[0, 12:16] == 1).all()
    torch.testing.assert_close(logits.sigmoid()[0, 0], torch.tensor([1 / 8, 1 / 6, 0.05, 0.05]))
    torch.testing.assert_close(logits.sigmoid()[0, 16], torch.tensor([0.5, 0.5, 0.1, 0.1]))


def test_anchors_larger_than_the_image_are_not_used():
    padding = torch.zeros(1, 1, 1, dtype=torch.bool)
    logits, used = make_anchors(Levels.of([padding] * 7))
    # 0.05 · 2^5 = 1.6 is larger than the image.
    assert used[0].tolist() == [True] * 5 + [False] * 2
    assert logits[0, 5:].isposinf().all()
