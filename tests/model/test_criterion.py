"""Losses, matches and gradients against published models, and properties of all batches."""

from __future__ import annotations

import json
import math
import os
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from deta.model.assigner import Matches, predicted_object
from deta.model.batch import Batch, Target, pad_targets
from deta.model.boxes import cxcywh_to_xyxy, generalized_iou
from deta.model.config import CriterionConfig
from deta.model.criterion import Criterion, focal_loss
from deta.model.detector import Outputs
from deta.model.pretrained import rename_to_published

SHARED = Path(
    os.environ.get("DETA_SHARED", Path(__file__).resolve().parents[2] / "../shared")
).resolve()
FOCAL_CASES = [
    (path, name)
    for path in sorted((SHARED / "parity").glob("*/functions/functions*.safetensors"))
    for name in sorted({key.split(".")[0] for key in load_file(path)})
    if name.startswith("focal")
]
MODEL_CASES = [
    (path.parent, path.stem.removeprefix("losses_"))
    for path in sorted((SHARED / "parity").glob("*/model_*/losses_*.json"))
]
# Without the images, the gradients of the backbone are unknown.
IMAGE_CASES = [
    (folder, variant)
    for folder, variant in MODEL_CASES
    if "images" in load_file(folder / "inputs.safetensors")
]
BEFORE_NORM = re.compile(r"input_proj\.\d+\.0\.bias")
MODELS = {
    "argnames": ("folder", "variant"),
    "argvalues": MODEL_CASES,
    "ids": [f"{folder.name}-{variant}" for folder, variant in MODEL_CASES],
}
FULL_SIZE_CASES = [
    path
    for path in sorted((SHARED / "parity").glob("*/full_size/*.json"))
    if "weights" in json.loads(path.read_text())
]


@pytest.mark.parametrize(
    ("path", "name"), FOCAL_CASES, ids=[f"{path.stem}-{name}" for path, name in FOCAL_CASES]
)
def test_parity_of_focal_loss(path: Path, name: str, compare):
    case = load_file(path)
    meta = json.loads(path.with_suffix(".json").read_text())["meta"][name]
    logits = case[f"{name}.logits"].requires_grad_()
    loss = focal_loss(logits, case[f"{name}.onehot"].bool()).sum() / meta["num_boxes"]
    loss.backward()
    assert logits.grad is not None
    compare("functions", "focal loss", loss, case[f"{name}.loss"], 1e-6)
    compare("functions", "gradient of the focal loss", logits.grad, case[f"{name}.grad"], 1e-6)


def our_loss_name(published: str) -> str | None:
    """Return our name, or None for a value that is only logged."""
    kinds = {"loss_ce": "class", "loss_bbox": "l1", "loss_giou": "giou"}
    for kind, ours in kinds.items():
        if published == kind or published.startswith(f"{kind}_"):
            return ours + published.removeprefix(kind).replace("_enc", "_encoder")
    return None


def compare_losses(compare, group: str, found: dict[str, Tensor], expected: dict) -> None:
    wanted = {
        name: value for key, value in expected.items() if (name := our_loss_name(key)) is not None
    }
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        compare(group, f"loss {name}", found[name], torch.tensor(value), 1e-4)


def pairs_of(matches: Matches, image: int, order: Tensor | None = None) -> set[tuple[int, int]]:
    """Return (prediction, object) pairs; `order` maps published rows to ours."""
    predictions, objects = matches.pairs(image)
    if order is not None:
        predictions = order[image].argsort()[predictions]
    return set(zip(predictions.tolist(), objects.tolist(), strict=True))


def compare_matches(
    record_property, group: str, found: list[Matches], encoder: Matches, expected: dict, order
) -> None:
    """Compare the matches; `found` has one entry per decoder layer."""
    num_layers = len(found)
    lists = {"encoder": (encoder, None)}
    for key in expected:
        if key == "decoder_all_layers":
            assert all(matches is found[0] for matches in found)
            lists[key] = (found[0], order)
        elif key == "decoder_last_layer":
            lists[key] = (found[-1], order)
        elif key != "encoder":
            layer = int(key.removeprefix("decoder_layer_"))
            assert layer < num_layers - 1
            lists[key] = (found[layer], order)
    for key, (matches, its_order) in lists.items():
        for image, (predictions, objects) in enumerate(expected[key]):
            wanted = set(zip(predictions, objects, strict=True))
            ours = pairs_of(matches, image, its_order)
            share = len(ours ^ wanted) / max(1, len(wanted))
            record_property("difference", (group, f"share of other pairs, {key}", share))
            assert ours == wanted, f"{key}, image {image}"


