"""Measure the cost of checkpoints for a training of DETA R50 as published, with EMA weights.

  python benchmarks/checkpoint.py [--size 320 320] [--saves 4] [--folder DIR] [--every-minutes 5]

One process trains and saves as a run does: training waits for a snapshot of the state in memory,
and a thread writes it to disk, with hashes and fsync. Steps are timed in turns without and with a
save in progress. The cost is the time that steps wait, plus the time by which a write slows them,
divided by the interval between two saves. For comparison, training also waits for a torch.save.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from pathlib import Path

import torch
from measuring import processor
from published_step import Step, one_batch, synthetic_run

from deta.platform.checkpoint.async_writer import CheckpointWriter
from deta.platform.checkpoint.local import Snapshot, take_snapshot
from deta.platform.learning.distributed import Worker
from deta.platform.run.run import Run
from deta.platform.run.run_state import RunState
from deta.platform.training.train_state import TrainState, make_train_state

QUIET_STEPS = 4  # between two saves
GOAL_PERCENT = 0.5


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", type=int, nargs=2, default=(320, 320), metavar=("H", "W"))
    parser.add_argument("--saves", type=int, default=4)
    parser.add_argument("--every-minutes", type=float, default=5.0)
    parser.add_argument(
        "--folder", type=Path, help="a folder on the disk to measure; default: temporary"
    )
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.folder) as temporary:
        measure(Path(temporary), tuple(arguments.size), arguments.saves, arguments.every_minutes)


def measure(folder: Path, size: tuple[int, int], saves: int, every_minutes: float) -> None:
    run = synthetic_run(folder)
    train_state = make_train_state(run, Worker(), None)
    step = Step(run.config, train_state, [one_batch(size)])
    writer = CheckpointWriter(run.checkpoints)
    print(f"{processor()}, {torch.get_num_threads()} threads, load {os.getloadavg()[0]:.1f}")
    step.seconds()  # creates the optimizer's state and warms up allocators
    quiet, beside, blocked, written, num_bytes = [], [], [], [], 0
    for save in range(saves + 1):
        quiet += [step.seconds() for _ in range(QUIET_STEPS)]
        began_s = time.perf_counter()
        writer.save(lambda into: snapshot_of(run, train_state, step.count, into))
        waited_s = time.perf_counter() - began_s
        during = []
        while writer.is_busy:
            during.append(step.seconds())
        (outcome,) = writer.poll()
        assert outcome.path is not None, outcome.error
        num_bytes = sum(file.stat().st_size for file in outcome.path.iterdir())
        print(
            f"save {save}: {num_bytes / 1e6:.0f} MB, steps waited {waited_s:.2f} s, on disk after "
            f"{outcome.seconds:.1f} s, {len(during)} steps of {statistics.median(during):.2f} s "
            "during the write" + (" (the first allocates its memory)" if save == 0 else ""),
            flush=True,
        )
        if save > 0:  # the last of `during` may have ended after the write
            blocked.append(waited_s)
            written.append(outcome.seconds)
            beside += during[:-1] or during
    in_place = [torch_save(folder / "torch.pt", train_state) for _ in range(2)][-1]

    step_s, beside_s = statistics.median(quiet), statistics.median(beside)
    ratio = beside_s / step_s
    waited_s, write_s = statistics.median(blocked), statistics.median(written)
    interval_s = 60 * every_minutes
    slowed_s = write_s * (1 - 1 / ratio) if ratio > 1 else 0.0
    print(f"\nload {os.getloadavg()[0]:.1f}; medians of {saves} saves of {num_bytes / 1e6:.0f} MB")
    print("| | seconds | share of the time, with a save every "
          f"{every_minutes:g} min |\n|---|---|---|")  # fmt: skip
    for what, seconds in (
        ("steps wait for the snapshot in memory", waited_s),
        (f"a step during a write takes {ratio:.2f}× (n={len(beside)}): lost", slowed_s),
        ("torch.save, steps wait for all of it", in_place),
    ):
        print(f"| {what} | {seconds:.2f} | {100 * seconds / interval_s:.2f} % |")
    share = 100 * waited_s / interval_s
    verdict = "reached" if share <= GOAL_PERCENT else "NOT reached"
    print(f"\nwaiting {share:.2f} % of the time; goal ≤ {GOAL_PERCENT} %: {verdict}")


def snapshot_of(run: Run, train_state: TrainState, step: int, into: Snapshot | None) -> Snapshot:
    return take_snapshot(
        RunState(step=step, samples_seen=step, epoch=0.0), run.config, run.train_set.categories,
        train_state.eval_model.state_dict(), train_state.training_state(), into,
    )  # fmt: skip


def torch_save(path: Path, train_state: TrainState) -> float:
    """Save the same tensors with torch.save and fsync; return the seconds."""
    state = {"model": train_state.eval_model.state_dict(), "training": train_state.training_state()}
    began_s = time.perf_counter()
    with path.open("wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())
    return time.perf_counter() - began_s


if __name__ == "__main__":
    main()
