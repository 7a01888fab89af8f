"""Published weights renamed to ours and back, against key lists of the three public codes."""

from __future__ import annotations

import json
import os
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from timm.models import register_model
from timm.models.swin_transformer import SwinTransformer, _create_swin_transformer
from torch import Tensor

from deta.model.backbone import Backbone
from deta.model.config import BackboneConfig, ModelConfig, PostprocessConfig
from deta.model.detector import DETA
from deta.model.postprocess import detect_objects
from deta.model.pretrained import (
    Format,
    detect_format,
    from_published,
    published_logit_eps,
    rename_from_published,
    rename_to_published,
    select_classes,
    to_published,
)

SHARED = Path(
    os.environ.get("DETA_SHARED", Path(__file__).resolve().parents[2] / "../shared")
).resolve()
FORMATS: tuple[Format, ...] = ("official", "detrex", "huggingface")

RESNET = BackboneConfig(pretrained=False)
SWIN = BackboneConfig(
    name="swin_large_patch4_window12_384",
    pretrained=False,
    norm="own",
    frozen_parts=(),
    output_norm=True,
)


def swin_of(name: str, **sizes) -> BackboneConfig:
    """Register a Swin of any size in timm under its own name."""

    def build(pretrained: bool = False, **options) -> SwinTransformer:
        return _create_swin_transformer(name, pretrained, **{**options, **sizes})

    build.__name__ = name
    register_model(build)
    return replace(SWIN, name=name)


TINY_SWIN = swin_of(
    "swin_tiny_for_names",
    embed_dim=12,
    depths=(1, 2, 2, 1),
    num_heads=(1, 2, 3, 4),
    window_size=5,
)
SMALL = ModelConfig(
    backbone=TINY_SWIN,
    num_classes=12,
    num_levels=4,
    dim=32,
    num_heads=4,
    num_points=2,
    encoder_layers=1,
    decoder_layers=2,
    ffn_dim=48,
    num_queries=20,
)
SMALL_RESNET = replace(SMALL, backbone=replace(RESNET, name="resnet18.tv_in1k"))


def shared_json(kind: str) -> list:
    """Return the JSON tables of published names whose entries have this field, one case each."""
    tables = {path.stem: json.loads(path.read_text()) for path in SHARED.glob("keys/*.json")}
    cases = [
        pytest.param(table, id=name)
        for name, table in sorted(tables.items())
        if isinstance(table, list) and kind in table[0]
    ]
    return cases or [pytest.param(None, marks=pytest.mark.skip(f"no tables in {SHARED}/keys"))]


def shared_swins() -> list:
    cases = [
        pytest.param(path.parent, id=str(path.parent.relative_to(SHARED)).replace("/", "-"))
        for path in sorted(SHARED.glob("parity/**/io.safetensors"))
        if "depths" in json.loads((path.parent / "config.json").read_text())["config"]
    ]
    return cases or [pytest.param(None, marks=pytest.mark.skip(f"no Swin in {SHARED}/parity"))]


def randomised(model: torch.nn.Module) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        name: 0.2 * torch.randn(tensor.shape, generator=generator)  # scores stay apart from 1
        if tensor.is_floating_point()
        else tensor
        for name, tensor in model.state_dict().items()
    }


@pytest.fixture(scope="module")
def state() -> dict[str, Tensor]:
    """Random weights of a SMALL model."""
    return randomised(DETA(SMALL))


@pytest.fixture(scope="module")
def resnet_state() -> dict[str, Tensor]:
    """Random weights of a SMALL_RESNET model."""
    return randomised(DETA(SMALL_RESNET))


def config_of(shapes: dict[str, torch.Size]) -> ModelConfig:
    """Return the configuration of the published model with these tensors, by our names."""

    def count(pattern: str) -> int:
        return len({found[0] for name in shapes if (found := re.match(pattern, name))})

    num_levels, dim = shapes["level_embedding"]
    is_swin = any("relative_position" in name for name in shapes)
    return ModelConfig(
        backbone=SWIN if is_swin else RESNET,
        num_classes=shapes["class_heads.0.bias"][0],
        num_levels=num_levels,
        dim=dim,
        encoder_layers=count(r"encoder\.layers\.\d+"),
        decoder_layers=count(r"decoder\.layers\.\d+"),
        ffn_dim=shapes["encoder.layers.0.ffn.linear1.bias"][0],
    )


