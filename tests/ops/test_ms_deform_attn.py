"""The operator against a plain loop, the published tensors, and PyTorch's own checks."""

from __future__ import annotations

import math
import os
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor

from deta.ops import cpu, plain
from deta.ops.ms_deform_attn import ms_deform_attn, ms_deform_attn_fused, plain_decompositions

SHARED = Path(
    os.environ.get("DETA_SHARED", Path(__file__).resolve().parents[2] / "../shared")
).resolve()
PARITY_CASES = sorted((SHARED / "parity").glob("*/op/*.safetensors"))


def brute_force(value: Tensor, shapes, locations: Tensor, weights: Tensor) -> Tensor:
    """Compute the definition, one sample at a time."""
    num_images, _, num_heads, num_channels = value.shape
    _, num_queries, _, num_levels, num_points, _ = locations.shape
    output = value.new_zeros(num_images, num_queries, num_heads, num_channels)
    starts = [sum(h * w for h, w in shapes[:level]) for level in range(num_levels)]
    for b, q, h, level, p in torch.cartesian_prod(
        *map(torch.arange, (num_images, num_queries, num_heads, num_levels, num_points))
    ).tolist():
        height, width = shapes[level]
        x, y = locations[b, q, h, level, p].tolist()
        if not (math.isfinite(x) and math.isfinite(y)):
            continue
        x, y = x * width - 0.5, y * height - 0.5
        left, top = math.floor(x), math.floor(y)
        for row, column in ((top, left), (top, left + 1), (top + 1, left), (top + 1, left + 1)):
            if 0 <= row < height and 0 <= column < width:
                share = (1 - abs(x - column)) * (1 - abs(y - row))
                pixel = value[b, starts[level] + row * width + column, h]
                output[b, q, h] += weights[b, q, h, level, p] * share * pixel
    return output.flatten(2)


def random_inputs(
    shapes=((6, 5), (3, 4)), images=2, queries=3, heads=2, points=2, channels=4, seed=0, low=-0.3
):
    generator = torch.Generator().manual_seed(seed)
    num_pixels = sum(h * w for h, w in shapes)
    value = torch.randn(images, num_pixels, heads, channels, generator=generator).double()
    size = (images, queries, heads, len(shapes), points)
    locations = torch.rand(*size, 2, generator=generator).double() * (1 - 2 * low) + low
    # Bilinear interpolation has a kink where a sample crosses a pixel centre; move samples off it,
    # so that finite differences stay on one side.
    for level, (height, width) in enumerate(shapes):
        scale = torch.tensor([width, height])
        pixel = locations[:, :, :, level] * scale - 0.5
        pixel = pixel.floor() + (pixel - pixel.floor()).clamp(0.05, 0.95)
        locations[:, :, :, level] = (pixel + 0.5) / scale
    weights = torch.rand(*size, generator=generator).double()
    return value, list(shapes), locations, weights


def random_references(locations: Tensor, shapes, size: int, seed: int = 0):
    """Return references and offsets that give the same locations."""
    generator = torch.Generator().manual_seed(seed)
    images, queries, _, levels, points, _ = locations.shape
    references = torch.rand(images, queries, levels, size, generator=generator).double() + 0.1
    unit = 1 / torch.tensor([(w, h) for h, w in shapes]).double()[:, None]
    if size == 4:
        unit = references[:, :, None, :, None, 2:] * (0.5 / points)
    return references, (locations - references[:, :, None, :, None, :2]) / unit


KERNELS = {"plain": plain}
if cpu.is_available():
    KERNELS["compiled"] = cpu


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("path", PARITY_CASES, ids=lambda path: path.stem)
def test_parity_with_published_operator(path: Path, kernel: str, record_property):
    kernels = KERNELS[kernel]
    case = load_file(path)
    shapes = case["spatial_shapes"].flatten().tolist()
    for dtype, prefix, tolerance in ((torch.float64, "f64", 1e-12), (torch.float32, "f32", 1e-5)):
        value, locations, weights, grad_output = (
            case[name].to(dtype)
            for name in ("value", "sampling_locations", "attention_weights", "grad_output")
        )
        names = ("grad_value", "grad_sampling_locations", "grad_attention_weights")
        found = {"output": kernels.forward(value, shapes, locations, weights)} | dict(
            zip(
                names,
                kernels.backward(grad_output, value, shapes, locations, weights),
                strict=True,
            )
        )
        for name, tensor in found.items():
            expected = case[f"{prefix}.{name}"]
            difference = (tensor - expected).abs().max() / expected.abs().max().clamp(min=1e-6)
            group = f"op, {kernel}" + (", float64" if prefix == "f64" else "")
            record_property("difference", (group, name, float(difference)))
            assert difference <= tolerance, f"{prefix}.{name} differs by {difference:.2e}"


