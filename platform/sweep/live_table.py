"""The live table of a sweep: one line per trial and a summary."""

from __future__ import annotations

import io
import time
from collections import Counter
from collections.abc import Callable, Sequence
from typing import TextIO

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table

from deta.platform.pages.number_format import duration
from deta.platform.sweep.search_space import format_value
from deta.platform.sweep.trial_folder import TrialFolder

REFRESH_S = 2.0
MIN_ROWS = 8
# In this order trials keep their place on a small screen.
STATES = ("running", "failed", "finished", "stopped", "waiting")


def trials_table(trials: Sequence[TrialFolder], keys: Sequence[str]) -> Table:
    """Return one row per trial, with its values of the keys."""
    lasts = Counter(key.rpartition(".")[2] for key in keys)
    names = [last if lasts[last := key.rpartition(".")[2]] == 1 else key for key in keys]
    rows = []
    for trial in trials:
        changes, speed, status = trial.trial.changes, trial.images_per_s, trial.status
        left = trial.remaining_s if status == "running" else None
        samples = f"{trial.samples:,}" if trial.samples or status != "waiting" else ""
        if samples and trial.num_steps:
            samples += f" / {trial.num_steps * trial.config.total_batch_size:,}"
        rows.append(
            [
                trial.trial.id,
                *(format_value(changes[key]) if key in changes else "" for key in keys),
                status,
                samples,
                "" if trial.ap is None else f"{trial.ap:.1f}",
                "" if speed is None else f"{speed:.1f}",
                "" if left is None else duration(left),
                _why(trial),
            ]
        )
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, expand=True)
    headings = ("trial", *names, "status", "samples", "AP", "images/s", "left")
    for place, heading in enumerate(headings):  # on a narrow screen, rather cut it than a value
        table.add_column(
            heading, no_wrap=True, min_width=max([len(row[place]) for row in rows], default=0)
        )
    table.add_column(no_wrap=True, ratio=1)  # why it ended, in what the others leave of a line
    for row in rows:
        table.add_row(*row)
    return table


def table_text(trials: Sequence[TrialFolder], keys: Sequence[str], summary: str) -> str:
    """Return the table and the summary as plain text, however wide."""
    text = io.StringIO()
    Console(file=text, width=10_000, markup=False, highlight=False).print(
        trials_table(trials, keys)
    )
    return "\n".join(line.rstrip() for line in [*text.getvalue().splitlines(), summary]) + "\n"


def summary_line(
    trials: Sequence[TrialFolder], num_trials: int, cost: str, remaining_s: float | None
) -> str:
    """
    Args:
        cost: of all trials so far.
        remaining_s: until all have ended.
    """
    count = Counter[str](trial.status for trial in trials)
    count["waiting"] += num_trials - len(trials)
    states = [f"{count[name]} {name}" for name in sorted(STATES) if count[name]]
    line = f"{num_trials} trials: {', '.join(states)} · {cost}"
    best = max((t for t in trials if t.ap is not None), key=lambda t: t.ap or 0.0, default=None)
    if best is not None:
        line += f" · best {best.ap:.1f} AP ({best.name})"
    return line if remaining_s is None else f"{line} · about {duration(remaining_s)} left"


class LiveTable:
    """A table that is redrawn in place on a terminal; elsewhere only changes are printed."""

    def __init__(self, stream: TextIO | None = None) -> None:
        self.console = Console(file=stream, markup=False, highlight=False, emoji=False)
        self._live: Live | None = None
        self._printed: dict[str, tuple[object, ...]] = {}
        self._drawn_s = -float("inf")

    def print_line(self, line: str) -> None:
        """Print a permanent line above the table."""
        self.console.print(line, soft_wrap=True)

    def update(
        self,
        trials: Sequence[TrialFolder],
        keys: Sequence[str],
        summary: Callable[[], str],
        *,
        last: bool = False,
    ) -> None:
        """Redraw the table. Rate-limited, so it may be called often.

        Args:
            last: draw all rows and leave them on the screen.
        """
        now_s = time.monotonic()
        if not last and now_s - self._drawn_s < REFRESH_S:
            return
        self._drawn_s = now_s
        if self.console.is_terminal:
            if self._live is None:
                self._live = Live(console=self.console, auto_refresh=False, transient=True)
                self._live.start()
            if last:
                self._live.stop()
                self.console.print(trials_table(trials, keys), summary())
                self._live = None
            else:
                self._live.update(self._screen(trials, keys, summary()), refresh=True)
        elif last:
            self.print_line(table_text(trials, keys, summary()).rstrip())
        else:
            for trial in trials:
                seen = (trial.status, len(trial.curve), trial.ended)
                if self._printed.get(trial.trial.id, ("waiting", 0, "")) != seen:
                    self._printed[trial.trial.id] = seen
                    self.print_line(f"{_line(trial)}   [{summary()}]")

    def _screen(self, trials: Sequence[TrialFolder], keys: Sequence[str], summary: str) -> Group:
        """Return the table with as many of the most relevant trials as the window has room for."""
        room = max(MIN_ROWS, self.console.height - 5)
        shown = set(sorted(range(len(trials)), key=lambda i: STATES.index(trials[i].status))[:room])
        hidden = [f"… and {len(trials) - len(shown)} more"] if len(shown) < len(trials) else []
        kept = [trial for i, trial in enumerate(trials) if i in shown]
        return Group(trials_table(kept, keys), *hidden, summary)


def _why(trial: TrialFolder) -> str:
    return trial.reason.partition("\n")[0] if trial.status in ("failed", "stopped") else ""


def _line(trial: TrialFolder) -> str:
    name, changes = trial.name, trial.trial.changes
    if name == trial.trial.cell.key:  # a number, which does not show the values
        values = (f"{k.rpartition('.')[2]}={format_value(v)}" for k, v in changes.items())
        name += f" ({', '.join(values)})"
    parts = [
        f"{name}: {trial.status}",
        f"{trial.samples:,} samples" if trial.samples else "",
        "" if trial.ap is None else f"AP {trial.ap:.1f}",
        "" if trial.images_per_s is None else f"{trial.images_per_s:.1f} images/s",
        _why(trial),
    ]
    return ", ".join(filter(None, parts))