@pytest.mark.parametrize(**MODELS)
def test_parity_of_losses_and_matches(
    folder: Path, variant: str, published_model, published_order, compare, record_property
):
    case = published_model(folder, variant)
    with torch.no_grad():
        outputs = case.run_from_features()
        losses = case.criterion(outputs, case.batch, case.losses["num_boxes"])
    compare_losses(compare, case.group, losses, case.losses["losses_unweighted"])
    total = torch.tensor(case.losses["total_weighted_loss"])
    compare(case.group, "total loss", case.criterion.total(losses), total, 1e-5)
    compare_matches(
        record_property,
        case.group,
        case.criterion.match_decoder(outputs, case.batch),
        case.criterion.match_encoder(outputs, case.batch),
        case.losses["matched"],
        published_order(outputs.proposals, case.expected["init_reference"]),
    )


@pytest.mark.parametrize(**MODELS)
def test_parity_of_gradients(folder: Path, variant: str, published_model, compare, record_property):
    case = published_model(folder, variant)
    losses = case.criterion(case.run(), case.batch, case.losses["num_boxes"])
    case.criterion.total(losses).backward()
    ours = rename_to_published(
        {
            name: parameter.grad
            for name, parameter in case.model.named_parameters()
            if parameter.grad is not None
        },
        "official",
    )
    expected = {
        name: summary
        for name, summary in case.losses["grad_norm_sum_maxabs"].items()
        if case.has_backbone or not name.startswith("backbone.")
    }
    assert set(expected) <= set(ours)
    assert set(case.losses["parameters_without_gradient"]).isdisjoint(ours)
    if case.model.config.dim <= 32:  # a GroupNorm of one channel per group cancels the bias
        expected = {name: s for name, s in expected.items() if not BEFORE_NORM.fullmatch(name)}
    # Other gradients are also zero up to rounding, so a millionth of the total norm passes. 1e-3
    # is for the sampling offsets and all layers before them: their gradient jumps where a sample
    # crosses a pixel.
    total_norm = math.sqrt(sum(norm**2 for norm, _, _ in expected.values()))
    worst = 0.0
    for name, (norm, _, largest) in expected.items():
        for found, wanted in ((ours[name].norm(), norm), (ours[name].abs().max(), largest)):
            difference = abs(float(found) - wanted)
            if difference > 1e-6 * total_norm:
                worst = max(worst, difference / wanted)
                assert difference <= 1e-3 * wanted, f"gradient of {name}: {found}, not {wanted}"
    record_property("difference", (case.group, "norms of gradients", worst))
    for name, gradient in case.gradients.items():
        if name in expected and expected[name][0] > 1e-5 * total_norm:
            compare(case.group, f"gradient of {name}", ours[name], gradient, 1e-3)


@pytest.mark.parametrize(
    ("folder", "variant"),
    IMAGE_CASES,
    ids=[f"{folder.name}-{variant}" for folder, variant in IMAGE_CASES],
)
def test_parity_of_training_steps(folder: Path, variant: str, published_model, compare):
    """Train with the official groups: a tenth of the rate for backbone and sampling offsets."""
    case = published_model(folder, variant)
    groups: dict[float, list[Tensor]] = {2e-4: [], 2e-5: []}
    for name, parameter in case.model.named_parameters():
        slow = name.startswith("pyramid.backbone") or "sampling_offsets" in name
        groups[2e-5 if slow else 2e-4].append(parameter)
    optimizer = torch.optim.AdamW(
        [{"params": parameters, "lr": lr} for lr, parameters in groups.items()], weight_decay=1e-4
    )
    # Adam's first steps amplify the rounding of gradients near zero, more with each step.
    for step, (expected, tolerance) in enumerate(
        zip(case.losses["adamw_steps"][:3], (1e-5, 1e-3, 1e-3), strict=True)
    ):
        losses = case.criterion(case.run(), case.batch, case.losses["num_boxes"])
        loss = case.criterion.total(losses)
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(case.model.parameters(), 0.1)
        optimizer.step()
        wanted = torch.tensor(expected["total_loss"])
        compare(case.group, f"loss of step {step}", loss, wanted, tolerance)
        wanted = torch.tensor(expected["grad_norm_before_clip"])
        compare(case.group, f"gradient norm of step {step}", norm, wanted, 10 * tolerance)


