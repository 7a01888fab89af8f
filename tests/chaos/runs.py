"""Runs of a tiny DETA, started by the command that a user types and observed by its files."""

from __future__ import annotations

import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from deta.platform.data.synthetic_shapes import ShapesDataset, write_shapes
from tests.chaos.processes import MARK, Family

ROOT = Path(__file__).resolve().parents[2]
INSIDE = Path(__file__).resolve().parent / "inside"
NUM_IMAGES, BATCH, SEED = 64, 4, 42
STEPS_PER_EPOCH = NUM_IMAGES // BATCH
CHECKPOINT_EVERY_STEPS = 10
TINY = {
    "model.backbone.width": "0.25", "model.dim": "32", "model.num_heads": "4",
    "model.ffn_dim": "32", "model.encoder_layers": "1", "model.decoder_layers": "1",
    "model.num_queries": "20",
    "data.augmentation.short_edges": "48,64", "data.augmentation.max_long_edge": "96",
    "data.evaluation_size.short_edge": "64", "data.evaluation_size.max_long_edge": "96",
    "data.loader_workers": "0", "total_batch_size": str(BATCH), "micro_batch_size": "2",
    "schedule.epochs": "4", "log_every_steps": "1", "evaluate_every_epochs": "4",
    "num_pictures": "0", "cluster.num_workers": "2",
    "checkpoint.every_steps": str(CHECKPOINT_EVERY_STEPS), "checkpoint.every_minutes": "none",
}  # fmt: skip

Event = dict[str, Any]


class ScenarioError(AssertionError):
    """An expectation of a scenario failed; the message explains it to the table's reader."""


def log_progress(text: str) -> None:
    """Print a line with the time to stderr."""
    print(f"    {time.strftime('%H:%M:%S')} {text}", file=sys.stderr, flush=True)


def expect(truth: object, message: str) -> None:
    if not truth:
        raise ScenarioError(message)


@dataclass
class Place:
    """The folder of one invocation of the harness, with the results its scenarios share."""

    folder: Path
    patience: float = 1.0  # multiplies time-outs
    _drawn: dict[int, ShapesDataset] = field(default_factory=dict)
    shared: dict[str, Any] = field(default_factory=dict)  # results that several scenarios read

    @staticmethod
    def make() -> Place:
        # Short: a Unix socket's path has at most 107 characters, and Ray's are long.
        return Place(Path(tempfile.mkdtemp(prefix="chaos-", dir="/tmp")))

    def drawn(self, num_train: int = NUM_IMAGES) -> ShapesDataset:
        if num_train not in self._drawn:
            folder = self.folder / f"shapes-{num_train}"
            self._drawn[num_train] = write_shapes(
                folder, num_train=num_train, num_val=6, size_px=64
            )
        return self._drawn[num_train]

    def own_data(self, name: str, num_train: int = NUM_IMAGES) -> ShapesDataset:
        """Return a copy that a scenario may damage."""
        folder = self.folder / "data" / name
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(self.drawn(num_train).folder, folder)
        return ShapesDataset(folder)

    def storage(self, name: str) -> Path:
        folder = self.folder / "runs" / name
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def remove(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)