@pytest.mark.parametrize("keys", shared_json("dtype"))
def test_parity_of_names_and_shapes_with_published_weights(keys):
    published = {
        # All elements of a tensor share one zero, so a Swin-L costs no memory.
        entry["name"]: torch.zeros((), dtype=getattr(torch, entry["dtype"])).expand(entry["shape"])
        for entry in keys
    }
    for name, tensor in published.items():
        if name.endswith("relative_position_index"):
            published[name] = position_index(window=int(len(tensor) ** 0.5))
    shapes = {name: tensor.shape for name, tensor in rename_from_published(published).items()}
    config = config_of(shapes)

    ours = from_published(published, config)
    exported = to_published(ours, config, detect_format(published))

    assert {name: tensor.shape for name, tensor in ours.items()} == shapes
    assert {name: tensor.shape for name, tensor in exported.items()} == {
        entry["name"]: torch.Size(entry["shape"]) for entry in keys
    }
    assert all(tensor.dtype == published[name].dtype for name, tensor in exported.items())


@pytest.mark.parametrize("table", shared_json("official"))
def test_parity_of_every_name_in_the_tables_of_all_three_layouts(table):
    """Give each tensor its own random values, which must end under the same name of ours."""
    generator = torch.Generator().manual_seed(0)
    states: dict[str, dict[str, Tensor]] = {layout: {} for layout in FORMATS}
    for entry in table:
        name = entry["official"]
        if name.endswith("relative_position_index"):
            tensor = position_index(window=1)
        elif name.endswith("relative_position_bias_table"):
            tensor = torch.randn(1, 3, generator=generator)
        else:
            tensor = torch.randn(3, generator=generator)
        tensor = states["official"].get(entry["alias_of"], tensor)
        states["official"][name] = states["detrex"][entry["detrex"]] = tensor
        parts = entry["hf"]
        states["huggingface"] |= zip(parts, tensor.chunk(len(parts)), strict=True)

    renamed = {layout: rename_from_published(state) for layout, state in states.items()}

    for layout, state in states.items():
        assert detect_format(state) == layout
        assert renamed[layout].keys() == renamed["official"].keys()
        for name, tensor in renamed[layout].items():
            assert torch.equal(tensor, renamed["official"][name]), name
        for name, tensor in rename_to_published(renamed["official"], layout).items():
            assert torch.equal(tensor, state[name]), name


@pytest.mark.parametrize("case", shared_swins())
def test_parity_of_swin_features_from_published_weights(case, compare):
    sizes = json.loads((case / "config.json").read_text())["config"]
    config = swin_of(
        f"swin_{case.parent.name}_{case.name}",
        embed_dim=sizes["embed_dim"],
        depths=tuple(sizes["depths"]),
        num_heads=tuple(sizes["heads"]),
        window_size=sizes["window"],
        patch_size=sizes["patch_size"],
        mlp_ratio=sizes["mlp_ratio"],
    )
    weights = load_file(case / "weights.safetensors")
    expected = load_file(case / "io.safetensors")
    backbone = Backbone(config).eval()

    ours = rename_from_published({f"backbone.0.body.{name}": w for name, w in weights.items()})
    backbone.load_state_dict(
        {name.removeprefix("pyramid.backbone."): tensor for name, tensor in ours.items()}
    )
    with torch.no_grad():
        features = backbone(expected.pop("image"))

    assert len(features) == len(expected)
    for number, feature in enumerate(features):
        # 1e-5 allows another order of summation; on the fixture's machine the result is exact.
        compare("swin", f"feat{number}", feature, expected[f"feat{number}"], 1e-5)
    exported = rename_to_published(ours, "official")
    assert exported.keys() == {f"backbone.0.body.{name}" for name in weights}
    for name, tensor in weights.items():
        assert torch.equal(exported[f"backbone.0.body.{name}"], tensor), name