@settings(max_examples=25, deadline=None)
@given(
    images=st.integers(1, 2),
    queries=st.integers(1, 3),
    heads=st.integers(1, 3),
    points=st.integers(1, 3),
    channels=st.integers(1, 5),
    shapes=st.lists(st.tuples(st.integers(1, 5), st.integers(1, 5)), min_size=1, max_size=3),
    seed=st.integers(0, 1000),
)
def test_any_shape_equals_the_definition(images, queries, heads, points, channels, shapes, seed):
    inputs = random_inputs(shapes, images, queries, heads, points, channels, seed)
    torch.testing.assert_close(
        ms_deform_attn(*inputs), brute_force(*inputs), rtol=1e-12, atol=1e-12
    )


@pytest.mark.parametrize("size", [2, 4])
def test_the_fused_form_equals_the_definition(size: int):
    value, shapes, locations, weights = random_inputs()
    references, offsets = random_references(locations, shapes, size)
    logits = weights.log() + 3.0  # a constant does not change a softmax
    expected = brute_force(value, shapes, locations, weights / weights.sum((3, 4), keepdim=True))
    found = ms_deform_attn_fused(value, shapes, references, offsets, logits)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, 1e30, -1e30])
def test_a_location_that_is_not_finite_contributes_nothing(bad: float):
    value, shapes, locations, weights = random_inputs()
    locations[0, 0, 0, 0, 0, 1] = bad
    value.requires_grad_()
    locations.requires_grad_()
    output = ms_deform_attn(value, shapes, locations, weights)
    expected = brute_force(value, shapes, locations, weights)
    torch.testing.assert_close(output, expected, rtol=1e-12, atol=1e-12)
    output.sum().backward()
    assert value.grad.isfinite().all()
    assert (locations.grad[0, 0, 0, 0, 0] == 0).all()


def test_gradients_agree_with_finite_differences():
    value, shapes, locations, weights = random_inputs()
    tensors = [tensor.requires_grad_() for tensor in (value, locations, weights)]
    assert torch.autograd.gradcheck(
        lambda value, locations, weights: ms_deform_attn(value, shapes, locations, weights),
        tensors,
        eps=1e-6,
        atol=1e-5,
        rtol=1e-3,
    )


@pytest.mark.parametrize("size", [2, 4])
def test_fused_gradients_agree_with_finite_differences(size: int):
    value, shapes, locations, weights = random_inputs()
    references, offsets = random_references(locations, shapes, size)
    tensors = [t.requires_grad_() for t in (value, references, offsets, weights.log())]
    assert torch.autograd.gradcheck(
        lambda value, *others: ms_deform_attn_fused(value, shapes, *others),
        tensors,
        eps=1e-6,
        atol=1e-5,
        rtol=1e-3,
    )


def test_the_operator_passes_pytorchs_checks():
    value, shapes, locations, weights = random_inputs()
    flat_shapes = [size for shape in shapes for size in shape]
    tensors = [tensor.requires_grad_() for tensor in (value, locations, weights)]
    torch.library.opcheck(
        torch.ops.deta.ms_deform_attn.default, (tensors[0], flat_shapes, tensors[1], tensors[2])
    )
    grad_output = torch.randn(2, 3, 8, dtype=torch.float64)
    with torch.no_grad():
        torch.library.opcheck(
            torch.ops.deta.ms_deform_attn_backward.default,
            (grad_output, *(t.detach() for t in tensors[:1]), flat_shapes, locations, weights),
            test_utils=("test_schema", "test_faketensor"),
        )


@pytest.mark.parametrize("size", [2, 4])
def test_the_fused_operator_passes_pytorchs_checks(size: int):
    value, shapes, locations, weights = random_inputs()
    references, offsets = random_references(locations, shapes, size)
    flat_shapes = [size for shape in shapes for size in shape]
    tensors = [t.requires_grad_() for t in (value, references, offsets, weights.log())]
    torch.library.opcheck(
        torch.ops.deta.ms_deform_attn_fused.default, (tensors[0], flat_shapes, *tensors[1:])
    )
    grad_output = torch.randn(2, 3, 8, dtype=torch.float64)
    with torch.no_grad():
        value, *others = (t.detach() for t in tensors)
        torch.library.opcheck(
            torch.ops.deta.ms_deform_attn_fused_backward.default,
            (grad_output, value, flat_shapes, *others),
            test_utils=("test_schema", "test_faketensor"),
        )


