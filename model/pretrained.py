"""Conversion of published DETA weights to our tensor names and back, and selection of classes.

The names themselves are in `published_names.py`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import cast, get_args

import torch
from torch import Tensor

from deta.model.config import ModelConfig
from deta.model.detector import DETA
from deta.model.published_names import (
    BIAS_INDEX,
    BIAS_TABLE,
    STEPS,
    Format,
    fill,
    match,
    rows_of,
)
from deta.model.published_sizes import with_sizes_of
from deta.model.shapes_only import shapes_only


@dataclass(frozen=True)
class Renamed:
    """Published weights under our names, and the origin of each tensor."""

    layout: str
    tensors: dict[str, Tensor]  # by our names
    sources: dict[str, list[str]]  # our name -> its published names, copies included
    computed: list[str]  # published names of tensors that follow from others, and were checked
    unknown: list[str]  # published names of tensors that DETA does not have


def detect_format(names: Iterable[str]) -> Format:
    """Return the published layout that these names belong to.

    If several layouts share the names, return the first; such names mean the same in all of them.

    Raises:
        ValueError: the names belong to no published layout.
    """
    names = list(names)
    formats: tuple[Format, ...] = get_args(Format)
    num_known = {f: sum(bool(rows_of(name, f)) for name in names) for f in formats}
    best = max(formats, key=num_known.__getitem__)
    num_ours = sum(bool(rows_of(name, "ours")) for name in names)
    if num_ours > num_known[best]:
        raise ValueError(
            "these weights already have this project's names; pass them to load_state_dict as "
            "they are"
        )
    if num_known[best] == 0:
        raise ValueError(
            f"{listing(names)}: no name of a DETA in the official, detrex or Hugging Face layout. "
            "If all names share a prefix, remove it; weights of other detectors cannot be converted"
        )
    return best


def published_logit_eps(format_: Format) -> float:
    """Return the `logit_eps` that weights of this layout were most likely trained with.

    detrex trains with 1e-3, all others with 1e-5. Official weights that someone converted to
    detrex's names need 1e-5, but their names do not show it: set `model.logit_eps` yourself for
    those. The wrong value moves boxes at the border by up to 1.2e-3 of the image.
    """
    return 1e-3 if format_ == "detrex" else 1e-5


def published_config(renamed: Renamed, config: ModelConfig) -> ModelConfig:
    """Return the configuration with the sizes of published weights, and their `logit_eps`.

    Raises:
        ValueError: there are no class heads.
    """
    eps = published_logit_eps(cast(Format, renamed.layout))
    return replace(with_sizes_of(renamed.tensors, config), logit_eps=eps)


def from_published(
    state: Mapping[str, Tensor], config: ModelConfig, class_rows: Sequence[int] | None = None
) -> dict[str, Tensor]:
    """Convert published weights to our names, complete and ready for `load_state_dict`.

    Args:
        state: the tensors of a file in any of the three layouts.
        config: the configuration of the model that they are for.
        class_rows: the file's classes that the model has, in its order; see `select_classes`.

    Raises:
        ValueError: a tensor is missing, left over, of another shape, or differs from its copy.
    """
    renamed = rename_from_published(state)
    if class_rows is not None:
        renamed = select_classes(renamed, class_rows)
    return fit(renamed, config)


def to_published(
    state: Mapping[str, Tensor], config: ModelConfig, format_: Format
) -> dict[str, Tensor]:
    """Convert our weights to the names of a published layout, with all copies that it stores.

    Copies share memory. The class heads keep their rows: code whose rows are COCO ids (official,
    Hugging Face) needs a model with 91 classes.

    Raises:
        ValueError: a tensor is missing, left over or of another shape, or the backbone is neither
            a plain ResNet nor a Swin and so has no published names.
    """
    return rename_to_published(fit(state, config), format_)


def rename_from_published(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename published weights to our names, for a model of any size; some may be missing.

    Copies of a tensor become one; separate query, key and value weights become one.

    Raises:
        ValueError: a tensor is unknown, lacks its siblings, or differs from its copy.
    """
    renamed = trace_published(state)
    if renamed.unknown:
        raise ValueError(
            f"{listing(renamed.unknown)}: no such tensor in DETA in the {renamed.layout} layout. "
            "Remove tensors that are known to be unused; weights of other networks cannot be "
            "converted"
        )
    return renamed.tensors


