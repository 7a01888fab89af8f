"""Every recipe: what it builds, and a run of it that is small enough for a CPU."""

from __future__ import annotations

import inspect
import math
import os
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from timm.layers.drop import DropPath

from deta.jobs.recipes import RECIPES, VARIANTS, find_variant
from deta.model import pretrained_anchor
from deta.model.anchor_detr import AnchorDETR
from deta.model.architectures import make_detector, without_download
from deta.model.backbone import Backbone
from deta.model.batch import Target, pad_batch
from deta.model.config import AnchorDETRConfig, BackboneConfig, ModelConfig
from deta.model.detector import DETA
from deta.platform.data.coco_dataset import Category, CocoDataset
from deta.platform.inference.predictor import Predictor
from deta.platform.learning.distributed import Worker
from deta.platform.run.config import RunConfig, flatten, from_json, override, to_json
from deta.platform.run.journal import read_events
from deta.platform.run.run import Run
from deta.platform.training.loop import train
from deta.platform.weights.initial_weights import load_initial_weights
from deta.platform.weights.weight_files import write_weights

SHARED = Path(os.environ.get("DETA_SHARED", Path(__file__).resolve().parents[2] / "../shared"))
COCO_MINI = SHARED.resolve() / "data" / "coco_mini"
NUM_TRAIN, NUM_VAL, NUM_STEPS = 8, 12, 20

# What a CPU needs. All that makes the architecture stays: kinds of layers, selection, assignment,
# patterns, windows, output norms, stochastic depth, dilation, checkpointed activations.
SMALL = {
    "model.backbone.pretrained": False,
    "model.dim": 32,
    "model.ffn_dim": 48,
    "model.encoder_layers": 1,
    "model.decoder_layers": 2,
    "data.augmentation.short_edges": (64, 80),
    "data.augmentation.max_long_edge": 96,
    "data.augmentation.crop_pre_short_edges": (64, 80),
    "data.augmentation.crop_min": 40,
    "data.augmentation.crop_max": 80,
    "data.evaluation_size.short_edge": 64,
    "data.evaluation_size.max_long_edge": 96,
    "data.loader_workers": 0,
    "cluster.num_workers": 1,
    "cluster.gpu": False,
    "total_batch_size": 2,
    "micro_batch_size": 1,  # so that gradients accumulate
    "schedule.epochs": 5,
    "schedule.lr_drop_epochs": (4.0,),
    "evaluate_every_epochs": 5,
    "log_every_steps": 1,
    "num_pictures": 0,
}
RESNET = {"model.backbone.width": 0.25}
OF_FAMILY = {
    "deta_r50.official_12ep": {**RESNET, "model.num_queries": 60},
    "improved_deformable_detr_r50.official_50ep": {**RESNET, "model.num_queries": 60},
    "deta_swin_l.official_finetune": {
        "model.backbone.name": "swin_tiny_patch4_window7_224",  # with the recipe's window of 12
        "model.backbone.width": 0.25,
        "model.num_queries": 60,
        "micro_batch_size": 2,
    },
    "anchor_detr_r50.official_r50": {**RESNET, "model.num_points": 20},
    "anchor_detr_r50.official_r50_dc5": {**RESNET, "model.num_points": 20},
    "anchor_detr_r50.official_r101": {**RESNET, "model.num_points": 20},
}


@pytest.fixture(scope="module")
def coco_mini() -> tuple[CocoDataset, CocoDataset]:
    if not COCO_MINI.is_dir():
        pytest.skip(f"{COCO_MINI} is absent")
    train_set, val_set = (
        CocoDataset.open(
            COCO_MINI / split, COCO_MINI / "annotations" / f"instances_{split}.json", lenient=True
        )
        for split in ("train", "val")
    )
    return train_set.first(NUM_TRAIN), val_set.first(NUM_VAL)