@pytest.mark.parametrize("path", FULL_SIZE_CASES, ids=lambda path: path.stem)
def test_parity_of_full_size_losses(path: Path, full_size_run, compare, record_property):
    run = full_size_run(path)
    num_boxes = max(1, run.batch.num_boxes)
    losses = run.criterion(run.outputs, run.batch, num_boxes)
    compare_losses(compare, "full_size", losses, run.expected["losses_unweighted"])
    total = torch.tensor(run.expected["total_weighted_loss"])
    compare("full_size", "total loss", run.criterion.total(losses), total, 1e-5)
    compare_matches(
        record_property,
        "full_size",
        run.criterion.match_decoder(run.outputs, run.batch),
        run.criterion.match_encoder(run.outputs, run.batch),
        run.expected["matched"],
        None,
    )


# A small replacement for a model's outputs, whose losses and gradients are easy to follow.


def make_outputs(num_images: int = 2, num_classes: int = 3, seed: int = 0) -> Outputs:
    generator = torch.Generator().manual_seed(seed)

    def logits(*shape: int) -> Tensor:
        return torch.randn(*shape, num_classes, generator=generator).requires_grad_()

    def boxes(*shape: int) -> Tensor:
        return (torch.rand(*shape, 4, generator=generator) * 0.3 + 0.2).requires_grad_()

    return Outputs(
        logits=logits(2, num_images, 20),
        boxes=boxes(2, num_images, 20),
        proposals=boxes(num_images, 20).detach(),
        encoder_logits=logits(num_images, 50),
        encoder_boxes=boxes(num_images, 50),
        anchors=boxes(num_images, 50).detach(),
    )


def make_batch(*counts: int, num_classes: int = 3, seed: int = 0) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    targets = [
        Target(
            torch.rand(count, 4, generator=generator) * 0.3 + 0.2,
            torch.randint(num_classes, (count,), generator=generator),
        )
        for count in counts
    ]
    nothing = torch.empty(len(counts), 0)
    return Batch(nothing, nothing.bool(), pad_targets(targets), torch.arange(len(counts)))


CONFIGS = [CriterionConfig(), CriterionConfig(assignment="one_to_one")]


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.assignment)
def test_losses_equal_their_definition(config: CriterionConfig):
    outputs, batch = make_outputs(), make_batch(3, 1)
    criterion = Criterion(config, num_queries=20)
    with torch.no_grad():
        losses = criterion(outputs, batch, 4.0)
    matches = criterion.match_decoder(outputs, batch)[0]
    sums = {"class_0": 0.0, "l1_0": 0.0, "giou_0": 0.0}
    owner = predicted_object(matches, 20)
    for image in range(2):
        for query in range(20):
            for label in range(3):
                p = float(outputs.logits[0, image, query, label].detach().sigmoid())
                of = int(owner[image, query])
                if of >= 0 and int(batch.targets.labels[image, of]) == label:
                    sums["class_0"] += 0.25 * (1 - p) ** 2 * -math.log(p)
                else:
                    sums["class_0"] += 0.75 * p**2 * -math.log(1 - p)
        for query, of in zip(*matches.pairs(image), strict=True):
            found, wanted = outputs.boxes[0, image, query], batch.targets.boxes[image, of]
            sums["l1_0"] += float((found - wanted).abs().sum().detach())
            giou = generalized_iou(cxcywh_to_xyxy(found), cxcywh_to_xyxy(wanted))
            sums["giou_0"] += 1 - float(giou.detach())
    for name, value in sums.items():
        torch.testing.assert_close(float(losses[name]), value / 4, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.assignment)
