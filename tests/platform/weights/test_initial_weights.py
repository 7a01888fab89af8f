"""Test `initial_weights.py`: the matching of classes, and backbones alone."""

from __future__ import annotations

import math
import os
import pickle
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from timm.models import register_model
from timm.models.swin_transformer import SwinTransformer, _create_swin_transformer
from torch import Tensor

from deta.model.backbone import BackboneConfig
from deta.model.detector import DETA, PRIOR_PROBABILITY, ModelConfig
from deta.model.pretrained import rename_to_published, to_published
from deta.platform.checkpoint.local import take_snapshot, write_checkpoint
from deta.platform.data.coco_dataset import Category
from deta.platform.run.config import RunConfig
from deta.platform.run.run_state import RunState
from deta.platform.weights.class_mapping import COCO_NAMES, published_classes
from deta.platform.weights.converted_file import write_converted
from deta.platform.weights.initial_weights import (
    check_initial_weights,
    load_backbone,
    load_initial_weights,
)
from deta.platform.weights.weight_files import write_weights

ROOT = Path(__file__).resolve().parents[3]
PRIOR = -math.log((1 - PRIOR_PROBABILITY) / PRIOR_PROBABILITY)
SMALL = ModelConfig(
    # The smallest network that published weights have names for, and narrow.
    backbone=BackboneConfig(name="resnet18.tv_in1k", pretrained=False, width=0.125),
    num_classes=91,
    num_levels=4,
    dim=32,
    num_heads=4,
    num_points=2,
    encoder_layers=1,
    decoder_layers=1,
    ffn_dim=32,
    num_queries=20,
)
# Ids 1 to 3 are other things in COCO: person, bicycle, car.
DATA = (Category(1, "dog"), Category(2, "resistor"), Category(3, "Person"))


def tiny_swin() -> BackboneConfig:
    """Under a name of its own, like any other network of timm."""

    def swin_tiny_alone(pretrained: bool = False, **options) -> SwinTransformer:
        sizes = {"embed_dim": 8, "depths": (2, 2, 2, 2), "num_heads": (1, 1, 2, 2)}
        return _create_swin_transformer("swin_tiny_alone", pretrained, **{**options, **sizes})

    register_model(swin_tiny_alone)
    return BackboneConfig(
        name="swin_tiny_alone", pretrained=False, norm="own", frozen_parts=(), output_norm=True
    )


def randomised(config: ModelConfig, seed: int = 0) -> DETA:
    torch.manual_seed(seed)
    model = DETA(config)
    with torch.no_grad():
        for tensor in model.state_dict().values():
            if tensor.is_floating_point():
                tensor.normal_()
    return model


@pytest.fixture(scope="module")
def trained() -> DETA:
    return randomised(SMALL)


@pytest.fixture(params=["official", "detrex", "huggingface", "converted", "checkpoint"])
def source(request: pytest.FixtureRequest, trained: DETA, tmp_path: Path) -> Path:
    """The same weights in every form, with COCO's 91 rows; a checkpoint has a class for each."""
    state, config = trained.state_dict(), RunConfig(model=SMALL)
    path = tmp_path / "weights.safetensors"
    if request.param == "checkpoint":
        everything = tuple(Category(i, COCO_NAMES.get(i, f"none {i}")) for i in range(91))
        run_state = RunState(step=1, samples_seen=1, epoch=1.0)
        return write_checkpoint(tmp_path, take_snapshot(run_state, config, everything, state, {}))
    if request.param == "converted":
        write_converted(path, state, config, published_classes(91), {"file": "x"})
    else:
        write_weights(path, to_published(state, SMALL, request.param))
    return path


