"""Test `transforms.py` against results of the released code, and properties of all images."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import load_file

from deta.model.batch import normalise
from deta.platform.data.coco_dataset import Sample
from deta.platform.data.image_sizes import (
    AugmentationConfig,
    EvaluationSize,
    larger_augmentation,
    tiny_augmentation,
    tiny_evaluation_size,
)
from deta.platform.data.sample_order import Draws
from deta.platform.data.transforms import (
    augment,
    crop,
    flip,
    resize,
    resize_for_evaluation,
    resized_size,
    to_model_input,
)

SHARED = Path(
    os.environ.get("DETA_SHARED", Path(__file__).resolve().parents[3] / "../shared")
).resolve()


# --- parity with the released code -------------------------------------------------------------


def function_cases(kind: str) -> list:
    """Every case of one kind in every JSON file of every `functions` folder of shared cases."""
    cases = []
    for path in sorted((SHARED / "parity").glob("**/functions/*.json")):
        for number, case in enumerate(json.loads(path.read_text()).get(kind, [])):
            name = f"{path.parent.relative_to(SHARED / 'parity')}-{number}"
            cases.append(pytest.param(path.parent, number, case, id=name))
    return cases or [
        pytest.param(None, 0, {}, marks=pytest.mark.skip(reason=f"no shared {kind} cases"))
    ]


@pytest.mark.parametrize(("folder", "number", "case"), function_cases("resize"))
def test_parity_of_resized_sizes(folder, number, case):
    size = resized_size(case["height"], case["width"], case["short_edge"], case["max_size"])
    assert list(size[::-1]) == case["official_out_wh"]


@pytest.mark.parametrize(("folder", "number", "case"), function_cases("transform_chains"))
def test_parity_of_a_chain_of_transforms(folder, number, case):
    pixels = load_file(folder / f"transform{number}.safetensors")
    prepared = case["after_prepare"]
    sample = Sample(
        image=Image.fromarray(pixels["image"].numpy()),
        boxes_px=torch.tensor(prepared["boxes"]).reshape(-1, 4),
        labels=torch.tensor(prepared["labels"], dtype=torch.int64),
        image_id=7,
        original_size_px=(case["height"], case["width"]),
    )

    def check(sample: Sample, expected: dict) -> None:
        assert [sample.image.height, sample.image.width] == expected["size"]
        assert sample.labels.tolist() == expected["labels"]
        boxes_px = torch.tensor(expected["boxes"]).reshape(-1, 4)
        torch.testing.assert_close(sample.boxes_px, boxes_px, rtol=1e-6, atol=1e-6)

    sample = flip(sample)
    check(sample, case["after_hflip"])
    sample = crop(sample, *case["crop_region_top_left_h_w"])
    check(sample, case["after_crop"])
    sample = resize(sample, case["resize_short"], case["resize_max"])
    check(sample, case["after_resize"])

    image, target = to_model_input(sample)
    # 2.4e-7 is one rounding of the largest values, 2.6; one step of an 8-bit pixel is 1.7e-2.
    normalised = normalise(image[None])[0]
    torch.testing.assert_close(normalised, pixels["final"], rtol=0, atol=2.4e-7)
    expected = torch.tensor(case["after_normalize"]["boxes"]).reshape(-1, 4)
    torch.testing.assert_close(target.boxes, expected, rtol=0, atol=1e-6)
    assert target.labels.tolist() == case["after_normalize"]["labels"]


def test_parity_with_a_published_preprocessing_of_an_image_of_cats():
    folder = SHARED / "data" / "coco_cats"
    path = folder / "expected_hf_deta_preprocess.json"
    if not path.exists():
        pytest.skip("no shared image of cats")
    expected = json.loads(path.read_text())
    tolerance = expected["tolerance"]
    annotation_file = next(iter(sorted((folder / "annotations").glob("*.json"))))
    annotations = json.loads(annotation_file.read_text())
    (record,) = annotations["images"]
    boxes = torch.tensor([one["bbox"] for one in annotations["annotations"]])  # N 4, xywh
    sample = Sample(
        image=Image.open(next(folder.rglob(record["file_name"]))).convert("RGB"),
        boxes_px=torch.cat([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], dim=1),
        labels=torch.tensor([one["category_id"] for one in annotations["annotations"]]),
        image_id=record["id"],
        original_size_px=(record["height"], record["width"]),
    )

    image, target = to_model_input(resize_for_evaluation(sample, EvaluationSize()))

    assert [1, *image.shape] == expected["pixel_values_shape"]
    first = torch.tensor(expected["pixel_values_first3_row0"])
    seen = normalise(image[None])[0, 0, 0, :3]
    torch.testing.assert_close(seen, first, rtol=0, atol=tolerance["pixel"])
    box = torch.tensor(expected["box0_cxcywh"])
    torch.testing.assert_close(target.boxes[0], box, rtol=0, atol=tolerance["boxes"])
    assert target.labels.tolist() == expected["class_labels"]


# --- sizes and configurations ------------------------------------------------------------------


@given(
    height=st.integers(1, 5000),
    width=st.integers(1, 5000),
    short_edge=st.integers(1, 1300),
    max_long_edge=st.none() | st.integers(1, 2000),
)
def test_no_size_is_ever_zero_or_far_over_the_maximum(height, width, short_edge, max_long_edge):
    new_height, new_width = resized_size(height, width, short_edge, max_long_edge)

    assert min(new_height, new_width) >= 1
    assert (new_width, new_height) == resized_size(width, height, short_edge, max_long_edge)
    if max_long_edge is not None:
        # The short edge is rounded: it is too long by half a pixel at most.
        ratio = max(height, width) / min(height, width)
        assert max(new_height, new_width) <= max_long_edge + ratio / 2
    elif min(height, width) == short_edge:
        assert (new_height, new_width) == (height, width)


# --- every image -------------------------------------------------------------------------------


def random_sample(seed: int, height: int, width: int, num_boxes: int) -> Sample:
    generator = np.random.default_rng(seed)
    pixels = generator.integers(0, 256, (height, width, 3), dtype=np.uint8)
    corners = generator.uniform(0, 1, (num_boxes, 2, 2)) * [width, height]
    boxes_px = np.concatenate([corners.min(1), corners.max(1)], axis=1).astype(np.float32)
    boxes_px = boxes_px[(boxes_px[:, 2:] > boxes_px[:, :2]).all(1)]
    return Sample(
        image=Image.fromarray(pixels),
        boxes_px=torch.from_numpy(boxes_px),
        labels=torch.arange(len(boxes_px)),
        image_id=seed,
        original_size_px=(height, width),
    )


edges = st.one_of(st.integers(1, 8), st.integers(1, 300))


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    height=edges,
    width=edges,
    num_boxes=st.integers(0, 6),
)
def test_boxes_stay_inside_the_image_and_have_area(seed, height, width, num_boxes):
    sample = random_sample(seed, height, width, num_boxes)

    augmented = augment(sample, tiny_augmentation(), Draws(seed))
    image, target = to_model_input(augmented)

    size_px = torch.tensor([augmented.image.width, augmented.image.height])
    assert (augmented.boxes_px >= 0).all()
    assert (augmented.boxes_px[:, 2:] <= size_px).all()
    assert (augmented.boxes_px[:, 2:] > augmented.boxes_px[:, :2]).all()
    assert (target.boxes[:, 2:] > 0).all()
    assert target.boxes.shape == (len(target.labels), 4)
    assert set(target.labels.tolist()) <= set(sample.labels.tolist())
    assert image.shape == (3, augmented.image.height, augmented.image.width)
    assert image.dtype == torch.uint8
    assert augmented.original_size_px == (height, width)


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**32))
def test_the_same_draws_give_the_same_sample_and_global_generators_are_left_alone(seed):
    sample = random_sample(1, 90, 120, 4)
    states = torch.get_rng_state(), str(np.random.get_state())

    first, first_target = to_model_input(augment(sample, tiny_augmentation(), Draws(seed)))
    torch.rand(1)
    torch.set_rng_state(states[0])
    second, second_target = to_model_input(augment(sample, tiny_augmentation(), Draws(seed)))

    assert torch.equal(first, second)
    assert torch.equal(first_target.boxes, second_target.boxes)
    assert torch.equal(torch.get_rng_state(), states[0])
    assert str(np.random.get_state()) == states[1]


@pytest.mark.parametrize("config", [AugmentationConfig(), larger_augmentation()])
@pytest.mark.parametrize("size", [(1, 1), (1, 3000), (3000, 1), (30, 500)])
def test_images_of_one_pixel_or_one_row_can_be_augmented(config, size):
    sample = random_sample(0, *size, num_boxes=2)
    # Of the first draws, these seeds crop and do not crop.
    for seed in range(4):
        augmented = augment(sample, config, Draws(seed))
        assert min(augmented.image.size) >= 1
        assert augmented.image.width * augmented.image.height <= 1.2 * config.max_long_edge**2
    evaluated = resize_for_evaluation(sample, EvaluationSize())
    assert min(evaluated.image.size) >= 1
    assert max(evaluated.image.size) <= 1334


def test_an_image_can_lose_all_its_boxes_and_keeps_its_shapes():
    sample = random_sample(3, 60, 80, 2)
    empty = crop(sample, 0, 0, 10, 10)  # far from both boxes of this seed
    image, target = to_model_input(resize(empty, 20, 40))
    assert image.shape == (3, 20, 20)
    assert target.boxes.shape == (0, 4)
    assert target.labels.shape == (0,)
    assert target.labels.dtype == torch.int64


@pytest.mark.parametrize("seed", range(20))
def test_a_bright_rectangle_stays_inside_its_box(seed):
    generator = np.random.default_rng(seed)
    pixels = np.zeros((100, 140, 3), dtype=np.uint8)
    top, left = generator.integers(20, 50, 2)
    height, width = generator.integers(20, 50, 2)
    pixels[top : top + height, left : left + width] = 255
    box_px = torch.tensor([[left, top, left + width, top + height]], dtype=torch.float32)
    sample = Sample(Image.fromarray(pixels), box_px, torch.tensor([0]), 0, (100, 140))

    augmented = augment(sample, tiny_augmentation(), Draws(seed))

    bright = np.argwhere(np.asarray(augmented.image)[..., 0] > 127)  # rows of (y, x)
    if len(augmented.boxes_px) == 0:
        assert len(bright) < 160  # at most a blurred edge of the rectangle is left
        return
    (y1, x1), (y2, x2) = bright.min(0), bright.max(0) + 1
    found_px = torch.tensor([[x1, y1, x2, y2]], dtype=torch.float32)
    # Two resizes round the edge of the rectangle to half a pixel each.
    assert (augmented.boxes_px - found_px).abs().max() <= 1.5


# --- distributions -----------------------------------------------------------------------------


def test_half_of_the_images_are_flipped_and_half_are_cropped():
    # Left half black, right half white: the mean of the left columns tells the flip.
    pixels = np.zeros((100, 150, 3), dtype=np.uint8)
    pixels[:, 75:] = 255
    sample = Sample(
        Image.fromarray(pixels), torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64), 0, (100, 150)
    )
    # An uncropped image is 1.5 times as wide as high, up to 160 px.
    flipped = cropped = 0
    short_edges = set()
    for seed in range(400):
        config = AugmentationConfig(
            short_edges=(40, 60, 80),
            max_long_edge=200,
            crop_pre_short_edges=(100,),
            crop_min=40,
            crop_max=80,
        )
        image = augment(sample, config, Draws(seed * 7919)).image
        cropped += image.width != image.height * 3 // 2
        if image.width == image.height * 3 // 2:
            short_edges.add(image.height)
    for seed in range(400):
        image = augment(
            sample, AugmentationConfig(short_edges=(40,), crop=False), Draws(seed * 7919)
        ).image
        assert image.size == (60, 40)
        flipped += image.getpixel((0, 0)) == (255, 255, 255)
    # Five standard deviations of 400 fair coins are 50.
    assert abs(flipped - 200) < 50
    assert abs(cropped - 200) < 50
    assert short_edges == {40, 60, 80}


@pytest.mark.parametrize(("probability", "expected"), [(0.0, False), (1.0, True)])
def test_flips_can_be_certain(probability, expected):
    pixels = np.zeros((10, 10, 3), dtype=np.uint8)
    pixels[:, 5:] = 255
    sample = Sample(
        Image.fromarray(pixels), torch.tensor([[5.0, 0, 10, 10]]), torch.tensor([1]), 0, (10, 10)
    )
    config = AugmentationConfig(
        short_edges=(10,), max_long_edge=10, crop=False, flip_probability=probability
    )
    for seed in range(20):
        augmented = augment(sample, config, Draws(seed))
        assert augmented.boxes_px.tolist() == [[0, 0, 5, 10] if expected else [5, 0, 10, 10]]


def test_the_tiny_sizes_are_small():
    sample = random_sample(5, 480, 640, 3)
    assert resize_for_evaluation(sample, tiny_evaluation_size()).image.size == (160, 120)
    for seed in range(10):
        assert max(augment(sample, tiny_augmentation(), Draws(seed)).image.size) <= 161
