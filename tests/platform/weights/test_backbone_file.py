"""Test `backbone_file.py`: backbones alone, of detectron2, torchvision and the Swin repository."""

from __future__ import annotations

import pickle
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from timm.models import register_model
from timm.models.swin_transformer import SwinTransformer, _create_swin_transformer
from torch import Tensor

from deta.model.config import BackboneConfig
from deta.model.detector import DETA
from deta.model.pretrained import rename_to_published
from deta.platform.run.config import RunConfig
from deta.platform.weights.backbone_file import is_backbone
from deta.platform.weights.initial_weights import check_initial_weights, load_backbone
from deta.platform.weights.weight_files import write_weights
from tests.platform.weights.small_detector import DATA, SMALL, randomised


def tiny_swin() -> BackboneConfig:
    """Under a name of its own, like any other network of timm."""

    def swin_tiny_alone(pretrained: bool = False, **options) -> SwinTransformer:
        sizes = {"embed_dim": 8, "depths": (2, 2, 2, 2), "num_heads": (1, 1, 2, 2)}
        return _create_swin_transformer("swin_tiny_alone", pretrained, **{**options, **sizes})

    register_model(swin_tiny_alone)
    return BackboneConfig(
        name="swin_tiny_alone", pretrained=False, norm="own", frozen_parts=(), output_norm=True
    )


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


def test_other_files_are_not_backbones(tmp_path):
    trained, path = DETA(SMALL), tmp_path / "a.safetensors"
    assert not is_backbone({"rpn.weight": torch.ones(2)})
    write_weights(path, {"rpn.weight": torch.ones(2)})
    with pytest.raises(ValueError, match="not the names of a ResNet or Swin"):
        load_backbone(trained, path)
    write_weights(path, {"layer1.0.conv1.weight": torch.ones(2), "layer1.0.gate": torch.ones(2)})
    with pytest.raises(ValueError, match=r"layer1\.0\.gate: no such tensor"):
        load_backbone(trained, path)
