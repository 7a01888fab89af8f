"""The command line, printed lines, signals and exit codes of all jobs.

The options of a job are a frozen dataclass: its fields are the options, the comments beside them
the help. Arguments of the form `key=value` change the configuration.
"""

from __future__ import annotations

import logging
import os
import shutil
import signal
import sys
import textwrap
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

import tyro
from tyro.conf import Positional

if TYPE_CHECKING:
    from deta.platform.data.synthetic_shapes import ShapesDataset
    from deta.platform.run.config import RunConfig

Options = TypeVar("Options")
Inputs = TypeVar("Inputs")
# A file or folder to write. All jobs call it --out; --output is accepted, too.
OUTPUT = tyro.conf.arg(aliases=["--output"])
DEFAULT_STORAGE = "~/deta-runs"
HELP_OF_KEYS = """

Arguments key=value change the configuration: optim.lr=1e-4, or --optim.lr 1e-4. --keys lists all
keys with their values."""


@dataclass(frozen=True, kw_only=True)
class StorageOptions:
    """The folder of the runs, as an argument without a name."""

    storage: Positional[Path] = Path(DEFAULT_STORAGE)  # the folder of the runs


# By the option that sets it.
KEYS = {
    "train_images": "data.train_images",
    "train_annotations": "data.train_annotations",
    "val_images": "data.val_images",
    "val_annotations": "data.val_annotations",
    "name": "name",
    "storage": "storage",
    "init": "init_checkpoint",
}


@dataclass(frozen=True, kw_only=True)
class DataOptions:
    """The images for training and validation with their annotations."""

    train_images: str | None = None  # a folder; or shards, a folder or address (jobs/pack.py)
    train_annotations: str | None = None  # a file, COCO format
    val_images: str | None = None  # as --train-images
    val_annotations: str | None = None  # a file, COCO format

    def changes(self) -> dict[str, str]:
        """Return what was given, by configuration key."""
        given = {KEYS.get(field.name): getattr(self, field.name) for field in fields(self)}
        return {key: value for key, value in given.items() if key and value is not None}


def read_options(kind: type[Options], doc: str | None, **how: Any) -> Options:
    """Parse a command line without `key=value`; see `read_command_line`."""
    return read_command_line(kind, doc, **how)[0]


