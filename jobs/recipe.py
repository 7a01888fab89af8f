"""The command line that all training recipes share."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import NoReturn

from deta.jobs.command_line import (
    add_data_options,
    data_changes,
    described_parser,
    drawn_changes,
    echo,
    exit_after,
    read_changes,
    refuse,
)
from deta.jobs.finetune import add_look_options, finetune, look_and_exit
from deta.jobs.total_batch import batch_notes, with_base_batch
from deta.platform.data.synthetic_shapes import ShapesDataset
from deta.platform.run.config import RunConfig, flatten, override
from deta.platform.run.run_file import RECIPE_TAG

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
    if sys.argv[1:2] == ["finetune"]:
        finetune(Path(sys.argv[0]).name, variants, sys.argv[2:])
    names = list(variants)
    listing = "\n".join(f"  {name:<22}{_first_line(make)}" for name, make in variants.items())
    parser = described_parser(
        f"{doc.strip()}\n\nvariants:\n{listing}",
        "Every number of the configuration is a key: --show prints them all, with the values "
        "that the\narguments give. Example: optim.lr=1e-4 total_batch_size=8 "
        "cluster.num_workers=2\n\n"
        "To fine-tune a checkpoint on your own data set, put the word finetune in front; see "
        "finetune --help",
    )
    parser.add_argument("--variant", choices=names, default=names[0], metavar="NAME")
    add_data_options(parser)
    parser.add_argument("--name", help="of the run; its folder is storage/name")
    parser.add_argument("--resume", action="store_true", help="continue the run of this name")
    parser.add_argument(
        "--force", action="store_true", help="resume although data or configuration have changed"
    )
    add_look_options(parser)
    parser.add_argument("--show", action="store_true", help="print the configuration and exit")
    parser.add_argument(
        "--compare", action="store_true", help="compare it with the published one and exit"
    )
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="change the configuration"
    )
    arguments = parser.parse_intermixed_args()

    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    try:
        changes = read_changes(arguments.overrides) | data_changes(arguments)
        if arguments.name is not None:
            changes["name"] = arguments.name
        recipe = variants[arguments.variant]()
        changes = with_base_batch(recipe, changes)
        config = override(recipe, changes)
    except ValueError as error:
        refuse(error)
    if arguments.compare:
        print(_comparison(f"{Path(sys.argv[0]).stem}.{arguments.variant}", config))
        sys.exit(0)
    for note in batch_notes(recipe, config, changes):
        print(note, file=sys.stderr)
    if arguments.show:
        for key, value in flatten(config).items():
            print(f"{key}={value}")
        sys.exit(0)
    if arguments.variant in drawn_data and not config.data.train_images:
        folder = Path(config.storage).expanduser() / "data" / arguments.variant
        echo(f"drawing the data set into {folder} …")
        drawn = drawn_data[arguments.variant](folder)
        config = override(config, drawn_changes(drawn))
    if (arguments.look or arguments.probe) and not arguments.resume:
        look_and_exit(config, only_look=arguments.look, probe=arguments.probe)
    name = f"{Path(sys.argv[0]).stem}.{arguments.variant}"
    train_and_exit(config, name, resume=arguments.resume, force=arguments.force)


def _comparison(variant: str, config: RunConfig) -> str:
    from deta.jobs.differences import as_text, compare_configs
    from deta.jobs.published import PUBLISHED

    if variant not in PUBLISHED:
        return f"{variant} follows no published system"
    return as_text(compare_configs(config, PUBLISHED[variant]), PUBLISHED[variant])


def train_and_exit(
    config: RunConfig, recipe: str, *, resume: bool = False, force: bool = False
) -> NoReturn:
    """Train; the outcome is the exit code, see `run_recipe`.

    Args:
        recipe: name under which the leaderboard has it.
    """
    from deta.platform.launch.start_run import launch

    tags = {RECIPE_TAG: recipe}
    exit_after(lambda: launch(config, resume=resume, force=force, echo=echo, tags=tags))


def _first_line(make: Callable[[], RunConfig]) -> str:
    return (make.__doc__ or "").strip().partition("\n")[0]