@pytest.mark.parametrize("variant", OF_FAMILY)
def test_a_recipe_trains_and_evaluates_on_a_cpu(variant: str, coco_mini, tmp_path: Path):
    config = override(VARIANTS[variant](), SMALL | OF_FAMILY[variant])
    run = Run(config, tmp_path, *coco_mini)
    assert run.num_steps == NUM_STEPS

    metrics = train(run, Worker())

    events = [event for event, _ in read_events(tmp_path)]
    losses = [event["metrics"]["train/loss"] for event in events if event["kind"] == "progress"]
    assert len(losses) == NUM_STEPS
    assert all(math.isfinite(loss) and loss > 0 for loss in losses)
    assert 0 <= metrics["AP"] <= 100
    (evaluation,) = [event for event in events if event["kind"] == "evaluation"]
    assert evaluation["step"] == NUM_STEPS
    predictor, seen = Predictor.from_checkpoint(tmp_path), []
    again = predictor.evaluate(coco_mini[1], on_batch=seen.append)
    assert sum(seen) == NUM_VAL
    assert again is not None
    assert again.metrics.percent()["AP"] == metrics["AP"]


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_variant_is_whole(variant: str):
    """A variant has its own name, survives JSON, and states its AP."""
    config = VARIANTS[variant]()
    assert [make().name for make in VARIANTS.values()].count(config.name) == 1
    assert from_json(RunConfig, to_json(config)) == config
    share = config.total_batch_size / config.cluster.num_workers
    assert share % config.micro_batch_size == 0
    first, _, text = inspect.cleandoc(VARIANTS[variant].__doc__ or "").partition("\n")
    assert text.strip().startswith(("Source: ", "No published source"))
    if text.strip().startswith("Source: "):
        assert re.search(r"\d\d\.\d AP|no AP", first), first
        assert f"{config.schedule.epochs} epochs" in first, first
        assert re.search(r"GPUs?|total batch", first), first


@pytest.mark.parametrize(
    ("variant", "num_classes", "num_parameters"),
    [
        ("deta_r50.official_12ep", 91, 48_438_489),
        ("improved_deformable_detr_r50.official_50ep", 91, 48_438_489),
        ("deta_swin_l.official_finetune", 91, 218_775_373),
        ("anchor_detr_r50.official_r50", 91, 37_038_711),
    ],
)
def test_a_recipe_builds_the_published_network(variant, num_classes, num_parameters):
    config = replace(without_download(VARIANTS[variant]().model), num_classes=num_classes)
    with torch.device("meta"):
        model = make_detector(config)
    assert sum(parameter.numel() for parameter in model.parameters()) == num_parameters


def test_recipes_differ_in_what_they_say_they_differ_in():
    """Of each variant all that is not its recipe's first variant's."""

    def difference(variant: str) -> set[str]:
        base = flatten(next(iter(RECIPES[variant.split(".")[0]].VARIANTS.values()))())
        own = flatten(VARIANTS[variant]())
        return {key for key in own if own[key] != base[key]} - {"name"}

    assert difference("deta_r50.official_24ep") == {"schedule.epochs", "schedule.lr_drop_epochs"}
    assert difference("deta_r50.detrex_aligned") == {"model.logit_eps", "optim.max_grad_norm"}
    assert difference("anchor_detr_r50.official_r101_dc5") == {
        "model.backbone.name",
        "model.backbone.dilated",
    }
    assert difference("deta_swin_l.o365_pretrain") == {
        "model.num_classes",
        "optim.lr",
        "init_classes",
    }


@pytest.mark.parametrize(
    ("name", "full"),
    [
        ("anchor_detr_r50.detrex_r50", "anchor_detr_r50.detrex_r50"),
        ("deta_swin_l", "deta_swin_l.official_finetune"),
        ("official_r101", "anchor_detr_r50.official_r101"),
        ("small", "deta_r50.small"),
    ],
)
def test_a_variant_is_found_by_any_name_that_means_one(name: str, full: str):
    assert find_variant(name) == VARIANTS[full]()


def test_a_variant_that_is_not_there_is_refused_with_the_nearest():
    with pytest.raises(ValueError, match=r"deta_r50\.official_12ep"):
        find_variant("official_12")


# Swin-L.


