"""The command line that sweeps and studies share."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import NoReturn

from deta.jobs.command_line import DataOptions, echo, run_training
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


def run_sweep_and_exit(options: SweepOptions, make: Callable[[], Sweep]) -> NoReturn:
    """Create the sweep and do what the options say. Exits with the codes of a recipe."""

    def run() -> None:
        sweep = make()
        if options.report_only:
            from deta.platform.sweep.results import report_only

            echo("\n".join(report_only(sweep).verdicts))
            return
        from deta.platform.sweep.tune_sweep import launch_sweep  # slow to import

        asks = sys.stdin.isatty() and not options.yes
        launch_sweep(
            sweep,
            probe=not options.no_probe,
            estimate_only=options.estimate,
            confirm=_confirm if asks and not options.no_probe else None,
            retry_failed=options.retry_failed,
        )

    run_training(run, again="repeat the command to continue")


def _confirm(_estimate: str) -> bool:
    return input("continue? [Y/n] ").strip().lower() in ("", "y", "yes")