def position_index(window: int) -> Tensor:
    """Return the row of the bias table for each two pixels of a window: P P, by loops."""
    reach = 2 * window - 1
    pixels = [(y, x) for y in range(window) for x in range(window)]
    return torch.tensor(
        [[(y - v + window - 1) * reach + x - u + window - 1 for v, u in pixels] for y, x in pixels]
    )


@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize("config", [SMALL, SMALL_RESNET], ids=["swin", "resnet"])
def test_export_and_import_give_the_same_parity_model_back(config, layout, state, resnet_state):
    model_state = resnet_state if config is SMALL_RESNET else state

    published = to_published(model_state, config, layout)
    back = from_published(published, config)

    assert detect_format(published) == layout
    assert list(back) == list(model_state)  # in the order of the model, too
    for name, tensor in model_state.items():
        assert torch.equal(back[name], tensor), name


@pytest.mark.parametrize("layout", FORMATS)
def test_one_of_two_copies_is_enough(state, layout):
    published = to_published(state, SMALL, layout)
    inside_decoder = [name for name in published if re.search(r"decoder\.(class|bbox)_", name)]
    alone = [name for name in published if re.match(r"(class|bbox)_embed", name)]
    assert len(inside_decoder) == len(alone) == 3 * (2 + 6)

    for copies in (inside_decoder, alone):
        rest = {name: tensor for name, tensor in published.items() if name not in copies}
        back = from_published(rest, SMALL)
        assert all(torch.equal(back[name], tensor) for name, tensor in state.items())


def test_different_copies_of_a_tensor_are_named(state):
    published = to_published(state, SMALL, "official")
    published["class_embed.1.bias"] = published["class_embed.1.bias"] + 1

    with pytest.raises(ValueError, match=r"decoder\.class_embed\.1\.bias and class_embed\.1\.bias"):
        from_published(published, SMALL)


def test_missing_and_unused_tensors_are_named_and_counted(state):
    published = to_published(state, SMALL, "official")
    missing = {name: tensor for name, tensor in published.items() if "encoder" not in name}
    with pytest.raises(ValueError, match=r"encoder\.layers\.0\..* and 6 more missing"):
        from_published(missing, SMALL)

    with pytest.raises(ValueError, match=r"encoder\.layers\.0\..* and 6 more left over"):
        from_published(published, replace(SMALL, encoder_layers=0))

    with pytest.raises(ValueError, match=r"query_embed\.weight: no such tensor in DETA"):
        from_published({**published, "query_embed.weight": torch.zeros(2)}, SMALL)


def test_a_query_weight_without_its_key_weight_is_refused(state):
    published = to_published(state, SMALL, "huggingface")
    del published["model.decoder.layers.1.self_attn.k_proj.bias"]

    with pytest.raises(ValueError, match=r"1\.self_attn\.k_proj\.bias: missing, although"):
        from_published(published, SMALL)


def test_a_wrong_shape_is_named_with_both_shapes(state):
    published = to_published(state, SMALL, "official")
    published["transformer.pos_trans.bias"] = torch.zeros(5)

    with pytest.raises(ValueError, match=r"box_projection\.bias \(5,\) instead of \(64,\)"):
        from_published(published, SMALL)


def test_another_number_of_classes_is_explained(state):
    published = to_published(state, SMALL, "official")

    with pytest.raises(ValueError, match=r"have 12 classes, the model 5\. Set model\.num_classes"):
        from_published(published, replace(SMALL, num_classes=5))

    fewer = from_published(published, replace(SMALL, num_classes=2), class_rows=[4, 9])
    assert torch.equal(fewer["class_heads.0.bias"], state["class_heads.0.bias"][[4, 9]])


def test_positions_of_an_unknown_window_are_refused(state):
    published = to_published(state, SMALL, "detrex")
    name = "backbone.layers.2.blocks.1.attn.relative_position_index"
    assert torch.equal(published[name], position_index(window=5))
    published[name] = published[name].T

    with pytest.raises(ValueError, match=r"layers_2\.blocks\.1\.attn.*: not the positions"):
        from_published(published, SMALL)