def trace_published(state: Mapping[str, Tensor]) -> Renamed:
    """Rename as `rename_from_published`, and list each tensor's origin and the unknown tensors.

    Raises:
        ValueError: a tensor lacks its siblings, or differs from its copy.
    """
    layout = detect_format(state)
    tensors: dict[str, Tensor] = {}
    sources: dict[str, list[str]] = {}
    unknown = []
    for name in state:
        rows = rows_of(name, layout)
        if not rows:
            unknown.append(name)
            continue
        row, values = rows[0]
        parts = fill(getattr(row, layout), values)
        absent = [part for part in parts if part not in state]
        if absent:
            raise ValueError(f"{listing(absent)}: missing, although {name} is present")
        if name != parts[0]:
            continue  # handled together with the first part
        (ours,) = fill(row.ours, values)
        tensor = state[name] if len(parts) == 1 else torch.cat([state[part] for part in parts])
        if not torch.equal(tensors.setdefault(ours, tensor), tensor):
            raise ValueError(
                f"{name} and {sources[ours][0]} differ, but DETA uses one tensor for both; these "
                "are the weights of another model, or they are damaged"
            )
        sources.setdefault(ours, []).extend(parts)
    kept = _without_bias_index(tensors)
    computed = [name for ours in tensors.keys() - kept.keys() for name in sources.pop(ours)]
    return Renamed(layout, kept, sources, sorted(computed), unknown)


def rename_to_published(state: Mapping[str, Tensor], format_: Format) -> dict[str, Tensor]:
    """Invert `rename_from_published`, with all copies that the layout stores.

    Raises:
        ValueError: a tensor has no published name.
    """
    published: dict[str, Tensor] = {}
    unknown = []
    for ours, tensor in _with_bias_index(state).items():
        if ours.endswith(STEPS):
            continue
        rows = rows_of(ours, "ours")
        if not rows:
            unknown.append(ours)
        for row, values in rows:
            parts = fill(getattr(row, format_), values)
            published.update(zip(parts, tensor.chunk(len(parts)), strict=True))
    if unknown:
        raise ValueError(
            f"{listing(unknown)}: no name in published layouts, which have only plain ResNets and "
            "Swins with output norms; keep this model under this project's names"
        )
    return published


def select_classes(
    state: Mapping[str, Tensor],
    rows: Sequence[int | None],
    fresh: Mapping[str, Tensor] | None = None,
) -> dict[str, Tensor]:
    """Select, reorder or add classes of a model.

    For example, the rows of official weights are COCO ids, 91 with gaps. With the ids of the 80
    categories as `rows`, the result fits the COCO data set as this project reads it.

    The last head belongs to the first stage. Its column 0 ranks the proposals and means "any
    object", whatever class has that number elsewhere. So its row 0 always stays first. Its other
    columns, which training only pushes down, are filled with its other rows. Detections of the
    kept classes do not change; they only move up into places among the best 100 that dropped
    classes took.

    Args:
        state: under our names.
        rows: the old class of each new one, without repetition; None for a class that the old
            model does not have.
        fresh: a newly initialised model's tensors, which provide the rows for None; at least its
            class heads.

    Raises:
        ValueError: a row does not exist or is given twice.
    """
    rows = list(rows)
    known = [row for row in rows if row is not None]
    heads = {
        name: int(values["i"])
        for name in state
        if (values := match("class_heads.{i}.*", name)) is not None
    }
    if not heads:
        raise ValueError(
            "these weights have no class_heads.*; convert them to this project's names first, "
            "with rename_from_published"
        )
    num_classes = min(len(state[name]) for name in heads)
    if (
        not rows
        or len(set(known)) < len(known)
        or not set(known) <= set(range(num_classes))
        or (len(known) < len(rows) and fresh is None)
    ):
        raise ValueError(
            f"class rows {rows}: give at least one, each only once, from 0 to {num_classes - 1}, "
            "which are the classes of these weights"
        )
    ranking_rows = [0] + [rows[0] if row == 0 else row for row in rows[1:]]
    first_stage = max(heads.values())
    selected = dict(state)
    for name, head in heads.items():
        chosen = ranking_rows if head == first_stage else rows
        selected[name] = rows_or_fresh(state[name], chosen, fresh[name] if fresh else None)
    return selected


