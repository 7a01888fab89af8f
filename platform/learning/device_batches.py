"""Moves the batches of a step to the device, on a GPU beside the computation of the step before."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any

import torch
from torch import Tensor

from deta.platform.data.data_loader import LoadedBatch


@dataclass(frozen=True)
class StepBatches:
    """The micro-batches of one step on this worker, on its device."""

    micro_batches: list[LoadedBatch]
    num_boxes: int  # in all of them, counted on the host


class DeviceBatches(Iterator[StepBatches]):
    """Yields the batches of each step; `prefetch` begins to copy the next ones to a GPU."""

    def __init__(self, batches: Iterator[list[LoadedBatch]], device: torch.device) -> None:
        self._batches, self._device = batches, device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._next: StepBatches | None = None

    def __next__(self) -> StepBatches:
        step = self._next or self._load()
        self._next = None
        if step is None:
            raise StopIteration
        if self._stream is not None:
            computing = torch.cuda.current_stream(self._device)
            computing.wait_stream(self._stream)
            for loaded in step.micro_batches:
                for tensor in _tensors(loaded.batch):
                    tensor.record_stream(computing)  # else its memory could be reused too early
        return step

    def prefetch(self) -> None:
        """Wait for the next step's data, and begin to copy them. Call it after a step's launch.

        It does nothing on a CPU, where there is nothing to copy.
        """
        if self._stream is not None and self._next is None:
            self._next = self._load()

    def _load(self) -> StepBatches | None:
        loaded = next(self._batches, None)
        if loaded is None:
            return None
        num_boxes = sum(one.batch.num_boxes for one in loaded)
        if self._stream is not None:
            with torch.cuda.stream(self._stream):
                loaded = [
                    replace(one, batch=one.batch.to(self._device, non_blocking=True))
                    for one in loaded
                ]
        return StepBatches(loaded, num_boxes)


def _tensors(part: Any) -> Iterator[Tensor]:
    """Yield the tensors in a dataclass and in those inside it."""
    for field in fields(part):
        value = getattr(part, field.name)
        if isinstance(value, Tensor):
            yield value
        elif is_dataclass(value):
            yield from _tensors(value)
