"""Measure how fast a browser shows the leaderboard with thousands of runs.

    python benchmarks/leaderboard.py [--runs 5000] [--storage FOLDER]

Writes synthetic runs, as large as real ones, into a new MLflow database, or uses the one in FOLDER.
Then it opens the page twice: as at the first start, and as at a later start, which shows the cached
copy from disk first. For each it measures the time from the request until the first rows are
visible, the time until all runs are loaded, and the times of sorting and filtering.
"""

from __future__ import annotations

import argparse
import os
import random
import re
import shutil
import sqlite3
import subprocess
import sys
import tempfile
import time
import uuid
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RECIPES = {"deta_r50.deta-r50-12ep": 50.0, "deta_swin_l.deta-swin-l-24ep": 58.0,
           "anchor_detr_r50.dc5": 44.0, "deta_r50.demo": 20.0}  # fmt: skip
NUM_CLASSES = 60
WITHIN_MS = 600_000
# One call in the page, so that the time between calls does not count.
HANDLE = """() => {
  const times = [performance.now()], next = () => times.push(performance.now());
  change({ sort: "gpu_hours", order: "ascending" }); next();
  change({ text: "swin" }); next();
  change({ text: "", sort: "ap", order: "descending" }); next();
  renderFigure(); next();
  return times.slice(1).map((time, i) => Math.round(time - times[i]));
}"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=5000)
    parser.add_argument("--storage", type=Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="deta-") as folder:
        storage = arguments.storage or Path(folder)
        if arguments.storage is None:
            write_runs(storage, arguments.runs)
        shutil.rmtree(storage / "dashboards", ignore_errors=True)
        for start in ("first start", "later start"):
            measure(storage, start)


def write_runs(storage: Path, number: int) -> None:
    """Insert runs into MLflow's tables directly: its API would take an hour."""
    from deta.platform.run.config import RunConfig, flatten
    from deta.platform.tracking.mlflow_store import MlflowStore

    client = MlflowStore(f"sqlite:///{storage / 'mlflow.db'}")._connect()
    experiment = int(client.create_experiment("deta"))
    params = {key: str(value)[:500] for key, value in flatten(RunConfig()).items()}
    rng, now_ms = random.Random(0), int(time.time() * 1000)
    database = sqlite3.connect(storage / "mlflow.db")
    for place in range(number):
        run, recipe = uuid.uuid4().hex, rng.choice(list(RECIPES))
        ap, hours = rng.gauss(RECIPES[recipe], 3.0), rng.uniform(1.0, 20.0)
        began_ms = now_ms - rng.randrange(90 * 86_400_000)
        insert(
            database, "runs", run_uuid=run, name=f"run-{place:05d}", status="FINISHED",
            start_time=began_ms, end_time=began_ms + int(hours * 3.6e6), lifecycle_stage="active",
            artifact_uri=str(storage / "mlartifacts" / run), experiment_id=experiment,
            source_type="JOB", user_id="somebody",
        )  # fmt: skip
        numbers = {f"AP_of_class/{i}": rng.uniform(0.0, 60.0) for i in range(NUM_CLASSES)}
        numbers |= {"best/AP": ap, "val/AP": ap, "val/seconds": 60.0, "cost/gpu_hours": 8 * hours,
                    "cost/cpu_hours": 32 * hours, "model/parameters": 48e6}  # fmt: skip
        tags = {"mlflow.runName": f"run-{place:05d}", "deta.recipe": recipe,
                "deta.val_fingerprint": "0" * 64, "deta.key": run}  # fmt: skip
        for table, values in (("params", params | {"seed": str(place)}), ("tags", tags)):
            for key, value in values.items():
                insert(database, table, key=key, value=value, run_uuid=run)
        for key, number_ in numbers.items():
            insert(
                database, "latest_metrics", key=key, value=number_, timestamp=began_ms, step=1,
                is_nan=0, run_uuid=run,
            )  # fmt: skip
    database.commit()
    database.close()


def insert(database: sqlite3.Connection, table: str, **values: Any) -> None:
    marks = ", ".join("?" * len(values))
    names = ", ".join(values)
    database.execute(f"insert into {table} ({names}) values ({marks})", tuple(values.values()))


def measure(storage: Path, start: str) -> None:
    from playwright.sync_api import sync_playwright

    chromium = shutil.which("chromium") or shutil.which("chromium-browser")
    env = {name: value for name, value in os.environ.items() if name != "MLFLOW_TRACKING_URI"}
    command = [sys.executable, str(ROOT / "jobs" / "leaderboard.py"), str(storage), "--port=0"]
    began_s = time.perf_counter()
    server = subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True, env=env | {"PYTHONPATH": str(ROOT)}
    )
    assert server.stdout is not None
    found = re.search(r"http://\S+", server.stdout.readline())
    assert found is not None
    print(f"{start}: responds after {time.perf_counter() - began_s:.1f} s")
    try:
        with sync_playwright() as playwright:
            browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
            page = browser.new_page(viewport={"width": 1440, "height": 900})
            page.set_default_timeout(WITHIN_MS)
            began_s = time.perf_counter()
            page.goto(found[0], wait_until="commit")
            page.locator("#rows tr").first.wait_for()
            first_ms = 1000 * (time.perf_counter() - began_s)
            page.get_by_text("runs, as of").wait_for()
            whole_s = time.perf_counter() - began_s
            number = page.evaluate("rows.size")
            sort, narrow, widen, draw = page.evaluate(HANDLE)
            print(f"{start}: first rows {first_ms:.0f} ms, all {number} runs {whole_s:.1f} s")
            print(f"{start}: sort {sort} ms, filter {narrow} ms, back {widen} ms, draw {draw} ms")
            print(f"{start}: peak memory of the server {peak_mb(server.pid)} MB")
            browser.close()
    finally:
        server.terminate()
        server.wait()


def peak_mb(process: int) -> int:
    text = Path(f"/proc/{process}/status").read_text()
    found = re.search(r"VmHWM:\s+(\d+)", text)
    return int(found[1]) // 1024 if found else 0


if __name__ == "__main__":
    main()
