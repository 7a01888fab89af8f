"""The sizes of images."""

from __future__ import annotations

import pytest

from deta.platform.data.image_sizes import (
    AugmentationConfig,
    EvaluationSize,
    larger_augmentation,
    larger_evaluation_size,
)


def test_the_larger_recipe_is_the_standard_one_times_one_and_a_half():
    larger = larger_augmentation()
    assert larger.short_edges == (720, 768, 816, 864, 912, 960, 1008, 1056, 1104, 1152, 1200)
    assert (larger.max_long_edge, larger_evaluation_size()) == (
        2000,
        EvaluationSize(short_edge=1200, max_long_edge=2000),
    )
    assert larger.crop_pre_short_edges == AugmentationConfig().crop_pre_short_edges


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"short_edges": ()}, "short_edges"),
        ({"short_edges": (0, 480)}, "short_edges"),
        ({"crop_pre_short_edges": (-1,)}, "crop_pre_short_edges"),
        ({"max_long_edge": 799}, "max_long_edge=799"),
        ({"flip_probability": 1.1}, "flip_probability"),
        ({"crop_min": 601}, "crop_min=601"),
        ({"crop_min": 0}, "crop_min=0"),
    ],
)
def test_an_impossible_augmentation_is_refused_by_name(change, message):
    with pytest.raises(ValueError, match=message):
        AugmentationConfig(**change)


@pytest.mark.parametrize("size", [(0, 10), (20, 10)])
def test_an_impossible_evaluation_size_is_refused_by_name(size):
    with pytest.raises(ValueError, match="short_edge="):
        EvaluationSize(short_edge=size[0], max_long_edge=size[1])


def test_a_configuration_read_from_json_equals_the_one_written_in_code():
    assert AugmentationConfig(short_edges=list(range(480, 801, 32))) == AugmentationConfig()
    hash(AugmentationConfig(short_edges=[480]))
