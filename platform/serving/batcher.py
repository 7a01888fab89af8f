"""Requests to batches: pictures that wait at the same time and have one shape go together.

While the model is busy requests gather, so batches grow with the load and not with the clock; only
the first picture after a pause waits, a few milliseconds. A picture stays with the model that it
was prepared for, so a change of models needs no pause: what waits is answered by the old one, which
is forgotten with its last picture.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from deta.model.postprocess import Detections
from deta.platform.serving.metrics import Measurements
from deta.platform.serving.model import PreparedPicture, ServedModel

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Answer:
    detections: Detections
    batch_size: int
    wait_s: float  # before the model looked at it
    model_s: float  # that the model took for the batch


@dataclass(frozen=True, eq=False)
class _Waiting:
    model: ServedModel
    picture: PreparedPicture
    since_s: float
    answer: asyncio.Future[Answer]

    def fits(self, other: _Waiting) -> bool:
        return self.model is other.model and self.picture.shape == other.picture.shape


class Batcher:
    """One model thread and the queue before it. All methods are for the event loop's thread."""

    def __init__(self, max_batch: int, batch_wait_s: float, measurements: Measurements) -> None:
        self.max_batch, self.batch_wait_s = max_batch, batch_wait_s
        self.measurements = measurements
        self.batch_began_s: float | None = None  # of the batch that the model looks at now
        self.mean_batch_s = 0.1  # about; for how long one who is sent away should wait
        self._queue: deque[_Waiting] = deque()
        self._arrived = asyncio.Event()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="model")
        self._task: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Batcher:
        self._task = asyncio.create_task(self._work(), name="batches")
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
        """How long the model has been at its present batch."""
        return 0.0 if self.batch_began_s is None else time.monotonic() - self.batch_began_s

    @property
    def is_working(self) -> bool:
        """Whether anybody takes pictures from the queue."""
        return self._task is not None and not self._task.done()

    async def detect(self, model: ServedModel, picture: PreparedPicture) -> Answer:
        """What is in the picture. One who gives up waiting leaves the queue.

        Raises:
            Exception: what the model raised for this picture alone.
        """
        answer = asyncio.get_running_loop().create_future()
        self._queue.append(_Waiting(model, picture, time.monotonic(), answer))
        self._arrived.set()
        return await answer

    async def _work(self) -> None:
        while True:
            batch = await self._next_batch()
            self.batch_began_s = time.monotonic()
            try:
                await self._answer(batch)
            finally:
                self.batch_began_s = None

    async def _next_batch(self) -> list[_Waiting]:
        """Those that fit the one who has waited longest; waits for at least one."""
        while True:
            self._arrived.clear()
            batch = self._fitting()
            if len(batch) == self.max_batch:
                break
            if batch:
                left_s = batch[0].since_s + self.batch_wait_s - time.monotonic()
                if left_s <= 0:
                    break
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self._arrived.wait(), left_s)
            else:
                await self._arrived.wait()
        taken = set(batch)
        self._queue = deque(waiting for waiting in self._queue if waiting not in taken)
        return batch

    def _fitting(self) -> list[_Waiting]:
        while self._queue and self._queue[0].answer.done():
            self._queue.popleft()
        if not self._queue:
            return []
        first = self._queue[0]
        fitting = (w for w in self._queue if w.fits(first) and not w.answer.done())
        return [waiting for _, waiting in zip(range(self.max_batch), fitting, strict=False)]

    async def _answer(self, batch: list[_Waiting]) -> None:
        """Give each of a batch its answer, or the error of its own picture."""
        began_s = time.monotonic()
        loop = asyncio.get_running_loop()
        pictures = [waiting.picture for waiting in batch]
        try:
            found = await loop.run_in_executor(self._thread, batch[0].model.detect, pictures)
        except Exception as error:
            if len(batch) == 1:
                log.exception("the model failed on a picture of %s", pictures[0].shape)
                if not batch[0].answer.done():
                    batch[0].answer.set_exception(error)
                return
            log.warning("a batch of %d failed (%s); one by one now", len(batch), error)
            for waiting in batch:  # no picture suffers for its neighbours
                await self._answer([waiting])
            return
        model_s = time.monotonic() - began_s
        self.mean_batch_s += 0.2 * (model_s - self.mean_batch_s)
        self.measurements.batch(len(batch), model_s)
        for waiting, detections in zip(batch, found, strict=True):
            if not waiting.answer.done():
                wait_s = began_s - waiting.since_s
                waiting.answer.set_result(Answer(detections, len(batch), wait_s, model_s))
