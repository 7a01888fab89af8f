#!/usr/bin/env python
"""Measure how long people wait for commands, each beside its floor.

  python benchmarks/waiting.py [--rounds 3] [--only help training predict serve evaluate open]

A floor is what the command cannot do without, measured in the same round: the interpreter with
torch, the model alone, Ray Train with an empty function, `json.load`. A time is from the command to
its answer on the clock, the least of the rounds; others on the machine make it longer.

  help      `--help`; floor: `python -c pass`
  training  the demo: command to its first step; floor: Ray Train, two workers that import torch
  predict   one picture; floor: import torch and build the model
  serve     command to /ready without Ray; floor: as for predict
  evaluate  200 pictures; floor: as for predict
  open      annotations of 20,000 pictures with masks, and their headers; floor: `json.load`
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path

from measuring import processor

from deta.platform.run.journal import JOURNAL_FILE, read_events
from deta.platform.system.child_server import free_port
from deta.platform.system.places import child_environment

JOBS = Path(__file__).resolve().parents[1] / "jobs"
NUM_OPENED, BOXES_EACH, POINTS_EACH = 20_000, 7, 54
MODEL = """
from deta.jobs.deta_r50 import demo
from deta.model.architectures import make_detector
make_detector(demo().model)
"""
EMPTY_TRAINING = """
import ray, ray.train, sys, time
from ray.train.torch import TorchTrainer
def work(config):
    import torch
    if ray.train.get_context().get_world_rank() == 0:
        open(config["began"], "w").close()
ray.init(num_cpus=2, log_to_driver=False)
TorchTrainer(work, train_loop_config={"began": sys.argv[1]},
    scaling_config=ray.train.ScalingConfig(num_workers=2),
    run_config=ray.train.RunConfig(name="empty", storage_path=sys.argv[2])).fit()
"""
OPEN = """
import sys
from pathlib import Path
from deta.platform.data.coco_dataset import CocoDataset
CocoDataset.open(Path(sys.argv[1]), Path(sys.argv[2]))
"""
LOAD = "import json, sys; json.load(open(sys.argv[2]))"


def python(*arguments: str | Path) -> float:
    """Run Python to its end; return the seconds that it took."""
    began_s = time.monotonic()
    command = [sys.executable, *map(str, arguments)]
    subprocess.run(command, env=child_environment(), stdout=subprocess.DEVNULL, check=True)
    return time.monotonic() - began_s


def seconds_until(is_there: Callable[[], bool], *arguments: str | Path) -> float:
    """Run Python until something has happened, and end it; return the seconds until then.

    Raises:
        RuntimeError: it ended before.
    """
    began_s = time.monotonic()
    process = subprocess.Popen(
        [sys.executable, *map(str, arguments)],
        env={k: v for k, v in child_environment().items() if k != "RAY_ADDRESS"},
        stdout=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        while not is_there():
            if process.poll() is not None:
                raise RuntimeError(f"{arguments} ended with {process.returncode}")
            time.sleep(0.02)
        return time.monotonic() - began_s
    finally:
        process.send_signal(signal.SIGINT)
        process.wait(60)


def answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=1) as response:
            return bool(response.status == 200)
    except (OSError, urllib.error.URLError):
        return False


def has_stepped(folder: Path) -> bool:
    return (folder / JOURNAL_FILE).exists() and any(
        event["kind"] == "progress" for event, _ in read_events(folder)
    )


class Waiting:
    """The measurements, in one folder, with a model that a first training leaves there."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.round = folder, 0
        demo = ["--variant", "demo", f"storage={folder}", "schedule.epochs=1"]
        python(JOBS / "deta_r50.py", *demo, "--name", "model")
        self.run = folder / "model"
        data = folder / "data" / "demo"
        self.images, self.annotations = data / "val", data / "annotations" / "instances_val.json"
        self.image = next(iter(sorted(self.images.iterdir())))
        self.demo = [*demo, "log_every_steps=1"]

    def help(self) -> tuple[float, float]:
        return python(JOBS / "deta_r50.py", "--help"), python("-c", "pass")

    def training(self) -> tuple[float, float]:
        name = f"round-{self.round}"
        ours = seconds_until(
            lambda: has_stepped(self.folder / name),
            *(JOBS / "deta_r50.py", *self.demo, "--name", name),
        )
        began = self.folder / f"began-{self.round}"
        return ours, seconds_until(
            began.exists, "-c", EMPTY_TRAINING, began, self.folder / f"empty-{self.round}"
        )

    def predict(self) -> tuple[float, float]:
        found = self.folder / f"found-{self.round}"
        ours = python(JOBS / "predict.py", self.run, self.image, "--out", found)
        return ours, python("-c", MODEL)

    def serve(self) -> tuple[float, float]:
        port = free_port("127.0.0.1", 21_000)
        ours = seconds_until(
            lambda: answers(f"http://127.0.0.1:{port}/ready"),
            *(JOBS / "serve.py", self.run, "--without-ray", "--port", str(port)),
        )
        return ours, python("-c", MODEL)

    def evaluate(self) -> tuple[float, float]:
        where = ["--images", self.images, "--annotations", self.annotations]
        out = self.folder / f"evaluated-{self.round}"
        ours = python(JOBS / "evaluate.py", self.run, *where, "--out", out)
        return ours, python("-c", MODEL)

    def open(self) -> tuple[float, float]:
        images, annotations = self.folder / "many", self.folder / "many.json"
        if not annotations.exists():
            write_many(self.image, images, annotations)
        places = [str(images), str(annotations)]
        return python("-c", OPEN, *places), python("-c", LOAD, *places)