def test_class_names_decide_in_every_form_of_weights(source, trained):
    model = randomised(replace(SMALL, num_classes=3), seed=1)
    fresh = {name: tensor.clone() for name, tensor in model.state_dict().items()}

    lines = load_initial_weights(model, source, DATA)

    before, after = trained.state_dict(), model.state_dict()
    for name, tensor in after.items():
        if name.startswith("class_heads.0."):
            assert torch.equal(tensor[[0, 2]], before[name][[18, 1]]), name  # dog and person
            assert torch.equal(tensor[1], fresh[name][1]), name
        elif name.startswith("class_heads.1."):  # of the first stage, which ranks by row 0
            assert torch.equal(tensor[0], before[name][0]), name
        else:
            assert torch.equal(tensor, before[name]), name
    told = "\n".join(lines)
    assert "2 of 3 by name: dog, Person (there person)" in told
    assert "1 new, which start untrained: resistor" in told


def test_new_classes_start_at_the_prior(source):
    torch.manual_seed(1)
    model = DETA(replace(SMALL, num_classes=3))

    load_initial_weights(model, source, DATA)

    assert model.class_heads[0].bias[1].item() == pytest.approx(PRIOR)
    assert model.class_heads[0].bias[0].item() != pytest.approx(PRIOR)


def test_dropped_heads_start_as_new_and_the_rest_is_kept(source, trained):
    torch.manual_seed(1)
    model = DETA(replace(SMALL, num_classes=3))
    fresh = {name: tensor.clone() for name, tensor in model.state_dict().items()}

    lines = load_initial_weights(model, source, DATA, "drop")

    for name, tensor in model.state_dict().items():
        expected = fresh if name.startswith("class_heads.") else trained.state_dict()
        assert torch.equal(tensor, expected[name]), name
    assert "all 3 start untrained" in lines[0]


def test_the_same_classes_are_taken_as_they_are(tmp_path):
    config = replace(SMALL, num_classes=3)
    trained, model = randomised(config), randomised(config, seed=1)
    state = RunState(step=1, samples_seen=1, epoch=1.0)
    snapshot = take_snapshot(state, RunConfig(model=config), DATA, trained.state_dict(), {})
    checkpoint = write_checkpoint(tmp_path, snapshot)

    assert load_initial_weights(model, checkpoint, DATA) == []

    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, trained.state_dict()[name]), name


def test_rows_without_names_are_refused_and_the_ways_out_are_told(tmp_path):
    config = replace(SMALL, num_classes=12)
    path = tmp_path / "a.safetensors"
    write_weights(path, to_published(randomised(config).state_dict(), config, "official"))
    model = DETA(replace(SMALL, num_classes=3))

    with pytest.raises(ValueError, match=r"a\.safetensors: .*init_classes=drop.*in_order"):
        load_initial_weights(model, path, DATA)
    load_initial_weights(model, path, DATA, "drop")


def test_all_that_can_be_refused_is_refused_before_a_run(tmp_path, trained):
    path = tmp_path / "a.safetensors"
    write_weights(path, to_published(trained.state_dict(), SMALL, "official"))
    config = RunConfig(model=SMALL, init_checkpoint=str(path))

    told = "\n".join(check_initial_weights(config, DATA))
    assert "a.safetensors (official layout)" in told
    assert "1 new, which start untrained: resistor" in told
    deeper = replace(config, model=replace(SMALL, decoder_layers=2))
    with pytest.raises(ValueError, match=r"decoder\.layers\.1.* missing"):
        check_initial_weights(deeper, DATA)
    with pytest.raises(ValueError, match="no such file"):
        check_initial_weights(replace(config, init_checkpoint=str(tmp_path / "b.pth")), DATA)
    assert check_initial_weights(RunConfig(), DATA) == []
    with pytest.raises(ValueError, match="holds a backbone already"):
        replace(config, init_backbone="R-50.pkl")
    with pytest.raises(ValueError, match="not by_name, in_order or drop"):
        replace(config, init_classes="by_id")


# Backbones alone.


def backbone_names(state: dict[str, Tensor], layout: str) -> dict[str, Tensor]:
    """The backbone of a state under the names that a file of it alone has."""
    prefix = {"detrex": "backbone.", "official": "backbone.0.body."}[layout]
    ours = {n: t for n, t in state.items() if n.startswith("pyramid.backbone.body.")}
    return {n.removeprefix(prefix): t for n, t in rename_to_published(ours, layout).items()}