def rows_or_fresh(tensor: Tensor, rows: Sequence[int | None], fresh: Tensor | None) -> Tensor:
    """Select rows of the tensor; for None, take the row at the same place of `fresh`."""
    picked = tensor[[row or 0 for row in rows]].clone()
    for place, row in enumerate(rows):
        if row is None:
            assert fresh is not None
            picked[place] = fresh[place].to(tensor)
    return picked


def fit(state: Mapping[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """Check that the state has exactly this model's tensors, and return them in its order.

    Raises:
        ValueError: a tensor is missing, left over, of another shape, or of an integer type.
    """
    expected = shapes_of(config)
    # Counters of a BatchNorm may be missing or extra: they change no result.
    fitted = {
        name: tensor
        for name, tensor in state.items()
        if name in expected or not name.endswith(STEPS)
    }
    for name in expected:
        if name.endswith(STEPS):
            fitted.setdefault(name, torch.tensor(0))

    missing = [name for name in expected if name not in fitted]
    extra = [name for name in fitted if name not in expected]
    if missing or extra:
        problems = [
            f"{listing(names)} {which}"
            for names, which in ((missing, "missing"), (extra, "left over"))
            if names
        ]
        raise ValueError(
            f"these weights do not fit model {config.backbone.name}, {config.encoder_layers}+"
            f"{config.decoder_layers} layers, {config.num_levels} levels: {'; '.join(problems)}. "
            "Choose the model.* settings that they were trained with"
        )
    wrong = [name for name, shape in expected.items() if fitted[name].shape != shape]
    if wrong and all(name.startswith("class_heads.") for name in wrong):
        num_classes = len(fitted[wrong[0]])
        raise ValueError(
            f"these weights have {num_classes} classes, the model {config.num_classes}. Set "
            f"model.num_classes={num_classes}, or select the rows of the common classes "
            "(class_rows; for official COCO weights they are the category ids), or omit the "
            "class_heads.* and train them from scratch"
        )
    if wrong:
        shapes = [
            f"{name} {tuple(fitted[name].shape)} instead of {tuple(expected[name])}"
            for name in wrong
        ]
        raise ValueError(
            f"{listing(shapes)}: wrong shape for this model. Choose the model.* settings that "
            "the weights were trained with"
        )
    integers = [
        f"{name} ({str(fitted[name].dtype).removeprefix('torch.')})"
        for name in expected
        if not fitted[name].is_floating_point() and not name.endswith(STEPS)
    ]
    if integers:
        raise ValueError(
            f"{listing(integers)}: integers, but the weights of a DETA are floating-point numbers; "
            "use a file that is not quantised"
        )
    return {name: fitted[name] for name in expected}


@lru_cache(maxsize=4)  # a Swin takes a second
def shapes_of(config: ModelConfig) -> dict[str, torch.Size]:
    """Return the shape of every tensor of this model, without allocating memory for it."""
    with shapes_only():
        model = DETA(replace(config, backbone=replace(config.backbone, pretrained=False)))
    return {name: tensor.shape for name, tensor in model.state_dict().items()}


def _without_bias_index(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Check Swin's stored position indices against the computed ones, and remove them."""
    for name, index in state.items():
        table = state.get(name.replace(BIAS_INDEX, BIAS_TABLE))
        if name.endswith(BIAS_INDEX) and not (
            table is not None and torch.equal(index.cpu(), _bias_index(table))
        ):
            raise ValueError(
                f"{name}: not the positions in a square window, row by row, that Swin uses; "
                "these are the weights of another network, or they are damaged"
            )
    return {name: tensor for name, tensor in state.items() if not name.endswith(BIAS_INDEX)}


def _with_bias_index(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    indices = {
        name.replace(BIAS_TABLE, BIAS_INDEX): _bias_index(table)
        for name, table in state.items()
        if name.endswith(BIAS_TABLE)
    }
    return {**state, **indices}


def _bias_index(table: Tensor) -> Tensor:
    """Return the table's row for each pair of pixels in a window. P P for P pixels."""
    reach = math.isqrt(len(table))  # the number of offsets along one axis
    window = (reach + 1) // 2
    y, x = torch.arange(window).repeat_interleave(window), torch.arange(window).repeat(window)
    down, right = y[:, None] - y + window - 1, x[:, None] - x + window - 1
    return down * reach + right


def listing(names: Sequence[str]) -> str:
    """Join at most ten names for a message."""
    more = f" and {len(names) - 10} more" if len(names) > 10 else ""
    return f"{', '.join(names[:10])}{more}" if names else "no tensors"
