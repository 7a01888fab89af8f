"""Compare the images per second from loose files and from Parquet shards.

  python benchmarks/shards.py                                      synthetic images, 640 px
  python benchmarks/shards.py --images val2017 --annotations instances_val2017.json
  python benchmarks/shards.py --shards s3://bucket/coco-val --images … --annotations …

"read" reads only the bytes, "decode" also decodes them, and "2 workers" is the training loader with
its augmentation. "row groups" reads the same images as Parquet readers do: the complete row group
of each image, with a cache of the last few. Files are in the system's page cache, unless --cold
asks the kernel to drop them before each measurement (Linux).
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable
from functools import lru_cache
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from measuring import processor

from deta.platform.data.coco_dataset import CocoDataset
from deta.platform.data.data_loader import train_loader
from deta.platform.data.image_sizes import AugmentationConfig
from deta.platform.data.synthetic_shapes import write_shapes
from deta.platform.shards.object_store import ObjectStore, is_address
from deta.platform.shards.open_dataset import open_dataset
from deta.platform.shards.packer import MEGABYTE, pack_dataset
from deta.platform.shards.sharded_dataset import ShardedDataset

CACHED_ROW_GROUPS = 8


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images", type=Path)
    parser.add_argument("--annotations", type=Path)
    parser.add_argument("--shards", help="folder or address; default: a temporary folder")
    parser.add_argument("--shard-mb", type=int, default=256)
    parser.add_argument("--first", type=int, default=300, help="number of images to measure")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument(
        "--cold", action="store_true", help="drop cached files before each measurement"
    )
    arguments = parser.parse_args()
    torch.set_num_threads(1)

    with tempfile.TemporaryDirectory() as temporary:
        if arguments.images is None:
            shapes = write_shapes(
                Path(temporary) / "shapes", num_train=arguments.first, num_val=1, size_px=640
            )
            arguments.images, arguments.annotations = (
                shapes.train_images,
                shapes.train_annotations,
            )
        loose = CocoDataset.open(arguments.images, arguments.annotations)
        location = arguments.shards or Path(temporary) / "shards"
        began = time.perf_counter()
        packed = pack_dataset(
            loose, ObjectStore(location), shard_bytes=arguments.shard_mb * MEGABYTE
        )
        seconds = time.perf_counter() - began
        sharded = open_dataset(location)
        assert isinstance(sharded, ShardedDataset)
        bytes_loose = int(loose.num_bytes.sum())
        files = [*packed.manifest.shards, packed.manifest.annotations]
        bytes_packed = sum(file.num_bytes for file in files if file is not None)
        print(f"{processor()}, {os.cpu_count()} cores, {'cold' if arguments.cold else 'cached'}")
        print(
            f"{len(loose)} images of {bytes_loose / len(loose) / 1000:.0f} kB; packed in "
            f"{seconds:.1f} s ({bytes_loose / seconds / MEGABYTE:.0f} MB/s), "
            f"{len(packed.manifest.shards)} shards, {bytes_packed / bytes_loose:.4f} × the size\n"
        )
        count = min(arguments.first, len(loose))
        measure(loose.first(count), sharded.first(count), arguments.repeats, arguments.cold)


def measure(loose: CocoDataset, sharded: CocoDataset, repeats: int, cold: bool) -> None:
    in_order = list(range(len(loose)))
    at_random = np.random.default_rng(0).permutation(len(loose)).tolist()
    print("| order | what | loose, images/s | shards | ratio | row groups | ratio |")
    print("|---|---|---|---|---|---|---|")
    for order, name in ((in_order, "sequential"), (at_random, "random")):
        for what in ("read", "decode"):
            calls = {
                "loose": reading(loose, order, what),
                "shards": reading(sharded, order, what),
            }
            if what == "read":
                calls["row groups"] = reading_row_groups(sharded, order)
            row(name, what, calls, len(order), repeats, [loose, sharded], cold)
    for workers in (0, 2):
        calls = {
            "loose": training(loose, workers),
            "shards": training(sharded, workers),
        }
        row(
            "random",
            f"train, {workers} workers",
            calls,
            len(loose),
            repeats,
            [loose, sharded],
            cold,
        )


def row(
    order: str,
    what: str,
    calls: dict[str, Callable[[], None]],
    count: int,
    repeats: int,
    datasets: Iterable[CocoDataset],
    cold: bool,
) -> None:
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(repeats):  # in turns, so that other load on the machine affects all
        for name, call in calls.items():
            if cold:
                for dataset in datasets:
                    forget(dataset)
            began = time.perf_counter()
            call()
            seconds[name].append(time.perf_counter() - began)
    rates = {name: count / statistics.median(each) for name, each in seconds.items()}
    cells = [f"{rates['loose']:,.0f}"]
    for name in ("shards", "row groups"):
        cells += (
            [f"{rates[name]:,.0f}", f"{rates[name] / rates['loose']:.2f}×"]
            if name in rates
            else ["", ""]
        )
    print(f"| {order} | {what} | {' | '.join(cells)} |", flush=True)


def reading(dataset: CocoDataset, order: list[int], what: str) -> Callable[[], None]:
    def read() -> None:
        for index in order:
            if what == "read":
                dataset.content(index)
            else:
                dataset[index]

    return read


def training(dataset: CocoDataset, workers: int) -> Callable[[], None]:
    def train() -> None:
        steps = train_loader(
            dataset,
            AugmentationConfig(),
            seed=0,
            total_batch_size=4,
            micro_batch_size=2,
            end_step=len(dataset) // 4,
            num_loader_workers=workers,
        )
        for _ in steps:
            pass

    return train


def reading_row_groups(dataset: CocoDataset, order: list[int]) -> Callable[[], None]:
    """Read the same bytes as a Parquet reader without offsets must."""
    assert isinstance(dataset, ShardedDataset)
    if is_address(dataset.store.shown):
        return lambda: None
    files = [
        pq.ParquetFile(f"{dataset.store.shown}/{shard.name}", memory_map=True)
        for shard in dataset.shards
    ]
    places = [
        (shard, group, place)
        for shard, file in enumerate(files)
        for group in range(file.num_row_groups)
        for place in range(file.metadata.row_group(group).num_rows)
    ]

    def read() -> None:
        @lru_cache(CACHED_ROW_GROUPS)
        def images_of(shard: int, group: int) -> pa.ChunkedArray:
            return files[shard].read_row_group(group, columns=["image"])["image"]

        for index in order:
            shard, group, place = places[index]
            images_of(shard, group)[place].as_py()

    return read


def forget(dataset: CocoDataset) -> None:
    """Ask the kernel to drop the files of a data set from its cache."""
    if isinstance(dataset, ShardedDataset):
        paths = [Path(dataset.store.shown) / shard.name for shard in dataset.shards]
    else:
        paths = [record.path for record in dataset.records]
    for path in paths:
        if path.exists():
            with open(path, "rb") as file:
                os.fsync(file.fileno())
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


if __name__ == "__main__":
    main()
