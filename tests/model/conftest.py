"""Fixtures for the tests of the model: published models and a measure of differences."""

from __future__ import annotations

import json
import re
import zlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn
from torchvision.models.resnet import Bottleneck
from torchvision.ops import FrozenBatchNorm2d

from deta.model import detector
from deta.model.batch import Batch, Target, pad_batch, pad_targets
from deta.model.config import BackboneConfig, CriterionConfig, ModelConfig
from deta.model.criterion import Criterion
from deta.model.detector import DETA, Outputs
from deta.model.pretrained import rename_from_published, rename_to_published

VARIANTS = {
    "deta": ({"proposal_selection": "spread"}, CriterionConfig()),
    "hungarian": (
        {"proposal_selection": "highest"},
        CriterionConfig(assignment="one_to_one"),
    ),
}


@pytest.fixture
def compare(record_property) -> Callable[[str, str, Tensor, Tensor, float], None]:
    """Assert that two tensors agree, and record their difference for `benchmarks/parity.py`.

    The difference is the largest one of any element, over the largest expected magnitude.
    Infinities must be at the same positions.
    """

    def compare(group: str, name: str, found: Tensor, expected: Tensor, tolerance: float) -> None:
        found, expected = found.detach(), expected.detach()
        assert found.shape == expected.shape, f"{name} is {found.shape}, not {expected.shape}"
        finite = expected.isfinite()
        assert torch.equal(finite, found.isfinite()), f"{name} is not finite at other positions"
        assert torch.equal(found[~finite], expected[~finite].to(found.dtype)), name
        found, expected = found[finite].double(), expected[finite].double()
        difference = 0.0
        if expected.numel() > 0:
            scale = expected.abs().max().item() or 1.0
            difference = (found - expected).abs().max().item() / scale
        record_property("difference", (group, name, difference))
        assert difference <= tolerance, f"{name} differs by {difference:.2e} of its largest element"

    return compare


class SmallResNet(nn.Module):
    """The backbone of the shrunken published models; stem and first stage are frozen."""

    def __init__(self, stem: int, planes: list[int], blocks: list[int]) -> None:
        super().__init__()
        self.channels = [4 * width for width in planes[1:]]
        stages: dict[str, nn.Module] = {
            "conv1": nn.Conv2d(3, stem, 7, stride=2, padding=3, bias=False),
            "bn1": FrozenBatchNorm2d(stem),
        }
        inputs = stem
        for stage, (width, num_blocks) in enumerate(zip(planes, blocks, strict=True)):
            layers = []
            for block in range(num_blocks):
                stride = 2 if stage > 0 and block == 0 else 1
                shortcut = None
                if block == 0:
                    shortcut = nn.Sequential(
                        nn.Conv2d(inputs, 4 * width, 1, stride=stride, bias=False),
                        FrozenBatchNorm2d(4 * width),
                    )
                layers.append(
                    Bottleneck(inputs, width, stride, shortcut, norm_layer=FrozenBatchNorm2d)
                )
                inputs = 4 * width
            stages[f"layer{stage + 1}"] = nn.Sequential(*layers)
        self.body = nn.ModuleDict(stages)
        self.body["conv1"].requires_grad_(False)
        self.body["layer1"].requires_grad_(False)

    def forward(self, images: Tensor) -> list[Tensor]:
        x = self.body["bn1"](self.body["conv1"](images)).relu()
        x = nn.functional.max_pool2d(x, 3, stride=2, padding=1)
        features = []
        for stage in range(1, 5):
            x = self.body[f"layer{stage}"](x)
            features.append(x)
        return features[1:]


@dataclass
class PublishedModel:
    """A shrunken published model under our names, with its published outputs."""

    group: str  # the folder's name
    variant: str
    model: DETA
    criterion: Criterion
    batch: Batch
    sizes_px: Tensor  # B 2, (height, width)
    features: list[Tensor]  # from the backbone
    has_backbone: bool
    expected: dict[str, Tensor]
    losses: dict
    gradients: dict[str, Tensor]  # for some parameters

    def run(self) -> Outputs:
        """Run from the images where there is a backbone, else from the features."""
        if self.has_backbone:
            return self.model(self.batch.images, self.batch.padding)
        return self.run_from_features()

    def run_from_features(self) -> Outputs:
        return self.model.detect(self.model.pyramid.project(self.features), self.batch.padding)


