"""The console prints the events that concern the user, one line each."""

from __future__ import annotations

import os
import pty
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from deta.platform.launch.console import Console
from deta.platform.run.config import override
from deta.platform.run.run import RunResult
from tests.platform.launch.tiny_splits import DATA, make_run, write_split


@pytest.fixture
def console(tmp_path: Path) -> Console:
    run = make_run(write_split(tmp_path / "train", [[], []]), tmp_path, DATA)
    printed: list[str] = []
    console = Console(run, printed.append)
    console.printed = printed  # type: ignore[attr-defined]
    return console


@pytest.mark.parametrize(
    ("event", "line"),
    [
        ({"kind": "begin", "step": 0, "num_steps": 9, "world_size": 1},
         "training has started with 1 worker"),
        ({"kind": "begin", "step": 4, "num_steps": 9, "world_size": 2, "wasted_steps": 3},
         "continuing from step 4 of 9 with 2 workers; 3 steps are repeated"),
        ({"kind": "replaced", "step": 1, "images": [{"by_image_id": 7, "reason": "a.png: empty"}]},
         "broken image, replaced by image 7: a.png: empty"),
        ({"kind": "checkpoint_failed", "step": 1, "message": "no space"}, "! no space"),
        ({"kind": "drift", "step": 3, "parameter": "w"}, "! step 3: w differs among the workers"),
        ({"kind": "end", "step": 3, "reason": "stopped early"}, "stopped early"),
    ],
)  # fmt: skip
def test_an_event_is_printed(console: Console, event: dict[str, Any], line: str):
    console.print_event(event)
    assert console.printed == [line]  # type: ignore[attr-defined]


def test_the_chosen_loader_workers_are_printed(console: Console):
    begin = {"kind": "begin", "step": 0, "num_steps": 9, "world_size": 2, "loader_workers": 3}
    for cpus, after in ((4.0, "; it has 4 CPUs"), (1, "; it has 1 CPU"), (None, "")):
        console.print_event(begin | {"cpus": cpus})
        line = f"data.loader_workers: 3 for each training worker (auto{after})"
        assert console.printed[-1] == line  # type: ignore[attr-defined]

    config = override(console.run.config, {"data.loader_workers": 3})
    console.run = replace(console.run, config=config)
    console.print_event(begin)
    assert console.printed[-1] == "training has started with 2 workers"  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("now", "waited", "advice"),
    [
        # Of 10 s, 4 s waited: 30 images/s in the other 6 s are 50, as 3 / 0.6 loader workers give.
        (3, 0.4, "it got 30.0 images/s and could take 50.0. Set data.loader_workers=5 (now 3)"),
        (1, 0.11, "it got 30.0 images/s and could take 33.7. Set data.loader_workers=2 (now 1)"),
        (0, 0.2, "it got 30.0 images/s and could take 37.5. Set data.loader_workers=1 (now 0)"),
        # Loading takes three times as long as the rest.
        (0, 0.75, "it got 30.0 images/s and could take 120.0. Set data.loader_workers=3 (now 0)"),
        (2, 1.0, "it got 30.0 images/s and could take 600.0. Set data.loader_workers=40 (now 2)"),
    ],
)
def test_a_run_that_waits_for_data_says_how_many_loader_workers_it_needs(
    console: Console, now: int, waited: float, advice: str
):
    shares = {"train/images_per_s": 30.0, "train/data_wait_share": waited}
    progress = PROGRESS | {"metrics": PROGRESS["metrics"] | shares}
    console.print_event(
        {"kind": "begin", "step": 0, "num_steps": 9, "world_size": 1, "loader_workers": now}
    )
    for _ in range(3):
        console.print_event(progress)
    printed = console.printed  # type: ignore[attr-defined]
    assert [advice in line for line in printed].count(True) == 1  # once, not for the first window
    assert advice not in printed[2]


def test_other_events_are_not_printed(console: Console):
    for kind in ("checkpoint", "evaluating", "energy", "a kind of a later version"):
        console.print_event({"kind": kind})
    assert console.printed == []  # type: ignore[attr-defined]


def test_the_result_names_where_everything_is(console: Console, tmp_path: Path):
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "validation.png").touch()
    result = RunResult(
        folder=tmp_path, metrics={"AP": 12.34}, best_checkpoint=tmp_path / "best",
        mlflow_uri="http://mlflow:5000", mlflow_run_id="abc", goodput=0.9, rows_left=0,
    )  # fmt: skip
    console.print_result(result)
    text = "\n".join(console.printed)  # type: ignore[attr-defined]
    for part in ("AP 12.3", str(tmp_path / "best"), "validation.png", "goodput 90 %", "run abc"):
        assert part in text


PROGRESS = {
    "kind": "progress", "step": 123456, "num_steps": 654321, "remaining_s": 99_999,
    "metrics": {"train/loss": 12.345, "train/epoch": 3.5, "train/lr": 1e-4,
                "train/images_per_s": 1234.5},
}  # fmt: skip
LIVE = f"""
import sys
from deta.platform.launch.console import Console
console = Console(None, print, is_live=sys.stdout.isatty())
metrics = {{"val/AP": 45.67}}
console.print_event({{"kind": "evaluation", "step": 1, "table": "", "metrics": metrics}})
console.print_event({PROGRESS})
console.print_event({{"kind": "drift", "step": 3, "parameter": "w"}})
console.close()
"""


def test_progress_is_a_bar_on_a_terminal_of_80_columns():
    reader, terminal = pty.openpty()
    environment = os.environ | {"TERM": "xterm", "COLUMNS": "80"}
    command = [sys.executable, "-c", LIVE]
    subprocess.run(command, stdout=terminal, stderr=terminal, env=environment, check=True)
    shown = re.sub(r"\x1b\[[\d;?]*[A-Za-z]", "", os.read(reader, 1 << 20).decode())
    lines = re.split("[\r\n]+", shown)
    assert max(map(len, lines)) <= 80
    assert "! step 3: w differs among the workers" in lines
    (bar,) = {line for line in lines if line.startswith("123456/654321")}
    for part in ("━", "loss 12.345", "AP 45.7", "1234.5 images/s", "27 h 47 min left"):
        assert part in bar


def test_progress_is_a_plain_line_elsewhere(console: Console):
    console.print_event(PROGRESS)
    (line,) = console.printed  # type: ignore[attr-defined]
    assert line.startswith("step 123456/654321  epoch   3.50  loss   12.345  lr 1.0e-04")
    assert line.endswith("1234.5 images/s  27 h 47 min left")
