"""A process that saves checkpoints of a given size in a loop until a scenario kills it."""

from __future__ import annotations

import os
import random
import select
import shutil
import signal
import time
from pathlib import Path
from typing import Any


class SaveLoop:
    """Forks processes that save; they share this process's imports and so start quickly."""

    def __init__(self, folder: Path, num_bytes: int) -> None:
        self.folder = folder / "checkpoints"
        self.folder.mkdir(parents=True)
        self.num_bytes = num_bytes
        self.usual_s = 1.0  # duration of one save
        self._snapshot: Any = None

    def __enter__(self) -> SaveLoop:
        return self

    def __exit__(self, *_: object) -> None:
        shutil.rmtree(self.folder.parent, ignore_errors=True)

    def newest_step(self) -> int | None:
        from deta.platform.checkpoint.local import newest_checkpoint

        found = newest_checkpoint(self.folder, lambda message: None)
        return None if found is None else found.state.step

    def run_and_kill(self, chance: random.Random) -> int:
        """Kill during the save after an acknowledged one; return the last acknowledged step."""
        child, reader = self._fork()
        acknowledged = self._read(reader, 1, 120)
        deadline_s = time.monotonic() + chance.uniform(0, 1.2) * self.usual_s
        while (left_s := deadline_s - time.monotonic()) > 0:
            if select.select([reader], [], [], left_s)[0]:
                acknowledged = self._read(reader, 1, 1) or acknowledged
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        while True:  # acknowledgements sent before the kill and not yet read
            rest = self._read(reader, 1, 0)
            if not rest:
                break
            acknowledged = rest
        os.close(reader)
        return acknowledged

    def run_and_stop(self) -> int:
        """Save twice without a kill; return the last acknowledged step."""
        child, reader = self._fork(2)
        acknowledged = self._read(reader, 2, 120)
        os.waitpid(child, 0)
        os.close(reader)
        return acknowledged

    def _fork(self, number: int = 10**6) -> tuple[int, int]:
        if self._snapshot is None:
            self._snapshot = _snapshot(self.num_bytes)
            began_s = time.monotonic()
            _save(self.folder.parent / "first", self._snapshot, 1)
            self.usual_s = time.monotonic() - began_s
            shutil.rmtree(self.folder.parent / "first")
        first = (self.newest_step() or 0) + 1
        reader, writer = os.pipe()
        child = os.fork()
        if child == 0:
            try:
                os.close(reader)
                for step in range(first, first + number):
                    _save(self.folder, self._snapshot, step)
                    os.write(writer, step.to_bytes(8, "little"))
            finally:
                os._exit(0)
        os.close(writer)
        return child, reader

    @staticmethod
    def _read(reader: int, number: int, timeout_s: float) -> int:
        last = 0
        for _ in range(number):
            if not select.select([reader], [], [], timeout_s)[0]:
                break
            content = os.read(reader, 8)
            if len(content) < 8:
                break
            last = int.from_bytes(content, "little")
        return last


def _snapshot(num_bytes: int) -> Any:
    import torch

    from deta.platform.checkpoint.local import take_snapshot
    from deta.platform.data.coco_dataset import Category
    from deta.platform.run.run_state import RunState
    from tests.chaos.direct import tiny_config
    from tests.chaos.runs import TINY

    quarter = num_bytes // 16
    tensors = {name: torch.randn(quarter) for name in ("weight", "exp_avg", "exp_avg_sq", "own")}
    return take_snapshot(
        RunState(step=1, samples_seen=4, epoch=0.1, metrics={"AP": 1.0}),
        tiny_config(TINY),
        (Category(1, "disc"),),
        {"weight": tensors.pop("weight")},
        {f"optimizer/{name}": tensor for name, tensor in tensors.items()},
    )


def _save(folder: Path, snapshot: Any, step: int) -> None:
    """Write a checkpoint, then delete old ones, as training does."""
    from dataclasses import replace

    from deta.platform.checkpoint.local import keep_newest_and_best, write_checkpoint

    state = replace(snapshot.state, step=step, samples_seen=4 * step, metrics={"AP": 1.0 / step})
    write_checkpoint(folder, replace(snapshot, state=state))
    keep_newest_and_best(folder, keep=2)
