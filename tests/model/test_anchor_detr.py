"""Anchor DETR against plain loops over pixels and against facts of its public code."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import cache

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn

from deta.model import pretrained_anchor
from deta.model.anchor_detr import AnchorDETR, RowColumnAttention
from deta.model.architectures import make_criterion, make_detector
from deta.model.backbone import Backbone
from deta.model.batch import Target, pad_batch
from deta.model.config import (
    AnchorDETRConfig,
    BackboneConfig,
    CriterionConfig,
    ModelConfig,
    PostprocessConfig,
)
from deta.model.criterion import Criterion, OneToOneCriterion
from deta.model.detector import Outputs, Predictions
from deta.model.postprocess import detect_objects

DIM, HEADS = 16, 4
TINY = AnchorDETRConfig(
    backbone=BackboneConfig(
        name="resnet10t", pretrained=False, norm="group", frozen_parts=(), width=0.25
    ),
    num_classes=3,
    dim=DIM,
    num_heads=HEADS,
    encoder_layers=2,
    decoder_layers=2,
    ffn_dim=24,
    num_points=6,
    num_patterns=2,
)


def shaken(model: nn.Module, seed: int = 0) -> nn.Module:
    """Move every parameter a little, so that none is zero, equal or symmetric by chance."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator, dtype=torch.float)
    return model


@cache
def tiny_model(**changes: object) -> AnchorDETR:
    torch.manual_seed(0)
    model = shaken(AnchorDETR(replace(TINY, **changes))).double().eval()
    with torch.no_grad():
        model.points.clamp_(0.05, 0.95)
    assert isinstance(model, AnchorDETR)
    return model


def attention_inputs(height: int, width: int, num_queries: int = 5) -> list[Tensor]:
    """Return queries for x and y, keys for x and y, values and padding of two images."""
    generator = torch.Generator().manual_seed(1)

    def draw(*shape: int) -> Tensor:
        return torch.randn(2, *shape, DIM, generator=generator, dtype=torch.float64)

    padding = torch.zeros(2, height, width, dtype=torch.bool)
    padding[1, height - 1 :] = True
    padding[1, :, width - 2 :] = True
    queries = draw(num_queries), draw(num_queries)
    return [*queries, draw(width), draw(height), draw(height, width), padding]


def attend_by_loops(
    layer: RowColumnAttention, inputs: list[Tensor], image: int, query: int
) -> Tensor:
    """Compute the definition, with one weight for each pixel, pixel by pixel: D."""
    queries_x, queries_y, keys_x, keys_y, values, padding = (each[image] for each in inputs)
    weight, bias = layer.in_weight.view(5, DIM, DIM), layer.in_bias.view(5, DIM)
    height, width = padding.shape
    head_dim = DIM // HEADS
    read = torch.zeros(DIM, dtype=torch.float64)
    for head in range(HEADS):
        rows = slice(head * head_dim, (head + 1) * head_dim)

        def project(part: int, vector: Tensor, rows: slice = rows) -> Tensor:
            return weight[part, rows] @ vector + bias[part, rows]

        x = project(0, queries_x[query]) / math.sqrt(head_dim)
        y = project(1, queries_y[query]) / math.sqrt(head_dim)
        along_x = torch.stack([x @ project(2, keys_x[w]) for w in range(width)]).exp()
        along_y = torch.stack([y @ project(3, keys_y[h]) for h in range(height)]).exp()
        along_x = along_x * ~padding[0]
        along_y = along_y * ~padding[:, 0]
        total = along_x.sum() * along_y.sum()
        for h in range(height):
            for w in range(width):
                share = along_x[w] * along_y[h] / total
                read[rows] += share * project(4, values[h, w])
    return layer.out_projection.weight @ read + layer.out_projection.bias


@pytest.mark.parametrize(("height", "width"), [(3, 5), (5, 3), (4, 4)])
def test_attention_is_a_weighted_sum_over_all_pixels(height: int, width: int):
    layer = shaken(RowColumnAttention(DIM, HEADS, dropout=0.0)).double()
    inputs = attention_inputs(height, width)

    read = layer(*inputs)

    for image in range(2):
        for query in range(5):
            wanted = attend_by_loops(layer, inputs, image, query)
            torch.testing.assert_close(read[image, query], wanted, rtol=1e-10, atol=1e-12)


