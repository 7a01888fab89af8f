"""Measure the cost per step of summing gradients in float64 (`optim.exact_sum`).

  python benchmarks/exact_sum.py [--workers 2] [--micro-batches 2] [--size 320 320] [--steps 8]

The same processes take steps of DETA R50 as published in turns: with sums in float64, and as
PyTorch does it (float32, exchanged by DistributedDataParallel during the backward pass). Workers
are processes on this machine, with one thread each or one GPU each. The exchange, twice as large in
float64, takes longer between machines: its size is printed.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing
from measuring import processor
from published_step import Step, one_batch, synthetic_run

from deta.platform.learning.distributed import Worker
from deta.platform.learning.optimizer import trainable
from deta.platform.training.train_state import make_train_state

WARM_UP = 2  # steps of each kind


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    num_gpus = torch.cuda.device_count()
    parser.add_argument("--workers", type=int, default=num_gpus or 2)
    parser.add_argument(
        "--micro-batches", type=int, default=2, help="per worker, of one image each"
    )
    parser.add_argument("--size", type=int, nargs=2, default=(320, 320), metavar=("H", "W"))
    parser.add_argument("--steps", type=int, default=8, help="of each kind")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        multiprocessing.spawn(
            work,
            (arguments.workers, arguments.micro_batches, tuple(arguments.size), arguments.steps,
             Path(folder)),
            nprocs=arguments.workers,
        )  # fmt: skip


def work(
    rank: int,
    num_workers: int,
    num_micro_batches: int,
    size: tuple[int, int],
    num_steps: int,
    folder: Path,
) -> None:
    """Run one worker; rank 0 prints."""
    is_gpu = torch.cuda.device_count() >= num_workers
    device = torch.device("cuda", rank) if is_gpu else torch.device("cpu")
    torch.set_num_threads(1)
    dist.init_process_group(
        "nccl" if is_gpu else "gloo", init_method=f"file://{folder / 'rendezvous'}",
        rank=rank, world_size=num_workers,
    )  # fmt: skip
    steps = {}
    for exact in (False, True):
        run = synthetic_run(folder / f"{rank}-{exact}", ema_decay=None, exact_sum=exact)
        train_state = make_train_state(run, Worker(rank, num_workers, device), None)
        batches = [one_batch(size)] * num_micro_batches
        steps[exact] = Step(run.config, train_state, batches, num_workers)
    num_weights = sum(p.numel() for p in trainable(steps[True].train_state.model.parameters()))
    took_s: dict[bool, list[float]] = {False: [], True: []}
    for count in range(WARM_UP + num_steps):
        for exact, step in steps.items():
            dist.barrier()
            seconds = step.seconds()
            if count >= WARM_UP:
                took_s[exact].append(seconds)
    if rank == 0:
        report(took_s, num_weights, num_workers, num_micro_batches, is_gpu)
    dist.destroy_process_group()


def report(
    took_s: dict[bool, list[float]],
    num_weights: int,
    num_workers: int,
    num_micro_batches: int,
    is_gpu: bool,
) -> None:
    where = torch.cuda.get_device_name() if is_gpu else processor()
    print(
        f"{where}, {num_workers} workers, {num_micro_batches} micro-batches of one image each, "
        f"{num_weights / 1e6:.1f} million trainable weights, load {os.getloadavg()[0]:.1f}"
    )
    plain_s, exact_s = (statistics.median(took_s[exact]) for exact in (False, True))
    differences = [b - a for a, b in zip(took_s[False], took_s[True], strict=True)]
    print("| gradients summed | median step, s | ratio | exchanged per worker, MB |")
    print("|---|---|---|---|")
    print(f"| as PyTorch does, float32 | {plain_s:.3f} | 1.00 | {4 * num_weights / 1e6:.0f} |")
    print(f"| in float64 | {exact_s:.3f} | {exact_s / plain_s:.2f} | {8 * num_weights / 1e6:.0f} |")
    print(
        f"\na step takes {statistics.median(differences):.3f} s longer (median of "
        f"{len(differences)} pairs, {min(differences):.3f} to {max(differences):.3f})"
    )


if __name__ == "__main__":
    main()
