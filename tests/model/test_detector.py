"""The complete model against published models, and properties that hold for every input."""

from __future__ import annotations

import json
import math
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from deta.model import proposals
from deta.model.batch import Batch, Target, pad_batch
from deta.model.config import BackboneConfig, CriterionConfig, ModelConfig
from deta.model.criterion import Criterion
from deta.model.detector import DETA, InputProjection, Outputs
from deta.model.proposals import select_highest, select_spread

SHARED = Path(
    os.environ.get("DETA_SHARED", Path(__file__).resolve().parents[2] / "../shared")
).resolve()
MODEL_CASES = [
    (path.parent, path.stem.removeprefix("outputs_"))
    for path in sorted((SHARED / "parity").glob("*/model_*/outputs_*.safetensors"))
]
IMAGE_CASES = sorted(
    {folder for folder, _ in MODEL_CASES if "images" in load_file(folder / "inputs.safetensors")}
)
# A case without a recipe (hf_seed0) depends on the order in which Hugging Face draws its numbers.
FULL_SIZE_CASES = [
    path
    for path in sorted((SHARED / "parity").glob("*/full_size/*.json"))
    if "weights" in json.loads(path.read_text())
]


def in_order(rows: Tensor, order: Tensor) -> Tensor:
    """Reorder rows … B Q D by B Q."""
    index = order[..., None].expand(*rows.shape[:-1], rows.shape[-1])
    return rows.gather(-2, index)


@pytest.mark.parametrize(
    ("folder", "variant"),
    MODEL_CASES,
    ids=[f"{folder.name}-{variant}" for folder, variant in MODEL_CASES],
)
def test_parity_of_a_shrunken_model(
    folder: Path, variant: str, published_model, published_order, record_parts, compare
):
    case = published_model(folder, variant)
    expected, group = case.expected, case.group
    with torch.no_grad(), record_parts(case.model) as parts:
        outputs = case.run_from_features()

    # A GroupNorm of one channel per group, as in the smallest case, amplifies rounding tenfold.
    compare(group, "memory", parts["memory"], expected["memory"], 1e-4)
    compare(group, "valid ratios", parts["levels"].valid_ratio, expected["valid_ratios"], 1e-6)
    compare(group, "first-stage logits", outputs.encoder_logits, expected["enc_logits"], 1e-4)
    compare(group, "first-stage boxes", outputs.encoder_boxes, expected["enc_boxes"], 1e-5)
    compare(group, "anchors", outputs.anchors, expected["anchors"], 1e-6)

    order = published_order(outputs.proposals, expected["init_reference"])
    for name, found, key, tolerance in (
        ("proposals", outputs.proposals, "init_reference", 1e-5),
        ("query positions", parts["query_position"], "query_pos", 1e-4),
        ("queries", parts["queries"], "tgt", 1e-4),
        ("decoder", parts["decoded"], "hs", 1e-4),
        ("references", outputs.boxes, "inter_references", 1e-5),
        ("logits", outputs.logits, "pred_logits", 1e-4),
        ("boxes", outputs.boxes, "pred_boxes", 1e-5),
    ):
        compare(group, name, in_order(found, order), expected[key], tolerance)
    # Where float64 results exist, they are the reference from which both float32 programs deviate.
    for name, found, key, tolerance in (
        ("proposals, from float64", outputs.proposals, "f64.init_reference", 1e-5),
        ("logits, from float64", outputs.logits[-1], "f64.pred_logits", 1e-4),
        ("boxes, from float64", outputs.boxes[-1], "f64.pred_boxes", 1e-5),
    ):
        if key in expected:
            order = published_order(outputs.proposals, expected["f64.init_reference"])
            compare(group, name, in_order(found, order), expected[key], tolerance)


@pytest.mark.parametrize("folder", IMAGE_CASES, ids=lambda folder: folder.name)
def test_parity_of_a_small_backbone(folder: Path, published_model, compare):
    case = published_model(folder, "deta")
    with torch.no_grad():
        features = case.model.pyramid.backbone(case.batch.images)
    for level, (found, expected) in enumerate(zip(features, case.features, strict=True)):
        compare(case.group, f"features {level}", found, expected, 1e-5)


