"""Read weights of a backbone alone, from which published detectors start.

  R-50.pkl               detectron2://ImageNetPretrained/torchvision/R-50.pkl and R-101.pkl
  resnet50-*.pth         torchvision, V1 weights of ImageNet-1k
  swin_*_22k.pth         the Swin repository, also its ImageNet-1k ones

The R-50.pkl of MSRA, which detectron2 uses by default, is refused: that network expects blue before
red, values of 0 to 255, and strides in its 1x1 convolutions. Our input would give wrong features.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from deta.model import pretrained
from deta.model.architectures import DetectorConfig, layouts_of
from deta.model.config import AnchorDETRConfig
from deta.model.published_names import STEPS
from deta.model.published_sizes import BODY
from deta.platform.system.short_list import short_list
from deta.platform.weights.weight_files import WeightsError, read_weights

# For each layout, how a tensor name begins, and the prefix of such a name in a complete detector.
_LAYOUTS = {
    "detectron2": (r"stem\.conv1\.|res2\.0\.", "backbone."),
    "torchvision or Swin": (
        r"conv1\.weight|layer1\.0\.|patch_embed\.|layers\.0\.", "backbone.0.body."
    ),
}  # fmt: skip
_CAFFE2 = re.compile(r"(res_)?conv1_|res\d_\d+_branch")
# The classifier, and in Swin the masks that the window size determines.
_UNUSED = re.compile(r"(stem\.)?fc\.|head\.|norm\.(weight|bias)$|.*\.attn_mask$")


def read_backbone(path: Path, model: DetectorConfig) -> tuple[dict[str, Tensor], list[str]]:
    """Return the backbone's tensors under our names, and lines about them to print.

    The output norms that DETA adds to a Swin are not in such files, nor in the result.

    Raises:
        ValueError: the file is refused, or is for another network or another input.
    """
    notes: list[str] = []
    tensors = read_weights(path, notes.append)
    try:
        layout, renamed, unused = rename_backbone(tensors)
        state = _fit_backbone(renamed, model)
    except ValueError as error:
        raise WeightsError(f"{path}: {error}") from error
    rest = f", not used: {short_list(unused, 6)}" if unused else ""
    return state, [f"backbone from {path} ({layout} layout): {len(state)} tensors{rest}", *notes]


def is_backbone(tensors: Mapping[str, Tensor]) -> bool:
    """Return True for the names of a backbone alone, readable or refused."""
    return _layout(tensors) is not None


def rename_backbone(
    tensors: Mapping[str, Tensor],
) -> tuple[str, dict[str, Tensor], list[str]]:
    """Return the layout, the tensors under our names, and the names of unused tensors.

    Raises:
        ValueError: the layout is unknown, or the network expects another input than ours.
    """
    layout = _layout(tensors)
    if layout == "Caffe2":
        raise ValueError(
            "has Caffe2 names, so it is a network of MSRA or Detectron: it expects blue before "
            "red, values of 0 to 255 and strides in its 1x1 convolutions, unlike ours. Use "
            "detectron2's torchvision/R-50.pkl (jobs/convert.py --list) or timm's weights"
        )
    if layout == "ours":
        return layout, dict(tensors), []
    if layout is None:
        raise ValueError(
            f"{', '.join(list(tensors)[:5])}: not the names of a ResNet or Swin of detectron2, "
            "torchvision or the Swin repository. For a complete detector use init_checkpoint"
        )
    prefix = _LAYOUTS[layout][1]
    unused = [name for name in tensors if _UNUSED.match(name)]
    used = {prefix + name: tensors[name] for name in tensors if name not in set(unused)}
    renamed = pretrained.trace_published(used)
    if renamed.unknown:
        names = [name.removeprefix(prefix) for name in renamed.unknown]
        raise ValueError(f"{', '.join(names[:10])}: no such tensor in a {layout} backbone")
    return layout, renamed.tensors, unused


def _layout(tensors: Mapping[str, Tensor]) -> str | None:
    if any(_CAFFE2.match(name) for name in tensors):
        return "Caffe2"
    if all(name.startswith(BODY) for name in tensors):
        return "ours"
    for layout, (begins, _) in _LAYOUTS.items():
        if any(re.match(begins, name) for name in tensors):
            return layout
    return None


def _fit_backbone(renamed: Mapping[str, Tensor], model: DetectorConfig) -> dict[str, Tensor]:
    """Return the tensors of the model's backbone, except output norms, under its names."""
    ours = BODY.removeprefix("pyramid.") if isinstance(model, AnchorDETRConfig) else BODY
    expected = {
        name: shape
        for name, shape in layouts_of(model).shapes_of(model).items()
        if name.startswith(ours) and not name.endswith(STEPS)
    }
    state = {
        ours + name.removeprefix(BODY): tensor
        for name, tensor in renamed.items()
        if not name.endswith(STEPS)
    }
    problems = {
        "missing": expected.keys() - state.keys(),
        "left over": state.keys() - expected.keys(),
        "of other shape": [n for n in expected if n in state and expected[n] != state[n].shape],
    }
    if any(problems.values()):
        found = [f"{len(n)} {what} ({short_list(sorted(n))})" for what, n in problems.items() if n]
        raise ValueError(
            f"is not backbone {model.backbone.name}: {'; '.join(found)}. Set model.backbone.name "
            "to the network of the file"
        )
    return {name: state[name] for name in expected}
