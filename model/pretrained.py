"""The names used in published weights, mapped to ours; the only file that knows them.

Three layouts are in circulation: `official` (jozhang97/DETA), `detrex` (IDEA-Research/detrex on
detectron2) and `huggingface` (transformers, models/deprecated/deta). They hold the same numbers.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import cache, lru_cache
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from deta.model.detector import DETA, ModelConfig

Format = Literal["official", "detrex", "huggingface"]


class _Row(NamedTuple):
    """The names of one thing.

    `{i}` is a number, `{i+1}` the same number counted from another start, `*` what a module calls
    its tensors, `(q|k|v)` three tensors that lie one under the other in a single one of ours.
    """

    ours: str
    official: str
    detrex: str
    huggingface: str


def _under(prefixes: _Row, *rows: tuple[str, str, str, str]) -> list[_Row]:
    return [
        _Row(*(prefix + name for prefix, name in zip(prefixes, row, strict=True))) for row in rows
    ]


def _deformable_attention(*prefixes: str) -> list[_Row]:
    return _under(
        _Row(*prefixes),
        ("sampling_offsets.*",) * 4,
        ("attention_weights.*",) * 4,
        ("value_projection.*", *("value_proj.*",) * 3),
        ("output_projection.*", *("output_proj.*",) * 3),
    )


_LEVEL_EMBEDDING = _Row(
    "level_embedding",
    "transformer.level_embed",
    "transformer.level_embeds",
    "model.level_embed",
)

_ENCODER_LAYER = _Row(
    "encoder.layers.{i}.",
    "transformer.encoder.layers.{i}.",
    "transformer.encoder.layers.{i}.",
    "model.encoder.layers.{i}.",
)
_ENCODER = _under(
    _ENCODER_LAYER,
    *_deformable_attention("attention.", "self_attn.", "attentions.0.", "self_attn."),
    ("attention_norm.*", "norm1.*", "norms.0.*", "self_attn_layer_norm.*"),
    ("ffn.linear1.*", "linear1.*", "ffns.0.layers.0.0.*", "fc1.*"),
    ("ffn.linear2.*", "linear2.*", "ffns.0.layers.1.*", "fc2.*"),
    ("ffn.norm.*", "norm2.*", "norms.1.*", "final_layer_norm.*"),
)

_DECODER_LAYER = _Row(
    "decoder.layers.{i}.",
    "transformer.decoder.layers.{i}.",
    "transformer.decoder.layers.{i}.",
    "model.decoder.layers.{i}.",
)
_SELF_ATTENTION = _Row("self_attention.", "self_attn.", "attentions.0.attn.", "self_attn.")
_DECODER = _under(
    _DECODER_LAYER,
    *_under(
        _SELF_ATTENTION,
        (*("in_proj_weight",) * 3, "(q|k|v)_proj.weight"),
        (*("in_proj_bias",) * 3, "(q|k|v)_proj.bias"),
        ("out_proj.*",) * 4,
    ),
    # Official numbers do not follow the order of use: norm2 comes first.
    ("self_attention_norm.*", "norm2.*", "norms.0.*", "self_attn_layer_norm.*"),
    *_deformable_attention("cross_attention.", "cross_attn.", "attentions.1.", "encoder_attn."),
    ("cross_attention_norm.*", "norm1.*", "norms.1.*", "encoder_attn_layer_norm.*"),
    ("ffn.linear1.*", "linear1.*", "ffns.0.layers.0.0.*", "fc1.*"),
    ("ffn.linear2.*", "linear2.*", "ffns.0.layers.1.*", "fc2.*"),
    ("ffn.norm.*", "norm3.*", "norms.2.*", "final_layer_norm.*"),
)

_FIRST_STAGE = _under(
    _Row("first_stage.", "transformer.", "transformer.", "model."),
    ("memory_projection.*", *("enc_output.*",) * 3),
    ("memory_norm.*", *("enc_output_norm.*",) * 3),
    ("box_projection.*", *("pos_trans.*",) * 3),
    ("box_norm.*", *("pos_trans_norm.*",) * 3),
    ("content_projection.*", *("pix_trans.*",) * 3),
    ("content_norm.*", *("pix_trans_norm.*",) * 3),
)

# Every head is stored twice: by itself and inside the decoder that refines with it.
_HEADS = [
    row
    for prefixes in (
        _Row("", "", "", ""),
        _Row("", "transformer.decoder.", "transformer.decoder.", "model.decoder."),
    )
    for row in _under(
        prefixes,
        ("class_heads.{i}.*", *("class_embed.{i}.*",) * 3),
        ("box_heads.{i}.mlp.0.*", *("bbox_embed.{i}.layers.0.*",) * 3),
        ("box_heads.{i}.mlp.2.*", *("bbox_embed.{i}.layers.1.*",) * 3),
        ("box_heads.{i}.mlp.4.*", *("bbox_embed.{i}.layers.2.*",) * 3),
    )
]

# detrex counts the levels made from backbone maps and the further ones apart.
_PROJECTIONS = [
    row
    for prefixes in (
        *(
            _Row(
                f"pyramid.projections.{level}.",
                f"input_proj.{level}.",
                f"neck.convs.{level}.",
                f"model.input_proj.{level}.",
            )
            for level in range(3)
        ),
        _Row(
            "pyramid.projections.{i+3}.",
            "input_proj.{i+3}.",
            "neck.extra_convs.{i}.",
            "model.input_proj.{i+3}.",
        ),
    )
    for row in _under(prefixes, ("0.*", "0.*", "conv.*", "0.*"), ("1.*", "1.*", "norm.*", "1.*"))
]

_RESNET = _under(
    _Row("pyramid.backbone.body.", "backbone.0.body.", "backbone.", "model.backbone.model."),
    ("conv1.*", "conv1.*", "stem.conv1.*", "embedder.embedder.convolution.*"),
    ("bn1.*", "bn1.*", "stem.conv1.norm.*", "embedder.embedder.normalization.*"),
    *_under(
        _Row("layer{i}.{j}.", "layer{i}.{j}.", "res{i+1}.{j}.", "encoder.stages.{i-1}.layers.{j}."),
        ("conv{k}.*", "conv{k}.*", "conv{k}.*", "layer.{k-1}.convolution.*"),
        ("bn{k}.*", "bn{k}.*", "conv{k}.norm.*", "layer.{k-1}.normalization.*"),
        ("downsample.0.*", "downsample.0.*", "shortcut.*", "shortcut.convolution.*"),
        ("downsample.1.*", "downsample.1.*", "shortcut.norm.*", "shortcut.normalization.*"),
    ),
)

_BIAS_TABLE = "relative_position_bias_table"
_BIAS_INDEX = "relative_position_index"  # follows from the window; only published files store it
_SWIN_BLOCK = _Row(
    "layers_{i}.blocks.{j}.",
    "layers.{i}.blocks.{j}.",
    "layers.{i}.blocks.{j}.",
    "encoder.layers.{i}.blocks.{j}.",
)
# Published files merge patches at the end of a stage, timm at the start of the next one.
_SWIN_MERGE = _Row(
    "layers_{i+1}.downsample.",
    "layers.{i}.downsample.",
    "layers.{i}.downsample.",
    "encoder.layers.{i}.downsample.",
)
_SWIN = [
    *_under(
        _Row("pyramid.backbone.body.", "backbone.0.body.", "backbone.", "model.backbone.model."),
        (*("patch_embed.proj.*",) * 3, "embeddings.patch_embeddings.projection.*"),
        (*("patch_embed.norm.*",) * 3, "embeddings.norm.*"),
        *_under(
            _SWIN_BLOCK,
            (*("norm1.*",) * 3, "layernorm_before.*"),
            (*("attn.qkv.*",) * 3, "attention.self.(query|key|value).*"),
            (*(f"attn.{_BIAS_TABLE}",) * 3, f"attention.self.{_BIAS_TABLE}"),
            (*(f"attn.{_BIAS_INDEX}",) * 3, f"attention.self.{_BIAS_INDEX}"),
            (*("attn.proj.*",) * 3, "attention.output.dense.*"),
            (*("norm2.*",) * 3, "layernorm_after.*"),
            (*("mlp.fc1.*",) * 3, "intermediate.dense.*"),
            (*("mlp.fc2.*",) * 3, "output.dense.*"),
        ),
        *_under(_SWIN_MERGE, ("norm.*",) * 4, ("reduction.*",) * 4),
    ),
    _Row(
        "pyramid.backbone.norms.{i}.*",
        "backbone.0.body.norm{i+1}.*",
        "backbone.norm{i+1}.*",
        "model.backbone.model.hidden_states_norms.stage{i+2}.*",
    ),
]

_ROWS = [
    _LEVEL_EMBEDDING,
    *_PROJECTIONS,
    *_ENCODER,
    *_DECODER,
    *_FIRST_STAGE,
    *_HEADS,
    *_RESNET,
    *_SWIN,
]
_STEPS = "num_batches_tracked"  # how often a BatchNorm was updated; changes no result
_SLOT = re.compile(r"\{(\w)([+-]\d+)?\}|\*")
_TENSOR = f"weight|bias|running_mean|running_var|{_STEPS}"
_PARTS = re.compile(r"\(([\w|]+)\)")


def detect_format(names: Iterable[str]) -> Format:
    """Which of the published layouts these names belong to.

    Of names that several layouts share, the first layout; such names mean the same in all.

    Raises:
        ValueError: none of them.
    """
    names = list(names)
    formats: tuple[Format, ...] = get_args(Format)
    num_known = {f: sum(bool(_rows_of(name, f)) for name in names) for f in formats}
    best = max(formats, key=num_known.__getitem__)
    num_ours = sum(bool(_rows_of(name, "ours")) for name in names)
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
    return _fit(renamed, config)


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
    return rename_to_published(_fit(state, config), format_)


def rename_from_published(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Published weights under our names, for a model of any size; some may be missing.

    Copies of a tensor become one; separate query, key and value weights become one.

    Raises:
        ValueError: a tensor has no place, lacks its siblings, or is unlike its copy.
    """
    format_ = detect_format(state)
    renamed: dict[str, Tensor] = {}
    source: dict[str, str] = {}  # our name -> the published one that it came from
    unknown = []
    for name in state:
        rows = _rows_of(name, format_)
        if not rows:
            unknown.append(name)
            continue
        row, values = rows[0]
        parts = _fill(getattr(row, format_), values)
        absent = [part for part in parts if part not in state]
        if absent:
            raise ValueError(f"{_listing(absent)}: missing, although {name} is there")
        if name != parts[0]:
            continue  # done with the first part
        (ours,) = _fill(row.ours, values)
        tensor = state[name] if len(parts) == 1 else torch.cat([state[part] for part in parts])
        if ours not in renamed:
            renamed[ours], source[ours] = tensor, name
        elif not torch.equal(renamed[ours], tensor):
            raise ValueError(
                f"{name} and {source[ours]} differ, but DETA uses one tensor for both; these are "
                "the weights of another model, or damaged"
            )
    if unknown:
        raise ValueError(
            f"{_listing(unknown)}: no such tensor in DETA as {format_} stores it; remove what "
            "is known to be unused, weights of other networks cannot be converted"
        )
    return _without_bias_index(renamed)


