"""The batches of a step reach the device in order, and none is lost."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from deta.model.batch import Target, pad_batch
from deta.platform.data.data_loader import LoadedBatch
from deta.platform.learning.device_batches import DeviceBatches


def loaded(first_id: int, num_boxes: int) -> LoadedBatch:
    target = Target(torch.rand(num_boxes, 4), torch.zeros(num_boxes, dtype=torch.int64))
    batch = pad_batch([torch.zeros(3, 8, 8)] * 2, [target] * 2)
    return LoadedBatch(batch, [first_id, first_id + 1], [(8, 8)] * 2)


def test_steps_come_in_order_with_the_count_of_their_boxes():
    steps = [[loaded(0, 3), loaded(2, 1)], [loaded(4, 0)], [loaded(6, 2)]]
    batches = DeviceBatches(iter(steps), torch.device("cpu"))
    found = []
    for step in batches:
        batches.prefetch()
        ids = [one for micro_batch in step.micro_batches for one in micro_batch.image_ids]
        found.append((ids, step.num_boxes))
    assert found == [([0, 1, 2, 3], 8), ([4, 5], 0), ([6, 7], 4)]


def test_on_a_cpu_nothing_is_loaded_in_advance():
    taken = []

    def steps() -> Iterator[list[LoadedBatch]]:
        for number in range(2):
            taken.append(number)
            yield [loaded(number, 1)]

    batches = DeviceBatches(steps(), torch.device("cpu"))
    next(batches)
    batches.prefetch()
    assert taken == [0]