def compare_summary(compare, name: str, found: Tensor, expected: dict, ordered: bool) -> None:
    """Compare a tensor with the numbers that summarise it in a full-size case.

    Rows of queries whose scores are nearly equal may swap. So unless `ordered`, the first published
    rows may be anywhere among our first rows.
    """
    assert list(found.shape) == expected["shape"], name
    values = found.double()
    scale = max(abs(expected["min"]), abs(expected["max"]))
    statistics = {
        "mean": values.mean() / scale,
        "std": values.std() / scale,
        "min": values.min() / scale,
        "max": values.max() / scale,
        "abs_sum": values.abs().mean() / scale,
    }
    wanted = torch.tensor([expected[key] for key in statistics], dtype=torch.float64) / scale
    wanted[-1] /= found.numel()
    # Relative to the largest element: 1e-4 for the extremes; means are much closer.
    compare("full_size", name, torch.stack(list(statistics.values())), wanted, 1e-4)
    first, last = torch.tensor(expected["first16"]), torch.tensor(expected["last8"])
    if ordered:
        flat = found.flatten()
        compare("full_size", f"{name}, ends", torch.cat([flat[:16], flat[-8:]]),
                torch.cat([first, last]), 1e-4)  # fmt: skip
    else:
        width = min(16, found.shape[-1])
        ours = found.flatten(0, -2)[:20, :width]
        for row in first.view(-1, width):
            assert ((ours - row).abs().amax(1) <= 1e-4 * scale).any(), f"{name} lacks {row}"


@pytest.mark.parametrize("path", FULL_SIZE_CASES, ids=lambda path: path.stem)
def test_parity_of_the_full_size_model(path: Path, full_size_run, compare):
    run = full_size_run(path)
    outputs, parts, summaries = run.outputs, run.parts, run.expected["outputs"]
    tensors = {f"feat{level}": feature for level, feature in enumerate(parts["features"])}
    tensors |= {
        "memory": parts["memory"],
        "enc_logits": outputs.encoder_logits,
        "enc_boxes": outputs.encoder_boxes,
        "anchors": outputs.anchors,
        "init_reference": outputs.proposals,
        "query_pos": parts["query_position"],
        "tgt": parts["queries"],
        "hs": parts["decoded"],
        "pred_logits": outputs.logits[-1],
        "pred_boxes": outputs.boxes[-1],
    }
    of_queries = {"init_reference", "query_pos", "tgt", "hs", "pred_logits", "pred_boxes"}
    for name, tensor in tensors.items():
        if name in summaries:
            compare_summary(compare, name, tensor, summaries[name], name not in of_queries)

    facts = run.expected["order_invariant"]
    scores = outputs.encoder_logits[..., 0]
    if run.config.proposal_selection == "spread":
        chosen = select_spread(
            scores, outputs.encoder_boxes, parts["levels"].shapes, outputs.proposals.shape[1]
        )
    else:
        chosen = select_highest(scores, outputs.proposals.shape[1])
    for name, key, found in (
        ("best logits", "max_logit_per_query_sorted_first32", outputs.logits[-1].amax(-1)),
        ("best scores", "selected_stage1_scores_sorted_first32", scores.gather(1, chosen)),
    ):
        found = found.flatten().sort(descending=True).values[: len(facts[key])]
        compare("full_size", name, found, torch.tensor(facts[key]), 1e-4)
    area = outputs.boxes[-1][..., 2:].double().prod(-1).sum()
    wanted = torch.tensor(facts["pred_box_area_sum"], dtype=torch.float64)
    compare("full_size", "area of all boxes", area, wanted, 1e-5)
    if int((scores == scores.gather(1, chosen).amin()).sum()) == 1:  # else the last is arbitrary
        assert int(chosen.sum()) == facts["selected_token_index_sum"]
        per_level = parts["levels"].index[chosen[0]].bincount(minlength=len(parts["levels"].shapes))
        assert per_level.tolist() == run.expected["selected_per_level"]


# Properties, on a small model with random weights.


def small_config(**changes) -> ModelConfig:
    backbone = BackboneConfig(name="resnet10t", pretrained=False, frozen_parts=())
    return replace(
        ModelConfig(
            backbone=backbone,
            num_classes=3,
            dim=64,
            num_heads=4,
            encoder_layers=1,
            decoder_layers=2,
            ffn_dim=64,
            num_queries=30,
        ),
        **changes,
    )


def small_model(**changes) -> DETA:
    """Return a model with random heads; the initial box heads change nothing."""
    torch.manual_seed(0)
    model = DETA(small_config(**changes))
    for head in model.box_heads:
        torch.nn.init.normal_(head.mlp[-1].weight, std=0.1)
    for head in model.class_heads:
        torch.nn.init.normal_(head.weight, std=0.2)
    return model


def random_batch(sizes: list[tuple[int, int]], counts: list[int], seed: int = 0) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    targets = [
        Target(
            torch.rand(count, 4, generator=generator) * 0.4 + 0.1,
            torch.randint(3, (count,), generator=generator),
        )
        for count in counts
    ]
    images = [torch.randn(3, *size, generator=generator) for size in sizes]
    return pad_batch(images, targets)


def train_once(model: DETA, batch: Batch, assignment: str) -> Tensor:
    criterion = Criterion(CriterionConfig(assignment=assignment), model.config.num_queries)
    outputs = model(batch.images, batch.padding)
    loss = criterion.total(criterion(outputs, batch, max(1, batch.num_boxes)))
    loss.backward()
    return loss.detach()


