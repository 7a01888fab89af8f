"""Measure what an image costs a loader worker, stage by stage, in milliseconds of a core.

  python benchmarks/loader.py --images train2017 --annotations instances_train2017.json
  python benchmarks/loader.py --images … --annotations … --workers 1 2 4    whole loader, too

The sizes are DETA's for COCO. "float32" is what a loader would cost that normalises and sends four
bytes for each colour, as PyTorch's examples do; both ways take turns image by image in one run.
Times are of the processor, not of the clock, so other processes disturb them little; each is the
median over the repeats of the mean over the images. Files are in the system's page cache.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch
from measuring import processor
from torchvision.transforms.v2 import functional

from deta.model.batch import PIXEL_MEAN, PIXEL_STD, Batch, pad_batch
from deta.platform.data.coco_dataset import CocoDataset
from deta.platform.data.data_loader import batch_tensors, train_loader
from deta.platform.data.image_decoding import decode_bytes, read_file, read_header
from deta.platform.data.image_sizes import AugmentationConfig
from deta.platform.data.sample_order import Draws, sample_seed
from deta.platform.data.transforms import augment, to_model_input

T = TypeVar("T")
BATCH_SIZE = 2
STAGES = ("read", "decode", "augment", "to tensor", "collate", "share")  # in a loader worker


class Clock:
    """Adds the processor time of each stage of each way."""

    def __init__(self) -> None:
        self.spent_s: dict[tuple[str, str], float] = defaultdict(float)

    def time(self, way: str, stage: str, call: Callable[[], T]) -> T:
        began_s = time.process_time()
        result = call()
        self.spent_s[way, stage] += time.process_time() - began_s
        return result


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images", type=Path, required=True)
    parser.add_argument("--annotations", type=Path, required=True)
    parser.add_argument("--first", type=int, default=100, help="number of images to measure")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--workers", type=int, nargs="*", default=[], help="measure whole loaders")
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # as in a loader worker
    dataset = CocoDataset.open(arguments.images, arguments.annotations)
    num_images = min(arguments.first, len(dataset)) // BATCH_SIZE * BATCH_SIZE
    print(f"{processor()}; {num_images} images, {arguments.repeats} repeats")

    measure_epoch(dataset, range(BATCH_SIZE), epoch=0)  # warm
    epochs = [
        measure_epoch(dataset, range(num_images), epoch) for epoch in range(arguments.repeats)
    ]

    def milliseconds(way: str, *stages: str) -> float:
        return statistics.median(
            1e3 * sum(epoch[way, stage] for stage in stages) / num_images for epoch in epochs
        )

    print("\n| ms an image | 8 bits | float32 |\n|---|---|---|")
    for stage in ("header", *STAGES, "to device"):
        print(f"| {stage} | {milliseconds('8 bits', stage):.2f} | ", end="")
        print(f"{milliseconds('float32', stage):.2f} |")
    both = [milliseconds(way, *STAGES) for way in ("8 bits", "float32")]
    print(f"| a loader worker, in all | {both[0]:.2f} | {both[1]:.2f} |")
    print(f"| images/s a core | {1e3 / both[0]:.0f} | {1e3 / both[1]:.0f} |")
    for num_workers in arguments.workers:
        rates = [loader_rate(dataset, num_images, num_workers) for _ in range(arguments.repeats)]
        print(f"{num_workers} loader workers: {statistics.median(rates):.0f} images/s")


def measure_epoch(dataset: CocoDataset, indices: range, epoch: int) -> dict[tuple[str, str], float]:
    """Return the seconds of each stage, over all these images.

    "header" is part of opening a data set; "to device" is what the training process does itself.
    """
    clock, config = Clock(), AugmentationConfig()
    ready: dict[str, list] = {"8 bits": [], "float32": []}
    for index in indices:
        record = dataset.records[index]
        for way, waiting in ready.items():
            clock.time(way, "header", lambda: read_header(record.path))  # noqa: B023
            content = clock.time(way, "read", lambda: read_file(record.path))  # noqa: B023
            clock.time(way, "decode", lambda: decode_bytes(content, record.path))  # noqa: B023
            sample = dataset[index]
            draws = Draws(sample_seed(0, epoch, index))
            sample = clock.time(
                way,
                "augment",
                lambda: augment(sample, config, draws),  # noqa: B023
            )
            make = to_model_input if way == "8 bits" else as_float
            waiting.append(clock.time(way, "to tensor", lambda: make(sample)))  # noqa: B023
            if len(waiting) == BATCH_SIZE:
                images, targets = zip(*waiting, strict=True)
                batch = clock.time(way, "collate", lambda: pad_batch(images, targets))  # noqa: B023
                clock.time(way, "share", lambda: share(batch))  # noqa: B023
                clock.time(way, "to device", lambda: batch.to("cpu"))  # noqa: B023
                waiting.clear()
    return clock.spent_s


def as_float(sample):  # type: ignore[no-untyped-def]
    pixels, target = to_model_input(sample)
    return functional.normalize(pixels.float() / 255, PIXEL_MEAN, PIXEL_STD), target


def share(batch: Batch) -> None:
    for tensor in batch_tensors(batch):
        if tensor is not batch.padding:
            tensor.share_memory_()


def loader_rate(dataset: CocoDataset, num_images: int, num_workers: int) -> float:
    """Return the images per second of a training loader, by the clock."""
    steps = train_loader(
        dataset, AugmentationConfig(), seed=0, total_batch_size=BATCH_SIZE,
        micro_batch_size=BATCH_SIZE, end_step=num_images // BATCH_SIZE,
        num_loader_workers=num_workers,
    )  # fmt: skip
    began_s = time.perf_counter()
    for step in steps:
        for loaded in step:
            loaded.batch.to("cpu")
    return num_images / (time.perf_counter() - began_s)


if __name__ == "__main__":
    main()