def rename_to_published(state: Mapping[str, Tensor], format_: Format) -> dict[str, Tensor]:
    """The inverse of `rename_from_published`, with all copies that the layout stores.

    Raises:
        ValueError: a tensor has no published name.
    """
    published: dict[str, Tensor] = {}
    unknown = []
    for ours, tensor in _with_bias_index(state).items():
        if ours.endswith(_STEPS):
            continue
        rows = _rows_of(ours, "ours")
        if not rows:
            unknown.append(ours)
        for row, values in rows:
            parts = _fill(getattr(row, format_), values)
            published.update(zip(parts, tensor.chunk(len(parts)), strict=True))
    if unknown:
        raise ValueError(
            f"{_listing(unknown)}: no name in published weights, which know plain ResNets and "
            "Swins with output norms only; keep this model under this project's names"
        )
    return published


def select_classes(state: Mapping[str, Tensor], rows: Sequence[int]) -> dict[str, Tensor]:
    """Keep some classes of a model, or give them another order.

    For example, the rows of official weights are COCO ids, 91 with gaps; the ids of the 80
    categories as `rows` give a model for the data set as it is read here.

    The last head belongs to the first stage, whose column 0 ranks the proposals and stands for
    "any object", whatever class has that number elsewhere. So its row 0 always stays first; its
    other columns, which training only ever pushes down, are filled with other rows of it.
    Detections of the kept classes do not change; they only move up into places among the best
    100 that dropped classes took.

    Args:
        state: under our names.
        rows: the old class of each new one, without repetition.

    Raises:
        ValueError: there is no such row, or one is asked for twice.
    """
    rows = list(rows)
    heads = {
        name: int(values["i"])
        for name in state
        if (values := _match("class_heads.{i}.*", name)) is not None
    }
    if not heads:
        raise ValueError(
            "these weights have no class_heads.*; bring them under this project's names first, "
            "with rename_from_published"
        )
    num_classes = min(len(state[name]) for name in heads)
    if not rows or len(set(rows)) < len(rows) or not set(rows) <= set(range(num_classes)):
        raise ValueError(
            f"class rows {rows}: give at least one, each once, from 0 to {num_classes - 1}, which "
            "are the classes of these weights"
        )
    ranking_rows = [0] + [row or rows[0] for row in rows[1:]]
    first_stage = max(heads.values())
    selected = dict(state)
    for name, head in heads.items():
        selected[name] = state[name][ranking_rows if head == first_stage else rows]
    return selected