VARIANTS = [("spread", "iou"), ("highest", "one_to_one")]


@pytest.mark.parametrize(("selection", "assignment"), VARIANTS)
@pytest.mark.parametrize(
    ("sizes", "counts"),
    [
        ([(1, 1)], [1]),
        ([(32, 32)], [0]),
        ([(1, 150)], [2]),
        ([(1, 1), (70, 33)], [0, 3]),
        ([(64, 64)], [500]),
        ([(40, 40), (48, 30)], [0, 0]),
    ],
)
def test_images_of_any_size_with_any_number_of_objects_train_all_parameters(
    sizes, counts, selection, assignment
):
    model = small_model(proposal_selection=selection)
    batch = random_batch(sizes, counts)
    assert train_once(model, batch, assignment).isfinite()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name


def test_outputs_have_the_documented_shapes_and_ranges():
    model = small_model()
    batch = random_batch([(64, 96), (50, 40)], [0, 0])
    outputs = model(batch.images, batch.padding)
    num_pixels = 8 * 12 + 4 * 6 + 2 * 3 + 1 * 2 + 1
    assert outputs.logits.shape == (2, 2, 30, 3)
    assert outputs.boxes.shape == (2, 2, 30, 4)
    assert outputs.proposals.shape == (2, 30, 4)
    assert outputs.encoder_logits.shape == (2, num_pixels, 3)
    assert outputs.encoder_boxes.shape == outputs.anchors.shape == (2, num_pixels, 4)
    assert not outputs.proposals.requires_grad
    for boxes in (outputs.boxes, outputs.proposals, outputs.encoder_boxes, outputs.anchors):
        assert ((boxes >= 0) & (boxes <= 1)).all()


