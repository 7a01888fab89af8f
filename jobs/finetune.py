"""`finetune`, the second command of every recipe: fine-tune a checkpoint on your own data set.

It also has the data set report, which any recipe prints with --look.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from deta.jobs.command_line import DataOptions, echo, read_command_line, refuse, run_training
from deta.jobs.total_batch import with_base_batch
from deta.platform.cluster.auth_token import (
    OpenClusterError,
    require_token_folder,
    starts_own_cluster,
)
from deta.platform.run.config import RunConfig, flatten, override
from deta.platform.run.run_paths import require_run_paths

# Before anything slow is imported: --help does not need it.
if TYPE_CHECKING:
    from deta.platform.launch.ray_driver import RayDriver
    from deta.platform.run.run import Run

Variants = Mapping[str, Callable[[], RunConfig]]

DESCRIPTION = """\
Fine-tune on a data set of your own, in COCO format. Classes come from its annotations.

  {program} finetune --init ~/deta-runs/deta-r50-12ep \\
      --train-images mine/train --train-annotations mine/train.json \\
      --val-images mine/val --val-annotations mine/val.json

CHECKPOINT is a run's folder (its best checkpoint) or one checkpoint in it: then the
model and its image sizes are the checkpoint's. Or a published file: then the model is the
variant's. All weights are used except those of classes that the checkpoint does not have.

Length, learning rate and early stopping follow from the number of images, and are printed with
reasons. Before a GPU is taken the data are checked: classes, sizes, problems, and a sheet of
training images as the model will see them.