def load_published_model(folder: Path, variant: str) -> PublishedModel:
    description = json.loads((folder / "config.json").read_text())
    sizes = description["config"]
    weights = load_file(folder / "weights.safetensors")
    inputs = load_file(folder / "inputs.safetensors")
    expected = load_file(folder / "outputs_deta.safetensors")
    if variant != "deta":
        expected |= load_file(folder / f"outputs_{variant}.safetensors")
    gradients = folder / f"grads_{variant}.safetensors"
    losses = json.loads((folder / f"losses_{variant}.json").read_text())

    model_changes, criterion_config = VARIANTS[variant]
    config = ModelConfig(
        backbone=BackboneConfig(pretrained=False),
        num_classes=sizes["num_classes"],
        num_levels=sizes["levels"],
        dim=sizes["d_model"],
        num_heads=sizes["heads"],
        num_points=sizes["points"],
        encoder_layers=sizes["enc"],
        decoder_layers=sizes["dec"],
        ffn_dim=sizes["ffn"],
        num_queries=sizes["num_queries"],
        **model_changes,
    )
    has_backbone = "images" in inputs
    backbone = SmallResNet(sizes["stem"], sizes["planes"], sizes["blocks"])
    assert backbone.channels == description["feature_channels"]
    with patch.object(detector, "Backbone", lambda _: backbone):
        model = DETA(config)
    missing, unexpected = model.load_state_dict(rename_from_published(weights), strict=False)
    assert not unexpected
    assert all(name.startswith("pyramid.backbone.") for name in missing), missing

    batch_size = len(inputs["mask"])
    batch = Batch(
        inputs.get("images", torch.zeros(batch_size, 3, 1, 1)),
        inputs["mask"],
        pad_targets(
            [
                Target(inputs[f"target{image}.boxes"], inputs[f"target{image}.labels"])
                for image in range(batch_size)
            ]
        ),
        torch.arange(batch_size),
    )
    return PublishedModel(
        group=folder.name,
        variant=variant,
        model=model,
        criterion=Criterion(criterion_config, config.num_queries),
        batch=batch,
        sizes_px=torch.tensor(losses["target_sizes_hw"]),
        features=[inputs[f"feat{level}"] for level in range(3)],
        has_backbone=has_backbone,
        expected=expected,
        losses=losses,
        gradients=load_file(gradients) if gradients.exists() else {},
    )


@pytest.fixture(scope="session")
def published_model() -> Callable[[Path, str], PublishedModel]:
    return load_published_model


@pytest.fixture(scope="session")
def published_order() -> Callable[[Tensor, Tensor], Tensor]:
    """Return a function that maps published rows to ours; nearly equal scores may swap rows."""

    def published_order(found: Tensor, expected: Tensor) -> Tensor:
        """Return for each published box the row of ours: B Q 4 and B Q 4 boxes -> B Q."""
        distance = torch.cdist(expected.double(), found.double(), p=1)
        return torch.stack(
            [torch.from_numpy(linear_sum_assignment(image.numpy())[1]) for image in distance]
        )

    return published_order


@contextmanager
def recorded_parts(model: DETA) -> Iterator[dict]:
    """Record the inputs and outputs of a model's parts in the forward pass of this context."""
    parts: dict = {}

    def keep_features(module: nn.Module, inputs: tuple, output: list[Tensor]) -> None:
        parts["features"] = [feature.detach() for feature in output]

    def keep_memory(module: nn.Module, inputs: tuple, output: Tensor) -> None:
        parts["memory"] = output.detach()

    def keep_queries(module: nn.Module, inputs: tuple, output: tuple) -> None:
        parts["queries"], parts["query_position"] = (tensor.detach() for tensor in inputs[:2])
        parts["levels"] = inputs[4]
        parts["decoded"] = torch.stack(output[0]).detach()  # K B Q D

    hooks = [
        model.pyramid.backbone.register_forward_hook(keep_features),
        model.encoder.register_forward_hook(keep_memory),
        model.decoder.register_forward_hook(keep_queries),
    ]
    yield parts
    for hook in hooks:
        hook.remove()


