"""hotcoco and pycocotools give the same numbers."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deta.platform.evaluation.coco_columns import read_columns
from deta.platform.evaluation.coco_engines import evaluated, match_detections
from deta.platform.evaluation.coco_metrics import evaluate_detections
from tests.platform.evaluation.detection_cases import random_case, reference

# Both compute in double precision, but in another order of sums, and average 1010 values.
TOLERANCE = 1e-12


def require_equal(ground_truth: dict[str, Any], results: list[dict[str, Any]]) -> None:
    """The tables are equal cell by cell, and so are the metrics."""
    before = copy.deepcopy((ground_truth, results))
    columns = read_columns(ground_truth, results)
    ours, theirs = (evaluated(columns, engine) for engine in ("hotcoco", "pycocotools"))
    for name in ("precision", "recall"):
        assert ours.eval[name].shape == theirs.eval[name].shape
        np.testing.assert_allclose(ours.eval[name], theirs.eval[name], rtol=0, atol=TOLERANCE)
    assert ours.stats == pytest.approx(theirs.stats, abs=TOLERANCE)
    assert (ground_truth, results) == before


@pytest.mark.parametrize("rounded", [False, True])
@pytest.mark.parametrize("seed", range(8))
def test_both_engines_agree_with_pycocotools_alone_on_a_random_case(
    seed: int, rounded: bool
) -> None:
    truth, results = random_case(seed, num_images=8, rounded=rounded)

    require_equal(truth, results)
    alone = reference(truth, results)
    alone.summarize()
    for engine in ("hotcoco", "pycocotools"):
        metrics = evaluate_detections(truth, results, engine)
        assert [*metrics.as_dict().values()] == pytest.approx(alone.stats.tolist(), abs=TOLERANCE)


def annotation(image_id: int, category_id: int, box: list[float], **more: Any) -> dict[str, Any]:
    return {"image_id": image_id, "category_id": category_id, "bbox": box} | more


# Sides around 32 and 96 pixels lie on both sides of COCO's area ranges, and exactly on them.
boxes = st.tuples(
    st.integers(0, 8).map(lambda i: 10.0 * i),
    st.integers(0, 8).map(lambda i: 10.0 * i),
    st.sampled_from([0.0, 8.0, 31.5, 32.0, 33.0, 95.0, 96.0, 97.0]),
    st.sampled_from([8.0, 32.0, 50.0, 96.0, 120.0]),
).map(list)
truths = st.builds(
    annotation,
    st.integers(1, 3),
    st.integers(1, 3),
    boxes,
    id=st.just(1),
    iscrowd=st.sampled_from([0, 0, 0, 1]),
    area=st.sampled_from([None, 0.0, 32.0**2, 96.0**2, 500.0, 1e5]),
)
found = st.builds(
    annotation,
    st.integers(1, 3),
    st.integers(1, 4),  # 4 is not listed
    boxes,
    score=st.sampled_from([0.1, 0.5, 0.9]),  # few, so that many are equal
)


@settings(max_examples=80, deadline=None)
@given(st.lists(truths, max_size=12), st.lists(found, max_size=25))
def test_both_engines_agree_on_ties_crowds_and_borders_of_areas(
    annotations: list[dict], results: list[dict]
) -> None:
    ground_truth = {
        "images": [{"id": i} for i in (1, 2, 3)],
        "categories": [{"id": i, "name": str(i)} for i in (1, 2, 3)],
        "annotations": annotations,
    }

    require_equal(ground_truth, results)


def test_both_engines_agree_beyond_100_detections_of_an_image() -> None:
    boxes = [[10.0 * i, 5.0, 9.0, 40.0] for i in range(150)]
    truth = {
        "images": [{"id": 1}],
        "categories": [{"id": 1, "name": "disc"}],
        "annotations": [annotation(1, 1, box, id=i) for i, box in enumerate(boxes)],
    }
    results = [annotation(1, 1, box, score=0.5) for box in boxes]

    require_equal(truth, results)
    recall = evaluate_detections(truth, results, "pycocotools").as_dict()["AR100"]
    assert recall == pytest.approx(100 / 150)


def test_both_engines_agree_where_there_is_nothing() -> None:
    nothing: dict[str, list] = {"images": [], "annotations": [], "categories": []}
    truth, results = random_case(3)

    require_equal(nothing, [])
    require_equal({**nothing, "images": truth["images"]}, [])
    require_equal({**nothing, "categories": truth["categories"]}, [])
    require_equal({**truth, "annotations": []}, results)
    require_equal(truth, [])


def test_pycocotools_prints_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    evaluate_detections(*random_case(1), "pycocotools")

    assert capfd.readouterr() == ("", "")


def test_matches_name_detections_by_their_position() -> None:
    truth, results = random_case(2)

    matched = match_detections(truth, results)

    listed = {category["id"] for category in truth["categories"]}
    assert len(matched.scores) == sum(one["category_id"] in listed for one in results)
    assert matched.evaluation.eval is not None