Often wanted keys: optim.freeze=backbone (or encoder, decoder, all-but-heads), schedule.epochs,
schedule.patience (none: no early stopping), data.augmentation.short_edges, micro_batch_size."""


@dataclass(frozen=True, kw_only=True)
class TrainingOptions(DataOptions):
    """What a recipe and its fine-tuning share."""

    # Training recipe. To fine-tune, the default is the variant with the checkpoint's model.
    variant: str | None = None
    name: str | None = None  # of the run; its folder is storage/name
    resume: bool = False  # continue the run of this name
    look: bool = False  # report on the data and exit
    # Measure the memory of the worst batch, suggest micro_batch_size, and exit.
    probe: bool = False
    show: bool = False  # print the configuration and exit

    def checked_variant(self, variants: Variants) -> str | None:
        """Return the name if there is such a variant, else raise a ValueError."""
        if self.variant is not None and self.variant not in variants:
            raise ValueError(f"--variant {self.variant}: is not one of {', '.join(variants)}")
        return self.variant


@dataclass(frozen=True, kw_only=True)
class FinetuneOptions(TrainingOptions):
    init: str | None = None  # checkpoint to start from (see above)
    samples: int | None = None  # samples to train on in total


def finetune(program: str, variants: Variants, arguments: Sequence[str]) -> NoReturn:
    """Run the command line after `finetune`: report on the data, train, exit like `run_recipe`."""
    options, changes = read_command_line(
        FinetuneOptions,
        DESCRIPTION.format(program=f"python jobs/{program}"),
        next(iter(variants.values()))(),
        program=f"{program} finetune",
        arguments=arguments,
    )
    try:
        changes |= options.changes()
        if changes.get("init_checkpoint", "none") == "none":
            raise ValueError(
                "no checkpoint to start from; give --init CHECKPOINT. To train from scratch, leave "
                "out the word finetune"
            )
        first = variants[options.checked_variant(variants) or next(iter(variants))]()
        wanted = override(first, changes)
        if wanted.data.train_images or not options.show:
            require_run_paths(wanted, is_resumed=options.resume)
        config, origin = _base(changes, variants, options.variant)
        config = override(config, changes)
        if options.show and not config.data.train_annotations:
            show(config)

        import numpy as np
        import torch

        from deta.platform.launch.finetune_plan import machine_plan, schedule_plan, size_reason
        from deta.platform.launch.prepare_run import prepare_run

        given = frozenset(changes)
        machine = machine_plan(
            config, given=given, num_gpus=torch.cuda.device_count(), num_cpus=os.cpu_count() or 1
        )
        config = override(config, machine.changes)
        driver = start_driver(config, options)
        run = prepare_run(config, resume=options.resume)
        schedule = schedule_plan(
            run.config, len(run.train_set), given=given, samples=options.samples
        )
        run = replace(run, config=override(run.config, schedule.changes))
    except ValueError as error:
        refuse(error)
    if options.show:
        show(run.config)
    images = run.train_set.tables.images
    size = size_reason(run.config, np.minimum(images["height"], images["width"]).tolist())
    echo("\n".join((f"starting from {origin}", size, *machine.reasons, *schedule.reasons)))
    train_and_exit(lambda: run, options, reports=True, driver=driver)


def _base(changes: dict[str, str], variants: Variants, named: str | None) -> tuple[RunConfig, str]:
    """Return the configuration before the command line's changes, and a description of its origin.

    A run's folder in `changes` becomes its best checkpoint.
    """
    from deta.platform.checkpoint.format import read_checkpoint
    from deta.platform.checkpoint.local import find_checkpoint
    from deta.platform.launch.finetune_plan import base_config, variant_of
    from deta.platform.weights.converted_file import is_converted, read_converted
    from deta.platform.weights.weight_parts import is_weights_folder

    path = Path(changes["init_checkpoint"]).expanduser()
    theirs: RunConfig | None = None
    origin = changes["init_checkpoint"]
    if path.is_file() and is_converted(path):
        theirs = read_converted(path).config
    elif (path.is_dir() and not is_weights_folder(path)) or path.name == "best":
        checkpoint = read_checkpoint(find_checkpoint(path))
        theirs = checkpoint.config
        origin = changes["init_checkpoint"] = str(checkpoint.path)
        if (ap := checkpoint.state.metrics.get("AP")) is not None:
            origin += f", AP {ap:.1f} on its own data"
    alike = None if theirs is None else variant_of(theirs.model, variants)
    variant = named or alike or next(iter(variants))
    origin += f"; trains as variant {variant}"
    if theirs is not None and alike is None and named is None:
        origin += ", although its model differs: --variant NAME chooses another"
    base = base_config(variants[variant](), theirs)
    changes |= with_base_batch(base, changes)
    return base, origin


def start_driver(config: RunConfig, options: TrainingOptions) -> RayDriver | None:
    """Start a cluster on this machine for a run whose data are still to be checked.

    It ends with this process. None if the run is not to train yet, or joins a cluster.
    """
    if options.look or options.probe or options.show or not starts_own_cluster():
        return None
    from deta.platform.launch.ray_driver import RayDriver
    from deta.platform.system.process_tree import new_mark

    try:
        require_token_folder()
    except OpenClusterError as error:
        refuse(ValueError(error))
    driver = RayDriver(new_mark())
    driver.plan(config.cluster)
    return driver


def train_and_exit(
    prepare: Callable[[], Run],
    options: TrainingOptions,
    *,
    reports: bool,
    force: bool = False,
    tags: dict[str, str] | None = None,
    driver: RayDriver | None = None,
) -> NoReturn:
    """Train a run, or only report on its data (--look) or memory (--probe); exit like `run_tool`.

    Args:
        reports: report on the data of a new run before the training.
        driver: of the run, if it was started already.
    """
    from deta.platform.launch.console import Console
    from deta.platform.launch.start_run import launch_prepared

    def train() -> None:
        run = prepare()
        if options.look or options.probe:
            Console(run, echo).print_start()
            folder = run.folder.parent / "first-looks" / run.folder.name
            _look(run, folder, options.probe, refuses=not options.look)
            return
        launch_prepared(
            run,
            resume=options.resume,
            force=force,
            echo=echo,
            preview=(lambda run: _look(run, run.folder)) if reports else None,
            tags=tags,
            driver=driver,
        )

    run_training(train, "the same command with --resume goes on")


def _look(run: Run, folder: Path, probe: bool = False, *, refuses: bool = True) -> None:
    """Print the data set report; write its text and the sheet of training images into the folder.

    Raises:
        ValueError: an image cannot be decoded; or the probe found, on the device that will
            train, that the micro-batch does not fit.
    """
    import torch

    from deta.platform.launch.dataset_report import summarize_datasets
    from deta.platform.launch.memory_probe import suggest_micro_batch, worst_batch
    from deta.platform.launch.sample_sheet import write_training_sheet
    from deta.platform.run.journal import Journal

    config = run.config
    share = -(-config.total_batch_size // config.cluster.num_workers)
    num_images = min(config.micro_batch_size, share)
    worst = worst_batch(run.train_set, config.data.augmentation, num_images)
    lines = [
        *summarize_datasets(run.train_set, run.val_set, config.data).lines(),
        f"worst micro-batch: {num_images} images padded to {worst}",
    ]
    echo("\n".join(("", *lines)))
    sheet = folder / "pictures" / "training.png"
    write_training_sheet(sheet, run)
    if folder == run.folder:
        journal = Journal(run.folder)
        journal.write("picture", step=0, path=str(sheet.relative_to(folder)))
        journal.close()
    if probe:
        device = "cuda" if config.cluster.gpu and torch.cuda.is_available() else "cpu"
        suggestion = suggest_micro_batch(run, device, echo)
        measured, is_other_device = suggestion.lines(), config.cluster.gpu and device == "cpu"
        if is_other_device:
            measured.append("this machine has no GPU; a GPU needs about as much")
        echo("\n".join(measured))
        lines += measured
        if refuses and not is_other_device and not suggestion.fits:
            raise ValueError(measured[-1].lstrip("! "))
    (folder / "first_look.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    echo(f"training images as the model sees them: {sheet}\n")


def show(config: RunConfig) -> NoReturn:
    """Print every key with its value, the number of classes of the data, and exit."""
    from deta.platform.inference.image_paths import read_listing

    if config.data.train_annotations:
        with suppress(ValueError):  # told when it is trained on
            categories, _ = read_listing(Path(config.data.train_annotations).expanduser())
            config = override(config, {"model.num_classes": len(categories)})
    for key, value in flatten(config).items():
        print(f"{key}={value}")
    sys.exit(0)
