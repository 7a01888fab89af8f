"""Batch requests: images of one shape that wait at the same time share a batch.

Requests queue while the model is busy, so batches grow with the load and not with a timer. After a
pause the first image waits for others for a few milliseconds, if there are signs of any. An image
stays with the model that it was prepared for, so a change of models needs no pause: the old model
processes what is queued, and is released with its last image.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass

from deta.model.postprocess import Detections
from deta.platform.inference.predictor import Predictor, PreparedImage
from deta.platform.serving.metrics import Measurements

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class BatchResult:
    """The detections of one image, and the times of its batch."""

    detections: Detections
    batch_size: int
    wait_s: float  # in the queue
    model_s: float  # inference time of the batch


@dataclass(frozen=True, eq=False)
class _QueuedImage:
    model: Predictor
    image: PreparedImage
    since_s: float
    answer: asyncio.Future[BatchResult]

    def matches(self, other: _QueuedImage) -> bool:
        return self.model is other.model and self.image.shape == other.image.shape


class Batcher:
    """A queue and one model thread. Call all methods from the event loop's thread."""

    def __init__(self, max_batch: int, batch_wait_s: float, measurements: Measurements) -> None:
        self.max_batch, self.batch_wait_s = max_batch, batch_wait_s
        self.measurements = measurements
        self.batch_began_s: float | None = None  # start of the current batch
        self.mean_batch_s = 0.1  # a running mean, for Retry-After
        self._num_coming, self._last_size = 0, 1
        self._queue: list[_QueuedImage] = []
        self._arrived = asyncio.Event()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="model")
        self._task: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Batcher:
        self._task = asyncio.create_task(self._run(), name="batches")
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self._task is not None
        self._task.cancel()
        await asyncio.wait([self._task])
        for waiting in self._queue:
            waiting.answer.cancel()
        self._thread.shutdown(wait=False, cancel_futures=True)

    @property
    def num_waiting(self) -> int:
        return len(self._queue)

    @property
    def busy_s(self) -> float:
        """Return how long the model has worked on its current batch."""
        return 0.0 if self.batch_began_s is None else time.monotonic() - self.batch_began_s

    @property
    def is_working(self) -> bool:
        """Return whether the task that takes images from the queue is alive."""
        return self._task is not None and not self._task.done()

    @contextmanager
    def coming(self) -> Iterator[None]:
        """Count an image that is being decoded: the first image of a batch may wait for it."""
        self._num_coming += 1
        try:
            yield
        finally:
            self._num_coming -= 1
            self._arrived.set()

    async def detect(self, model: Predictor, image: PreparedImage) -> BatchResult:
        """Return the detections in an image. A cancelled caller leaves the queue.

        Raises:
            Exception: from the model, for this image alone.
        """
        answer = asyncio.get_running_loop().create_future()
        self._queue.append(_QueuedImage(model, image, time.monotonic(), answer))
        self._arrived.set()
        return await answer

    async def _run(self) -> None:
        while True:
            batch = await self._next_batch()
            self.batch_began_s = time.monotonic()
            await self._process(batch)
            self.batch_began_s = None

    async def _next_batch(self) -> list[_QueuedImage]:
        """Wait for at least one image; return those that can share a batch with the oldest."""
        while True:
            self._arrived.clear()
            self._queue = [waiting for waiting in self._queue if not waiting.answer.done()]
            if not self._queue:
                await self._arrived.wait()
                continue
            first = self._queue[0]
            batch = [waiting for waiting in self._queue if waiting.matches(first)]
            batch = batch[: self.max_batch]
            left_s = first.since_s + self.batch_wait_s - time.monotonic()
            # A lone client is not kept waiting. Clients that shared a batch come again together.
            is_alone = not self._num_coming and self._last_size == 1
            if len(batch) == self.max_batch or left_s <= 0 or is_alone:
                self._queue = [waiting for waiting in self._queue if waiting not in batch]
                self._last_size = len(batch)
                return batch
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._arrived.wait(), left_s)

    async def _process(self, batch: list[_QueuedImage]) -> None:
        """Set the result of each image of a batch, or the error that the image alone causes."""
        began_s = time.monotonic()
        loop = asyncio.get_running_loop()
        images = [waiting.image for waiting in batch]
        try:
            found = await loop.run_in_executor(self._thread, batch[0].model.detect, images)
        except Exception as error:
            if len(batch) > 1:
                log.warning("a batch of %d failed (%s); retrying one by one", len(batch), error)
                for waiting in batch:  # so that one bad image does not fail the others
                    await self._process([waiting])
            else:
                log.exception("the model failed on an image of %s", images[0].shape)
                if not batch[0].answer.done():
                    batch[0].answer.set_exception(error)
            return
        model_s = time.monotonic() - began_s
        self.mean_batch_s += 0.2 * (model_s - self.mean_batch_s)
        self.measurements.record("batch_size", len(batch))
        for waiting, detections in zip(batch, found, strict=True):
            if not waiting.answer.done():
                wait_s = began_s - waiting.since_s
                waiting.answer.set_result(BatchResult(detections, len(batch), wait_s, model_s))
