"""The names used in published Anchor DETR weights, mapped to ours; the only file that knows them.

Two layouts are in circulation, alike but for the input projection: `official`
(megvii-research/AnchorDETR) and `detrex` (IDEA-Research/detrex, projects/anchor_detr). Written
down from the modules in their public code; not yet tried on a published file.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Literal

import torch
from torch import Tensor

from deta.model.anchor_detr import AnchorDETR, AnchorDETRConfig
from deta.model.pretrained import Renamed, rows_or_fresh

Format = Literal["official", "detrex"]

# Published beginnings of names and ours; `{i}` is a number. What follows them is the same.
_PREFIXES = {
    "transformer.encoder_layers.{i}.": "encoder.{i}.",
    "transformer.decoder_layers.{i}.": "decoder.{i}.",
    "transformer.pattern.weight": "patterns",
    "transformer.position.weight": "points",
    "transformer.adapt_pos2d.": "position_xy.",
    "transformer.adapt_pos1d.": "position_1d.",
    # Stored once for each decoder layer, though all layers share one head.
    "transformer.class_embed.{i}.": "class_head.",
    "transformer.bbox_embed.{i}.layers.0.": "box_head.mlp.0.",
    "transformer.bbox_embed.{i}.layers.1.": "box_head.mlp.2.",
    "transformer.bbox_embed.{i}.layers.2.": "box_head.mlp.4.",
    "backbone.body.": "backbone.body.",
}
_INPUT_PROJECTION = {"official": "input_proj.0.", "detrex": "input_proj."}
# And what follows, inside the layers.
_IN_LAYERS = {
    "encoder": {
        "self_attn.in_proj_": "attention.in_",
        "self_attn.out_proj.": "attention.out_projection.",
        "norm1.": "attention_norm.",
    },
    "decoder": {
        "cross_attn.in_proj_": "cross_attention.in_",
        "cross_attn.out_proj.": "cross_attention.out_projection.",
        "norm1.": "cross_attention_norm.",
        "self_attn.": "self_attention.",
        "norm2.": "self_attention_norm.",
    },
}
_FFN = {"ffn.linear1.": "ffn.linear1.", "ffn.linear2.": "ffn.linear2.", "ffn.norm2.": "ffn.norm."}
# Counters of a profiler that official files carry, and how often a BatchNorm was updated.
_WITHOUT_EFFECT = ("total_ops", "total_params", "num_batches_tracked")


def detect_format(names: Iterable[str]) -> Format:
    """Which of the two layouts these names belong to.

    Raises:
        ValueError: neither.
    """
    names = list(names)
    if is_anchor_detr(names):
        if any(name.startswith("input_proj.0.0.") for name in names):
            return "official"
        return "detrex"
    raise ValueError(
        f"{_listing(names)}: not the names of an Anchor DETR as official or detrex store it. "
        "Weights of other detectors cannot be converted"
    )


def is_anchor_detr(names: Iterable[str]) -> bool:
    """Whether these are names that only a published Anchor DETR has."""
    return any(name.startswith("transformer.encoder_layers.") for name in names)


def from_published(
    state: Mapping[str, Tensor], config: AnchorDETRConfig, class_rows: Sequence[int] | None = None
) -> dict[str, Tensor]:
    """Published weights under our names, complete, ready for `load_state_dict`.

    Args:
        state: the tensors of a file in either layout.
        config: of the model that they are for.
        class_rows: which of the file's classes the model has, in its order; all if left out.

    Raises:
        ValueError: a tensor is missing, left over, of another shape, or unlike its copy.
    """
    renamed = rename_from_published(state)
    if class_rows is not None:
        renamed = select_classes(renamed, class_rows)
    return fit(renamed, config)


def fit(state: Mapping[str, Tensor], config: AnchorDETRConfig) -> dict[str, Tensor]:
    """The state as the model of this config wants it: every tensor, in its shape, and no other.

    Raises:
        ValueError: a tensor is missing, left over or of another shape.
    """
    expected = shapes_of(config)
    missing = [name for name in expected if name not in state]
    extra = [name for name in state if name not in expected]
    if missing or extra:
        raise ValueError(
            f"these weights do not fit Anchor DETR with backbone {config.backbone.name} and "
            f"{config.encoder_layers}+{config.decoder_layers} layers: {_listing(missing)} missing, "
            f"{_listing(extra)} left over. Choose the model.* settings that they were trained with"
        )
    wrong = [
        f"{name} {tuple(state[name].shape)} instead of {tuple(shape)}"
        for name, shape in expected.items()
        if state[name].shape != shape
    ]
    if wrong:
        raise ValueError(
            f"{_listing(wrong)}: wrong shape for this model. Choose the model.* settings that the "
            "weights were trained with"
        )
    return {name: state[name] for name in expected}


def to_published(
    state: Mapping[str, Tensor], config: AnchorDETRConfig, format_: Format
) -> dict[str, Tensor]:
    """Our weights under the names of a published layout, with the copies that it stores."""
    published: dict[str, Tensor] = {}
    for name, tensor in state.items():
        if name.endswith(_WITHOUT_EFFECT):
            continue
        for theirs, ours in _names(format_):
            if (rest := _rest(ours, name)) is None:
                continue
            number, tail = rest
            layers = range(config.decoder_layers) if "{i}" not in ours else [number]
            for layer in layers if "{i}" in theirs else [""]:
                published[theirs.replace("{i}", str(layer)) + tail] = tensor
            break
        else:
            raise ValueError(f"{name}: has no name in published Anchor DETR weights")
    return published


def rename_from_published(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Published weights under our names, for a model of any size; some may be missing.

    Raises:
        ValueError: a tensor has no place, or is unlike its copy.
    """
    renamed = trace_published(state)
    if renamed.unknown:
        raise ValueError(
            f"{_listing(renamed.unknown)}: no such tensor in Anchor DETR; weights of other "
            "networks cannot be converted"
        )
    return renamed.tensors


