"""Published weights under our names and back, with their classes; the names are in another file."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import get_args

import torch
from torch import Tensor

from deta.model.detector import DETA, ModelConfig
from deta.model.published_names import (
    BIAS_INDEX,
    BIAS_TABLE,
    STEPS,
    Format,
    fill,
    match,
    rows_of,
)


@dataclass(frozen=True)
class Renamed:
    """Published weights under our names, and what became of each of theirs."""

    layout: str
    tensors: dict[str, Tensor]  # by our names
    sources: dict[str, list[str]]  # ours -> the published names it was made of, copies included
    computed: list[str]  # published names of what follows from the rest, and was compared with it
    unknown: list[str]  # published names that have no place in DETA


def detect_format(names: Iterable[str]) -> Format:
    """Which of the published layouts these names belong to.

    Of names that several layouts share, the first layout; such names mean the same in all.

    Raises:
        ValueError: none of them.
    """
    names = list(names)
    formats: tuple[Format, ...] = get_args(Format)
    num_known = {f: sum(bool(rows_of(name, f)) for name in names) for f in formats}
    best = max(formats, key=num_known.__getitem__)
    num_ours = sum(bool(rows_of(name, "ours")) for name in names)
    if num_ours > num_known[best]:
        raise ValueError(
            "these weights already have this project's names; give them to load_state_dict as "
            "they are"
        )
    if num_known[best] == 0:
        raise ValueError(
            f"{_listing(names)}: not one name of a DETA as official, detrex or Hugging Face store "
            "it. Remove a prefix that all names share; weights of other detectors cannot be "
            "converted"
        )
    return best


def published_logit_eps(format_: Format) -> float:
    """`ModelConfig.logit_eps` that weights of this layout were most likely trained with.

    detrex trains with 1e-3, all others with 1e-5. Official weights that someone converted to
    detrex's names want 1e-5, but nothing in the names tells them apart: set `model.logit_eps`
    yourself for those. The wrong value moves boxes at the border by up to 1.2e-3 of the image.
    """
    return 1e-3 if format_ == "detrex" else 1e-5


def from_published(
    state: Mapping[str, Tensor], config: ModelConfig, class_rows: Sequence[int] | None = None
) -> dict[str, Tensor]:
    """Published weights under our names, complete, ready for `load_state_dict`.

    Args:
        state: the tensors of a file in any of the three layouts.
        config: of the model that they are for.
        class_rows: which of the file's classes the model has, in its order; see `select_classes`.

    Raises:
        ValueError: a tensor is missing, left over, of another shape, or unlike its copy.
    """
    renamed = rename_from_published(state)
    if class_rows is not None:
        renamed = select_classes(renamed, class_rows)
    return fit(renamed, config)


def to_published(
    state: Mapping[str, Tensor], config: ModelConfig, format_: Format
) -> dict[str, Tensor]:
    """Our weights under the names of a published layout, with all the copies that it stores.

    Copies share memory. The class heads keep their rows: code that takes rows for COCO ids
    (official, Hugging Face) needs a model with 91 classes.

    Raises:
        ValueError: a tensor is missing, left over or of another shape, or the backbone is neither
            a plain ResNet nor a Swin and so has no published names.
    """
    return rename_to_published(fit(state, config), format_)


def rename_from_published(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Published weights under our names, for a model of any size; some may be missing.

    Copies of a tensor become one; separate query, key and value weights become one.

    Raises:
        ValueError: a tensor has no place, lacks its siblings, or is unlike its copy.
    """
    renamed = trace_published(state)
    if renamed.unknown:
        raise ValueError(
            f"{_listing(renamed.unknown)}: no such tensor in DETA as {renamed.layout} stores it; "
            "remove what is known to be unused, weights of other networks cannot be converted"
        )
    return renamed.tensors


def trace_published(state: Mapping[str, Tensor]) -> Renamed:
    """As `rename_from_published`, but tells where each tensor came from and what has no place.

    Raises:
        ValueError: a tensor lacks its siblings, or is unlike its copy.
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
            raise ValueError(f"{_listing(absent)}: missing, although {name} is there")
        if name != parts[0]:
            continue  # done with the first part
        (ours,) = fill(row.ours, values)
        tensor = state[name] if len(parts) == 1 else torch.cat([state[part] for part in parts])
        if not torch.equal(tensors.setdefault(ours, tensor), tensor):
            raise ValueError(
                f"{name} and {sources[ours][0]} differ, but DETA uses one tensor for both; these "
                "are the weights of another model, or damaged"
            )
        sources.setdefault(ours, []).extend(parts)
    kept = _without_bias_index(tensors)
    computed = [name for ours in tensors.keys() - kept.keys() for name in sources.pop(ours)]
    return Renamed(layout, kept, sources, sorted(computed), unknown)


def rename_to_published(state: Mapping[str, Tensor], format_: Format) -> dict[str, Tensor]:
    """The inverse of `rename_from_published`, with all copies that the layout stores.

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
            f"{_listing(unknown)}: no name in published weights, which know plain ResNets and "
            "Swins with output norms only; keep this model under this project's names"
        )
    return published