def test_compiles_into_one_graph():
    value, shapes, locations, weights = random_inputs()
    references, offsets = random_references(locations, shapes, 4)
    tensors = [t.float().requires_grad_() for t in (value, locations, weights, references, offsets)]

    def loss(value, locations, weights, references, offsets):
        read = ms_deform_attn(value * 2, shapes, locations, weights)
        return (read + ms_deform_attn_fused(value, shapes, references, offsets, weights)).norm()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*tensors), loss(*tensors))
    expected = torch.autograd.grad(loss(*tensors), tensors)
    torch.testing.assert_close(torch.autograd.grad(compiled(*tensors), tensors), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_summed_in_float32(dtype: torch.dtype):
    value, shapes, locations, weights = random_inputs(((40, 60), (20, 30)), channels=8)
    value, weights = value.to(dtype), weights.to(dtype)
    expected = ms_deform_attn(value.double(), shapes, locations, weights.double())
    output = ms_deform_attn(value, shapes, locations.float(), weights)
    assert output.dtype == dtype
    # One rounding to 8 (bfloat16) or 11 (float16) bits at the end, none before.
    torch.testing.assert_close(
        output.double(), expected, rtol=2 * torch.finfo(dtype).eps, atol=1e-3
    )


def test_a_strided_view_gives_the_same_as_its_copy():
    value, shapes, locations, weights = random_inputs()
    strided = torch.stack([value, value + 1], -1)[..., 0]
    assert not strided.is_contiguous()
    assert torch.equal(
        ms_deform_attn(strided, shapes, locations, weights),
        ms_deform_attn(value, shapes, locations, weights),
    )


@pytest.mark.parametrize(("images", "queries"), [(0, 3), (2, 0)])
def test_empty_inputs_give_empty_outputs(images: int, queries: int):
    value, shapes, locations, weights = random_inputs()
    value = value[:images].requires_grad_()
    output = ms_deform_attn(value, shapes, locations[:images, :queries], weights[:images, :queries])
    assert output.shape == (images, queries, 8)
    output.sum().backward()
    assert torch.equal(value.grad, torch.zeros_like(value))


def test_inconsistent_shapes_are_named():
    value, shapes, locations, weights = random_inputs()
    with pytest.raises(ValueError, match="42 pixels"):
        ms_deform_attn(value, [(6, 5), (3, 5)], locations, weights)
    with pytest.raises(ValueError, match="attention_weights"):
        ms_deform_attn(value, shapes, locations, weights[:, :, :1])


def test_autocast_lowers_the_precision_of_the_features_only():
    value, shapes, locations, weights = random_inputs(((40, 60), (20, 30)), channels=16)
    value, locations, weights = value.float(), locations.float(), weights.float()
    references, offsets = random_references(locations, shapes, 2)
    expected = ms_deform_attn(value.bfloat16(), shapes, locations, weights)
    fused = ms_deform_attn_fused(
        value.bfloat16(), shapes, references.float(), offsets.float(), weights
    )
    value.requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(ms_deform_attn(value, shapes, locations, weights), expected)
        found = ms_deform_attn_fused(value, shapes, references.float(), offsets.float(), weights)
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, fused)
    found.float().sum().backward()
    assert value.grad.dtype == torch.float32


@pytest.mark.parametrize("size", [2, 4])
def test_an_exported_program_contains_only_standard_operators(size: int):
    value, shapes, locations, weights = random_inputs()
    references, offsets = random_references(locations, shapes, size)
    inputs = tuple(t.float() for t in (value, references, offsets, weights.log()))

    class Attention(torch.nn.Module):
        def forward(self, value, references, offsets, logits):
            return ms_deform_attn_fused(value, shapes, references, offsets, logits)

    images = torch.export.Dim("images", min=1, max=8)
    program = torch.export.export(
        Attention(), inputs, dynamic_shapes=[{0: images}] * 4, strict=False
    ).run_decompositions(plain_decompositions())
    assert "deta" not in program.graph_module.code
    alone = tuple(tensor[:1] for tensor in inputs)
    torch.testing.assert_close(program.module()(*alone), Attention()(*alone))


def test_references_of_a_wrong_shape_are_named():
    value, shapes, locations, weights = random_inputs()
    references, offsets = random_references(locations, shapes, 2)
    with pytest.raises(ValueError, match="reference_points must be B Q L 2 or B Q L 4"):
        ms_deform_attn_fused(value, shapes, references[..., :1], offsets, weights)
    with pytest.raises(ValueError, match="sampling_offsets"):
        ms_deform_attn_fused(value, shapes, references, offsets[:, :1], weights)