def random_levels(height: int, width: int, num_images: int = 2) -> list[Tensor]:
    """Return possible outputs of the pyramid for images of multiples of 128 pixels."""
    generator = torch.Generator().manual_seed(1)
    return [
        torch.randn(num_images, 64, height // stride, width // stride, generator=generator)
        for stride in (8, 16, 32, 64, 128)
    ]


def assert_same_queries(found: Outputs, expected: Outputs, tolerance: float = 0.0) -> None:
    for name in ("logits", "boxes", "proposals"):
        torch.testing.assert_close(
            getattr(found, name), getattr(expected, name), atol=tolerance, rtol=0
        )


@torch.no_grad()
def test_level_pixels_under_the_padding_change_nothing():
    """Start from the levels, because a complete model does read padding, as published ones do.

    Convolutions mix neighbours, and a GroupNorm takes its statistics over the padded map.
    """
    model = small_model()
    levels = random_levels(128, 256)
    padding = torch.zeros(2, 128, 256, dtype=torch.bool)
    padding[0, :, 100:] = True
    padding[1, 70:] = True
    expected = model.detect(levels, padding)
    for junk in (1e4, torch.nan):
        changed = []
        for level in levels:
            hidden = torch.nn.functional.interpolate(padding[None].float(), level.shape[-2:])[0]
            changed.append(level.masked_fill(hidden.bool()[:, None], junk))
        found = model.detect(changed, padding)
        assert_same_queries(found, expected)
        assert torch.equal(found.encoder_logits, expected.encoder_logits)
        assert torch.equal(found.encoder_boxes, expected.encoder_boxes)


@torch.no_grad()
def test_more_padding_changes_nothing():
    """Start from the same levels; the property holds only as far as in published models.

    Image sizes must be whole pixels on every level; otherwise a border pixel is part image and part
    padding. Unused pixels must score low, as after training; otherwise one becomes a proposal. With
    "spread", an unused pixel of a level with fewer pixels than its share becomes a proposal with
    any score. So padding costs up to one query per level there, and this holds for "highest" only.
    """
    model = small_model(proposal_selection="highest")
    stage = model.first_stage
    unused = stage.describe(torch.zeros(1, 1, 64), torch.zeros(1, 1, dtype=torch.bool))[0, 0]
    model.class_heads[-1].weight[0] -= 5 * unused / unused.norm()
    levels = random_levels(128, 128)
    expected = model.detect(levels, torch.zeros(2, 128, 128, dtype=torch.bool))
    padding = torch.zeros(2, 256, 384, dtype=torch.bool)
    padding[:, 128:] = True
    padding[:, :, 128:] = True
    wider = [
        torch.nn.functional.pad(level, (0, 2 * level.shape[3], 0, level.shape[2]), value=7.0)
        for level in levels
    ]
    # Rounding only: sample positions are relative to another size.
    assert_same_queries(model.detect(wider, padding), expected, tolerance=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("selection", ["spread", "highest"])
def test_an_image_does_not_depend_on_the_other_images_of_its_batch(selection: str):
    model = small_model(proposal_selection=selection)
    levels = random_levels(128, 128)
    padding = torch.zeros(2, 128, 128, dtype=torch.bool)
    padding[1, :, 90:] = True
    together = model.detect(levels, padding)
    for image in range(2):
        alone = model.detect([level[image, None] for level in levels], padding[image, None])
        torch.testing.assert_close(alone.logits[:, 0], together.logits[:, image])
        torch.testing.assert_close(alone.boxes[:, 0], together.boxes[:, image])


@pytest.mark.parametrize("channels_last", [False, True])
def test_nothing_but_suppression_waits_for_the_device(monkeypatch, channels_last: bool):
    """Run on the meta device, which has no values: code that reads one raises."""

    def keep_all(boxes: Tensor, scores: Tensor, iou: float) -> Tensor:
        return torch.arange(len(scores), device=scores.device)

    monkeypatch.setattr(proposals, "nms", keep_all)
    batch = random_batch([(64, 96), (50, 40)], [3, 0])
    num_boxes = float(batch.num_boxes)
    model = small_model().to("meta")
    if channels_last:
        model = model.to(memory_format=torch.channels_last)
    batch = batch.to("meta")
    outputs = model(batch.images, batch.padding)
    criterion = Criterion(CriterionConfig(), model.config.num_queries)
    loss = criterion.total(criterion(outputs, batch, num_boxes))
    loss.backward()
    assert loss.shape == ()


def test_bfloat16_gives_nearly_the_same_loss():
    batch = random_batch([(96, 128), (90, 100)], [4, 2])
    expected = train_once(small_model(), batch, "iou")
    model = small_model()
    with torch.autocast("cpu", torch.bfloat16):
        found = train_once(model, batch, "iou")
    assert found.dtype == torch.float32
    # 8 bits of precision, and other proposals where scores were close.
    torch.testing.assert_close(found, expected, rtol=0.03, atol=0)
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_gradients_of_a_map_one_pixel_wide_are_finite_in_bfloat16():
    """oneDNN gives other values each time, often none that is finite."""
    torch.manual_seed(0)
    projection = InputProjection(32, 32, kernel_size=3, stride=2)
    for _ in range(50):
        junk = [torch.full((size,), math.nan) for size in (64, 1000, 9216, 18432)]
        del junk  # its memory is reused
        projection.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            projection(torch.randn(1, 32, 5, 1)).float().square().sum().backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in projection.parameters())


@pytest.mark.parametrize(
    ("num_classes", "total", "trainable"),
    [(91, 48_438_489, 48_216_089), (80, 48_418_700, 48_196_300)],  # official, detrex
)
def test_parity_of_the_number_of_parameters(num_classes: int, total: int, trainable: int):
    config = ModelConfig(backbone=BackboneConfig(pretrained=False), num_classes=num_classes)
    with torch.device("meta"):
        model = DETA(config)
    assert sum(p.numel() for p in model.parameters()) == total
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == trainable


def test_initial_weights_are_those_of_the_official_code():
    torch.manual_seed(0)
    model = DETA(small_config())
    for class_head, box_head in zip(model.class_heads, model.box_heads, strict=True):
        torch.testing.assert_close(class_head.bias, torch.full((3,), -4.59512))
        assert torch.equal(class_head.weight, model.class_heads[0].weight)
        assert torch.equal(box_head.mlp[0].weight, model.box_heads[0].mlp[0].weight)
        assert (box_head.mlp[-1].weight == 0).all()
        assert (box_head.mlp[-1].bias == 0).all()
    for name, parameter in model.named_parameters():
        if "sampling_offsets.weight" in name or "attention_weights" in name:
            assert (parameter == 0).all(), name
        elif name.split(".")[0] in ("encoder", "decoder", "first_stage") and parameter.dim() > 1:
            bound = (6 / sum(parameter.shape)) ** 0.5  # Xavier, uniform
            assert 0.9 * bound < parameter.abs().max() <= bound, name
        elif "norm" in name and not name.startswith("pyramid"):
            assert (parameter == (1 if name.endswith("weight") else 0)).all(), name
    assert 0.8 < model.level_embedding.std() < 1.2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_classes": 0}, "num_classes=0"),
        ({"num_queries": 0}, "num_queries=0"),
        ({"num_levels": 2}, "num_levels=2"),
        ({"dim": 90}, "dim=90"),
        ({"num_heads": 7}, "dim=64"),
        ({"proposal_selection": "best"}, "proposal_selection='best'"),
    ],
)
def test_invalid_settings_are_refused(changes: dict, message: str):
    with pytest.raises(ValueError, match=message):
        small_config(**changes)
