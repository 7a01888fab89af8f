"""Assignment of predictions to objects: published cases, plain references, the repairs."""

from __future__ import annotations

import json
import math
import os
from dataclasses import replace
from itertools import permutations
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torchvision.ops import box_iou

from deta.model.assigner import (
    Matches,
    _keep_best_owner,
    assign_by_iou,
    match_one_to_one,
    predicted_object,
    random_priority,
)
from deta.model.batch import Target, Targets, pad_targets
from deta.model.boxes import cxcywh_to_xyxy, xyxy_to_cxcywh
from deta.model.config import CriterionConfig, IouAssignerConfig, MatchingCost
from deta.model.criterion import FIRST_STAGE_POSITIVES, SECOND_STAGE_SHARE

SHARED = Path(
    os.environ.get("DETA_SHARED", Path(__file__).resolve().parents[2] / "../shared")
).resolve()


def listed(pattern: str) -> dict:
    """Return the arguments of parametrize for every case of the lists with such a name."""
    chosen = [
        (path, case)
        for path in sorted((SHARED / "parity").glob(f"*/assigners/{pattern}.json"))
        for case in json.loads(path.read_text())
    ]
    return {
        "argnames": ("path", "case"),
        "argvalues": chosen,
        "ids": [f"{path.stem}-{case['case']}" for path, case in chosen],
    }


def tensors_of(path: Path, case: dict) -> dict[str, Tensor]:
    everything = load_file(path.with_suffix(".safetensors"))
    tensors = {
        key.removeprefix(f"{case['case']}."): value
        for key, value in everything.items()
        if key.startswith(f"{case['case']}.")
    }
    if case.get("anchors"):
        tensors["proposals"] = everything[case["anchors"]]
    return tensors


def published_priority(case: dict, tensors: dict[str, Tensor]) -> Tensor:
    """Return the priority of positives in the subsampling, drawn as in the released code."""
    priority = torch.full((1, case["n_proposals"]), case["n_proposals"], dtype=torch.int64)
    positives = tensors.get("positive_proposals_before_sampling")
    if positives is not None:
        torch.manual_seed(case["torch_manual_seed"])
        priority[0, positives[torch.randperm(len(positives))]] = torch.arange(len(positives))
    return priority


@pytest.mark.parametrize(**listed("cases*"))
def test_parity_of_assignment(path: Path, case: dict, record_property):
    tensors = tensors_of(path, case)
    published = CriterionConfig()
    if case["stage"] == 1:
        config = published.assigner(published.first_stage_iou, FIRST_STAGE_POSITIVES)
        labels = torch.zeros_like(tensors["gt_labels"])
    else:
        limit = int(SECOND_STAGE_SHARE * case["num_queries"])
        config = published.assigner(published.second_stage_iou, limit)
        labels = tensors["gt_labels"]
    matches = assign_by_iou(
        tensors["proposals"][None],
        pad_targets([Target(tensors["gt_boxes"], labels)]),
        published_priority(case, tensors),
        config,
    )
    predictions, objects = matches.pairs(0)
    assert len(predictions) == len(objects)
    if case["raises"]:
        # Released code needs four predictions; here an object gets as many as there are.
        assert (objects.bincount() <= case["n_proposals"]).all()
        return
    expected = torch.stack([tensors["pred_indices"], tensors["gt_indices"]], 1).tolist()
    found = torch.stack([predictions, objects], 1).tolist()
    if case["selection_has_exact_tie"]:
        assert torch.equal(objects.sort().values, tensors["gt_indices"].sort().values)
        return
    others = sum(pair not in expected for pair in found) + abs(len(found) - len(expected))
    share = others / max(1, len(expected))
    record_property("difference", ("assigners", "share of other pairs", share))
    assert found == expected


@pytest.mark.parametrize(**listed("hungarian*"))
def test_parity_of_one_to_one_matching(path: Path, case: dict, record_property):
    tensors = tensors_of(path, case)
    images = range(case["batch"])
    (matches,) = match_one_to_one(
        tensors["pred_logits"][None],
        tensors["pred_boxes"][None],
        pad_targets(
            [Target(tensors[f"gt_boxes{image}"], tensors[f"gt_labels{image}"]) for image in images]
        ),
        MatchingCost(class_=case["cost_class"], l1=case["cost_bbox"], giou=case["cost_giou"]),
    )
    for image in images:
        predictions, objects = matches.pairs(image)
        found = set(zip(predictions.tolist(), objects.tolist(), strict=True))
        expected = set(
            zip(
                tensors[f"pred_indices{image}"].tolist(),
                tensors[f"gt_indices{image}"].tolist(),
                strict=True,
            )
        )
        share = len(found ^ expected) / max(1, len(expected))
        record_property("difference", ("assigners", "share of other pairs", share))
        assert found == expected


