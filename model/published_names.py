"""A table of the tensor names in published DETA weights and in ours.

Three layouts are in use: `official` (jozhang97/DETA), `detrex` (IDEA-Research/detrex on
detectron2) and `huggingface` (transformers, models/deprecated/deta). They have the same tensors.
Files of a backbone alone have the same names without the prefix: those of torchvision and of the
Swin repository as in `official`, those of detectron2 as in `detrex`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import cache
from typing import Literal, NamedTuple

Format = Literal["official", "detrex", "huggingface"]


class Row(NamedTuple):
    """The names of one kind of tensor, in our layout and in each published one.

    `{i}` is a number and `{i+1}` the same number with an offset. `*` is a tensor of a module, such
    as weight or bias. `(q|k|v)` stands for three tensors that are stacked in one of ours.
    """

    ours: str
    official: str
    detrex: str
    huggingface: str


def _under(prefixes: Row, *rows: tuple[str, str, str, str]) -> list[Row]:
    return [
        Row(*(prefix + name for prefix, name in zip(prefixes, row, strict=True))) for row in rows
    ]


def _deformable_attention(*prefixes: str) -> list[Row]:
    return _under(
        Row(*prefixes),
        ("sampling_offsets.*",) * 4,
        ("attention_weights.*",) * 4,
        ("value_projection.*", *("value_proj.*",) * 3),
        ("output_projection.*", *("output_proj.*",) * 3),
    )


_LEVEL_EMBEDDING = Row(
    "level_embedding",
    "transformer.level_embed",
    "transformer.level_embeds",
    "model.level_embed",
)

_ENCODER_LAYER = Row(
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

_DECODER_LAYER = Row(
    "decoder.layers.{i}.",
    "transformer.decoder.layers.{i}.",
    "transformer.decoder.layers.{i}.",
    "model.decoder.layers.{i}.",
)
_SELF_ATTENTION = Row("self_attention.", "self_attn.", "attentions.0.attn.", "self_attn.")
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
    Row("first_stage.", "transformer.", "transformer.", "model."),
    ("memory_projection.*", *("enc_output.*",) * 3),
    ("memory_norm.*", *("enc_output_norm.*",) * 3),
    ("box_projection.*", *("pos_trans.*",) * 3),
    ("box_norm.*", *("pos_trans_norm.*",) * 3),
    ("content_projection.*", *("pix_trans.*",) * 3),
    ("content_norm.*", *("pix_trans_norm.*",) * 3),
)

# Every head is stored twice: on its own, and in the decoder, which refines boxes with it.
_HEADS = [
    row
    for prefixes in (
        Row("", "", "", ""),
        Row("", "transformer.decoder.", "transformer.decoder.", "model.decoder."),
    )
    for row in _under(
        prefixes,
        ("class_heads.{i}.*", *("class_embed.{i}.*",) * 3),
        ("box_heads.{i}.mlp.0.*", *("bbox_embed.{i}.layers.0.*",) * 3),
        ("box_heads.{i}.mlp.2.*", *("bbox_embed.{i}.layers.1.*",) * 3),
        ("box_heads.{i}.mlp.4.*", *("bbox_embed.{i}.layers.2.*",) * 3),
    )
]

# detrex numbers the levels made from backbone maps and the extra levels separately.
_PROJECTIONS = [
    row
    for prefixes in (
        *(
            Row(
                f"pyramid.projections.{level}.",
                f"input_proj.{level}.",
                f"neck.convs.{level}.",
                f"model.input_proj.{level}.",
            )
            for level in range(3)
        ),
        Row(
            "pyramid.projections.{i+3}.",
            "input_proj.{i+3}.",
            "neck.extra_convs.{i}.",
            "model.input_proj.{i+3}.",
        ),
    )
    for row in _under(prefixes, ("0.*", "0.*", "conv.*", "0.*"), ("1.*", "1.*", "norm.*", "1.*"))
]

_RESNET = _under(
    Row("pyramid.backbone.body.", "backbone.0.body.", "backbone.", "model.backbone.model."),
    ("conv1.*", "conv1.*", "stem.conv1.*", "embedder.embedder.convolution.*"),
    ("bn1.*", "bn1.*", "stem.conv1.norm.*", "embedder.embedder.normalization.*"),
    *_under(
        Row("layer{i}.{j}.", "layer{i}.{j}.", "res{i+1}.{j}.", "encoder.stages.{i-1}.layers.{j}."),
        ("conv{k}.*", "conv{k}.*", "conv{k}.*", "layer.{k-1}.convolution.*"),
        ("bn{k}.*", "bn{k}.*", "conv{k}.norm.*", "layer.{k-1}.normalization.*"),
        ("downsample.0.*", "downsample.0.*", "shortcut.*", "shortcut.convolution.*"),
        ("downsample.1.*", "downsample.1.*", "shortcut.norm.*", "shortcut.normalization.*"),
    ),
)

BIAS_TABLE = "relative_position_bias_table"
BIAS_INDEX = "relative_position_index"  # follows from the window; only published files store it
_SWIN_BLOCK = Row(
    "layers_{i}.blocks.{j}.",
    "layers.{i}.blocks.{j}.",
    "layers.{i}.blocks.{j}.",
    "encoder.layers.{i}.blocks.{j}.",
)
# Published files merge patches at the end of a stage, timm at the start of the next one.
_SWIN_MERGE = Row(
    "layers_{i+1}.downsample.",
    "layers.{i}.downsample.",
    "layers.{i}.downsample.",
    "encoder.layers.{i}.downsample.",
)
_SWIN = [
    *_under(
        Row("pyramid.backbone.body.", "backbone.0.body.", "backbone.", "model.backbone.model."),
        (*("patch_embed.proj.*",) * 3, "embeddings.patch_embeddings.projection.*"),
        (*("patch_embed.norm.*",) * 3, "embeddings.norm.*"),
        *_under(
            _SWIN_BLOCK,
            (*("norm1.*",) * 3, "layernorm_before.*"),
            (*("attn.qkv.*",) * 3, "attention.self.(query|key|value).*"),
            (*(f"attn.{BIAS_TABLE}",) * 3, f"attention.self.{BIAS_TABLE}"),
            (*(f"attn.{BIAS_INDEX}",) * 3, f"attention.self.{BIAS_INDEX}"),
            (*("attn.proj.*",) * 3, "attention.output.dense.*"),
            (*("norm2.*",) * 3, "layernorm_after.*"),
            (*("mlp.fc1.*",) * 3, "intermediate.dense.*"),
            (*("mlp.fc2.*",) * 3, "output.dense.*"),
        ),
        *_under(_SWIN_MERGE, ("norm.*",) * 4, ("reduction.*",) * 4),
    ),
    Row(
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
STEPS = "num_batches_tracked"  # a BatchNorm's counter of updates; changes no result
_SLOT = re.compile(r"\{(\w)([+-]\d+)?\}|\*")
_TENSOR = f"weight|bias|running_mean|running_var|{STEPS}"
_PARTS = re.compile(r"\(([\w|]+)\)")


def rows_of(name: str, column: str) -> list[tuple[Row, dict[str, str]]]:
    """Return the rows that match the name in a column, each with the values of its slots."""
    return [
        (row, values) for row in _ROWS if (values := match(getattr(row, column), name)) is not None
    ]


def match(template: str, name: str) -> dict[str, str] | None:
    """Return the values of the template's slots in this name, or None if it does not match."""
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


def fill(template: str, values: Mapping[str, str]) -> list[str]:
    """Fill in the slots. Return one name, or several for the parts of one of our tensors."""
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
