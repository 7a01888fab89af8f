"""The command line that sweeps and studies share."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NoReturn

from deta.jobs.command_line import (
    add_data_options,
    data_changes,
    drawn_changes,
    echo,
    exit_after,
    read_changes,
    refuse,
)
from deta.platform.data.synthetic_shapes import ShapesDataset
from deta.platform.run.config import RunConfig, override
from deta.platform.sweep.search_space import Sweep

# Before anything of Ray or MLflow is imported: they are slow to import, and --help needs neither.


def add_sweep_options(parser: argparse.ArgumentParser) -> None:
    add_data_options(parser)
    parser.add_argument("--name", help="of the sweep; its folder is storage/name")
    parser.add_argument(
        "--storage", metavar="FOLDER", help="where it is stored; all nodes must see it"
    )
    parser.add_argument(
        "--estimate", action="store_true", help="measure the speed, print the cost, and exit"
    )
    parser.add_argument(
        "--report-only",
        action="store_true",
        help="write the report of the existing trials, and exit",
    )
    parser.add_argument("--yes", action="store_true", help="do not ask whether to continue")
    parser.add_argument("--no-probe", action="store_true", help="start without an estimate")
    parser.add_argument("--retry-failed", action="store_true", help="run failed trials again")
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="key=value",
        help="change the base configuration of all trials",
    )


def changes_of(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return what the command line changes in the base configuration, by dotted key.

    Raises:
        ValueError: an argument is not of the form key=value.
    """
    changes: dict[str, Any] = {**read_changes(arguments.overrides), **data_changes(arguments)}
    for key in ("name", "storage"):
        if getattr(arguments, key) is not None:
            changes[key] = getattr(arguments, key)
    return changes


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


def run_sweep_and_exit(arguments: argparse.Namespace, make: Callable[[], Sweep]) -> NoReturn:
    """Create the sweep and do what the options say. Exits with the codes of a recipe."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    try:
        sweep = make()
    except ValueError as error:
        refuse(error)

    def run() -> None:
        if arguments.report_only:
            from deta.platform.sweep.results import report_only

            report = report_only(sweep)
            for sentence in report.verdicts:
                echo(sentence)
            return
        from deta.platform.sweep.tune_sweep import launch_sweep  # slow to import

        asks = sys.stdin.isatty() and not arguments.yes
        launch_sweep(
            sweep,
            probe=not arguments.no_probe,
            estimate_only=arguments.estimate,
            confirm=_ask if asks and not arguments.no_probe else None,
            retry_failed=arguments.retry_failed,
        )

    exit_after(run, again="repeat the command to continue")


def _ask(_estimate: str) -> bool:
    return input("continue? [Y/n] ").strip().lower() in ("", "y", "yes")