PLAIN = IouAssignerConfig(positive_iou=0.6, max_positives=20)


def assign_plainly(
    boxes: Tensor, objects: Tensor, priority: Tensor, config: IouAssignerConfig
) -> set[tuple[int, int]]:
    """Return the (prediction, object) pairs of one image by the definition, with loops."""
    iou = box_iou(cxcywh_to_xyxy(objects), cxcywh_to_xyxy(boxes)).tolist()
    num_objects, num_boxes = len(objects), len(boxes)
    if num_objects == 0:
        return set()
    chosen = [max(range(num_objects), key=lambda o: iou[o][q]) for q in range(num_boxes)]
    positive = []
    for q in range(num_boxes):
        highest_of = [
            o
            for o in range(num_objects)
            if iou[o][q] == max(iou[o]) and (max(iou[o]) > 0 or not config.require_overlap)
        ]
        if iou[chosen[q]][q] >= config.positive_iou or highest_of:
            positive.append(q)
    if config.subsample:
        positive = sorted(positive, key=lambda q: int(priority[q]))[: config.max_positives]
    pairs = set()
    for o in range(num_objects):
        count = sum(chosen[q] == o for q in positive)
        best = sorted(range(num_boxes), key=lambda q: -iou[o][q])
        pairs |= {(q, o) for q in best[: min(count, config.max_per_object)]}
    if config.exclusive:
        pairs = {
            (q, o)
            for q, o in pairs
            if o == min((other for p, other in pairs if p == q), key=lambda x: (-iou[x][q], x))
        }
    return pairs


def pairs_of(matches: Matches, image: int = 0) -> set[tuple[int, int]]:
    predictions, objects = matches.pairs(image)
    return set(zip(predictions.tolist(), objects.tolist(), strict=True))


def random_boxes(num_boxes: int, seed: int) -> Tensor:
    """Return cxcywh boxes inside 0..1, so dense that overlaps are common."""
    generator = torch.Generator().manual_seed(seed)
    corners = torch.rand(num_boxes, 2, 2, generator=generator) * 0.4
    return xyxy_to_cxcywh(torch.cat([corners.amin(1), corners.amax(1) + 0.1], -1))


def objects_only(boxes: Tensor) -> Targets:
    return pad_targets([Target(boxes, torch.zeros(len(boxes), dtype=torch.int64))])


@pytest.mark.parametrize("num_objects", [0, 1, 7, 40])
@pytest.mark.parametrize("num_boxes", [1, 3, 60])
@pytest.mark.parametrize(
    "config",
    [
        PLAIN,
        replace(PLAIN, exclusive=True),
        replace(PLAIN, require_overlap=True),
        replace(PLAIN, subsample=False),
        replace(PLAIN, max_positives=3, positive_iou=0.3),
        replace(PLAIN, max_positives=0),
        replace(PLAIN, max_per_object=1, exclusive=True, require_overlap=True, subsample=False),
    ],
)
def test_assignment_equals_its_definition(
    config: IouAssignerConfig, num_boxes: int, num_objects: int
):
    for seed in range(3):
        boxes, objects = random_boxes(num_boxes, seed), random_boxes(num_objects, seed + 100)
        priority = random_priority(torch.tensor([seed]), num_boxes)
        found = assign_by_iou(boxes[None], objects_only(objects), priority, config)
        assert pairs_of(found) == assign_plainly(boxes, objects, priority[0], config)


def test_an_assignment_does_not_depend_on_the_other_images():
    boxes = torch.stack([random_boxes(50, seed) for seed in range(4)])
    objects = [random_boxes(count, seed + 50) for seed, count in enumerate((5, 0, 30, 1))]
    targets = [Target(b, torch.zeros(len(b), dtype=torch.int64)) for b in objects]
    seeds = torch.tensor([3, 1, 4, 1])
    config = replace(PLAIN, max_positives=8)
    together = assign_by_iou(boxes, pad_targets(targets), random_priority(seeds, 50), config)
    for image in range(4):
        alone = assign_by_iou(
            boxes[image, None],
            pad_targets([targets[image]]),
            random_priority(seeds[image, None], 50),
            config,
        )
        assert pairs_of(alone) == pairs_of(together, image)