def test_gradients_of_attention_are_those_of_finite_differences():
    layer = shaken(RowColumnAttention(DIM, HEADS, dropout=0.0)).double()
    *floats, padding = attention_inputs(2, 3, num_queries=1)
    floats = [each.requires_grad_() for each in floats]
    assert torch.autograd.gradcheck(lambda *inputs: layer(*inputs, padding), floats)


def test_values_in_the_padding_have_no_weight():
    layer = shaken(RowColumnAttention(DIM, HEADS, dropout=0.0)).double()
    inputs = attention_inputs(4, 5)
    read = layer(*inputs)
    values, padding = inputs[4], inputs[5]
    inputs[4] = values.masked_fill(padding[..., None], 1e6)
    torch.testing.assert_close(layer(*inputs), read, rtol=0, atol=0)


def sines(place: Tensor, num_features: int) -> Tensor:
    """Encode one number in 0..1 as D sines and cosines."""
    return torch.stack(
        [
            (torch.sin if i % 2 == 0 else torch.cos)(
                place * 2 * math.pi / 10_000 ** (2 * (i // 2) / num_features)
            )
            for i in range(num_features)
        ]
    )


def detect_one_by_one(model: AnchorDETR, feature: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """Run the paper's model on one unpadded feature map D H W, with full H·W attention maps."""
    config = model.config
    height, width = feature.shape[1:]
    xs = [torch.tensor((w + 0.5) / width, dtype=torch.float64) for w in range(width)]
    ys = [torch.tensor((h + 0.5) / height, dtype=torch.float64) for h in range(height)]
    place_x = torch.stack([model.position_1d(sines(x, DIM)) for x in xs])  # W D
    place_y = torch.stack([model.position_1d(sines(y, DIM)) for y in ys])  # H D

    def read(layer: RowColumnAttention, at_x: Tensor, at_y: Tensor, memory: Tensor) -> Tensor:
        keys_x = torch.stack([memory[:, w].mean(0) for w in range(width)]) + place_x
        keys_y = torch.stack([memory[h].mean(0) for h in range(height)]) + place_y
        weight, bias = layer.in_weight.view(5, DIM, DIM), layer.in_bias.view(5, DIM)
        q_x, q_y, k_x, k_y, value = (
            (each @ weight[i].T + bias[i]).unflatten(-1, (HEADS, -1))
            for i, each in enumerate((at_x, at_y, keys_x, keys_y, memory))
        )
        scale = math.sqrt(DIM // HEADS)
        share_x = torch.einsum("qad,wad->aqw", q_x, k_x).div(scale).softmax(-1)
        share_y = torch.einsum("qad,had->aqh", q_y, k_y).div(scale).softmax(-1)
        full = torch.einsum("aqh,aqw->aqhw", share_y, share_x)
        return layer.out_projection(torch.einsum("aqhw,hwad->qad", full, value).flatten(1))

    memory = feature.permute(1, 2, 0)
    for layer in model.encoder:
        at_x = (memory + place_x).flatten(0, 1)
        at_y = (memory + place_y[:, None]).flatten(0, 1)
        memory = layer.ffn(
            layer.attention_norm(memory + read(layer.attention, at_x, at_y, memory).view_as(memory))
        )

    pairs = [(pattern, point) for pattern in model.patterns for point in model.points]
    queries = torch.stack([pattern for pattern, _ in pairs])
    points = torch.stack([point for _, point in pairs])
    position = torch.stack(
        [model.position_xy(torch.cat([sines(y, DIM // 2), sines(x, DIM // 2)])) for x, y in points]
    )
    position_x = torch.stack([model.position_1d(sines(x, DIM)) for x, _ in points])
    position_y = torch.stack([model.position_1d(sines(y, DIM)) for _, y in points])
    logits, boxes = [], []
    for layer in model.decoder:
        at = queries + position
        mixed, _ = layer.self_attention(at[None], at[None], queries[None])
        queries = layer.self_attention_norm(queries + mixed[0])
        looked = read(layer.cross_attention, queries + position_x, queries + position_y, memory)
        queries = layer.ffn(layer.cross_attention_norm(queries + looked))
        logits.append(model.class_head(queries))
        correction = model.box_head.mlp(queries)
        at_point = torch.cat([torch.logit(points), torch.zeros_like(points)], -1)
        boxes.append((correction + at_point).sigmoid())
    assert len(queries) == config.num_queries
    return logits, boxes


@pytest.mark.parametrize(("height", "width"), [(2, 4), (4, 3)])
def test_the_model_equals_the_paper_with_full_attention_maps(height: int, width: int):
    model = tiny_model()
    feature = torch.randn(DIM, height, width, dtype=torch.float64)
    padding = torch.zeros(1, 32 * height, 32 * width, dtype=torch.bool)

    with torch.no_grad():
        found = model.detect(feature[None], padding)
        logits, boxes = detect_one_by_one(model, feature)

    # float32 sines and outputs in the model
    torch.testing.assert_close(found.logits[:, 0], torch.stack(logits).float(), rtol=0, atol=3e-6)
    torch.testing.assert_close(found.boxes[:, 0], torch.stack(boxes).float(), rtol=0, atol=1e-6)


def detect_padded(model: AnchorDETR, fill: float, rows: int, columns: int) -> Tensor:
    """Return logits from a 3 x 4 map with this many rows and columns of padding."""
    generator = torch.Generator().manual_seed(2)
    feature = torch.randn(1, DIM, 3, 4, generator=generator, dtype=torch.float64)
    padded = F.pad(feature, (0, columns, 0, rows), value=fill)
    padding = torch.ones(1, 3 + rows, 4 + columns, dtype=torch.bool)
    padding[:, :3, :4] = False
    with torch.no_grad():
        return model.detect(padded, padding).logits


def test_padding_changes_nothing_where_averages_exclude_it():
    model = tiny_model(average_padding=False)
    alone = detect_padded(model, 0.0, rows=0, columns=0)
    for fill, rows, columns in ((0.0, 1, 2), (9.0, 1, 2), (9.0, 4, 0)):
        found = detect_padded(model, fill, rows, columns)
        torch.testing.assert_close(found, alone, rtol=0, atol=1e-6)


def test_padding_counts_in_the_averages_of_the_released_code():
    model = tiny_model()
    alone = detect_padded(model, 0.0, rows=0, columns=0)
    assert (detect_padded(model, 0.0, rows=2, columns=0) - alone).abs().max() > 1e-3


def test_batches_of_equal_images_give_equal_predictions():
    model = tiny_model()
    feature = torch.randn(1, DIM, 3, 3, dtype=torch.float64).expand(2, -1, -1, -1)
    with torch.no_grad():
        found = model.detect(feature, torch.zeros(2, 96, 96, dtype=torch.bool))
    torch.testing.assert_close(found.logits[:, 0], found.logits[:, 1])


def test_r50_has_the_published_number_of_parameters():
    """37 million in the paper's table. By hand, with 91 classes, D = 256 and FFN 1024."""
    config = AnchorDETRConfig(backbone=BackboneConfig(pretrained=False), num_classes=91)
    with torch.device("meta"):
        model = AnchorDETR(config)
    linear = 256 * 256 + 256
    norm, rcda, ffn = 2 * 256, 6 * linear, 256 * 1024 + 1024 + 1024 * 256 + 256
    encoder = 6 * (rcda + ffn + 2 * norm)
    decoder = 6 * (rcda + 4 * linear + ffn + 3 * norm)
    heads = 91 * 257 + 2 * linear + 4 * 257
    rest = 3 * 256 + 2 * 300 + 4 * linear + (2048 * 256 + 256 + norm)
    resnet = 23_454_912  # torchvision's ResNet-50 without its classifier and BatchNorms
    total = sum(parameter.numel() for parameter in model.parameters())
    assert total == encoder + decoder + heads + rest + resnet == 37_038_711
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert round(trainable / 1e6) == 37  # without stem and first stage


def test_initial_weights_are_those_of_the_released_code():
    torch.manual_seed(0)
    model = AnchorDETR(replace(TINY, num_points=50))
    batch = pad_batch([torch.randn(3, 64, 96)], [Target(torch.zeros(0, 4), torch.zeros(0).long())])
    found = model(batch.images, batch.padding)
    points = model.points.detach().repeat(2, 1)
    torch.testing.assert_close(found.boxes[-1, 0, :, :2], points.clamp(1e-5, 1 - 1e-5))
    size = torch.full((100, 2), 1 / (1 + math.exp(2.0)))
    torch.testing.assert_close(found.boxes[-1, 0, :, 2:], size)
    assert ((model.points >= 0) & (model.points <= 1)).all()
    assert model.class_head.bias.tolist() == pytest.approx([-math.log(99)] * 3)
    for layers in (model.encoder, model.decoder):
        first, second = (layer.state_dict() for layer in layers)
        assert all(torch.equal(first[name], second[name]) for name in first)


def test_points_on_a_grid_are_the_centres_of_a_square_of_cells():
    config = replace(TINY, points="grid", num_points=8)  # the nearest square is 9
    model = AnchorDETR(config)
    thirds = {round(1 / 6, 5), round(3 / 6, 5), round(5 / 6, 5)}
    assert {(round(x, 5), round(y, 5)) for x, y in model.points.tolist()} == {
        (x, y) for x in thirds for y in thirds
    }
    assert config.num_queries == 18
    assert "points" not in model.state_dict()


def test_every_parameter_learns():
    torch.manual_seed(0)
    model = shaken(AnchorDETR(TINY))
    target = Target(torch.tensor([[0.4, 0.5, 0.2, 0.3]]), torch.tensor([1]))
    batch = pad_batch([torch.randn(3, 64, 96), torch.randn(3, 96, 64)], [target, target])
    criterion = make_criterion(CriterionConfig(assignment="one_to_one", class_weight=2.0), TINY)
    criterion.total(criterion(model(batch.images, batch.padding), batch, 2.0)).backward()
    without = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert without == []


def test_losses_are_those_of_every_layer_matched_on_its_own():
    generator = torch.Generator().manual_seed(3)
    target = Target(torch.rand(3, 4, generator=generator) / 2, torch.tensor([0, 2, 2]))
    batch = pad_batch([torch.zeros(3, 8, 8)], [target])
    logits = torch.randn(2, 1, 7, 3, generator=generator)
    boxes = torch.rand(2, 1, 7, 4, generator=generator)
    config = CriterionConfig(assignment="one_to_one", class_weight=2.0)

    losses = OneToOneCriterion(config)(Predictions(logits, boxes), batch, 3.0)

    first_stage = Outputs(logits, boxes, boxes[0], logits[0], boxes[0], boxes[0])
    with_encoder = Criterion(config, num_queries=7)(first_stage, batch, 3.0)
    assert set(losses) == {f"{n}{layer}" for n in ("class", "l1", "giou") for layer in ("_0", "")}
    assert all(torch.equal(losses[name], with_encoder[name]) for name in losses)
    weights = {"class": 2, "l1": 5, "giou": 2}
    total = sum(weights[name.split("_")[0]] * value for name, value in losses.items())
    torch.testing.assert_close(OneToOneCriterion(config).total(losses), total)


def test_assignment_by_iou_is_refused_for_a_model_without_proposals():
    with pytest.raises(ValueError, match="assignment=one_to_one"):
        make_criterion(CriterionConfig(), AnchorDETRConfig())


def test_the_type_of_the_configuration_selects_the_detector():
    assert isinstance(make_detector(TINY), AnchorDETR)
    assert isinstance(make_criterion(CriterionConfig(), ModelConfig()), Criterion)


def test_detections_come_from_the_last_layer():
    model = tiny_model().float()
    with torch.no_grad():
        found = model(torch.randn(1, 3, 64, 64), torch.zeros(1, 64, 64, dtype=torch.bool))
    (detections,) = detect_objects(
        found, torch.tensor([[100, 200]]), PostprocessConfig(nms_iou=None, max_detections=4)
    )
    best = found.logits[-1].sigmoid().flatten().topk(4).values
    torch.testing.assert_close(detections.scores, best)
    model.double()


@pytest.mark.parametrize(
    "changes", [{"num_points": 0}, {"dim": 18}, {"points": "random"}, {"decoder_layers": 0}]
)
def test_a_configuration_that_cannot_be_built_is_refused(changes: dict):
    with pytest.raises(ValueError, match=next(iter(changes))):
        replace(TINY, **changes)


def test_dc5_is_torchvisions_dilated_resnet():
    config = BackboneConfig(name="resnet26", pretrained=False, dilated=True)
    ours = Backbone(config, strides=(32,)).eval()
    theirs = torchvision.models.ResNet(
        torchvision.models.resnet.Bottleneck,
        [2, 2, 2, 2],
        replace_stride_with_dilation=[False, False, True],
    ).eval()
    state = shaken(theirs).state_dict()
    ours.body.load_state_dict({n: t for n, t in state.items() if n in ours.body.state_dict()})
    theirs.avgpool, theirs.fc = nn.Identity(), nn.Identity()
    image = torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        (feature,) = ours(image)
        wanted = theirs(image).view_as(feature)
    assert feature.shape == (1, 2048, 4, 6)
    torch.testing.assert_close(feature, wanted, rtol=0, atol=1e-5 * wanted.abs().max().item())


# Published names, as the modules of the public code define them.


def published_names(format_: str, num_layers: int) -> set[str]:
    """Return the names in a published file, without the backbone."""
    names = {"transformer.pattern.weight", "transformer.position.weight"}
    rcda = ("in_proj_weight", "in_proj_bias", "out_proj.weight", "out_proj.bias")
    layer = [
        f"{part}.{kind}"
        for part in ("ffn.linear1", "ffn.linear2", "ffn.norm2", "norm1")
        for kind in ("weight", "bias")
    ]
    decoder_layer = [*layer, "norm2.weight", "norm2.bias"]
    decoder_layer += [f"{part}.{kind}" for part in ("self_attn", "cross_attn") for kind in rcda]
    encoder_layer = [*layer, *(f"self_attn.{kind}" for kind in rcda)]
    projection = {"official": "input_proj.0", "detrex": "input_proj"}[format_]
    for kind in ("weight", "bias"):
        names |= {f"{projection}.{i}.{kind}" for i in (0, 1)}
        names |= {f"transformer.adapt_pos{n}d.{i}.{kind}" for n in (1, 2) for i in (0, 2)}
        for i in range(num_layers):
            names.add(f"transformer.class_embed.{i}.{kind}")
            names |= {f"transformer.bbox_embed.{i}.layers.{j}.{kind}" for j in range(3)}
    for i in range(num_layers):
        names |= {f"transformer.encoder_layers.{i}.{name}" for name in encoder_layer}
        names |= {f"transformer.decoder_layers.{i}.{name}" for name in decoder_layer}
    return names


@pytest.mark.parametrize("format_", ["official", "detrex"])
def test_weights_go_to_published_names_and_back_unchanged(format_):
    state = shaken(AnchorDETR(TINY)).state_dict()

    published = pretrained_anchor.to_published(state, TINY, format_)

    names = {name for name in published if not name.startswith("backbone.body.")}
    assert names == published_names(format_, num_layers=2)
    assert pretrained_anchor.detect_format(published) == format_
    published |= {"transformer.encoder_layers.0.norm1.total_ops": torch.tensor(3)}
    back = pretrained_anchor.from_published(published, TINY)
    assert back.keys() == state.keys()
    assert all(torch.equal(back[name], state[name]) for name in state)


def test_sizes_and_classes_are_read_from_published_weights():
    published = pretrained_anchor.to_published(AnchorDETR(TINY).state_dict(), TINY, "detrex")
    unaware = AnchorDETRConfig(backbone=TINY.backbone, num_heads=HEADS)

    renamed = pretrained_anchor.trace_published(published)
    config = pretrained_anchor.published_config(renamed, unaware)

    assert config == replace(TINY, logit_eps=1e-3)
    two = pretrained_anchor.from_published(
        published, replace(TINY, num_classes=2), class_rows=[2, 0]
    )
    rows = published["transformer.class_embed.0.bias"][[2, 0]]
    assert torch.equal(two["class_head.bias"], rows)


def test_weights_that_do_not_fit_are_refused_by_name():
    published = pretrained_anchor.to_published(AnchorDETR(TINY).state_dict(), TINY, "official")
    refuse = pretrained_anchor.from_published
    missing = {n: t for n, t in published.items() if n != "transformer.pattern.weight"}
    with pytest.raises(ValueError, match="patterns missing"):
        refuse(missing, TINY)
    with pytest.raises(ValueError, match=r"query_embed\.weight: no such tensor"):
        refuse({**published, "query_embed.weight": torch.zeros(2)}, TINY)
    with pytest.raises(ValueError, match=r"class_embed\.1\.bias: differs from its copy"):
        refuse({**published, "transformer.class_embed.1.bias": torch.zeros(3)}, TINY)
    with pytest.raises(ValueError, match="wrong shape"):
        refuse(published, replace(TINY, num_classes=5))
    with pytest.raises(ValueError, match="not the names of an Anchor DETR"):
        refuse({"class_embed.0.weight": torch.zeros(2)}, TINY)
    with pytest.raises(ValueError, match="class rows"):
        refuse(published, replace(TINY, num_classes=1), class_rows=[9])
