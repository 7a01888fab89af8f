"""The command line that all training recipes share."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import NoReturn

from deta.jobs.command_line import drawn_data, read_command_line, refuse
from deta.jobs.finetune import TrainingOptions, finetune, show, start_driver, train_and_exit
from deta.jobs.total_batch import batch_notes, with_base_batch
from deta.platform.data.synthetic_shapes import ShapesDataset
from deta.platform.run.config import RunConfig, override
from deta.platform.run.run_file import RECIPE_TAG
from deta.platform.run.run_paths import require_run_paths, require_storage

# Before anything of Ray or MLflow is imported: they are slow to import, and --help needs neither.


@dataclass(frozen=True, kw_only=True)
class RecipeOptions(TrainingOptions):
    force: bool = False  # resume although data or configuration have changed
    compare: bool = False  # compare the configuration with the published one and exit


def run_recipe(
    doc: str,
    variants: Mapping[str, Callable[[], RunConfig]],
    drawn: Mapping[str, Callable[[Path], ShapesDataset]] = MappingProxyType({}),
) -> NoReturn:
    """Read the command line, train, and exit with the run's outcome.

    Args:
        doc: the recipe's own description.
        variants: by name; the first is the default. The first line of each docstring is shown.
        drawn: variants that draw a data set of their own into a folder when none is given.

    The exit code is 0 for a run that reached its end, 2 for input that was refused before the
    cluster was touched, 1 for a run that failed, 130 and 143 for one that was stopped.
    """
    if sys.argv[1:2] == ["finetune"]:
        finetune(Path(sys.argv[0]).name, variants, sys.argv[2:])
    listing = "\n".join(
        f"  {name:<22}{(make.__doc__ or '').strip().partition(chr(10))[0]}"
        for name, make in variants.items()
    )
    options, changes = read_command_line(
        RecipeOptions,
        f"{doc.strip()}\n\nvariants, of which the first is the default:\n{listing}\n\n"
        "To fine-tune a checkpoint on your own data set, put the word finetune in front; see "
        "finetune --help",
        next(iter(variants.values()))(),
    )
    try:
        variant = options.checked_variant(variants) or next(iter(variants))
        recipe = variants[variant]()
        changes = with_base_batch(recipe, changes | options.changes())
        config = override(recipe, changes)
    except ValueError as error:
        refuse(error)
    name = f"{Path(sys.argv[0]).stem}.{variant}"
    if options.compare:
        print(_comparison(name, config))
        sys.exit(0)
    for note in batch_notes(recipe, config, changes):
        print(note, file=sys.stderr)
    if options.show:
        show(config)
    draws = variant in drawn and not config.data.train_images
    try:
        if draws:
            require_storage(config.storage)
        else:
            require_run_paths(config, is_resumed=options.resume)
    except ValueError as error:
        refuse(error)
    driver = start_driver(config, options)
    if draws:
        config = override(config, drawn_data(config, drawn[variant], variant))

    from deta.platform.launch.prepare_run import prepare_run

    train_and_exit(
        lambda: prepare_run(config, resume=options.resume),
        options,
        reports=False,
        force=options.force,
        tags={RECIPE_TAG: name},
        driver=driver,
    )


def _comparison(variant: str, config: RunConfig) -> str:
    from deta.jobs.differences import as_text, compare_configs
    from deta.jobs.published import PUBLISHED

    if variant not in PUBLISHED:
        return f"{variant} follows no published system"
    return as_text(compare_configs(config, PUBLISHED[variant]), PUBLISHED[variant])