def boxes_at(*x_and_width: tuple[float, float]) -> Tensor:
    """Return cxcywh boxes as high as the image, with this left side and width."""
    return torch.tensor([[x + width / 2, 0.5, width, 1.0] for x, width in x_and_width])


def assign_one(boxes: Tensor, objects: Tensor, config: IouAssignerConfig) -> set[tuple[int, int]]:
    priority = torch.arange(len(boxes))[None]
    return pairs_of(assign_by_iou(boxes[None], objects_only(objects), priority, config))


def test_exclusive_gives_a_prediction_to_the_object_that_it_overlaps_more():
    objects = boxes_at((0.10, 0.4), (0.14, 0.4))
    # 0 and 1 choose object 0, 2 and 3 object 1; but 1 and 2 are the best two of both.
    boxes = boxes_at((0.0, 0.4), (0.115, 0.4), (0.145, 0.4), (0.28, 0.4))
    config = replace(PLAIN, positive_iou=0.3)
    assert assign_one(boxes, objects, config) == {(1, 0), (2, 0), (1, 1), (2, 1)}
    assert assign_one(boxes, objects, replace(config, exclusive=True)) == {(1, 0), (2, 1)}


def test_with_require_overlap_an_object_that_nothing_overlaps_has_no_match():
    boxes = boxes_at((0.0, 0.2), (0.25, 0.2), (0.4, 0.1))
    objects = boxes_at((0.01, 0.2), (0.8, 0.1))
    # Without overlap for object 1, all three become positive for it; two of them, not
    # overlapping object 0 either, raise that object's count.
    flooded = assign_one(boxes, objects, PLAIN)
    assert len(flooded) == 3
    assert assign_one(boxes, objects, replace(PLAIN, require_overlap=True)) == {(0, 0)}


def test_subsample_keeps_the_positives_that_come_first():
    boxes = boxes_at((0.0, 0.2), (0.5, 0.2), (0.01, 0.2), (0.51, 0.2))
    objects = boxes_at((0.0, 0.2), (0.5, 0.2))
    few = replace(PLAIN, max_positives=2)
    targets = objects_only(objects)
    # Both remaining positives chose object 0, which gets its best two; object 1 gets none.
    priority = torch.tensor([[0, 2, 1, 3]])
    assert pairs_of(assign_by_iou(boxes[None], targets, priority, few)) == {(0, 0), (2, 0)}
    everyone = pairs_of(
        assign_by_iou(boxes[None], targets, priority, replace(few, subsample=False))
    )
    assert everyone == {(0, 0), (2, 0), (1, 1), (3, 1)}


def test_2000_objects_in_one_image():
    objects = random_boxes(2000, seed=0)
    found = assign_one(random_boxes(300, seed=1), objects, replace(PLAIN, max_positives=75))
    assert 0 < len(found) <= 75


def test_equal_overlaps_go_to_the_first_object():
    boxes = boxes_at((0.0, 0.2))
    assert assign_one(boxes, boxes.repeat(3, 1), PLAIN) == {(0, 0)}


def test_of_several_objects_the_last_gives_the_class():
    matches = Matches(
        torch.tensor([[[0, 1], [1, 2], [3, 3]]]),
        torch.tensor([[[True, True], [True, False], [False, False]]]),
    )
    assert predicted_object(matches, 5).tolist() == [[0, 1, -1, -1, -1]]


def splitmix64(seed: int, index: int) -> int:
    """Return the published generator's output number `index` (from 1), in unsigned arithmetic."""
    mask = 2**64 - 1
    z = (seed + index * 0x9E3779B97F4A7C15) & mask
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
    return z ^ (z >> 31)


def test_random_priority_is_splitmix64():
    seeds = torch.tensor([0, 1, 2**63 - 1, -1, -(2**63)])
    found = random_priority(seeds, 5)
    for row, seed in enumerate(seeds.tolist()):
        expected = [splitmix64(seed, index) & (2**62 - 1) for index in range(1, 6)]
        assert found[row].tolist() == expected


