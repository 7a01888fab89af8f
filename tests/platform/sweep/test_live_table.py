"""The table of a sweep on a terminal of 80 columns, and without one."""

from __future__ import annotations

import io
from pathlib import Path

from optuna.distributions import FloatDistribution
from rich.console import Console
from rich.text import Text

from deta.jobs.deta_r50 import demo
from deta.platform.sweep.live_table import LiveTable, summary_line, table_text
from deta.platform.sweep.search_space import Random, Sweep
from deta.platform.sweep.trial_folder import TrialFolder

KEYS = ("optim.lr", "optim.weight_decay", "model.backbone.width")


def trials(num: int) -> list[TrialFolder]:
    space = {key: FloatDistribution(0.001, 0.9) for key in KEYS}
    sweep = Sweep(base=demo(), space=space, search=Random(num))
    made = [TrialFolder(t, t.cell.key, demo(), Path("nowhere")) for t in sweep.trials()]
    made[-1].ended, made[-1].reason = "FAILED", "ValueError: a reason that is too long for a line"
    return made


def test_no_line_is_wrapped_on_a_terminal_and_the_relevant_trials_are_shown():
    screen = io.StringIO()
    table = LiveTable()
    table.console = Console(file=screen, force_terminal=True, width=80, height=20)
    shown = trials(30)
    table.update(shown, KEYS, lambda: "the summary")
    lines = Text.from_ansi(screen.getvalue().replace("\033[?25l", "")).plain.splitlines()
    assert len(lines) == 18  # heading, 15 trials, how many more, summary
    assert max(map(len, lines)) <= 80
    lr = f"{shown[-1].trial.changes['optim.lr']:.4g}"
    assert any(line.startswith(f"{shown[-1].trial.id}  {lr}") for line in lines)
    assert lines[-2:] == ["… and 15 more", "the summary"]
    table.update(shown, KEYS, lambda: "the summary", last=True)
    assert all(trial.trial.id in screen.getvalue() for trial in shown)


def test_without_a_terminal_only_changes_are_printed():
    screen = io.StringIO()
    table = LiveTable(screen)
    shown = trials(3)
    for _ in range(2):
        table.update(shown, KEYS, lambda: "the summary")
        table._drawn_s = 0.0
    (line,) = screen.getvalue().splitlines()
    assert line.startswith("trial 03 (lr=")
    assert line.endswith("failed, ValueError: a reason that is too long for a line   [the summary]")


def test_the_table_as_text_is_not_cut():
    text = table_text(trials(2), KEYS, "the summary")
    heading, first, second, summary = text.splitlines()
    assert heading.split() == ["trial", "lr", "weight_decay", "width", "status", "samples", "AP",
                               "images/s", "left"]  # fmt: skip
    assert first.endswith("waiting")
    assert second.endswith("a reason that is too long for a line")
    assert summary == "the summary"


def test_the_summary_counts_states_and_names_the_best():
    shown = trials(3)
    shown[0].ended, shown[0].metrics = "FINISHED", {"AP": 31.5}
    assert summary_line(shown, 5, "1.50 CPU-hours", 90.0) == (
        "5 trials: 1 failed, 1 finished, 3 waiting · 1.50 CPU-hours · best 31.5 AP (trial 01) · "
        "about 2 min left"
    )
