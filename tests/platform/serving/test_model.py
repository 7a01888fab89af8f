"""A served model detects what the predictor does, in batches of one shape."""

from __future__ import annotations

import pytest
import torch

from deta.model.postprocess import Detections
from deta.platform.inference.predictor import Predictor
from deta.platform.serving.model import ModelName, ServedModel
from tests.platform.serving.serving_case import CATEGORIES, random_image, tiny_config, tiny_model


@pytest.fixture(scope="module")
def served() -> ServedModel:
    predictor = Predictor(tiny_model(0), tiny_config(), CATEGORIES, weights_sha256="0" * 64)
    return ServedModel(predictor, ModelName("tiny", "", "0" * 64))


def test_detections_are_those_of_the_predictor_and_do_not_depend_on_the_batch(served: ServedModel):
    images = [random_image(seed) for seed in range(5)]
    expected = served.predictor.predict(images, batch_size=1)
    predictor = served.predictor
    prepared = [predictor.prepare(image) for image in images]

    alone = [predictor.detect([one])[0] for one in prepared]
    together = predictor.detect(prepared)

    assert len({tuple(found.scores.tolist()) for found in expected}) == 5
    for one, other, best in zip(alone, together, expected, strict=True):
        assert torch.equal(one.scores, best.scores)
        assert torch.equal(one.boxes_px, best.boxes_px)
        assert torch.equal(other.labels, best.labels)
        # The order of float32 sums changes with the batch.
        torch.testing.assert_close(other.scores, best.scores, atol=1e-4, rtol=0)
        torch.testing.assert_close(other.boxes_px, best.boxes_px, atol=0.02, rtol=0)


def test_images_of_two_shapes_are_refused_as_one_batch(served: ServedModel):
    predictor = served.predictor
    prepared = [predictor.prepare(random_image(1, *size)) for size in ((80, 60), (60, 80))]
    with pytest.raises(ValueError, match="one shape"):
        predictor.detect(prepared)


def test_a_score_that_is_not_a_number_is_an_error(served: ServedModel):
    broken = Detections(
        torch.tensor([0.5, float("nan")]), torch.zeros(2, dtype=torch.int64), torch.zeros(2, 4)
    )
    with pytest.raises(RuntimeError, match="not a number"):
        served.as_json(broken, min_score=0, max_detections=10)
