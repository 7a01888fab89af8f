#!/usr/bin/env python
"""Compare a step of our training loop with one of a loop written by hand.

  python benchmarks/step_overhead.py [--workers 1] [--models demo r50] [--steps 20] [--rounds 3]

By hand means: the same model, losses and loader, DistributedDataParallel with several workers,
clipping, fused AdamW, and nothing else. Ours adds heartbeats, votes, the journal, checks for values
that are not finite and, by default, sums of gradients in float64. Both train the same data in the
same processes in turns, one thread or one GPU for each worker. A time is that from one step to the
next, with the wait for data, median over all rounds.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import statistics
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing
from measuring import processor, synchronize
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grad_norm_

from deta.jobs.deta_r50 import demo, official_12ep
from deta.model.architectures import make_criterion, make_detector, without_download
from deta.platform.data.coco_dataset import CocoDataset
from deta.platform.data.data_loader import choose_loader_workers, train_loader
from deta.platform.data.image_sizes import AugmentationConfig
from deta.platform.data.synthetic_shapes import ShapesDataset, write_shapes
from deta.platform.learning.distributed import Worker, control_group
from deta.platform.learning.numerics import AUTOCAST
from deta.platform.learning.optimizer import make_optimizer
from deta.platform.run.config import RunConfig
from deta.platform.run.run import Run
from deta.platform.training.loop import train

WARM_UP = 3  # steps of each round
# Of DETA R50, so that a step takes seconds on a CPU.
SMALL_IMAGES = AugmentationConfig(short_edges=(320,), max_long_edge=427, crop=False)


class Enough(Exception):
    """The loop has taken as many steps as are measured."""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--models", nargs="+", choices=("demo", "r50"), default=("demo", "r50"))
    parser.add_argument("--steps", type=int, default=20, help="of each loop in a round")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    is_gpu = torch.cuda.device_count() >= options.workers
    where = torch.cuda.get_device_name() if is_gpu else processor()
    print(f"{where}, workers: {options.workers}, PyTorch {torch.__version__}\n")
    print("| model | loop | median step, ms | ratio |\n|---|---|---|---|", flush=True)
    for model in options.models:
        with tempfile.TemporaryDirectory() as folder:
            write_shapes(Path(folder) / "shapes", num_train=200, num_val=2, size_px=160)
            multiprocessing.spawn(
                work, (model, options, is_gpu, Path(folder)), nprocs=options.workers
            )


def work(rank: int, model: str, options: argparse.Namespace, is_gpu: bool, folder: Path) -> None:
    """Measure in one worker; rank 0 prints."""
    device = torch.device("cuda", rank) if is_gpu else torch.device("cpu")
    torch.set_num_threads(1)
    if options.workers > 1:
        dist.init_process_group(
            "nccl" if is_gpu else "gloo", init_method=f"file://{folder / 'rendezvous'}",
            rank=rank, world_size=options.workers,
        )  # fmt: skip
    worker = Worker(rank, options.workers, device, control_group(options.workers, device))
    took_s: dict[str, list[float]] = {"by hand": [], "ours": [], "ours, exact_sum=false": []}
    for number in range(options.rounds):
        for name, times_s in took_s.items():
            run = make_run(model, folder, f"{rank}-{number}-{name}", options.workers)
            if name == "by hand":
                steps = by_hand(run, worker)
                times_s += [next(steps) for _ in range(options.steps + WARM_UP)][WARM_UP:]
            else:
                exact = replace(run.config.optim, exact_sum=name == "ours")
                run = replace(run, config=replace(run.config, optim=exact))
                times_s += ours(run, worker, options.steps + WARM_UP)[WARM_UP:]
    if rank == 0:
        report(model, took_s)


def make_run(model: str, folder: Path, name: str, num_workers: int) -> Run:
    config: RunConfig = demo()
    if model == "r50":
        published = official_12ep()
        data = replace(demo().data, augmentation=SMALL_IMAGES)
        config = replace(published, data=data, model=without_download(published.model))
    shapes = ShapesDataset(folder / "shapes")
    train_set = CocoDataset.open(shapes.train_images, shapes.train_annotations)
    val_set = CocoDataset.open(shapes.val_images, shapes.val_annotations)
    model_config = replace(config.model, num_classes=len(train_set.categories))
    config = replace(
        config, model=model_config, precision="fp32", total_batch_size=2 * num_workers,
        micro_batch_size=2, cluster=replace(config.cluster, num_workers=num_workers),
    )  # fmt: skip
    (folder / name).mkdir()
    return Run(config, folder / name, train_set, val_set)


def ours(run: Run, worker: Worker, num_steps: int) -> list[float]:
    """Return the seconds of each step of `train`."""
    ended_s: list[float] = []

    def on_step(_: object) -> None:
        synchronize(worker.device)
        ended_s.append(time.perf_counter())
        if len(ended_s) > num_steps:
            raise Enough

    with contextlib.suppress(Enough):
        train(run, worker, on_step=on_step)
    return [after - before for before, after in itertools.pairwise(ended_s)]


def by_hand(run: Run, worker: Worker) -> Iterator[float]:
    """Yield the seconds of each step of a plain loop."""
    config, device = run.config, worker.device
    torch.manual_seed(config.seed)
    model = parallel = make_detector(config.model).to(device)
    optimizer = make_optimizer(model, config.optim)
    criterion = make_criterion(config.criterion, config.model)
    if worker.world_size > 1:
        parallel = DistributedDataParallel(model)  # type: ignore[assignment]
    loader = train_loader(
        run.train_set, config.data.augmentation, seed=config.seed,
        total_batch_size=config.total_batch_size, micro_batch_size=config.micro_batch_size,
        rank=worker.rank, world_size=worker.world_size, start_step=0, end_step=run.num_steps,
        num_loader_workers=choose_loader_workers(
            config.data.loader_workers, on_gpu=device.type == "cuda"
        ), pin_memory=device.type == "cuda",
    )  # fmt: skip
    autocast = AUTOCAST[config.precision]
    began_s = time.perf_counter()
    for (loaded,) in loader:
        num_boxes = torch.tensor(float(loaded.batch.num_boxes), device=device)
        if worker.world_size > 1:  # as the published codes do
            dist.all_reduce(num_boxes)
        batch = loaded.batch.to(device, non_blocking=True)
        optimizer.zero_grad()
        with torch.autocast(device.type, autocast, enabled=autocast != torch.float32):
            outputs = parallel(batch.images, batch.padding)
        losses = criterion(outputs, batch, num_boxes.clamp(min=1) / worker.world_size)
        criterion.total(losses).backward()
        if config.optim.max_grad_norm is not None:
            clip_grad_norm_(model.parameters(), config.optim.max_grad_norm)
        optimizer.step()
        synchronize(device)
        ended_s = time.perf_counter()
        yield ended_s - began_s
        began_s = ended_s


def report(model: str, took_s: Mapping[str, list[float]]) -> None:
    base_s = statistics.median(took_s["by hand"])
    for name, times_s in took_s.items():
        median_s = statistics.median(times_s)
        print(f"| {model} | {name} | {1000 * median_s:.1f} | {median_s / base_s:.3f} |", flush=True)


if __name__ == "__main__":
    main()
