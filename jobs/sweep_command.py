"""The command line that sweeps and studies share."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from deta.jobs.command_line import DataOptions, drawn_changes, echo, exit_after, refuse
from deta.platform.data.synthetic_shapes import ShapesDataset
from deta.platform.run.config import RunConfig, override
from deta.platform.sweep.search_space import Sweep

# Before anything of Ray or MLflow is imported: they are slow to import, and --help needs neither.


@dataclass(frozen=True, kw_only=True)
class SweepOptions(DataOptions):
    """The options of every sweep; `key=value` changes the base configuration of all trials."""

    name: str | None = None  # of the sweep; its folder is storage/name
    storage: str | None = None  # folder where it is stored; all nodes must see it
    estimate: bool = False  # measure the speed, print the cost, and exit
    report_only: bool = False  # write the report of the existing trials, and exit
    yes: bool = False  # do not ask whether to continue
    no_probe: bool = False  # start without an estimate
    retry_failed: bool = False  # run failed trials again

    def changes(self) -> dict[str, str]:
        named = {"name": self.name, "storage": self.storage}
        return super().changes() | {key: value for key, value in named.items() if value is not None}


def with_drawn_data(
    config: RunConfig, changes: Mapping[str, Any], draw: Callable[[Path], ShapesDataset]
) -> dict[str, Any]:
    """Add a data set of drawn shapes to the changes if none is given."""
    config = override(config, changes)
    if config.data.train_images:
        return dict(changes)
    folder = Path(config.storage).expanduser() / "data" / "demo"
    echo(f"drawing the data set into {folder} …")
    drawn = draw(folder)
    return dict(changes) | drawn_changes(drawn)


def run_sweep_and_exit(options: SweepOptions, make: Callable[[], Sweep]) -> NoReturn:
    """Create the sweep and do what the options say. Exits with the codes of a recipe."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    try:
        sweep = make()
    except ValueError as error:
        refuse(error)

    def run() -> None:
        if options.report_only:
            from deta.platform.sweep.results import report_only

            report = report_only(sweep)
            for sentence in report.verdicts:
                echo(sentence)
            return
        from deta.platform.sweep.tune_sweep import launch_sweep  # slow to import

        asks = sys.stdin.isatty() and not options.yes
        launch_sweep(
            sweep,
            probe=not options.no_probe,
            estimate_only=options.estimate,
            confirm=_ask if asks and not options.no_probe else None,
            retry_failed=options.retry_failed,
        )

    exit_after(run, again="repeat the command to continue")


def _ask(_estimate: str) -> bool:
    return input("continue? [Y/n] ").strip().lower() in ("", "y", "yes")
