"""The command line that all training recipes share."""

from __future__ import annotations

import argparse
import logging
import os
import signal
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import NoReturn

from deta.platform.config import RunConfig, flatten, override
from deta.platform.shapes import ShapesDataset

# Before anything of Ray or MLflow is imported: they are slow to import, and --help needs neither.


def run_recipe(
    doc: str,
    variants: Mapping[str, Callable[[], RunConfig]],
    drawn_data: Mapping[str, Callable[[Path], ShapesDataset]] = MappingProxyType({}),
) -> NoReturn:
    """Read the command line, train, and exit with the run's outcome.

    Args:
        doc: the recipe's own description.
        variants: by name; the first is the default. The first line of each docstring is shown.
        drawn_data: variants that draw a data set of their own into a folder when none is given.

    The exit code is 0 for a run that reached its end, 2 for input that was refused before the
    cluster was touched, 1 for a run that failed, 130 and 143 for one that was stopped.
    """
    names = list(variants)
    listing = "\n".join(f"  {name:<22}{_first_line(make)}" for name, make in variants.items())
    parser = argparse.ArgumentParser(
        description=f"{doc.strip()}\n\nvariants:\n{listing}",
        epilog=(
            "Every number of the configuration is a key: --show prints them all, with the values "
            "that the\narguments give. Example: optim.lr=1e-4 total_batch_size=8 "
            "cluster.num_workers=2"
        ),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--variant", choices=names, default=names[0], metavar="NAME")
    for split in ("train", "val"):
        parser.add_argument(f"--{split}-images", metavar="FOLDER", help=f"{split} images")
        parser.add_argument(
            f"--{split}-annotations", metavar="FILE", help=f"{split} annotations, COCO format"
        )
    parser.add_argument("--name", help="of the run; its folder is storage/name")
    parser.add_argument("--resume", action="store_true", help="go on with the run of this name")
    parser.add_argument("--show", action="store_true", help="print the configuration and stop")
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="change the configuration"
    )
    arguments = parser.parse_intermixed_args()

    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    try:
        changes: dict[str, str] = {}
        for text in arguments.overrides:
            key, equals, value = text.partition("=")
            if not equals:
                raise ValueError(f"{text!r} is not of the form key=value")
            changes[key] = value
        for key in ("train_images", "train_annotations", "val_images", "val_annotations"):
            if getattr(arguments, key) is not None:
                changes[f"data.{key}"] = getattr(arguments, key)
        if arguments.name is not None:
            changes["name"] = arguments.name
        config = override(variants[arguments.variant](), changes)
    except ValueError as error:
        _refuse(error)
    if arguments.show:
        for key, value in flatten(config).items():
            print(f"{key}={value}")
        sys.exit(0)
    if arguments.variant in drawn_data and not config.data.train_images:
        folder = Path(config.storage).expanduser() / "data" / arguments.variant
        _echo(f"drawing the data set into {folder} …")
        drawn = drawn_data[arguments.variant](folder)
        config = override(
            config,
            {
                "data.train_images": str(drawn.train_images),
                "data.train_annotations": str(drawn.train_annotations),
                "data.val_images": str(drawn.val_images),
                "data.val_annotations": str(drawn.val_annotations),
            },
        )
    train_and_exit(config, resume=arguments.resume)


def train_and_exit(config: RunConfig, *, resume: bool = False) -> NoReturn:
    """Train; the outcome is the exit code, see `run_recipe`."""
    signal.signal(signal.SIGTERM, _exit_on_signal)
    from deta.platform.launch import launch

    try:
        launch(config, resume=resume, echo=_echo)
    except ValueError as error:
        _refuse(error)
    except RuntimeError as error:
        print(f"\nthe run failed: {error}", file=sys.stderr)
        sys.exit(1)
    except (KeyboardInterrupt, SystemExit):
        print("\nstopped; the same command with --resume goes on", file=sys.stderr)
        sys.stderr.flush()
        sys.stdout.flush()
        # The run is written and marked. Leaving by the front door, Ray's library would wait for
        # its workers and then abort, which hides the exit code.
        os._exit(128 + (_signals[0] if _signals else signal.SIGINT))
    sys.exit(0)


def _refuse(error: ValueError) -> NoReturn:
    print(f"error: {error}", file=sys.stderr)
    sys.exit(2)


_signals: list[int] = []  # kept here, since Ray raises a SystemExit of its own on the way


def _exit_on_signal(number: int, _frame: object) -> NoReturn:
    _signals.append(number)
    sys.exit(128 + number)


def _echo(line: str) -> None:
    print(line, flush=True)


def _first_line(make: Callable[[], RunConfig]) -> str:
    return (make.__doc__ or "").strip().partition("\n")[0]
