"""The product's training loop in separate processes, without a cluster or supervisor.

`python -m tests.chaos.direct SPEC RANK` is one such process; `Direct` writes the file `SPEC`.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from deta.platform.data.synthetic_shapes import ShapesDataset
from tests.chaos.mlflow_server import free_port
from tests.chaos.oracles import losses, weights_sha256
from tests.chaos.processes import MARK
from tests.chaos.runs import (
    ROOT,
    TINY,
    Place,
    ScenarioError,
    clean_environment,
    expect,
    inside_environment,
    read_journal,
)

PERSISTENT = {"cluster.hang_timeout_s": "600"}  # only a busy machine can cause a hang here


class Direct:
    """A run's folder in which `train` can run several times."""

    def __init__(
        self,
        place: Place,
        name: str,
        *,
        data: ShapesDataset | None = None,
        faults: Sequence[dict[str, Any]] = (),
        record: bool = True,
        break_images: int = 0,
        as_launched: bool = False,
        prefix: Sequence[str] = (),
        **overrides: object,
    ) -> None:
        """
        Args:
            break_images: number of images at the end of the data set to break, each time after
                it was opened; the data must be `place.own_data`.
            as_launched: resume only what the supervisor would resume.
            prefix: put before the command of each rank.
        """
        self.as_launched, self.prefix = as_launched, list(prefix)
        self.break_images = break_images
        self.place, self.name = place, name
        self.folder = place.storage("direct") / name
        self.folder.mkdir(parents=True, exist_ok=True)
        self.data = data or place.drawn()
        self.overrides = (
            TINY | PERSISTENT | {k.replace("__", "."): str(v) for k, v in overrides.items()}
        )
        self.records = place.folder / "records" / name
        self.records.mkdir(parents=True, exist_ok=True)
        self.num_images = len(json.loads(self.data.train_annotations.read_text())["images"])
        self.environment = clean_environment() | {MARK: name}
        self.environment |= inside_environment(
            faults, self.records if record else None, self.num_images
        )
        self.log = place.folder / f"{name}.log"

    def start(self, world_size: int = 1, **overrides: object) -> list[subprocess.Popen[bytes]]:
        """Start and return the processes of all ranks."""
        changed = {k.replace("__", "."): str(v) for k, v in overrides.items()}
        spec = self.folder / "direct.json"
        spec.write_text(
            json.dumps(
                {
                    "overrides": self.overrides
                    | {"cluster.num_workers": str(world_size)}
                    | changed,
                    "data": str(self.data.folder),
                    "folder": str(self.folder),
                    "world_size": world_size,
                    "port": free_port(),
                    "break_images": self.break_images,
                    "as_launched": self.as_launched,
                    "pristine": str(self.place.drawn(self.num_images).folder),
                }
            )
        )
        with self.log.open("ab") as log:
            return [
                subprocess.Popen(
                    [*self.prefix, sys.executable, "-m", "tests.chaos.direct"]
                    + [str(spec), str(rank)],
                    cwd=ROOT,
                    env=self.environment,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                )
                for rank in range(world_size)
            ]

    def run(self, world_size: int = 1, timeout_s: float = 300, **overrides: object) -> list[int]:
        """Run all ranks to their end and return their exit codes."""
        timeout_s *= self.place.patience
        processes = self.start(world_size, **overrides)
        deadline_s = time.monotonic() + timeout_s
        try:
            return [p.wait(max(1.0, deadline_s - time.monotonic())) for p in processes]
        except subprocess.TimeoutExpired:
            raise ScenarioError(f"{self.name}: did not end within {timeout_s:.0f} s") from None
        finally:
            kill(processes)

    def finish(self, world_size: int = 1, timeout_s: float = 300, **overrides: object) -> None:
        codes = self.run(world_size, timeout_s, **overrides)
        expect(set(codes) == {0}, f"{self.name}: exit codes {codes}: {self.tail()}")

    def losses(self, *, same_again: bool = True) -> dict[int, str]:
        return losses(read_journal(self.folder), same_again=same_again)

    def weights(self) -> str:
        return weights_sha256(self.folder)

    def step(self) -> int:
        events = read_journal(self.folder)
        return max((e["step"] for e in events if e["kind"] == "progress"), default=0)

    def wait_for_step(
        self, step: int, processes: list[subprocess.Popen[bytes]], timeout_s: float = 120
    ) -> None:
        deadline_s = time.monotonic() + timeout_s * self.place.patience
        while self.step() < step:
            expect(time.monotonic() < deadline_s, f"{self.name}: did not reach step {step}")
            dead = [p.returncode for p in processes if p.poll() is not None]
            expect(
                not dead or self.step() >= step, f"{self.name}: ended with {dead}: {self.tail()}"
            )
            time.sleep(0.02)

    def tail(self, characters: int = 800) -> str:
        text = self.log.read_text(errors="replace") if self.log.exists() else ""
        return "… " + " | ".join(text[-characters:].splitlines())