def _rows_of(name: str, column: str) -> list[tuple[_Row, dict[str, str]]]:
    return [
        (row, values) for row in _ROWS if (values := _match(getattr(row, column), name)) is not None
    ]


def _match(template: str, name: str) -> dict[str, str] | None:
    """What the template's slots stand for in this name, or None if it is not of this kind."""
    pattern, shifts = _pattern(template)
    found = pattern.fullmatch(name)
    if found is None:
        return None
    values = found.groupdict()
    for slot, shift in shifts.items():
        number = int(values[slot]) - shift
        if number < 0:
            return None
        values[slot] = str(number)
    return values


def _fill(template: str, values: Mapping[str, str]) -> list[str]:
    """The name with these values, or the names of the several parts of one tensor of ours."""
    name = _SLOT.sub(
        lambda slot: str(int(values[slot[1]]) + int(slot[2] or 0)) if slot[1] else values["tensor"],
        template,
    )
    parts = _PARTS.search(name)
    return [_PARTS.sub(part, name) for part in parts[1].split("|")] if parts else [name]


@cache
def _pattern(template: str) -> tuple[re.Pattern[str], dict[str, int]]:
    shifts: dict[str, int] = {}
    pattern, end = "", 0
    for slot in _SLOT.finditer(template):
        pattern += _literal(template[end : slot.start()])
        if slot[1]:
            shifts[slot[1]] = int(slot[2] or 0)
            pattern += rf"(?P<{slot[1]}>\d+)"
        else:
            pattern += f"(?P<tensor>{_TENSOR})"
        end = slot.end()
    return re.compile(pattern + _literal(template[end:])), shifts