def test_random_priority_depends_on_the_seed_only():
    seeds = torch.tensor([5, 17, 5])
    found = random_priority(seeds, 100)
    assert torch.equal(found[0], found[2])
    assert torch.equal(found[1], random_priority(seeds[1:2], 100)[0])
    assert torch.equal(found[0, :40], random_priority(seeds[:1], 40)[0])
    assert not torch.equal(found[0], random_priority(~seeds, 100)[0])


def test_random_priority_prefers_no_position():
    # Each of 64 positions should be the first one 20000 / 64 = 312 times, give or take 18.
    first = random_priority(torch.arange(20_000), 64).argmin(1).bincount(minlength=64)
    assert ((first - 20_000 / 64).abs() < 5 * math.sqrt(20_000 / 64)).all()


@pytest.mark.parametrize(("num_predictions", "num_objects"), [(4, 3), (3, 4), (4, 1), (1, 1)])
def test_matching_is_the_cheapest_one(num_predictions: int, num_objects: int):
    generator = torch.Generator().manual_seed(num_predictions)
    logits = torch.randn(2, 1, num_predictions, 5, generator=generator)
    boxes = torch.stack([random_boxes(num_predictions, seed)[None] for seed in (0, 1)])
    target = Target(random_boxes(num_objects, 9), torch.arange(num_objects) % 5)
    for layer, matches in enumerate(
        match_one_to_one(logits, boxes, pad_targets([target]), MatchingCost())
    ):
        cost = torch.zeros(num_predictions, num_objects)
        for q in range(num_predictions):
            for o in range(num_objects):
                p = logits[layer, 0, q, target.labels[o]].sigmoid()
                focal = 0.25 * (1 - p) ** 2 * -p.log() - 0.75 * p**2 * -(1 - p).log()
                box, wanted = boxes[layer, 0, q], target.boxes[o]
                corners = cxcywh_to_xyxy(torch.stack([box, wanted]))
                hull = torch.cat([corners[:, :2].amin(0), corners[:, 2:].amax(0)])
                hull_area = (hull[2] - hull[0]) * (hull[3] - hull[1])
                iou = box_iou(corners[:1], corners[1:])[0, 0]
                union = (box[2] * box[3] + wanted[2] * wanted[3]) / (1 + iou)
                giou = iou - (hull_area - union) / hull_area
                cost[q, o] = 2 * focal + 5 * (box - wanted).abs().sum() - 2 * giou
        if num_predictions >= num_objects:
            ways = [list(zip(way, range(num_objects), strict=True))
                    for way in permutations(range(num_predictions), num_objects)]  # fmt: skip
        else:
            ways = [list(zip(range(num_predictions), way, strict=True))
                    for way in permutations(range(num_objects), num_predictions)]  # fmt: skip
        cheapest = min(ways, key=lambda way: sum(float(cost[pair]) for pair in way))
        assert pairs_of(matches) == set(cheapest)


def test_matching_survives_predictions_that_are_not_finite():
    logits = torch.full((1, 1, 3, 2), torch.nan)
    boxes = torch.full((1, 1, 3, 4), torch.nan)
    target = Target(random_boxes(2, 0), torch.zeros(2, dtype=torch.int64))
    (matches,) = match_one_to_one(logits, boxes, pad_targets([target]), MatchingCost())
    assert len(pairs_of(matches)) == 2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"positive_iou": 0.0}, "positive_iou=0.0"),
        ({"positive_iou": 1.1}, "positive_iou=1.1"),
        ({"max_positives": -1}, "max_positives=-1"),
        ({"max_per_object": 0}, "max_per_object=0"),
    ],
)
def test_invalid_settings_are_refused(changes: dict, message: str):
    with pytest.raises(ValueError, match=message):
        replace(PLAIN, **changes)


def test_nothing_is_made_on_another_device_than_the_inputs():
    """On the meta device, which computes shapes only and refuses tensors of other devices."""
    seeds = torch.zeros(2, dtype=torch.int64, device="meta")
    assert random_priority(seeds, 5).device.type == "meta"
    matches = Matches(
        torch.zeros(2, 3, 4, dtype=torch.int64, device="meta"),
        torch.ones(2, 3, 4, dtype=torch.bool, device="meta"),
    )
    assert predicted_object(matches, 6).device.type == "meta"
    iou = torch.rand(2, 3, 4, device="meta")
    kept = _keep_best_owner(matches.predictions, iou, matches.valid, 6)
    assert kept.device.type == "meta"
