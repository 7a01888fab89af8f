"""Conversion of published Anchor DETR weights to our tensor names and back.

Two layouts are in use, which differ only in the input projection: `official`
(megvii-research/AnchorDETR) and `detrex` (IDEA-Research/detrex, projects/anchor_detr). The names
follow the modules in their public code; they have not been tried on a published file yet.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Literal, get_args

import torch
from torch import Tensor

from deta.model.anchor_detr import AnchorDETR
from deta.model.config import AnchorDETRConfig
from deta.model.pretrained import Renamed, listing, rows_or_fresh
from deta.model.shapes_only import shapes_only

Format = Literal["official", "detrex"]

# Published prefixes of names and ours; `{i}` is a number. The rest of the name is the same.
_PREFIXES = {
    "transformer.encoder_layers.{i}.": "encoder.{i}.",
    "transformer.decoder_layers.{i}.": "decoder.{i}.",
    "transformer.pattern.weight": "patterns",
    "transformer.position.weight": "points",
    "transformer.adapt_pos2d.": "position_xy.",
    "transformer.adapt_pos1d.": "position_1d.",
    # Stored once per decoder layer, although all layers share one head.
    "transformer.class_embed.{i}.": "class_head.",
    "transformer.bbox_embed.{i}.layers.0.": "box_head.mlp.0.",
    "transformer.bbox_embed.{i}.layers.1.": "box_head.mlp.2.",
    "transformer.bbox_embed.{i}.layers.2.": "box_head.mlp.4.",
    "backbone.body.": "backbone.body.",
}
_INPUT_PROJECTION = {"official": "input_proj.0.", "detrex": "input_proj."}
# The second part of the names in the layers.
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
# Counters of a profiler in official files, and counters of BatchNorm updates.
_WITHOUT_EFFECT = ("total_ops", "total_params", "num_batches_tracked")


def detect_format(names: Iterable[str]) -> Format:
    """Return the published layout that these names belong to.

    Raises:
        ValueError: the names belong to neither layout.
    """
    names = list(names)
    if is_anchor_detr(names):
        if any(name.startswith("input_proj.0.0.") for name in names):
            return "official"
        return "detrex"
    raise ValueError(
        f"{listing(names)}: not the names of an Anchor DETR in the official or detrex layout. "
        "Weights of other detectors cannot be converted"
    )


def is_anchor_detr(names: Iterable[str]) -> bool:
    """Return whether these are names that only a published Anchor DETR has."""
    return any(name.startswith("transformer.encoder_layers.") for name in names)


def from_published(
    state: Mapping[str, Tensor], config: AnchorDETRConfig, class_rows: Sequence[int] | None = None
) -> dict[str, Tensor]:
    """Convert published weights to our names, complete and ready for `load_state_dict`.

    Args:
        state: the tensors of a file in either layout.
        config: the configuration of the model that they are for.
        class_rows: the file's classes that the model has, in its order; by default all.

    Raises:
        ValueError: a tensor is missing, left over, of another shape, or differs from its copy.
    """
    renamed = rename_from_published(state)
    if class_rows is not None:
        renamed = select_classes(renamed, class_rows)
    return fit(renamed, config)


def fit(state: Mapping[str, Tensor], config: AnchorDETRConfig) -> dict[str, Tensor]:
    """Check that the state has exactly this model's tensors, and return them in its order.

    Raises:
        ValueError: a tensor is missing, left over or of another shape.
    """
    expected = shapes_of(config)
    missing = [name for name in expected if name not in state]
    extra = [name for name in state if name not in expected]
    if missing or extra:
        raise ValueError(
            f"these weights do not fit Anchor DETR with backbone {config.backbone.name} and "
            f"{config.encoder_layers}+{config.decoder_layers} layers: {listing(missing)} missing, "
            f"{listing(extra)} left over. Choose the model.* settings that they were trained with"
        )
    wrong = [
        f"{name} {tuple(state[name].shape)} instead of {tuple(shape)}"
        for name, shape in expected.items()
        if state[name].shape != shape
    ]
    if wrong:
        raise ValueError(
            f"{listing(wrong)}: wrong shape for this model. Choose the model.* settings that the "
            "weights were trained with"
        )
    return {name: state[name] for name in expected}


def to_published(
    state: Mapping[str, Tensor], config: AnchorDETRConfig, format_: Format
) -> dict[str, Tensor]:
    """Convert our weights to the names of a published layout, with the copies that it stores.

    Raises:
        ValueError: a tensor is missing, left over or of another shape, or the layout is unknown.
    """
    if format_ not in get_args(Format):
        raise ValueError(f"Anchor DETR has no {format_} layout; choose official or detrex")
    published: dict[str, Tensor] = {}
    for name, tensor in fit(state, config).items():
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
            raise ValueError(f"{name}: no name in published Anchor DETR weights")
    return published


def rename_from_published(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename published weights to our names, for a model of any size; some may be missing.

    Raises:
        ValueError: a tensor is unknown, or differs from its copy.
    """
    renamed = trace_published(state)
    if renamed.unknown:
        raise ValueError(
            f"{listing(renamed.unknown)}: no such tensor in Anchor DETR; weights of other "
            "networks cannot be converted"
        )
    return renamed.tensors