class TinyRun:
    """One run by its name, which a scenario starts, observes, disturbs and resumes."""

    def __init__(
        self,
        place: Place,
        name: str,
        *,
        storage: Path | None = None,
        data: ShapesDataset | None = None,
        faults: Sequence[dict[str, Any]] | None = None,
        record: bool = False,
        clock: Path | None = None,
        environment: dict[str, str] | None = None,
        prefix: Sequence[str] = (),
        **overrides: object,
    ) -> None:
        """Prepare the run without starting it.

        Args:
            faults: see `inside/sitecustomize.py`.
            record: save what the workers trained on, in `self.records`.
            clock: file with the seconds by which the clock of the run is wrong.
            prefix: put before the command, such as a change of the network namespace.
            overrides: configuration values; their keys have __ for the dot.
        """
        self.place, self.name = place, name
        self.storage = storage or place.storage(name)
        self.data = data or place.drawn()
        self.overrides = TINY | {k.replace("__", "."): str(v) for k, v in overrides.items()}
        self.prefix = list(prefix)
        self.mark = f"{name}-{secrets.token_hex(6)}"
        self.family = Family(f"{MARK}={self.mark}")
        self.records = place.folder / "records" / f"{name}-{self.mark[-6:]}"
        self.log = place.folder / "logs" / f"{name}-{self.mark[-6:]}.log"
        self.log.parent.mkdir(parents=True, exist_ok=True)
        self.records.mkdir(parents=True)
        self.ray_folder = Path(tempfile.mkdtemp(prefix="r", dir=place.folder))
        self.environment = clean_environment() | {
            MARK: self.mark,
            "RAY_TMPDIR": str(self.ray_folder),
        }
        images = len(list(self.data.train_images.iterdir()))
        if faults is not None or record or clock is not None:
            self.environment |= inside_environment(
                faults or (), self.records if record else None, images, clock
            )
        self.environment |= environment or {}
        self.process: subprocess.Popen[bytes] | None = None

    @property
    def folder(self) -> Path:
        return self.storage / self.name

    def command(self, *more: str) -> list[str]:
        return [
            *self.prefix, sys.executable, "jobs/deta_r50.py", "--variant", "demo",
            "--train-images", str(self.data.train_images),
            "--train-annotations", str(self.data.train_annotations),
            "--val-images", str(self.data.val_images),
            "--val-annotations", str(self.data.val_annotations),
            "--name", self.name, *more, f"storage={self.storage}",
            *(f"{key}={value}" for key, value in self.overrides.items()),
        ]  # fmt: skip

    def start(self, *, resume: bool = False) -> None:
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                self.command(*(["--resume"] if resume else [])),
                cwd=ROOT,
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def again(self, *, resume: bool, timeout_s: float = 120) -> tuple[int, float, str]:
        """Run the same command a second time; return its exit code, seconds and output."""
        began_s = time.monotonic()
        done = subprocess.run(
            self.command(*(["--resume"] if resume else [])),
            cwd=ROOT, env=self.environment, stdin=subprocess.DEVNULL, capture_output=True,
            text=True, timeout=timeout_s * self.place.patience, start_new_session=True,
        )  # fmt: skip
        return done.returncode, time.monotonic() - began_s, done.stdout + done.stderr

    def events(self) -> list[Event]:
        return read_journal(self.folder)

    def step(self) -> int:
        """Return the last step in the journal."""
        return max((e["step"] for e in self.events() if e["kind"] == "progress"), default=0)

    def wait_for(
        self, what: str, reached: Callable[[], Any], timeout_s: float = 180, every_s: float = 0.1
    ) -> Any:
        """Wait until `reached` returns a true value, and return it.

        Raises:
            ScenarioError: it timed out, or the command ended before.
        """
        timeout_s *= self.place.patience
        began_s = time.monotonic()
        # Looked at anew when the time is over: the machine may have become busy meanwhile.
        while time.monotonic() < began_s + timeout_s or (
            time.monotonic() < began_s + timeout_s * self.family.slowdown()
        ):
            value = reached()
            if value:
                return value
            if self.process is not None and self.process.poll() is not None:
                value = reached()
                if value:
                    return value
                raise ScenarioError(
                    f"ended with {self.process.returncode} before {what}: {self.tail()}"
                )
            time.sleep(every_s)
        raise ScenarioError(f"{what}: not within {timeout_s:.0f} s; {self.tail()}")

    def wait_for_step(self, step: int, timeout_s: float = 180) -> int:
        return self.wait_for(f"step {step}", lambda: max(0, self.step() - step + 1), timeout_s)

    def wait(self, timeout_s: float = 240) -> int:
        """Wait for the command to end and return its exit code."""
        assert self.process is not None
        timeout_s *= self.place.patience
        try:
            return self.process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            more_s = timeout_s * (self.family.slowdown() - 1)  # other processes took their share
        try:
            return self.process.wait(more_s)
        except subprocess.TimeoutExpired:
            timeout_s += more_s
            raise ScenarioError(f"did not end within {timeout_s:.0f} s; {self.tail()}") from None

    def finish(self, timeout_s: float = 240) -> None:
        """Wait for the command to end and require exit code 0."""
        code = self.wait(timeout_s)
        expect(code == 0, f"exit code {code}: {self.tail()}")

    def one(self, role: str, timeout_s: float = 30) -> Any:
        """Return the youngest process of a role."""
        found = self.wait_for(f"a {role} process", lambda: self.family.alive(role), timeout_s)
        return max(found, key=lambda process: process.start)

    def signal(self, number: signal.Signals) -> None:
        assert self.process is not None
        self.process.send_signal(number)

    def limit_s(self, seconds: float, slack: float) -> float:
        """Return a limit for a quiet machine, as it is on this one."""
        return seconds * slack * self.family.slowdown()

    def tail(self, characters: int = 600) -> str:
        text = self.log.read_text(errors="replace") if self.log.exists() else ""
        return "… " + " | ".join(text[-characters:].splitlines())

    def close(self) -> None:
        """Kill what is left of the run."""
        left = self.family.kill()
        if self.process is not None:
            self.process.wait()
        if left:
            log_progress(f"{self.name}: killed {left} remaining processes")
        shutil.rmtree(self.ray_folder, ignore_errors=True)

    def __enter__(self) -> TinyRun:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def read_journal(folder: Path) -> list[Event]:
    """Return all complete lines, without the product's reader, which is under test too."""
    events = []
    path = folder / "journal.jsonl"
    if path.exists():
        for line in path.read_bytes().split(b"\n")[:-1]:
            try:
                events.append(json.loads(line))
            except ValueError:
                continue
    return events


def clean_environment() -> dict[str, str]:
    """Return this process's environment without other clusters, servers and runs."""
    kept = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("RAY_", "MLFLOW_", "DETA_CHAOS", "DETA_RUN", "PYTEST"))
    }
    return kept | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


def inside_environment(
    faults: Sequence[dict[str, Any]],
    records: Path | None,
    images: int = NUM_IMAGES,
    clock: Path | None = None,
) -> dict[str, str]:
    """Return the variables that activate `inside/sitecustomize.py` in a process tree."""
    spec = {"seed": SEED, "images": images, "batch": BATCH, "faults": list(faults)}
    if records is not None:
        spec["record"] = str(records)
    if clock is not None:
        spec["clock"] = str(clock)
    return {
        "DETA_CHAOS_INSIDE": json.dumps(spec),
        "PYTHONPATH": f"{INSIDE}{os.pathsep}{ROOT}",
    }