@pytest.fixture(scope="session")
def record_parts() -> Callable[[DETA], AbstractContextManager[dict]]:
    return recorded_parts


def named_weight(name: str, shape: torch.Size, salt: str) -> Tensor:
    """Return the weight that the full-size cases define by a parameter's official name."""
    seed = zlib.crc32((name + salt).encode())
    r = np.random.RandomState(seed).standard_normal(int(np.prod(shape))).reshape(shape)
    root_fan = np.sqrt(np.prod(shape[1:]))
    is_bias = name.endswith("bias")
    if name.startswith("backbone.0.body."):
        if name.endswith("running_mean") or is_bias:
            value = 0.1 * r
        elif name.endswith("running_var"):
            value = 1 + 0.2 * np.abs(r)
        elif len(shape) == 4:
            value = r * np.sqrt(2) / root_fan
        else:
            value = (0.5 if "bn3" in name or "downsample" in name else 1.0) * (1 + 0.1 * r)
    elif "sampling_offsets" in name:
        value = 1.5 * r if is_bias else 0.02 * r
    elif "attention_weights" in name:
        value = 0.03 * r
    elif "level_embed" in name:
        value = r
    elif "class_embed" in name:
        value = -3 + 0.3 * r if is_bias else r / root_fan
    elif "bbox_embed" in name and "layers.2" in name:
        value = 0.05 * r if is_bias else 0.1 * r / root_fan
        if is_bias and "bbox_embed.6" in name:
            value[2:] += 0.8
    elif len(shape) == 1:
        value = 0.05 * r if is_bias else 1 + 0.05 * r
    else:
        value = r / root_fan
    return torch.from_numpy(value.astype(np.float32))


@cache
def named_weights_model(num_classes: int, num_queries: int, salt: str) -> DETA:
    config = ModelConfig(
        backbone=BackboneConfig(pretrained=False), num_classes=num_classes, num_queries=num_queries
    )
    model = DETA(config)
    official = rename_to_published(model.state_dict(), "official")
    weights = {
        name: named_weight(name, tensor.shape, salt)
        for name, tensor in official.items()
        if not name.startswith("transformer.decoder.class_embed")
        and not name.startswith("transformer.decoder.bbox_embed")
        and tensor.is_floating_point()
    }
    state = rename_from_published(weights)
    counters = {
        name: tensor for name, tensor in model.state_dict().items() if name not in state
    }  # BatchNorm's counters of updates, without effect
    assert not any(tensor.is_floating_point() for tensor in counters.values())
    model.load_state_dict(state | counters)
    return model.eval()


def named_image(seed: int, height: int, width: int) -> Tensor:
    generator = np.random.RandomState(seed)
    coarse = generator.standard_normal((3, -(-height // 32), -(-width // 32)))
    fine = generator.standard_normal((3, height, width))
    repeated = coarse.repeat(32, 1).repeat(32, 2)[:, :height, :width]
    return torch.from_numpy((repeated + 0.3 * fine).astype(np.float32))


@pytest.fixture(scope="session")
def full_size_run() -> Iterator[Callable[[Path], SimpleNamespace]]:
    """Run the complete R50 model on the image of a full-size case: several seconds, cached."""

    @cache
    def full_size_run(path: Path) -> SimpleNamespace:
        expected = json.loads(path.read_text())
        salt = re.search(r"#\d+", expected["weights"])
        assert salt is not None
        shape = expected["outputs"]["pred_logits"]["shape"]
        model_changes, criterion_config = VARIANTS[expected["variant"]]
        model = named_weights_model(shape[-1], shape[-2], salt[0])
        model.config = replace(model.config, **model_changes)
        image = named_image(*(expected["image"][key] for key in ("seed", "H", "W")))
        target = Target(
            torch.tensor(expected["gt_boxes"]).view(-1, 4), torch.tensor(expected["gt_labels"])
        )
        batch = pad_batch([image], [target])
        with torch.no_grad(), recorded_parts(model) as parts:
            outputs = model(batch.images, batch.padding)
        criterion = Criterion(criterion_config, model.config.num_queries)
        return SimpleNamespace(
            expected=expected, config=model.config, batch=batch, outputs=outputs,
            criterion=criterion, parts=parts,
        )  # fmt: skip

    yield full_size_run
    named_weights_model.cache_clear()