def write_many(image: Path, folder: Path, annotations: Path) -> None:
    """Write a data set of many links to one picture, with masks of a usual length."""
    folder.mkdir()
    names = [f"{number:012d}.jpg" for number in range(1, NUM_OPENED + 1)]
    for number, name in enumerate(names):
        if number % 10_000 == 0:  # a file system allows so many links to one file
            shutil.copy(image, folder / name)
            first = folder / name
        else:
            os.link(first, folder / name)
    from PIL import Image

    width, height = Image.open(image).size
    document = {
        "images": [
            {"id": i, "file_name": name, "width": width, "height": height, "license": 1}
            for i, name in enumerate(names)
        ],
        "annotations": [
            {"id": i * BOXES_EACH + k, "image_id": i, "category_id": 1, "area": 90.5, "iscrowd": 0,
             "bbox": [k, k, 10.25, 9.5], "segmentation": [[10.25 + i % 7, *range(POINTS_EACH)]]}
            for i in range(NUM_OPENED) for k in range(BOXES_EACH)
        ],
        "categories": [{"id": 1, "name": "thing"}],
    }  # fmt: skip
    annotations.write_text(json.dumps(document))


def main() -> None:
    names = ("help", "training", "predict", "serve", "evaluate", "open")
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", nargs="+", choices=names, default=names)
    given = parser.parse_args()
    print(f"{processor()}, {os.cpu_count()} cores, least of {given.rounds} rounds")
    with tempfile.TemporaryDirectory(prefix="deta-waiting-") as folder:
        waiting = Waiting(Path(folder))
        found: dict[str, list[tuple[float, float]]] = {name: [] for name in given.only}
        for waiting.round in range(given.rounds):
            for name, times in found.items():
                times.append(getattr(waiting, name)())
    print(f"{'':<10}{'s':>8}{'floor s':>9}{'ratio':>7}")
    for name, times in found.items():
        ours, floor = (min(column) for column in zip(*times, strict=True))
        print(f"{name:<10}{ours:8.2f}{floor:9.2f}{ours / floor:7.2f}")


if __name__ == "__main__":
    main()
