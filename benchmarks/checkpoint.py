"""What checkpoints cost a training: DETA R50 as published, with averaged weights.

  python benchmarks/checkpoint.py [--size 320 320] [--saves 4] [--folder DIR] [--every-minutes 5]

One process trains, and saves as a run does: a copy of the state in memory, for which the training
waits, and a thread that writes, hashes and forces it to disk. Steps are timed with no save in
flight and with one, in turns. The cost at an interval is what the steps waited, and what they took
longer beside a write, over that interval. torch.save in place, which the training waits for, stands
beside it.
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
from published_step import Step, drawn_run, one_batch

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
    parser.add_argument("--folder", type=Path, help="on the disk to measure; default: temporary")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.folder) as temporary:
        measure(Path(temporary), tuple(arguments.size), arguments.saves, arguments.every_minutes)


def measure(folder: Path, size: tuple[int, int], saves: int, every_minutes: float) -> None:
    run = drawn_run(folder)
    train_state = make_train_state(run, Worker(), None)
    step = Step(run.config, train_state, [one_batch(size)])
    writer = CheckpointWriter(run.checkpoints)
    print(f"{processor()}, {torch.get_num_threads()} threads, load {os.getloadavg()[0]:.1f}")
    step.seconds()  # moments are made, allocators warm up
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
            "beside it" + (" (first: its memory is taken now)" if save == 0 else ""),
            flush=True,
        )
        if save > 0:  # the last of `during` may have gone on after the write
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
    print("| | seconds | of the time, at one save in "
          f"{every_minutes:g} min |\n|---|---|---|")  # fmt: skip
    for what, seconds in (
        ("steps wait for the copy in memory", waited_s),
        (f"a step beside a write takes {ratio:.2f}× (n={len(beside)}): lost", slowed_s),
        ("torch.save in place, steps wait for all of it", in_place),
    ):
        print(f"| {what} | {seconds:.2f} | {100 * seconds / interval_s:.2f} % |")
    share = 100 * waited_s / interval_s
    word = "reached" if share <= GOAL_PERCENT else "NOT reached"
    print(f"\nwaiting {share:.2f} % of the time; goal ≤ {GOAL_PERCENT} %: {word}")


def snapshot_of(run: Run, train_state: TrainState, step: int, into: Snapshot | None) -> Snapshot:
    return take_snapshot(
        RunState(step=step, samples_seen=step, epoch=0.0), run.config, run.train_set.categories,
        train_state.eval_model.state_dict(), train_state.training_state(), into,
    )  # fmt: skip


def torch_save(path: Path, train_state: TrainState) -> float:
    """The same tensors, forced to disk as well."""
    state = {"model": train_state.eval_model.state_dict(), "training": train_state.training_state()}
    began_s = time.perf_counter()
    with path.open("wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())
    return time.perf_counter() - began_s


if __name__ == "__main__":
    main()