def swin_blocks_drop_path(config: BackboneConfig) -> list[float]:
    with torch.device("meta"):
        body = Backbone(replace(config, pretrained=False)).body
    names = [n for n, _ in body.named_modules() if re.fullmatch(r"layers_\d\.blocks\.\d+", n)]
    blocks = [body.get_submodule(name) for name in names]
    paths = [block.get_submodule("drop_path1") for block in blocks]
    return [path.drop_prob if isinstance(path, DropPath) else 0.0 for path in paths]


@pytest.mark.parametrize(
    ("variant", "last"), [("official_finetune", 0.3), ("detrex_finetune", 0.2)]
)
def test_stochastic_depth_of_swin_l_rises_linearly_over_all_24_blocks(variant: str, last: float):
    found = swin_blocks_drop_path(VARIANTS[f"deta_swin_l.{variant}"]().model.backbone)
    assert found == pytest.approx([last * block / 23 for block in range(24)])


def assert_same_gradients(make, loss_of) -> None:
    """Of the model with and without activations that are computed again."""
    found = []
    for again in (False, True):
        torch.manual_seed(0)
        model = make(again).train()
        torch.manual_seed(5)  # of what stochastic depth drops
        loss_of(model).backward()
        found.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    plain, recomputed = found
    assert plain.keys() == recomputed.keys()
    assert all(torch.equal(plain[name], recomputed[name]) for name in plain)


@pytest.mark.parametrize(
    "config",
    [
        BackboneConfig(
            name="swin_tiny_patch4_window7_224",
            pretrained=False,
            norm="own",
            frozen_parts=(),
            output_norm=True,
            drop_path=0.3,
            window=4,
            width=0.25,
        ),
        BackboneConfig(name="resnet18", pretrained=False, width=0.25),
    ],
    ids=["swin", "resnet"],
)
def test_activations_computed_again_give_the_same_gradients(config: BackboneConfig):
    images = torch.randn(1, 3, 70, 90)  # not a multiple of any window
    assert_same_gradients(
        lambda again: Backbone(replace(config, checkpoint_activations=again)),
        lambda model: sum(map(torch.Tensor.sum, map(torch.square, model(images)))),
    )


def test_an_encoder_computed_again_gives_the_same_gradients():
    config = ModelConfig(
        backbone=BackboneConfig(name="resnet10t", pretrained=False, norm="group", width=0.25),
        num_classes=3,
        dim=16,
        num_heads=2,
        num_levels=3,
        encoder_layers=2,
        decoder_layers=1,
        ffn_dim=16,
        num_queries=5,
        dropout=0.2,
    )
    nothing = Target(torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64))
    batch = pad_batch([torch.randn(3, 64, 64)], [nothing])
    assert_same_gradients(
        lambda again: DETA(replace(config, checkpoint_encoder=again)),
        lambda model: model(batch.images, batch.padding).encoder_logits.sum(),
    )


def test_an_assignment_that_does_not_fit_the_model_is_refused_before_anything_is_read():
    from deta.platform.launch.prepare_run import prepare_run

    config = override(VARIANTS["anchor_detr_r50.official_r50"](), {"criterion.assignment": "iou"})
    with pytest.raises(ValueError, match=r"criterion\.assignment=one_to_one"):
        prepare_run(config)


def test_published_anchor_detr_weights_start_a_run_and_predict(tmp_path: Path):
    """The layout is that of the public code; see test_anchor_detr.py."""
    narrow = {**SMALL, **OF_FAMILY["anchor_detr_r50.official_r50"], "model.num_classes": 3}
    config = override(VARIANTS["anchor_detr_r50.official_r50"](), narrow)
    assert isinstance(config.model, AnchorDETRConfig)
    model = AnchorDETR(config.model)
    published = pretrained_anchor.to_published(model.state_dict(), config.model, "official")
    path = tmp_path / "published.safetensors"
    write_weights(path, {name: tensor.clone() for name, tensor in published.items()})
    categories = tuple(Category(i, str(i)) for i in range(3))

    started = AnchorDETR(config.model)
    load_initial_weights(started, path, categories)
    predictor = Predictor.from_published(path, config, categories)

    for filled in (started, predictor.model):
        state = filled.state_dict()
        assert all(torch.equal(state[n], t) for n, t in model.state_dict().items())