def _literal(text: str) -> str:
    return text.replace(".", r"\.").replace("(", "(?:")


def _fit(state: Mapping[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """The state as the model of this config wants it: every tensor, in its shape, and no other."""
    expected = _shapes(config)
    # Counters of a BatchNorm may be absent or too many: they change nothing.
    fitted = {
        name: tensor
        for name, tensor in state.items()
        if name in expected or not name.endswith(_STEPS)
    }
    for name in expected:
        if name.endswith(_STEPS):
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
    return {name: fitted[name] for name in expected}


@lru_cache(maxsize=4)  # a Swin takes a second
def _shapes(config: ModelConfig) -> dict[str, torch.Size]:
    """Of every tensor of the model of this config, which is built without memory."""
    with torch.device("meta"):
        model = DETA(replace(config, backbone=replace(config.backbone, pretrained=False)))
    return {name: tensor.shape for name, tensor in model.state_dict().items()}


def _without_bias_index(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Check Swin's stored position indices, which we compute, and leave them out."""
    for name, index in state.items():
        table = state.get(name.replace(_BIAS_INDEX, _BIAS_TABLE))
        if name.endswith(_BIAS_INDEX) and not (
            table is not None and torch.equal(index.cpu(), _bias_index(table))
        ):
            raise ValueError(
                f"{name}: not the positions in a square window, row by row, that Swin uses; "
                "these are the weights of another network, or damaged"
            )
    return {name: tensor for name, tensor in state.items() if not name.endswith(_BIAS_INDEX)}


def _with_bias_index(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    indices = {
        name.replace(_BIAS_TABLE, _BIAS_INDEX): _bias_index(table)
        for name, table in state.items()
        if name.endswith(_BIAS_TABLE)
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
