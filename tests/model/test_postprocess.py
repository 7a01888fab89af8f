"""Detections against published numbers, a plain reference and hand-made cases."""

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
from deta.model.config import PostprocessConfig
from deta.model.detector import Outputs
from deta.model.postprocess import Detections, detect_objects

SHARED = Path(
    os.environ.get("DETA_SHARED", Path(__file__).resolve().parents[2] / "../shared")
).resolve()
CASES = [
    (path, case["case"], kind)
    for path in sorted((SHARED / "parity").glob("*/nms/postprocess*.json"))
    for case in json.loads(path.read_text())
    for kind in ("nms", "plain_top100_")
    if kind == "nms" or case["has_plain_top100"]
]
MODEL_CASES = [
    (path.parent, path.stem.removeprefix("outputs_"))
    for path in sorted((SHARED / "parity").glob("*/model_*/outputs_*.safetensors"))
]
FULL_SIZE_CASES = [
    path
    for path in sorted((SHARED / "parity").glob("*/full_size/*.json"))
    if "weights" in json.loads(path.read_text())
]
CONFIGS = {"deta": PostprocessConfig(), "hungarian": PostprocessConfig(nms_iou=None)}
TIE = 1e-5  # scores closer than this may swap between two correct programs


def outputs_with(logits: Tensor, boxes: Tensor) -> Outputs:
    """Return outputs with the last layer only; the rest is empty and never read."""
    nothing = torch.empty(0)
    return Outputs(logits[None], boxes[None], nothing, nothing, nothing, nothing)


def compare_detections(
    compare, group: str, found: Detections, scores: Tensor, labels: Tensor, boxes: Tensor
) -> None:
    """Pair each published detection with one of ours, and compare the pairs."""
    assert len(found.scores) == len(scores)
    free = torch.ones(len(found.scores), dtype=torch.bool)
    theirs, ours = [], []
    for row, (score, label, box) in enumerate(zip(scores, labels, boxes, strict=True)):
        alike = free & ((found.scores - score).abs() <= TIE) & (found.labels == label)
        if not alike.any() and score <= found.scores[-1] + TIE:
            continue  # another one tied for the last rank
        assert alike.any(), f"no detection of class {label} with score {score}"
        distance = (found.boxes_px - box).abs().amax(1).masked_fill(~alike, torch.inf)
        ours.append(int(distance.argmin()))
        theirs.append(row)
        free[ours[-1]] = False
    compare(group, "scores of detections", found.scores[ours], scores[theirs], TIE)
    compare(group, "boxes of detections", found.boxes_px[ours], boxes[theirs], 1e-5)


@pytest.mark.parametrize(
    ("path", "name", "kind"),
    CASES,
    ids=[f"{path.stem}-{name}-{kind}" for path, name, kind in CASES],
)
def test_parity_of_detections(path: Path, name: str, kind: str, compare):
    tensors = {
        key.removeprefix(f"{name}."): value
        for key, value in load_file(path.with_suffix(".safetensors")).items()
        if key.startswith(f"{name}.")
    }
    config = PostprocessConfig() if kind == "nms" else PostprocessConfig(nms_iou=None)
    found = detect_objects(
        outputs_with(tensors["pred_logits"], tensors["pred_boxes"]),
        tensors["target_sizes_hw"],
        config,
    )
    for image, detections in enumerate(found):
        expected = [tensors[f"{kind}{image}.{key}"] for key in ("scores", "labels", "boxes")]
        compare_detections(compare, "nms", detections, *expected)


@pytest.mark.parametrize(
    ("folder", "variant"),
    MODEL_CASES,
    ids=[f"{folder.name}-{variant}" for folder, variant in MODEL_CASES],
)
def test_parity_of_a_models_detections(folder: Path, variant: str, published_model, compare):
    case = published_model(folder, variant)
    with torch.no_grad():
        found = detect_objects(case.run_from_features(), case.sizes_px, CONFIGS[variant])
    for image, detections in enumerate(found):
        expected = [case.expected[f"det{image}.{key}"] for key in ("scores", "labels", "boxes")]
        compare_detections(compare, case.group, detections, *expected)