def test_counters_of_a_batch_norm_may_be_absent_or_too_many(resnet_state):
    published = to_published(resnet_state, SMALL_RESNET, "official")
    trainable = replace(
        SMALL, backbone=replace(SMALL_RESNET.backbone, norm="batch", frozen_parts=())
    )

    for_batch_norm = from_published(published, trainable)
    counter = "backbone.0.body.bn1.num_batches_tracked"
    for_frozen = from_published({**published, counter: torch.tensor(3)}, SMALL_RESNET)

    DETA(trainable).load_state_dict(for_batch_norm, strict=True)
    assert for_frozen.keys() == resnet_state.keys()
    assert to_published(for_batch_norm, trainable, "official").keys() == published.keys()


def test_a_backbone_without_published_names_cannot_be_exported():
    config = replace(SMALL, backbone=replace(RESNET, name="resnet10t", frozen_parts=()))
    state = DETA(config).state_dict()

    with pytest.raises(ValueError, match=r"body\.conv1\.0\.weight.*: no name in published"):
        to_published(state, config, "official")


def test_names_that_are_not_published_are_refused(state):
    with pytest.raises(ValueError, match="already have this project's names"):
        detect_format(state)
    with pytest.raises(ValueError, match=r"rpn\.head\.weight: no name of a DETA"):
        detect_format(["rpn.head.weight"])
    with pytest.raises(ValueError, match="no tensors"):
        detect_format([])


def test_conversion_draws_no_random_numbers(state):
    published = to_published(state, SMALL, "official")
    before = torch.get_rng_state()

    from_published(published, replace(SMALL, num_queries=7))  # a model that was not yet built

    assert torch.equal(torch.get_rng_state(), before)


def test_only_detrex_trains_with_the_larger_logit_eps():
    assert [published_logit_eps(layout) for layout in FORMATS] == [1e-5, 1e-3, 1e-5]
    assert ModelConfig().logit_eps == published_logit_eps("official")


@pytest.mark.parametrize("rows", [[3, 7, 11], [5, 0, 2], [0, 1], [6], list(range(11, -1, -1))])
def test_detections_of_selected_classes_do_not_change(state, rows):
    model = DETA(SMALL).eval()
    model.load_state_dict(state)
    few = DETA(replace(SMALL, num_classes=len(rows))).eval()
    few.load_state_dict(select_classes(state, rows))
    generator = torch.Generator().manual_seed(1)
    features = [torch.randn(2, 32, size, size, generator=generator) for size in (8, 4, 2, 1)]
    padding = torch.zeros(2, 64, 64, dtype=torch.bool)
    padding[1, 40:] = True
    sizes_px = torch.tensor([[480, 640], [300, 640]])
    keep_all = PostprocessConfig(max_detections=10_000)

    with torch.no_grad():
        all_outputs, few_outputs = model.detect(features, padding), few.detect(features, padding)

    assert torch.equal(few_outputs.proposals, all_outputs.proposals)
    assert torch.equal(few_outputs.boxes, all_outputs.boxes)
    for before, after in zip(
        detect_objects(all_outputs, sizes_px, keep_all),
        detect_objects(few_outputs, sizes_px, keep_all),
        strict=True,
    ):
        assert set(after.labels.tolist()) == set(range(len(rows)))
        for new, old in enumerate(rows):
            # 1e-6: a matrix product of another width may sum in another order.
            torch.testing.assert_close(
                after.scores[after.labels == new],
                before.scores[before.labels == old],
                atol=1e-6,
                rtol=0,
            )
            assert torch.equal(
                after.boxes_px[after.labels == new], before.boxes_px[before.labels == old]
            )


def test_the_first_stage_ranks_by_the_old_row_0_once(state):
    heads = [f"class_heads.{head}.bias" for head in range(3)]
    numbered = {**state, **{head: torch.arange(12.0) for head in heads}}

    selected = select_classes(numbered, [5, 0, 2])

    assert [selected[head].tolist() for head in heads] == [[5, 0, 2], [5, 0, 2], [0, 5, 2]]


@pytest.mark.parametrize("rows", [[], [1, 1], [12], [-1]])
def test_rows_that_are_no_classes_are_refused(state, rows):
    with pytest.raises(ValueError, match="from 0 to 11"):
        select_classes(state, rows)
