"""Parsers, printed lines, signals and exit codes that all jobs share."""

from __future__ import annotations

import argparse
import logging
import os
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn, TypeVar

if TYPE_CHECKING:
    from deta.platform.data.synthetic_shapes import ShapesDataset

Inputs = TypeVar("Inputs")
DEFAULT_STORAGE = "~/deta-runs"


def described_parser(
    doc: str | None, epilog: str = "", program: str | None = None
) -> argparse.ArgumentParser:
    """Return a parser that prints the docstring of a job as its help, line by line."""
    return argparse.ArgumentParser(
        prog=program,
        description=(doc or "").strip(),
        epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def add_data_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that name the training and the validation images with their annotations."""
    for split in ("train", "val"):
        parser.add_argument(
            f"--{split}-images",
            metavar="FOLDER",
            help=f"{split} images; or shards, a folder or address (jobs/pack.py)",
        )
        parser.add_argument(
            f"--{split}-annotations", metavar="FILE", help=f"{split} annotations, COCO format"
        )


def add_storage_argument(parser: argparse.ArgumentParser) -> None:
    """Add the folder of the runs as an argument without a name."""
    parser.add_argument(
        "storage",
        nargs="?",
        type=Path,
        metavar="STORAGE",
        default=Path(DEFAULT_STORAGE),
        help=f"the folder of the runs, default {DEFAULT_STORAGE}",
    )


def read_changes(texts: Sequence[str]) -> dict[str, str]:
    """Split `key=value` arguments.

    Raises:
        ValueError: an argument is not of that form.
    """
    changes: dict[str, str] = {}
    for text in texts:
        key, equals, value = text.partition("=")
        if not equals:
            raise ValueError(f"{text!r} is not of the form key=value")
        changes[key] = value
    return changes


def data_changes(arguments: argparse.Namespace) -> dict[str, str]:
    """Return the values of `add_data_options` that were given, by configuration key."""
    return {
        f"data.{key}": getattr(arguments, key)
        for key in ("train_images", "train_annotations", "val_images", "val_annotations")
        if getattr(arguments, key) is not None
    }


def drawn_changes(drawn: ShapesDataset) -> dict[str, str]:
    """Return the paths of a drawn data set by configuration key."""
    return {
        "data.train_images": str(drawn.train_images),
        "data.train_annotations": str(drawn.train_annotations),
        "data.val_images": str(drawn.val_images),
        "data.val_annotations": str(drawn.val_annotations),
    }


def echo(line: str) -> None:
    """Print a line at once, also into a pipe or a log."""
    print(line, flush=True)


def exit_after(
    training: Callable[[], object], again: str = "the same command with --resume goes on"
) -> NoReturn:
    """Run a training and exit with its outcome as exit code (see `run_recipe`).

    Args:
        again: hint printed after an interruption.
    """
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, _exit_on_signal)
    try:
        training()
    except ValueError as error:
        refuse(error)
    except RuntimeError as error:
        print(f"\nthe run failed: {error}", file=sys.stderr)
        sys.exit(1)
    except SystemExit:
        print(f"\nstopped; {again}", file=sys.stderr)
        raise
    sys.exit(0)


def refuse(error: ValueError) -> NoReturn:
    """Print why the input was refused, and exit with 2."""
    print(f"error: {error}", file=sys.stderr)
    sys.exit(2)


_signals: list[int] = []


def _exit_on_signal(number: int, _frame: object) -> None:
    """Shut down cleanly at the first signal, and at once at a second Ctrl-C."""
    _signals.append(number)
    if len(_signals) == 1:
        sys.exit(128 + number)
    if number == signal.SIGINT:
        os._exit(128 + number)  # the orphan reaper ends what is left


def run_tool(prepare: Callable[[], Inputs], work: Callable[[Inputs], int]) -> NoReturn:
    """Check the input with `prepare`, call `work` and exit.

    The exit code is 2 if `prepare` refused the input, 1 for a failure, 130 or 143 after Ctrl-C or
    SIGTERM, and otherwise what `work` returns.
    """
    signal.signal(signal.SIGTERM, _exit_with_signal)
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    try:
        try:
            inputs = prepare()
        except ValueError as error:
            refuse(error)
        sys.exit(work(inputs))
    except (ValueError, RuntimeError, OSError) as error:
        print(f"\nfailed: {error}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        print("\nstopped", file=sys.stderr)
        sys.exit(130)


def _exit_with_signal(number: int, _frame: object) -> NoReturn:
    sys.exit(128 + number)


def exit_cleanly_on_signals() -> None:
    """Make Ctrl-C end a server with exit code 0, and other signals with 128 + their number."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _exit_from_server)


def _exit_from_server(number: int, _frame: object) -> NoReturn:
    sys.exit(0 if number == signal.SIGINT else 128 + number)
