"""The live table of a sweep: one line per trial and a summary."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TextIO

from deta.platform.pages.number_format import duration
from deta.platform.sweep.search_space import format_value
from deta.platform.sweep.trial_folder import TrialFolder

REFRESH_S = 2.0
MIN_ROWS = 8


@dataclass(frozen=True)
class TableFooter:
    """Totals over all trials."""

    cost: str  # so far
    remaining_s: float | None


def rows(trials: Sequence[TrialFolder], keys: Sequence[str]) -> list[list[str]]:
    """Return the heading and one row per trial."""
    names = [_short(key, keys) for key in keys]
    table = [["trial", *names, "status", "samples", "AP", "images/s", "left", ""]]
    for trial in trials:
        speed, status = trial.images_per_s, trial.status
        left = trial.remaining_s if status == "running" else None
        samples = f"{trial.samples:,}"
        if trial.num_steps:
            samples += f" / {trial.num_steps * trial.config.total_batch_size:,}"
        table.append(
            [
                trial.trial.id,
                *(
                    format_value(trial.trial.changes[k]) if k in trial.trial.changes else ""
                    for k in keys
                ),
                status,
                samples if trial.samples or status != "waiting" else "",
                "" if trial.ap is None else f"{trial.ap:.1f}",
                "" if speed is None else f"{speed:.1f}",
                "" if left is None else duration(left),
                trial.reason.partition("\n")[0] if status in ("failed", "stopped") else "",
            ]
        )
    return table


def summary_line(trials: Sequence[TrialFolder], num_trials: int, footer: TableFooter) -> str:
    count: dict[str, int] = {}
    for trial in trials:
        count[trial.status] = count.get(trial.status, 0) + 1
    count["waiting"] = num_trials - sum(n for name, n in count.items() if name != "waiting")
    states = [
        f"{count[name]} {name}"
        for name in ("finished", "running", "waiting", "stopped", "failed")
        if count.get(name)
    ]
    line = f"{num_trials} trials: {', '.join(states)} · {footer.cost}"
    best = max((t for t in trials if t.ap is not None), key=lambda t: t.ap or 0.0, default=None)
    if best is not None:
        line += f" · best {best.ap:.1f} AP ({best.name})"
    if footer.remaining_s is not None:
        line += f" · about {duration(footer.remaining_s)} left"
    return line


class LiveTable:
    """A table that is redrawn in place on a terminal; elsewhere only changes are printed."""

    def __init__(self, echo: Callable[[str], None] | None = None, stream: TextIO | None = None):
        self.stream = stream or sys.stdout
        self.is_terminal = self.stream.isatty()
        self.echo = echo or (lambda line: print(line, file=self.stream, flush=True))
        self._num_drawn = 0
        self._printed: dict[str, tuple[object, ...]] = {}
        self._drawn_s = -float("inf")

    def print_line(self, line: str) -> None:
        """Print a permanent line above the table."""
        self._clear()
        self.echo(line)
        self._drawn_s = -float("inf")

    def update(
        self,
        trials: Sequence[TrialFolder],
        keys: Sequence[str],
        num_trials: int,
        footer: Callable[[], TableFooter],
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
        if last or self.is_terminal:
            drawn = [*aligned(rows(trials, keys)), summary_line(trials, num_trials, footer())]
            if not last:
                drawn = self._fit(drawn, trials)
            self._clear()
            for line in drawn:
                self.stream.write(line + "\n")
            self.stream.flush()
            self._num_drawn = 0 if last else len(drawn)
            return
        for trial in trials:
            seen = (trial.status, len(trial.curve), trial.ended)
            if self._printed.get(trial.trial.id, ("waiting", 0, "")) != seen:
                self._printed[trial.trial.id] = seen
                self.echo(f"{_line(trial)}   [{summary_line(trials, num_trials, footer())}]")

    def _fit(self, drawn: list[str], trials: Sequence[TrialFolder]) -> list[str]:
        """Fit the table into the window: cut lines, and choose the most relevant trials."""
        try:
            width, height = os.get_terminal_size(self.stream.fileno())
        except OSError:
            width, height = 120, 40
        room = max(MIN_ROWS, height - 3)
        head, body, foot = drawn[0], drawn[1:-1], drawn[-1]
        if len(body) + 2 > room:
            order = {"running": 0, "failed": 1, "finished": 2, "stopped": 3, "waiting": 4}
            ranked = sorted(range(len(body)), key=lambda i: (order[trials[i].status], -i))
            kept = sorted(ranked[: room - 3])
            hidden = len(body) - len(kept)
            body = [*(body[i] for i in kept), f"… and {hidden} more"]
        return [line[: width - 1] for line in (head, *body, foot)]

    def _clear(self) -> None:
        if self._num_drawn:
            self.stream.write(f"\033[{self._num_drawn}F\033[J")
            self._num_drawn = 0


def aligned(table: Sequence[Sequence[str]]) -> list[str]:
    """Align the columns; the last one is not padded."""
    widths = [max(len(row[i]) for row in table) for i in range(len(table[0]))]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in table
    ]


def _line(trial: TrialFolder) -> str:
    parts = [f"{trial.name}: {trial.status}"]
    if trial.name == trial.trial.cell.key:  # a number, which does not show the values
        changes = trial.trial.changes
        content = ", ".join(
            f"{key.rpartition('.')[2]}={format_value(changes[key])}" for key in changes
        )
        parts = [f"{trial.name} ({content}): {trial.status}"]
    if trial.samples:
        parts.append(f"{trial.samples:,} samples")
    if trial.ap is not None:
        parts.append(f"AP {trial.ap:.1f}")
    if trial.images_per_s is not None:
        parts.append(f"{trial.images_per_s:.1f} images/s")
    if trial.status in ("failed", "stopped"):
        parts.append(trial.reason.partition("\n")[0])
    return ", ".join(parts)


def _short(key: str, keys: Sequence[str]) -> str:
    """Return the last part of a key, or all of it if two keys end alike."""
    last = key.rpartition(".")[2]
    return last if sum(other.rpartition(".")[2] == last for other in keys) == 1 else key
