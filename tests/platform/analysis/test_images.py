"""Images of a report are small JPEGs of the right places."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from deta.platform.analysis.analysis import explain
from deta.platform.analysis.images import (
    CROP_PX,
    LONGER_PX,
    MAX_BOXES,
    boxes_of,
    choose_label_errors,
    drawn,
    label_error_card,
    small_jpeg,
)
from deta.platform.analysis.label_errors import MISSING, SHIFTED, LabelError
from deta.platform.pages.content import Box
from tests.platform.analysis.scenes import detections_of, scene


def label_error(image_id: int, suspicion: float) -> LabelError:
    return LabelError(MISSING, suspicion, image_id, None, 0)


def test_an_image_is_chosen_once_while_there_are_others():
    errors = [label_error(image, s) for image, s in ((0, 0.9), (0, 0.8), (1, 0.7), (2, 0.6))]
    assert [one.image_id for one in choose_label_errors(errors, 3)] == [0, 1, 2]
    assert [one.suspicion for one in choose_label_errors(errors, 4)] == [0.9, 0.8, 0.7, 0.6]


def test_images_are_small_jpegs_with_their_boxes():
    explanation = explain(scene(0), detections_of(scene(0), 0, noise=1))
    image = Image.fromarray(np.full((600, 900, 3), 128, np.uint8))
    card = label_error_card(explanation, LabelError(SHIFTED, 0.7, 0, 0, 0), image, "name")
    for jpeg, longer in ((small_jpeg(image, LONGER_PX), LONGER_PX), (card.jpeg, CROP_PX)):
        assert max(jpeg.size_px) == longer
        with Image.open(io.BytesIO(jpeg.content)) as found:
            assert (found.format, found.size) == ("JPEG", jpeg.size_px)
    for box in card.boxes:
        assert 0 <= box.left < box.left + box.width <= 1


def test_the_boxes_of_an_image_are_its_errors_and_what_was_found():
    explanation = explain(scene(0), detections_of(scene(0), 0, noise=1))
    for worst in explanation.worst:
        kinds = [box.kind for box in boxes_of(explanation, worst.image_id, (400, 110))]
        assert kinds.count("wrong") == worst.num_false
        assert kinds.count("missed") == worst.num_missed
        assert kinds.count("right") + worst.num_missed == 4  # boxes of each image
    annotated = scene(0)["annotations"][0]["bbox"]
    missed_by_all = np.ones(len(explanation.matched.crowd), bool)
    first = boxes_of(explain(scene(0), []), 0, (400, 110), missed_by_all)[0]
    assert (first.left * 400, first.top * 110) == pytest.approx(annotated[:2])
    assert first.is_strong


def test_a_box_is_cut_at_the_edges_of_its_image():
    ground_truth = scene(0)
    ground_truth["annotations"][0]["bbox"] = [-40.0, 90.0, 120.0, 50.0]
    box = boxes_of(explain(ground_truth, []), 0, (400, 100))[0]
    assert (box.left, box.top, box.width, box.height) == pytest.approx((0, 0.9, 0.2, 0.1))


def test_the_most_telling_boxes_are_drawn_on_top():
    boxes = [Box(0, 0, 1, 1, "right", str(i), i == 3) for i in range(MAX_BOXES + 5)]
    assert [box.text for box in drawn(boxes)] == [
        *(str(i) for i in range(MAX_BOXES) if i != 3), "3",
    ]  # fmt: skip