def trace_published(state: Mapping[str, Tensor]) -> Renamed:
    """Rename as `rename_from_published`, and list each tensor's origin and the unknown tensors.

    Raises:
        ValueError: a tensor differs from its copy.
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
                "for both; these are the weights of another model, or they are damaged"
            )
        sources.setdefault(place, []).append(name)
    return Renamed(layout, tensors, sources, computed, unknown)


def select_classes(
    state: Mapping[str, Tensor],
    rows: Sequence[int | None],
    fresh: Mapping[str, Tensor] | None = None,
) -> dict[str, Tensor]:
    """Select, reorder or add classes of a model.

    Args:
        state: under our names.
        rows: the old class of each new one; None for a class that the old model does not have.
        fresh: a newly initialised model's tensors, which provide the rows for None; at least its
            class head.

    Raises:
        ValueError: a row does not exist or is given twice.
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


def published_config(renamed: Renamed, config: AnchorDETRConfig) -> AnchorDETRConfig:
    """Return the configuration with the sizes of published weights, and their `logit_eps`.

    detrex trained its weights with 1e-3. Official ones that someone converted to detrex's names
    need 1e-5, but their names do not show it.

    Raises:
        ValueError: these are not the weights of a complete Anchor DETR.
    """
    ours = renamed.tensors
    needed = ("class_head.bias", "patterns", "encoder.0.ffn.linear1.bias")
    if absent := [name for name in needed if name not in ours]:
        raise ValueError(f"{listing(absent)}: missing, so this is not a complete Anchor DETR")

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
        logit_eps=1e-3 if renamed.layout == "detrex" else 1e-5,
    )


def _names(format_: Format) -> list[tuple[str, str]]:
    """Return pairs of prefixes, (published, ours); the first that fits a name applies."""
    rows = []
    for theirs, ours in {**_PREFIXES, _INPUT_PROJECTION[format_]: "input_projection."}.items():
        part = ours.split(".")[0]
        if part in _IN_LAYERS:
            inner = {**_IN_LAYERS[part], **_FFN}
            rows += [(theirs + their_tail, ours + tail) for their_tail, tail in inner.items()]
        else:
            rows.append((theirs, ours))
    return rows


def _rest(prefix: str, name: str) -> tuple[int | None, str] | None:
    """Return the number for `{i}` and the rest of the name; None if the prefix does not fit."""
    pattern = re.escape(prefix).replace(re.escape("{i}"), r"(\d+)")
    found = re.match(pattern, name)
    if found is None:
        return None
    return (int(found[1]) if found.groups() else None), name[found.end() :]


@lru_cache(maxsize=4)
def shapes_of(config: AnchorDETRConfig) -> dict[str, torch.Size]:
    """Return the shape of every tensor of this model, without allocating memory for it."""
    with shapes_only():
        model = AnchorDETR(replace(config, backbone=replace(config.backbone, pretrained=False)))
    return {name: tensor.shape for name, tensor in model.state_dict().items()}
