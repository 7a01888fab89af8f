"""Images of a report are small JPEGs of the right places."""

from __future__ import annotations

import io

import numpy as np
from PIL import Image

from deta.platform.analysis.analysis import explain
from deta.platform.analysis.images import (
    CROP_PX,
    LONGER_PX,
    choose_label_errors,
    draw_label_error,
    draw_worst_image,
)
from deta.platform.analysis.label_errors import MISSING, LabelError
from tests.platform.analysis.scenes import detections_of, scene


def label_error(image_id: int, suspicion: float) -> LabelError:
    return LabelError(MISSING, suspicion, image_id, None, 0)


def test_an_image_is_chosen_once_while_there_are_others():
    errors = [label_error(image, s) for image, s in ((0, 0.9), (0, 0.8), (1, 0.7), (2, 0.6))]
    assert [one.image_id for one in choose_label_errors(errors, 3)] == [0, 1, 2]
    assert [one.suspicion for one in choose_label_errors(errors, 4)] == [0.9, 0.8, 0.7, 0.6]


def test_images_are_small_jpegs_of_their_size():
    explanation = explain(scene(0), detections_of(scene(0), 0, noise=1))
    image = Image.fromarray(np.full((600, 900, 3), 128, np.uint8))
    worst = explanation.worst[0].image_id
    crop = draw_label_error(explanation, explanation.label_errors[0], image)
    drawn = [*draw_worst_image(explanation, worst, image), crop]
    for one, longer in zip(drawn, (LONGER_PX, LONGER_PX, CROP_PX), strict=True):
        assert max(one.size_px) == longer
        with Image.open(io.BytesIO(one.content)) as found:
            assert (found.format, found.size) == ("JPEG", one.size_px)