def select_classes(
    state: Mapping[str, Tensor],
    rows: Sequence[int | None],
    fresh: Mapping[str, Tensor] | None = None,
) -> dict[str, Tensor]:
    """Keep some classes of a model, give them another order, or put new ones among them.

    For example, the rows of official weights are COCO ids, 91 with gaps; the ids of the 80
    categories as `rows` give a model for the data set as it is read here.

    The last head belongs to the first stage, whose column 0 ranks the proposals and stands for
    "any object", whatever class has that number elsewhere. So its row 0 always stays first; its
    other columns, which training only ever pushes down, are filled with other rows of it.
    Detections of the kept classes do not change; they only move up into places among the best
    100 that dropped classes took.

    Args:
        state: under our names.
        rows: the old class of each new one, without repetition; None for a class that the old
            model does not know.
        fresh: a new model's tensors, whose rows unknown classes get; at least its class heads.

    Raises:
        ValueError: there is no such row, or one is asked for twice.
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
            "these weights have no class_heads.*; bring them under this project's names first, "
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
            f"class rows {rows}: give at least one, each once, from 0 to {num_classes - 1}, which "
            "are the classes of these weights"
        )
    ranking_rows = [0] + [rows[0] if row == 0 else row for row in rows[1:]]
    first_stage = max(heads.values())
    selected = dict(state)
    for name, head in heads.items():
        chosen = ranking_rows if head == first_stage else rows
        selected[name] = rows_or_fresh(state[name], chosen, fresh[name] if fresh else None)
    return selected


def rows_or_fresh(tensor: Tensor, rows: Sequence[int | None], fresh: Tensor | None) -> Tensor:
    """Row by row one of the tensor, or for None the row at this place of the fresh one."""
    picked = tensor[[row or 0 for row in rows]].clone()
    for place, row in enumerate(rows):
        if row is None:
            assert fresh is not None
            picked[place] = fresh[place].to(tensor)
    return picked


def fit(state: Mapping[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """The state as the model of this config wants it: every tensor, in its shape, and no other.

    Raises:
        ValueError: a tensor is missing, left over, of another shape or of whole numbers.
    """
    expected = shapes_of(config)
    # Counters of a BatchNorm may be absent or too many: they change nothing.
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
            f"{_listing(names)} {which}"
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
            f"these weights know {num_classes} classes, the model {config.num_classes}. Set "
            f"model.num_classes={num_classes}, or pick the rows of the classes in common "
            "(class_rows; for official COCO weights they are the category ids), or leave the "
            "class_heads.* out and train them anew"
        )
    if wrong:
        shapes = [
            f"{name} {tuple(fitted[name].shape)} instead of {tuple(expected[name])}"
            for name in wrong
        ]
        raise ValueError(
            f"{_listing(shapes)}: wrong shape for this model. Choose the model.* settings that "
            "the weights were trained with"
        )
    whole = [
        f"{name} ({str(fitted[name].dtype).removeprefix('torch.')})"
        for name in expected
        if not fitted[name].is_floating_point() and not name.endswith(STEPS)
    ]
    if whole:
        raise ValueError(
            f"{_listing(whole)}: whole numbers, which are no weights of a DETA; use a file that "
            "was not quantised"
        )
    return {name: fitted[name] for name in expected}


@lru_cache(maxsize=4)  # a Swin takes a second
def shapes_of(config: ModelConfig) -> dict[str, torch.Size]:
    """Of every tensor of the model of this config, which is built without memory."""
    with torch.device("meta"):
        model = DETA(replace(config, backbone=replace(config.backbone, pretrained=False)))
    return {name: tensor.shape for name, tensor in model.state_dict().items()}


def _without_bias_index(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Check Swin's stored position indices, which we compute, and leave them out."""
    for name, index in state.items():
        table = state.get(name.replace(BIAS_INDEX, BIAS_TABLE))
        if name.endswith(BIAS_INDEX) and not (
            table is not None and torch.equal(index.cpu(), _bias_index(table))
        ):
            raise ValueError(
                f"{name}: not the positions in a square window, row by row, that Swin uses; "
                "these are the weights of another network, or damaged"
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
    """P P, P pixels of a window: the table's row for the way from one to another."""
    reach = math.isqrt(len(table))  # from one side of the window to the other and back
    window = (reach + 1) // 2
    y, x = torch.arange(window).repeat_interleave(window), torch.arange(window).repeat(window)
    down, right = y[:, None] - y + window - 1, x[:, None] - x + window - 1
    return down * reach + right


def _listing(names: Sequence[str]) -> str:
    """At most ten of them."""
    more = f" and {len(names) - 10} more" if len(names) > 10 else ""
    return f"{', '.join(names[:10])}{more}" if names else "no tensors"
