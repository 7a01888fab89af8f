"""The same faults with plain Ray Train, torch.save and MLflow, see `stock_job.py`."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from tests.chaos import oracles
from tests.chaos.mlflow_server import free_port
from tests.chaos.processes import MARK, Family
from tests.chaos.runs import ROOT, Place, ScenarioError, clean_environment, expect, log_progress
from tests.chaos.scenario import BETWEEN_KILLS_S, Options, Outcome
from tests.chaos.stock_job import MAX_FAILURES

GIVE_UP_S = 150


class StockRun:
    """One run of the plain job."""

    def __init__(
        self, place: Place, name: str, steps: int = 60, mlflow: str = "", **fault: int
    ) -> None:
        self.folder = place.storage("stock") / name
        self.folder.mkdir(exist_ok=True)
        (self.folder / "fault.json").write_text(json.dumps(fault))
        self.steps = steps
        self.log = self.folder / "log"
        mark = f"stock-{name}-{os.urandom(4).hex()}"
        self.family = Family(f"{MARK}={mark}")
        self.tmp = place.folder / f"s{os.urandom(2).hex()}"
        self.tmp.mkdir()
        self.environment = clean_environment() | {
            MARK: mark, "STOCK_MLFLOW": mlflow, "RAY_TMPDIR": str(self.tmp),
            "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
        }  # fmt: skip
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "tests.chaos.stock_job", str(self.folder), str(self.steps)],
                cwd=ROOT, env=self.environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                start_new_session=True,
            )  # fmt: skip

    def rows(self, kind: str = "step", rank: int = 0) -> list[dict[str, Any]]:
        path = self.folder / f"steps-{rank}.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        return [row for row in map(json.loads, lines) if row["kind"] == kind]

    def step(self) -> int:
        return max((row["step"] for row in self.rows()), default=0)

    def wait_for_step(self, step: int, timeout_s: float = 120) -> bool:
        deadline_s = time.monotonic() + timeout_s
        while self.step() < step:
            assert self.process is not None
            if time.monotonic() > deadline_s or self.process.poll() is not None:
                return False
            time.sleep(0.1)
        return True

    def hit(self, role: str) -> Outcome:
        """Kill a process of a role at step 25 and return the outcome."""
        self.start()
        expect(self.wait_for_step(25), "the plain job did not start")
        victims = self.family.alive(role)
        expect(victims, f"no {role} process")
        hit_s, before = time.time(), self.step()
        victims[-1].send(signal.SIGKILL)
        came = self.wait_for_step(before + 5, GIVE_UP_S)
        assert self.process is not None
        if not came:
            code = self.process.poll()
            took_s = time.time() - hit_s
            ended = f"ended with exit code {code}" if code is not None else "hung"
            return Outcome(f"{ended} after {took_s:.0f} s, no retry", "", False)
        begins = [row for row in self.rows("begin") if row["time_s"] > hit_s]
        if not begins:
            return Outcome("continued", "", False)
        news = [r for r in self.rows() if r["time_s"] > hit_s and r["step"] > before]
        again = before - begins[0]["step"]
        return Outcome(f"{news[0]['time_s'] - hit_s:.1f} s; {again} repeated steps", "", True)

    def __enter__(self) -> StockRun:
        return self

    def __exit__(self, *_: object) -> None:
        self.family.kill()
        if self.process is not None:
            self.process.wait()


def worker_killed(place: Place, options: Options) -> Outcome:
    with StockRun(place, "a1") as run:
        return run.hit("worker")


def controller_killed(place: Place, options: Options) -> Outcome:
    with StockRun(place, "a2") as run:
        return run.hit("controller")


def raylet_killed(place: Place, options: Options) -> Outcome:
    with StockRun(place, "a7") as run:
        return run.hit("raylet")


def gcs_killed(place: Place, options: Options) -> Outcome:
    with StockRun(place, "a8", steps=1500) as run:
        run.start()
        expect(run.wait_for_step(25), "the plain job did not start")
        hit_s = time.time()
        run.family.alive("gcs")[-1].send(signal.SIGKILL)
        assert run.process is not None
        try:
            code: int | str = run.process.wait(GIVE_UP_S)
        except subprocess.TimeoutExpired:
            code = "none"
        return Outcome(f"exit code {code} after {time.time() - hit_s:.0f} s, no retry", "", False)


def driver_killed(place: Place, options: Options) -> Outcome:
    uri = f"sqlite:///{place.folder}/stock-a3.db"
    with StockRun(place, "a3", mlflow=uri) as run:
        run.start()
        expect(run.wait_for_step(15), "the plain job did not start")
        assert run.process is not None
        run.process.kill()
        run.process.wait()
        gone_s, left = run.family.wait_until_gone(30)
        return Outcome(
            f"{len(left)} orphans after {gone_s:.0f} s; MLflow {_status(Path(uri[10:]))}", ""
        )


def terminated(place: Place, options: Options) -> Outcome:
    with StockRun(place, "a4") as run:
        run.start()
        expect(run.wait_for_step(25), "the plain job did not start")
        assert run.process is not None
        began_s = time.monotonic()
        run.process.terminate()
        try:
            code: int | str = run.process.wait(60)
        except subprocess.TimeoutExpired:
            code = "none"
        took_s = time.monotonic() - began_s
        lost = run.step() - run.step() // 10 * 10
        return Outcome(f"exit code {code} after {took_s:.1f} s; {lost} steps lost", "")


def killed_every_two_minutes(place: Place, options: Options) -> Outcome:
    """Kill at most as many workers as the plain job has retries."""
    times = min(options.times(3), MAX_FAILURES)
    with StockRun(place, "gp", steps=10**6) as run:
        run.start()
        expect(run.wait_for_step(8), "the plain job did not start")
        begun_s = time.time()
        for number in range(times):
            time.sleep(max(0.0, begun_s + 60 + BETWEEN_KILLS_S * number - time.time()))
            victims = run.family.alive("worker")
            expect(victims, "no worker to kill: the one before was not replaced")
            victims[0].send(signal.SIGKILL)
        time.sleep(max(0.0, begun_s + BETWEEN_KILLS_S * times - time.time()))
        lines = sorted(run.rows("begin") + run.rows("step"), key=lambda row: row["time_s"])
    share = oracles.useful_seconds(lines) / (BETWEEN_KILLS_S * times)
    return Outcome(f"{100 * share:.1f} % since the first step", "", True)


def nan_loss(place: Place, options: Options) -> Outcome:
    with StockRun(place, "d1", steps=30, nan_rank=1, nan_step=20) as run:
        run.start()
        expect(run.wait_for_step(30), "the plain job did not reach its end")
        rows = run.rows()
        return Outcome(f"{rows[-1]['poisoned']} poisoned weights, training continues", "", False)


def crash_loop(place: Place, options: Options) -> Outcome:
    with StockRun(place, "a11", raise_step=7) as run:
        run.start()
        assert run.process is not None
        began_s = time.monotonic()
        code = run.process.wait(300)
        return Outcome(
            f"{len(run.rows('begin'))} attempts (max_failures=3), exit code {code}, "
            f"{time.monotonic() - began_s:.0f} s in total", "",
        )  # fmt: skip


def same_name(place: Place, options: Options) -> Outcome:
    with StockRun(place, "f3", steps=20) as run:
        for _ in range(2):
            before = len(run.rows())
            run.start()
            assert run.process is not None
            code = run.process.wait(200)
        return Outcome(f"exit code {code}, {len(run.rows()) - before} steps", "", False)


def resumed(place: Place, options: Options) -> Outcome:
    """Measure the largest relative difference of the losses after one kill."""
    with StockRun(place, "g1-clean") as clean, StockRun(place, "g1") as run:
        clean.start()
        assert clean.process is not None
        clean.process.wait(200)
        run.hit("worker")
        assert run.process is not None
        run.process.wait(200)
        ours, theirs = ({r["step"]: float.fromhex(r["loss"]) for r in one.rows()}
                        for one in (run, clean))  # fmt: skip
    worst = max(abs(ours[s] - theirs[s]) / abs(theirs[s]) for s in theirs)
    return Outcome(f"losses differ by {worst:.0e} after one kill", "", worst == 0)


def mlflow_refused(place: Place, options: Options) -> Outcome:
    program = "import mlflow; mlflow.log_metric('loss', 1.0, step=1)"
    environment = clean_environment()
    environment["MLFLOW_TRACKING_URI"] = f"http://127.0.0.1:{free_port()}"
    began_s = time.monotonic()
    try:
        done = subprocess.run([sys.executable, "-c", program], env=environment, cwd="/",
                              capture_output=True, timeout=300, check=False)  # fmt: skip
    except subprocess.TimeoutExpired:
        return Outcome("blocked for more than 300 s", "", False)
    took_s = time.monotonic() - began_s
    return Outcome(f"blocked for {took_s:.0f} s, then exit code {done.returncode}", "", False)


def killed_while_saving(place: Place, options: Options) -> Outcome:
    """Kill `torch.save` while it overwrites an existing file."""
    import torch

    times = options.times(20)
    chance = random.Random("b1")
    path = place.folder / "stock.pt"
    state = {str(i): torch.randn(6 * 2**20) for i in range(4)}  # 96 MiB
    began_s = time.monotonic()
    torch.save(state, path)
    usual_s = time.monotonic() - began_s
    unloadable = 0
    for _ in range(times):
        torch.save(state, path)
        child = os.fork()
        if child == 0:
            while True:
                torch.save(state, path)
        time.sleep(chance.uniform(0, 2) * usual_s)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        try:
            torch.load(path)
        except Exception:
            unloadable += 1
    path.unlink()
    return Outcome(f"{unloadable}/{times} unloadable (torch.save in place)", "")


def leftovers(place: Place, options: Options) -> Outcome:
    """Count temporary folders after killed saves; as in Ray, a save renames its folder last."""
    import torch

    times = options.times(8)
    chance = random.Random("b10")
    folder = place.folder / "stock-b10"
    state = {str(i): torch.randn(6 * 2**18) for i in range(4)}
    for number in range(times):
        child = os.fork()
        if child == 0:
            for step in range(10**6):
                unfinished = folder / f"{number}-{step}.tmp"
                unfinished.mkdir(parents=True)
                torch.save(state, unfinished / "checkpoint.pt")
                unfinished.rename(unfinished.with_suffix(""))
        time.sleep(0.3 + chance.random() * 0.3)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    left = len(list(folder.glob("*.tmp")))
    shutil.rmtree(folder)
    return Outcome(f"{left}/{times} kills left one for good (temporary folder and rename)", "")


def bit_flipped(place: Place, options: Options) -> Outcome:
    import torch

    times = options.times(200)
    chance = random.Random("b5")
    path = place.folder / "stock.pt"
    torch.save({str(i): torch.randn(2**14) for i in range(4)}, path)
    whole = path.read_bytes()
    detected = 0
    for _ in range(times):
        content = bytearray(whole)
        content[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
        path.write_bytes(content)
        try:
            torch.load(path)
        except Exception:
            detected += 1
    path.unlink()
    return Outcome(f"{detected}/{times} detected (torch.load)", "")


def damaged_newest(place: Place, options: Options) -> Outcome:
    """Truncate the newest checkpoint, which Ray's own record names, and start the job again."""
    with StockRun(place, "b4", steps=40) as run:
        run.start()
        expect(run.wait_for_step(25), "the plain job did not start")
        assert run.process is not None
        run.process.kill()
        run.process.wait()
        run.family.wait_until_gone(60)
        newest = max(run.folder.rglob("checkpoint.pt"), key=lambda path: path.stat().st_mtime)
        newest.write_bytes(newest.read_bytes()[:500])
        run.start()
        try:
            code = run.process.wait(200)
        except subprocess.TimeoutExpired:
            raise ScenarioError("did not end within 200 s") from None
        log_progress(f"stock b4: exit code {code}")
        return Outcome(f"exit code {code}, at step {run.step()} of 40", "", code == 0)


def _status(database: Path) -> str:
    import sqlite3

    with sqlite3.connect(database) as connection:
        rows = connection.execute("select status from runs").fetchall()
    return ", ".join(row[0] for row in rows)
