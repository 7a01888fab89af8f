"""Pictures of one shape that wait together go together, and no answer depends on it."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from deta.model.postprocess import Detections
from deta.platform.inference.predictor import Predictor
from deta.platform.serving.batcher import Answer, Batcher
from deta.platform.serving.metrics import ProcessMeasurements
from deta.platform.serving.model import ModelName, PreparedPicture, ServedModel
from tests.platform.serving.serving_case import CATEGORIES, picture, tiny_config, tiny_model


class NotingModel:
    """Answers with a picture's own first value, notes its batches, and can be held up."""

    def __init__(self, fails_at: float | None = None) -> None:
        self.batches: list[list[float]] = []
        self.free = threading.Event()
        self.free.set()
        self.fails_at = fails_at

    def detect(self, pictures: Sequence[PreparedPicture]) -> list[Detections]:
        values = [float(one.image[0, 0, 0]) for one in pictures]
        self.batches.append(values)
        self.free.wait()
        if self.fails_at in values:
            raise RuntimeError("this one breaks it")
        return [
            Detections(torch.tensor([v]), torch.zeros(1, dtype=torch.int64), torch.zeros(1, 4))
            for v in values
        ]


def prepared(value: float, height: int = 4, width: int = 6) -> PreparedPicture:
    return PreparedPicture(torch.full((3, height, width), value), (height, width))


def value_of(answer: Answer) -> float:
    return float(answer.detections.scores[0])


def batcher(**options: Any) -> Batcher:
    return Batcher(**{"max_batch": 4, "batch_wait_s": 0.01} | options, measurements=MEASUREMENTS)


MEASUREMENTS = ProcessMeasurements()


async def until_taken(model: NotingModel, batches: int) -> None:
    while len(model.batches) < batches:
        await asyncio.sleep(0.005)


def test_pictures_of_one_shape_that_wait_together_go_together_and_each_gets_its_own_answer():
    async def scenario() -> None:
        model: Any = NotingModel()
        model.free.clear()
        async with batcher() as batches:
            first = asyncio.create_task(batches.detect(model, prepared(0)))
            await until_taken(model, 1)
            wide = [1, 2, 4, 5, 6]
            others = [
                asyncio.create_task(
                    batches.detect(model, prepared(v, *((4, 6) if v in wide else (6, 4))))
                )
                for v in range(1, 8)
            ]
            await asyncio.sleep(0.05)
            assert batches.num_waiting == 7
            model.free.set()
            answers = await asyncio.gather(first, *others)
        assert [value_of(answer) for answer in answers] == list(range(8))
        assert model.batches == [[0], [1, 2, 4, 5], [3, 7], [6]]
        assert [answer.batch_size for answer in answers] == [1, 4, 4, 2, 4, 4, 1, 2]

    asyncio.run(scenario())


def test_a_lone_picture_waits_no_longer_than_the_batch_wait():
    async def scenario() -> float:
        async with batcher(batch_wait_s=0.02) as batches:
            answer = await batches.detect(NotingModel(), prepared(1))  # type: ignore[arg-type]
        return answer.wait_s

    assert 0.015 < asyncio.run(scenario()) < 5  # above: a machine whose processors are taken


def test_one_who_gave_up_is_not_looked_at():
    async def scenario() -> None:
        model: Any = NotingModel()
        model.free.clear()
        async with batcher(max_batch=1) as batches:
            tasks = [asyncio.create_task(batches.detect(model, prepared(v))) for v in range(4)]
            await until_taken(model, 1)
            tasks[0].cancel()  # the model is at it already
            tasks[2].cancel()
            await asyncio.sleep(0.02)
            model.free.set()
            assert value_of(await tasks[1]) == 1
            assert value_of(await tasks[3]) == 3
        assert model.batches == [[0], [1], [3]]

    asyncio.run(scenario())


def test_a_picture_that_breaks_the_model_harms_none_beside_it():
    async def scenario() -> None:
        model: Any = NotingModel(fails_at=2)
        async with batcher(batch_wait_s=5, max_batch=3) as batches:
            answers = await asyncio.gather(
                *(batches.detect(model, prepared(v)) for v in (1, 2, 3)), return_exceptions=True
            )
            assert isinstance(answers[1], RuntimeError)
            assert [value_of(answers[i]) for i in (0, 2)] == [1, 3]  # type: ignore[arg-type]
            assert batches.is_working
        assert model.batches == [[1, 2, 3], [1], [2], [3]]

    asyncio.run(scenario())


def test_pictures_of_two_models_never_go_together():
    async def scenario() -> None:
        old, new = NotingModel(), NotingModel()
        async with batcher(batch_wait_s=0.05) as batches:
            which: list[Any] = [old, new, old, new]
            answers = await asyncio.gather(
                *(batches.detect(model, prepared(v)) for v, model in enumerate(which))
            )
        assert [value_of(answer) for answer in answers] == [0, 1, 2, 3]
        assert (old.batches, new.batches) == ([[0, 2]], [[1, 3]])

    asyncio.run(scenario())


def test_it_tells_how_long_a_batch_takes():
    async def scenario() -> None:
        model: Any = NotingModel()
        model.free.clear()
        async with batcher() as batches:
            assert batches.busy_s == 0
            task = asyncio.create_task(batches.detect(model, prepared(1)))
            await until_taken(model, 1)
            time.sleep(0.03)
            assert batches.busy_s >= 0.03
            model.free.set()
            await task
            await asyncio.sleep(0.01)
            assert batches.busy_s == 0
            assert batches.is_working
        assert not batches.is_working

    asyncio.run(scenario())


@pytest.fixture(scope="module")
def served() -> ServedModel:
    predictor = Predictor(tiny_model(0), tiny_config(), CATEGORIES, weights_sha256="0" * 64)
    return ServedModel(predictor, ModelName("tiny", "", "0" * 64))


def test_answers_are_those_of_the_predictor_and_do_not_depend_on_the_batch(served: ServedModel):
    images = [picture(seed) for seed in range(5)]
    expected = served.predictor.predict(images)
    pictures = [served.prepare(image) for image in images]

    alone = [served.detect([one])[0] for one in pictures]
    together = served.detect(pictures)

    assert len({tuple(found.scores.tolist()) for found in expected}) == 5
    for one, other, best in zip(alone, together, expected, strict=True):
        assert torch.equal(one.scores, best.scores)
        assert torch.equal(one.boxes_px, best.boxes_px)
        assert torch.equal(other.labels, best.labels)
        # The order in which float32 sums are taken changes with the batch.
        torch.testing.assert_close(other.scores, best.scores, atol=1e-4, rtol=0)
        torch.testing.assert_close(other.boxes_px, best.boxes_px, atol=0.02, rtol=0)


def test_pictures_of_two_shapes_are_not_padded_to_one_batch(served: ServedModel):
    pictures = [served.prepare(picture(1)), served.prepare(picture(1, 60, 80))]
    with pytest.raises(ValueError, match="one shape"):
        served.detect(pictures)


def test_a_score_that_is_no_number_is_an_error_and_no_answer(served: ServedModel, tmp_path: Path):
    broken = Detections(
        torch.tensor([0.5, float("nan")]), torch.zeros(2, dtype=torch.int64), torch.zeros(2, 4)
    )
    with pytest.raises(RuntimeError, match="not a number"):
        served.as_json(broken, min_score=0, max_detections=10)