@pytest.mark.parametrize("counts", [(0, 0), (0, 5), (60, 2)])
@pytest.mark.parametrize("num_classes", [1, 3])
def test_losses_and_gradients_are_finite(config, counts, num_classes):
    outputs = make_outputs(num_classes=num_classes)
    batch = make_batch(*counts, num_classes=num_classes)
    criterion = Criterion(config, num_queries=20)
    losses = criterion(outputs, batch, max(1, batch.num_boxes))
    assert set(losses) == {
        f"{kind}{stage}" for kind in ("class", "l1", "giou") for stage in ("", "_0", "_encoder")
    }
    criterion.total(losses).backward()
    for tensor in (outputs.logits, outputs.boxes, outputs.encoder_logits, outputs.encoder_boxes):
        assert tensor.grad is not None
        assert tensor.grad.isfinite().all()
    if not any(counts):
        assert all(float(v.detach()) == 0 for name, v in losses.items() if "class" not in name)


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.assignment)
def test_the_loss_of_a_batch_is_the_sum_of_its_images(config: CriterionConfig):
    outputs, batch = make_outputs(), make_batch(7, 2)
    criterion = Criterion(config, num_queries=20)
    together = criterion(outputs, batch, 1.0)
    parts = []
    for image in range(2):
        alone = Outputs(
            logits=outputs.logits[:, image, None],
            boxes=outputs.boxes[:, image, None],
            proposals=outputs.proposals[image, None],
            encoder_logits=outputs.encoder_logits[image, None],
            encoder_boxes=outputs.encoder_boxes[image, None],
            anchors=outputs.anchors[image, None],
        )
        present = batch.targets.present[image]
        target = Target(batch.targets.boxes[image][present], batch.targets.labels[image][present])
        single = replace(
            batch,
            images=batch.images[image, None],
            targets=pad_targets([target]),
            seeds=batch.seeds[image, None],
        )
        parts.append(criterion(alone, single, 1.0))
    for name, loss in together.items():
        torch.testing.assert_close(loss, parts[0][name] + parts[1][name])


def test_the_first_stage_learns_any_object_in_column_0():
    outputs, batch = make_outputs(), make_batch(4, 4)
    criterion = Criterion(CriterionConfig(), num_queries=20)
    with torch.no_grad():
        expected = criterion(outputs, batch, 1.0)
        relabelled = replace(batch.targets, labels=2 - batch.targets.labels)
        found = criterion(outputs, replace(batch, targets=relabelled), 1.0)
    assert torch.equal(found["class_encoder"], expected["class_encoder"])
    assert not torch.equal(found["class"], expected["class"])


def test_the_total_is_weighted():
    criterion = Criterion(
        CriterionConfig(class_weight=1.0, l1_weight=10.0, giou_weight=100.0), num_queries=20
    )
    losses = {"class": 1.0, "class_0": 2.0, "l1": 3.0, "giou_encoder": 4.0}
    total = criterion.total({name: torch.tensor(value) for name, value in losses.items()})
    assert float(total) == 1 + 2 + 30 + 400


def test_a_prediction_that_is_not_finite_makes_the_loss_not_finite():
    outputs, batch = make_outputs(), make_batch(3, 1)
    with torch.no_grad():
        outputs.logits[0, 1, 7, 2] = torch.nan
    for config in CONFIGS:
        losses = Criterion(config, num_queries=20)(outputs, batch, 1.0)
        assert losses["class_0"].isnan()
        assert losses["class"].isfinite()


@pytest.mark.parametrize("repair", ["exclusive", "require_overlap", "subsample"])
def test_repairs_reach_both_assigners(repair: str):
    default = getattr(CriterionConfig(), repair)
    criterion = Criterion(replace(CriterionConfig(), **{repair: not default}), num_queries=20)
    assert getattr(criterion.first_stage, repair) is not default
    assert getattr(criterion.second_stage, repair) is not default


def test_invalid_settings_are_refused():
    with pytest.raises(ValueError, match="assignment='greedy'"):
        CriterionConfig(assignment="greedy")
    with pytest.raises(ValueError, match=r"positive_iou=2\.0"):
        CriterionConfig(second_stage_iou=2.0)
