"""A model is run over a data set in evaluation mode, and every image counts once."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from deta.model.config import PostprocessConfig
from deta.model.detector import DETA
from deta.platform.data.coco_dataset import CocoDataset
from deta.platform.data.image_sizes import EvaluationSize
from deta.platform.data.synthetic_shapes import write_shapes
from deta.platform.evaluation.evaluate_model import evaluate_model
from deta.platform.learning.distributed import Worker
from tests.platform.weights.small_detector import SMALL

SIZE = EvaluationSize(short_edge=64, max_long_edge=96)
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> CocoDataset:
    shapes = write_shapes(tmp_path_factory.mktemp("shapes"), num_train=1, num_val=5, size_px=64)
    return CocoDataset.open(shapes.val_images, shapes.val_annotations)


@pytest.fixture(scope="module")
def model() -> DETA:
    torch.manual_seed(0)
    return DETA(replace(SMALL, num_classes=5))


def test_every_image_is_evaluated_once_and_progress_is_reported(model, dataset):
    batches: list[int] = []

    result = evaluate_model(
        model, dataset, SIZE, PostprocessConfig(), batch_size=2, precision=torch.float32,
        worker=Worker(0, 1, CPU), on_batch=batches.append,
    )  # fmt: skip

    assert result is not None
    assert sum(batches) == len(dataset) == 5
    ids = list(dict.fromkeys(entry["image_id"] for entry in result.results))
    assert ids == [image["id"] for image in dataset.ground_truth["images"]]
    assert 0 <= result.metrics.AP <= 1


@pytest.mark.parametrize("was_training", [True, False])
def test_the_model_returns_to_its_mode_also_after_an_error(model, dataset, was_training):
    model.train(was_training)

    def stop(_: int) -> None:
        assert not model.training
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        evaluate_model(
            model, dataset, SIZE, PostprocessConfig(), batch_size=1, precision=torch.float32,
            worker=Worker(0, 1, CPU), on_batch=stop,
        )  # fmt: skip

    assert model.training == was_training