def trace_published(state: Mapping[str, Tensor]) -> Renamed:
    """As `rename_from_published`, but tells where each tensor came from and what has no place.

    Raises:
        ValueError: a tensor is unlike its copy.
    """
    layout = detect_format(state)
    names = _names(layout)
    tensors: dict[str, Tensor] = {}
    sources: dict[str, list[str]] = {}
    computed, unknown = [], []
    for name, tensor in state.items():
        if name.endswith(_WITHOUT_EFFECT):
            computed.append(name)
            continue
        for theirs, ours in names:
            if (rest := _rest(theirs, name)) is not None:
                place = ours.replace("{i}", str(rest[0])) + rest[1]
                break
        else:
            unknown.append(name)
            continue
        if not torch.equal(tensors.setdefault(place, tensor), tensor):
            raise ValueError(
                f"{name}: differs from its copy in another layer, but Anchor DETR uses one tensor "
                "for both; these are the weights of another model, or damaged"
            )
        sources.setdefault(place, []).append(name)
    return Renamed(layout, tensors, sources, computed, unknown)


def select_classes(
    state: Mapping[str, Tensor],
    rows: Sequence[int | None],
    fresh: Mapping[str, Tensor] | None = None,
) -> dict[str, Tensor]:
    """Keep some classes of a model, give them another order, or put new ones among them.

    Args:
        state: under our names.
        rows: the old class of each new one; None for a class that the old model does not know.
        fresh: a new model's tensors, whose rows unknown classes get; at least its class head.

    Raises:
        ValueError: there is no such row, or one is asked for twice.
    """
    num_classes = len(state["class_head.bias"])
    known = [row for row in rows if row is not None]
    if (
        not rows
        or len(set(known)) < len(known)
        or not set(known) <= set(range(num_classes))
        or (len(known) < len(rows) and fresh is None)
    ):
        raise ValueError(
            f"class rows {list(rows)}: give at least one, each once, from 0 to {num_classes - 1}"
        )
    heads = {
        name: rows_or_fresh(state[name], rows, fresh[name] if fresh else None)
        for name in ("class_head.weight", "class_head.bias")
    }
    return {**state, **heads}


def with_sizes_of(state: Mapping[str, Tensor], config: AnchorDETRConfig) -> AnchorDETRConfig:
    """The configuration with what the published tensors show, and the layout's `logit_eps`.

    detrex trained its weights with 1e-3; official ones that someone converted to detrex's names
    want 1e-5, but nothing in the names tells them apart.

    Raises:
        ValueError: these are not the weights of a whole Anchor DETR.
    """
    ours = rename_from_published(state)
    needed = ("class_head.bias", "patterns", "encoder.0.ffn.linear1.bias")
    if absent := [name for name in needed if name not in ours]:
        raise ValueError(f"{_listing(absent)}: missing, so this is not a whole Anchor DETR")

    def num_layers(part: str) -> int:
        return len({name.split(".")[1] for name in ours if name.startswith(f"{part}.")})

    return replace(
        config,
        num_classes=len(ours["class_head.bias"]),
        num_patterns=len(ours["patterns"]),
        dim=ours["patterns"].shape[1],
        ffn_dim=len(ours["encoder.0.ffn.linear1.bias"]),
        encoder_layers=num_layers("encoder"),
        decoder_layers=num_layers("decoder"),
        points="learned" if "points" in ours else "grid",
        num_points=len(ours["points"]) if "points" in ours else config.num_points,
        logit_eps=1e-3 if detect_format(state) == "detrex" else 1e-5,
    )


def _names(format_: Format) -> list[tuple[str, str]]:
    """(published, ours), beginnings of names; the first that fits is meant."""
    rows = []
    for theirs, ours in {**_PREFIXES, _INPUT_PROJECTION[format_]: "input_projection."}.items():
        part = ours.split(".")[0]
        if part in _IN_LAYERS:
            inner = {**_IN_LAYERS[part], **_FFN}
            rows += [(theirs + their_tail, ours + tail) for their_tail, tail in inner.items()]
        else:
            rows.append((theirs, ours))
    return rows


def _rest(beginning: str, name: str) -> tuple[int | None, str] | None:
    """The number for `{i}` and what follows; none if the name begins otherwise."""
    pattern = re.escape(beginning).replace(re.escape("{i}"), r"(\d+)")
    found = re.match(pattern, name)
    if found is None:
        return None
    return (int(found[1]) if found.groups() else None), name[found.end() :]


@lru_cache(maxsize=4)
def shapes_of(config: AnchorDETRConfig) -> dict[str, torch.Size]:
    with torch.device("meta"):
        model = AnchorDETR(replace(config, backbone=replace(config.backbone, pretrained=False)))
    return {name: tensor.shape for name, tensor in model.state_dict().items()}


def _listing(names: Sequence[str]) -> str:
    """At most ten of them."""
    more = f" and {len(names) - 10} more" if len(names) > 10 else ""
    return f"{', '.join(names[:10])}{more}" if names else "no tensors"
