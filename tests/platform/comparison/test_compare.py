"""Two evaluations of the same images are compared, and others are refused."""

from __future__ import annotations

from typing import Any

import pytest

from deta.platform.comparison.compare import Comparison, compare_sides, configuration_difference
from deta.platform.comparison.report import verdict_sentences
from tests.platform.comparison.cases import HOSTILE, boxes, compared, side
from tests.platform.evaluation.detection_cases import random_case

__all__ = ["compared"]  # the fixture


def test_images_gained_and_lost_are_counted(compared: Comparison) -> None:
    assert [change.image_id for change in compared.gained] == [0, 1, 2]
    assert [change.image_id for change in compared.lost] == [3]
    assert compared.num_same == 1
    found = compared.found
    assert (found.both, found.only_a, found.only_b, found.neither) == (7, 0, 3, 0)
    first = compared.gained[0]
    assert (first.errors, first.gained, first.lost) == ((1, 0), 1, 0)


def test_a_side_compared_with_itself_is_equal() -> None:
    truth, results = random_case(2, num_images=24)
    both = compare_sides(side("x", truth, results), side("x", truth, results), resamples=30)

    assert both.gained == both.lost == ()
    assert both.names == ("x (A)", "x (B)")
    assert verdict_sentences(both)[0] == "The two are equal on every image."


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"images": [{"id": i} for i in (0, 1, 9)]}, r"A has 3 images and B 3, 2 of them the same "
         r"\(only in A: 2\) \(only in B: 9\)"),
        ({"categories": [{"id": 1, "name": HOSTILE}, {"id": 2, "name": "can"}]},
         r"1 categories differ \(such as: 2 \(box / can\)\)"),
        ({"annotations": boxes(3)["annotations"][:-1]}, r"the boxes of 1 images differ "
         r"\(such as: 2\)"),
    ],
)  # fmt: skip
def test_other_images_or_boxes_are_refused_by_name(change: dict[str, Any], words: str) -> None:
    truth = boxes(3)
    with pytest.raises(ValueError, match=words):
        compare_sides(side("a", truth, []), side("b", truth | change, []))


def test_only_keys_that_differ_are_shown() -> None:
    a = {"lr": 0.1, "sizes": [1, 2], "seed": None}
    assert configuration_difference(a, {"lr": 0.1, "sizes": (1, 3), "new": True}) == (
        ("new", "-", "True"),
        ("seed", "none", "-"),
        ("sizes", "1, 2", "1, 3"),
    )
    assert configuration_difference(a, {}) == ()