@pytest.mark.parametrize("path", FULL_SIZE_CASES, ids=lambda path: path.stem)
def test_parity_of_full_size_detections(path: Path, full_size_run, compare):
    run = full_size_run(path)
    sizes_px = torch.tensor([run.batch.images.shape[-2:]])
    (found,) = detect_objects(run.outputs, sizes_px, CONFIGS[run.expected["variant"]])
    expected = run.expected["outputs"]
    assert list(found.boxes_px.shape) == expected["det_boxes"]["shape"]
    scores = torch.tensor(expected["det_scores"]["first16"])
    compare("full_size", "scores of detections", found.scores[:16], scores, 1e-4)
    scores = torch.tensor(expected["det_scores"]["last8"])
    compare("full_size", "scores of detections", found.scores[-8:], scores, 1e-4)
    # Neighbours may swap where their scores are nearly equal.
    if (-found.scores[:5].diff()).min() > TIE:
        boxes = torch.tensor(expected["det_boxes"]["first16"]).view(4, 4)
        compare("full_size", "boxes of detections", found.boxes_px[:4], boxes, 1e-4)
    if (-found.scores[:21].diff()).min() > TIE:
        assert found.labels[:20].tolist() == run.expected["det_labels_first20"]


def suppress_plainly(
    scores: Tensor, boxes_px: Tensor, config: PostprocessConfig
) -> list[tuple[float, int]]:
    """Return (score, class) of one image's surviving detections, computed pair by pair."""
    pairs = sorted(
        ((float(scores[q, c]), q, c) for q in range(len(scores)) for c in range(scores.shape[1])),
        reverse=True,
    )
    kept: list[tuple[float, int, int]] = []
    for score, query, label in pairs[: config.max_candidates]:
        rivals = [other for _, other, its_label in kept if its_label == label]
        if rivals and box_iou(boxes_px[query, None], boxes_px[rivals]).max() > config.nms_iou:
            continue
        kept.append((score, query, label))
    return [(score, label) for score, _, label in kept[: config.max_detections]]


@pytest.mark.parametrize("max_candidates", [10, 10_000])
def test_suppression_equals_its_definition(max_candidates: int):
    generator = torch.Generator().manual_seed(0)
    boxes = torch.rand(2, 5, 4, generator=generator) * 0.4 + 0.2
    boxes = boxes.repeat(1, 3, 1) + 0.02 * torch.rand(2, 15, 4, generator=generator)
    logits = torch.randn(2, 15, 3, generator=generator)
    sizes_px = torch.tensor([[100, 200], [640, 480]])
    config = PostprocessConfig(max_candidates=max_candidates)
    found = detect_objects(outputs_with(logits, boxes), sizes_px, config)
    for image in range(2):
        height, width = sizes_px[image].tolist()
        boxes_px = cxcywh_to_xyxy(boxes[image]) * torch.tensor([width, height, width, height])
        expected = suppress_plainly(logits[image].sigmoid(), boxes_px, config)
        assert found[image].labels.tolist() == [label for _, label in expected]
        torch.testing.assert_close(
            found[image].scores, torch.tensor([score for score, _ in expected])
        )


def test_boxes_are_scaled_to_width_and_height():
    logits = torch.tensor([[[4.0]]])
    boxes = torch.tensor([[[0.5, 0.5, 0.5, 1.0]]])
    (found,) = detect_objects(
        outputs_with(logits, boxes), torch.tensor([[100, 200]]), PostprocessConfig()
    )
    assert torch.equal(found.boxes_px, torch.tensor([[50.0, 0.0, 150.0, 100.0]]))


def test_classes_do_not_suppress_each_other():
    logits = torch.tensor([[[3.0, 2.0], [1.0, 0.0]]])
    boxes = torch.tensor([0.5, 0.5, 0.2, 0.2]).expand(1, 2, 4)
    (found,) = detect_objects(
        outputs_with(logits, boxes), torch.tensor([[10, 10]]), PostprocessConfig()
    )
    assert found.labels.tolist() == [0, 1]
    torch.testing.assert_close(found.scores, torch.tensor([3.0, 2.0]).sigmoid())


def test_one_query_and_one_class_give_one_detection():
    for config in (PostprocessConfig(), PostprocessConfig(nms_iou=None)):
        (found,) = detect_objects(
            outputs_with(torch.zeros(1, 1, 1), torch.full((1, 1, 4), 0.5)),
            torch.tensor([[1, 1]]),
            config,
        )
        assert found.scores.tolist() == [0.5]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"nms_iou": 0.0}, "nms_iou=0.0"),
        ({"nms_iou": 1.5}, "nms_iou=1.5"),
        ({"max_candidates": 0}, "max_candidates"),
        ({"max_detections": 0}, "max_detections"),
    ],
)
def test_invalid_settings_are_refused(changes: dict, message: str):
    with pytest.raises(ValueError, match=message):
        PostprocessConfig(**changes)