def write_backbone(kind: str, folder: Path, state: dict[str, Tensor]) -> Path:
    if kind == "detectron2":
        arrays = {name: t.numpy() for name, t in backbone_names(state, "detrex").items()}
        arrays["stem.fc.weight"] = torch.zeros(10, 512).numpy()
        content = {"model": arrays, "__author__": "torchvision", "matching_heuristics": True}
        (folder / "R-18.pkl").write_bytes(pickle.dumps(content))
        return folder / "R-18.pkl"
    state = backbone_names(state, "official")
    if kind == "torchvision":
        extra = {"fc.weight": torch.zeros(10, 512), "fc.bias": torch.zeros(10)}
        torch.save(state | extra, folder / "resnet18-a.pth", _use_new_zipfile_serialization=False)
        return folder / "resnet18-a.pth"
    extra = {
        "norm.weight": torch.zeros(8), "head.bias": torch.zeros(3),
        "layers.0.blocks.1.attn_mask": torch.zeros(4, 49, 49),
        "layers.1.blocks.1.attn_mask": torch.zeros(4, 49, 49),
    }  # fmt: skip
    torch.save({"model": state | extra}, folder / "swin_tiny.pth")
    return folder / "swin_tiny.pth"


@pytest.mark.parametrize("kind", ["detectron2", "torchvision", "swin"])
def test_a_backbone_alone_is_taken_and_nothing_else_changes(kind, tmp_path):
    backbone = SMALL.backbone
    if kind == "swin":
        backbone = tiny_swin()
    config = replace(SMALL, backbone=backbone, num_classes=3)
    trained, model = randomised(config), randomised(config, seed=1)
    fresh = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    path = write_backbone(kind, tmp_path, trained.state_dict())

    (line,) = load_backbone(model, path)

    for name, tensor in model.state_dict().items():
        is_body = name.startswith("pyramid.backbone.body.")
        assert torch.equal(tensor, (trained.state_dict() if is_body else fresh)[name]), name
    assert "not used:" in line
    other = RunConfig(
        model=replace(SMALL, backbone=replace(SMALL.backbone, name="resnet34.tv_in1k")),
        init_backbone=str(path),
    )
    with pytest.raises(ValueError, match=r"is not backbone resnet34.* missing .*model\.backbone"):
        check_initial_weights(other, DATA)


def test_a_backbone_with_another_input_is_refused_with_the_reason(tmp_path):
    """The MSRA file that detectron2 uses by default, by its Caffe2 names."""
    names = ("conv1_w", "res_conv1_bn_gamma", "res2_0_branch2a_w", "res2_0_branch2a_bn_beta")
    arrays = {name: torch.ones(2).numpy() for name in names}
    path = tmp_path / "R-50.pkl"
    for content in ({"model": arrays, "__author__": "Caffe2"}, {"blobs": arrays}, arrays):
        path.write_bytes(pickle.dumps(content, protocol=2))
        with pytest.raises(ValueError, match=r"R-50\.pkl: .*blue before red.*torchvision/R-50"):
            load_backbone(DETA(SMALL), path)


def test_other_files_are_no_backbones(tmp_path, trained):
    path = tmp_path / "a.safetensors"
    write_weights(path, {"rpn.weight": torch.ones(2)})
    with pytest.raises(ValueError, match="not the names of a ResNet or Swin"):
        load_backbone(trained, path)
    write_weights(path, {"layer1.0.conv1.weight": torch.ones(2), "layer1.0.gate": torch.ones(2)})
    with pytest.raises(ValueError, match=r"layer1\.0\.gate: no such tensor"):
        load_backbone(trained, path)


def test_timms_weights_without_a_network_are_an_error_that_says_what_to_do(tmp_path):
    code = (
        "from deta.model.backbone import Backbone, BackboneConfig\n"
        "Backbone(BackboneConfig(name='resnet18.tv_in1k'))"
    )
    env = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", code]

    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=env)

    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    for part in (
        "RuntimeError: ",
        "resnet18.tv_in1k",
        "init_backbone=FILE",
        "init_checkpoint=FILE",
    ):
        assert part in last