def read_command_line(
    kind: type[Options],
    doc: str | None,
    config: Any = None,
    *,
    program: str | None = None,
    arguments: Sequence[str] | None = None,
) -> tuple[Options, dict[str, str]]:
    """Parse a command line. Exits with 0 after --help and --keys, with 2 if it is refused.

    Args:
        kind: dataclass of the options.
        doc: description of the job, usually its docstring.
        config: configuration whose keys `key=value` changes; none: there are no such arguments.
        program: name in the help; default: the script's.
        arguments: default: those of this process.

    Returns:
        The options, and the changes of the configuration as text, which `override` checks.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    program = program or Path(sys.argv[0]).name
    known: Mapping[str, Any] = {}
    if config is not None:
        from deta.platform.run.config import flatten  # not at the top: it imports torch

        known = flatten(config)
        if "--keys" in words:
            _print_keys(config, program)
    words, changes = _sorted_words(words, kind, known)
    with _quiet_if_the_reader_leaves():
        if {"-h", "--help"} & set(words):
            # Not as tyro's description: it would join the lines of lists and examples.
            print(_wrapped((doc or "").strip() + (HELP_OF_KEYS if known else "")), end="\n\n")
        options = tyro.cli(
            kind,
            prog=program,
            description="",
            args=words,
            config=(
                tyro.conf.FlagCreatePairsOff,
                tyro.conf.DisallowNone,
                tyro.conf.PositionalMetavarFromFieldName,
            ),
        )
    return options, changes


@contextmanager
def _quiet_if_the_reader_leaves() -> Iterator[None]:
    """Exit without a traceback if the reader of a pipe has enough, as in `--help | head`."""
    try:
        try:
            yield
        finally:
            sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)


def _wrapped(text: str) -> str:
    """Fit paragraphs to the terminal, but leave those with indented lines as they are."""
    width = min(100, shutil.get_terminal_size().columns)
    return "\n\n".join(
        part if "\n  " in f"\n{part}" else textwrap.fill(" ".join(part.split()), width)
        for part in text.split("\n\n")
    )


def _print_keys(config: Any, program: str) -> NoReturn:
    with _quiet_if_the_reader_leaves():
        tyro.cli(
            type(config),
            default=config,
            prog=program,
            args=["--help"],
            use_underscores=True,
            config=(tyro.conf.AvoidSubcommands, tyro.conf.FlagConversionOff),
        )
    sys.exit(0)


def flags_of(kind: type) -> set[str]:
    """Return the options of a dataclass that take no value."""
    hints = typing.get_type_hints(kind)
    return {"-h", "--help"} | {_option(name) for name, hint in hints.items() if hint is bool}


def _sorted_words(
    words: Sequence[str], kind: type, known: Mapping[str, Any]
) -> tuple[list[str], dict[str, str]]:
    """Put arguments without a name first, however mixed they were, and take out `key=value`."""
    hints = typing.get_type_hints(kind, include_extras=True)
    lists = {_option(name) for name, hint in hints.items() if typing.get_origin(hint) is tuple}
    # Names of files may hold a `=`.
    takes_files = any(
        Positional in getattr(hint, "__metadata__", ())
        and typing.get_origin(hint.__origin__) is tuple
        for hint in hints.values()
    )
    flags, own = flags_of(kind), {_option(name) for name in hints}
    # `--storage FOLDER` and `storage=FOLDER`, where a job takes FOLDER without a name.
    nameless = {
        name
        for name, hint in hints.items()
        if Positional in getattr(hint, "__metadata__", ()) and hint.__origin__ is Path
    }
    plain: list[str] = []
    named: list[str] = []
    changes: dict[str, str] = {}
    rest = list(words)
    while rest:
        word = rest.pop(0)
        name, equals, value = word.partition("=")
        if name.removeprefix("--") in nameless and (equals or word.startswith("--")):
            plain.append(value if equals or not rest else rest.pop(0))
        elif not word.startswith("--"):
            is_key = equals and (name in known or (known and not takes_files and "/" not in name))
            if is_key:
                changes[name] = value
            else:
                plain.append(word)
        elif name not in own and name[2:] in known:
            if not equals:
                if not rest or rest[0].startswith("--"):
                    refuse(ValueError(f"{name} needs a value: {name} VALUE"))
                value = rest.pop(0)
            changes[name[2:]] = value
        else:
            named.append(word)
            takes = 0 if equals or word in flags else len(rest) if word in lists else 1
            is_list = takes > 1
            while takes and rest and not rest[0].startswith("--"):
                if is_list and rest[0].partition("=")[0] in known:
                    break
                named.append(rest.pop(0))
                takes -= 1
    return plain + named, changes


def _option(field_name: str) -> str:
    return "--" + field_name.replace("_", "-")


def drawn_data(
    config: RunConfig, draw: Callable[[Path], ShapesDataset], name: str = "demo"
) -> dict[str, str]:
    """Draw a data set unless the configuration names one; return its paths by key."""
    if config.data.train_images:
        return {}
    folder = Path(config.storage).expanduser() / "data" / name
    echo(f"drawing the data set into {folder} …")
    drawn = draw(folder)
    keys = ("train_images", "train_annotations", "val_images", "val_annotations")
    return {f"data.{key}": str(getattr(drawn, key)) for key in keys}


def echo(line: str) -> None:
    """Print a line at once, also into a pipe or a log."""
    print(line, flush=True)


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


def run_tool(
    prepare: Callable[[], Inputs], work: Callable[[Inputs], int], again: str = ""
) -> NoReturn:
    """Check the input with `prepare`, call `work` and exit.

    The exit code is 2 if `prepare` refused the input, 1 for a failure, 130 or 143 after Ctrl-C or
    SIGTERM, and otherwise what `work` returns.

    Args:
        again: hint printed after a failure or an interruption.
    """
    hint = again and f"; {again}"
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, _exit_on_signal)
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    try:
        try:
            inputs = prepare()
        except ValueError as error:
            refuse(error)
        sys.exit(work(inputs))
    except (ValueError, RuntimeError, OSError) as error:
        print(f"\nfailed: {error}{hint}", file=sys.stderr)
        sys.exit(1)
    except SystemExit:
        if _signals:
            print(f"\nstopped{hint}", file=sys.stderr)
        raise


def run_training(training: Callable[[], object], again: str) -> NoReturn:
    """Run a training, whose input may be refused until it starts; exit like `run_tool`."""
    run_tool(training, lambda _: 0, again)


def exit_cleanly_on_signals() -> None:
    """Make Ctrl-C end a server with exit code 0, and other signals with 128 + their number."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda n, _frame: sys.exit(0 if n == signal.SIGINT else 128 + n))
