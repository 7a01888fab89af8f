"""A progress bar on a terminal."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def progress_bar(
    description: str, total: float, *, is_bytes: bool = False, show: bool = True
) -> Iterator[Callable[[float], None]]:
    """Show a bar with rate and remaining time on stderr; yield the function that advances it.

    Nothing is shown if stderr is not a terminal, and nothing is left of the bar at its end.
    """
    if not show:
        yield lambda amount: None
        return
    from rich import progress
    from rich.console import Console

    console = Console(stderr=True)
    columns: list[progress.ProgressColumn] = (
        [progress.DownloadColumn(), progress.TransferSpeedColumn()]
        if is_bytes
        else [progress.MofNCompleteColumn(), progress.TextColumn("{task.fields[rate]:.1f}/s")]
    )
    with progress.Progress(
        "{task.description}",
        progress.BarColumn(bar_width=20),
        *columns,
        progress.TimeRemainingColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    ) as bar:
        bar.add_task(description, total=total, rate=0.0)
        (task,) = bar.tasks
        yield lambda amount: bar.update(task.id, advance=amount, rate=task.speed or 0.0)