def kill(processes: list[subprocess.Popen[bytes]]) -> None:
    for process in processes:
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
    for process in processes:
        process.wait()


def tiny_config(overrides: dict[str, str]) -> Any:
    from deta.jobs.deta_r50 import demo
    from deta.platform.run.config import override

    return override(demo(), overrides)


def undisturbed(place: Place, epochs: int = 4, world_size: int = 2) -> Direct:
    """Return a run without faults, made once. All other runs must equal it."""
    key = f"undisturbed-{epochs}-{world_size}"
    if key not in place.shared:
        run = Direct(place, key, schedule__epochs=epochs, evaluate_every_epochs=epochs)
        run.finish(world_size)
        place.shared[key] = run
    found: Direct = place.shared[key]
    return found


def break_images(data: ShapesDataset, number: int) -> set[int]:
    """Truncate, replace, remove or empty the last images of a data set; return their ids."""
    images = json.loads(data.train_annotations.read_text())["images"][-number:]
    for kind, image in enumerate(images):
        path = data.train_images / image["file_name"]
        content = path.read_bytes()
        path.unlink()
        if kind % 4 != 2:
            path.write_bytes((content[: len(content) // 3], b"no image", b"", b"")[kind % 4])
    return {int(image["id"]) for image in images}


def _main() -> None:
    spec = json.loads(Path(sys.argv[1]).read_text())
    rank, world_size = int(sys.argv[2]), spec["world_size"]
    import torch
    import torch.distributed as dist

    from deta.platform.data.coco_dataset import CocoDataset
    from deta.platform.launch.resume_check import changes_since_start, refuse_changes
    from deta.platform.learning.distributed import Worker
    from deta.platform.run.run import Run
    from deta.platform.training.loop import train

    torch.set_num_threads(1)
    if world_size > 1:
        dist.init_process_group(
            "gloo",
            init_method=f"tcp://127.0.0.1:{spec['port']}",
            rank=rank,
            world_size=world_size,
        )
    data = ShapesDataset(Path(spec["data"]))
    if spec["break_images"]:
        shutil.copytree(spec["pristine"], data.folder, dirs_exist_ok=True)
    train_set, val_set = (
        CocoDataset.open(
            images, annotations, lenient=spec["overrides"].get("data.lenient") == "true"
        )
        for images, annotations in (
            (data.train_images, data.train_annotations),
            (data.val_images, data.val_annotations),
        )
    )
    if spec["break_images"]:
        break_images(data, spec["break_images"])
    config = tiny_config(spec["overrides"] | {"model.num_classes": str(len(train_set.categories))})
    run = Run(config, Path(spec["folder"]), train_set, val_set)
    if spec["as_launched"] and run.checkpoints.exists():
        refuse_changes(run, changes_since_start(run))
    train(run, Worker(rank, world_size))
    sys.stdout.flush()
    os._exit(0)  # a clean shutdown of the process group would wait for other ranks


if __name__ == "__main__":
    _main()
