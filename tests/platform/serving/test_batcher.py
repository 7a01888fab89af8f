"""Images of one shape that wait together share a batch, and each gets its own result."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Sequence
from typing import Any

import pytest
import torch

from deta.model.postprocess import Detections
from deta.platform.inference.predictor import PreparedImage
from deta.platform.serving.batcher import Batcher, BatchResult
from deta.platform.serving.metrics import Measurements


class RecordingModel:
    """A model that returns an image's first value as its score, records batches, and can block."""

    def __init__(self, fails_at: float | None = None) -> None:
        self.batches: list[list[float]] = []
        self.free = threading.Event()
        self.free.set()
        self.fails_at = fails_at

    def detect(self, images: Sequence[PreparedImage]) -> list[Detections]:
        values = [float(image.pixels[0, 0, 0]) for image in images]
        self.batches.append(values)
        self.free.wait()
        if self.fails_at in values:
            raise RuntimeError("this image breaks it")
        return [
            Detections(torch.tensor([v]), torch.zeros(1, dtype=torch.int64), torch.zeros(1, 4))
            for v in values
        ]


def prepared(value: float, height: int = 4, width: int = 6) -> PreparedImage:
    return PreparedImage(torch.full((3, height, width), value), (height, width))


def value_of(result: BatchResult) -> float:
    return float(result.detections.scores[0])


def batcher(**options: Any) -> Batcher:
    return Batcher(**{"max_batch": 4, "batch_wait_s": 0.01} | options, measurements=MEASUREMENTS)


MEASUREMENTS = Measurements()
pytestmark = pytest.mark.anyio


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


async def until_taken(model: RecordingModel, batches: int) -> None:
    while len(model.batches) < batches:
        await asyncio.sleep(0.005)


async def test_images_of_one_shape_share_a_batch_and_each_gets_its_own_result() -> None:
    model: Any = RecordingModel()
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
        results = await asyncio.gather(first, *others)
    assert [value_of(result) for result in results] == list(range(8))
    assert model.batches == [[0], [1, 2, 4, 5], [3, 7], [6]]
    assert [result.batch_size for result in results] == [1, 4, 4, 2, 4, 4, 1, 2]


async def test_a_lone_image_does_not_wait_and_others_wait_for_those_that_are_coming() -> None:
    model: Any = RecordingModel()
    async with batcher(batch_wait_s=60) as batches:
        for value in (1, 2):  # one after another
            await batches.detect(model, prepared(value))
        with batches.coming():
            first = asyncio.create_task(batches.detect(model, prepared(3)))
            await asyncio.sleep(0.05)
        await asyncio.gather(first, batches.detect(model, prepared(4)))
    assert model.batches == [[1], [2], [3, 4]]


async def test_clients_that_shared_a_batch_wait_for_each_other_no_longer_than_allowed() -> None:
    model: Any = RecordingModel()
    async with batcher(batch_wait_s=0.02) as batches:
        await asyncio.gather(*(batches.detect(model, prepared(value)) for value in (1, 2)))
        result = await batches.detect(model, prepared(3))
    assert model.batches == [[1, 2], [3]]
    assert 0.015 < result.wait_s < 5  # 5: on a busy machine


async def test_a_cancelled_request_is_not_processed() -> None:
    model: Any = RecordingModel()
    model.free.clear()
    async with batcher(max_batch=1) as batches:
        tasks = [asyncio.create_task(batches.detect(model, prepared(v))) for v in range(4)]
        await until_taken(model, 1)
        tasks[0].cancel()  # it is in the model already
        tasks[2].cancel()
        await asyncio.sleep(0.02)
        model.free.set()
        assert value_of(await tasks[1]) == 1
        assert value_of(await tasks[3]) == 3
    assert model.batches == [[0], [1], [3]]


async def test_an_image_that_breaks_the_model_does_not_fail_the_others() -> None:
    model: Any = RecordingModel(fails_at=2)
    async with batcher(batch_wait_s=5, max_batch=3) as batches:
        results = await asyncio.gather(
            *(batches.detect(model, prepared(v)) for v in (1, 2, 3)), return_exceptions=True
        )
        assert isinstance(results[1], RuntimeError)
        assert [value_of(results[i]) for i in (0, 2)] == [1, 3]  # type: ignore[arg-type]
        assert batches.is_working
    assert model.batches == [[1, 2, 3], [1], [2], [3]]


async def test_images_of_two_models_never_share_a_batch() -> None:
    old, new = RecordingModel(), RecordingModel()
    async with batcher(batch_wait_s=0.05) as batches:
        which: list[Any] = [old, new, old, new]
        results = await asyncio.gather(
            *(batches.detect(model, prepared(v)) for v, model in enumerate(which))
        )
    assert [value_of(result) for result in results] == [0, 1, 2, 3]
    assert (old.batches, new.batches) == ([[0, 2]], [[1, 3]])


async def test_the_duration_of_the_current_batch_is_known() -> None:
    model: Any = RecordingModel()
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
