"""Load the initial weights of a run, for a complete detector or its backbone alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from deta.model.architectures import Detector, DetectorConfig, layouts_of
from deta.platform.data.coco_dataset import Category
from deta.platform.run.config import RunConfig
from deta.platform.weights.backbone_file import read_backbone
from deta.platform.weights.class_mapping import ClassPlan, InitClasses, plan_classes
from deta.platform.weights.model_file import ModelFile, is_class_head, open_model_file


def load_initial_weights(
    model: Detector,
    path: Path,
    categories: tuple[Category, ...],
    how: InitClasses = "by_name",
) -> list[str]:
    """Load weights into a new model; classes without weights in the file keep its rows.

    Args:
        path: a checkpoint folder, a file that jobs/convert.py wrote, or a published file.
        categories: of the data set; those of the weights may differ.
        how: how the rows of the file are matched with the categories.

    Returns:
        Lines about matched, new and dropped classes; empty if the classes are the same.

    Raises:
        ValueError: the file does not fit the model; names missing and unused tensors.
    """
    file = open_model_file(path, RunConfig(model=model.config))
    untrained = {name: tensor for name, tensor in model.state_dict().items() if is_class_head(name)}
    state, plan = _initial_state(file, model.config, categories, how, untrained)
    model.load_state_dict(state)
    return list(plan.lines)


def check_initial_weights(config: RunConfig, categories: tuple[Category, ...]) -> list[str]:
    """Check what `load_initial_weights` and `load_backbone` will read; return lines to print.

    Raises:
        ValueError: the errors of these two functions, before the run starts.
    """
    lines: list[str] = []
    model = replace(config.model, num_classes=len(categories))
    if config.init_checkpoint is not None:
        path = Path(config.init_checkpoint)
        file = open_model_file(path, replace(config, model=model))
        shapes = layouts_of(model).shapes_of(model)
        untrained = {name: torch.zeros(shapes[name]) for name in shapes if is_class_head(name)}
        _, plan = _initial_state(file, model, categories, config.init_classes, untrained)
        lines += [f"starts from {file.path} ({'; '.join((f'{file.layout} layout', *file.notes))})"]
        lines += plan.lines
        theirs, ours = file.config.data.evaluation_size, config.data.evaluation_size
        if theirs != ours:
            lines.append(
                f"! its images were resized to a short edge of {theirs.short_edge} px (at most "
                f"{theirs.max_long_edge}), those of this run to {ours.short_edge} px (at most "
                f"{ours.max_long_edge}); data.evaluation_size.* and data.augmentation.* set it"
            )
    if config.init_backbone is not None:
        lines += read_backbone(Path(config.init_backbone), model)[1]
    return lines


def load_backbone(model: Detector, path: Path) -> list[str]:
    """Load weights into the backbone of a new model only; return lines to print.

    Raises:
        ValueError: as `read_backbone`.
    """
    state, lines = read_backbone(path, model.config)
    model.load_state_dict({**model.state_dict(), **state})
    return lines


def _initial_state(
    file: ModelFile,
    model: DetectorConfig,
    categories: tuple[Category, ...],
    how: InitClasses,
    untrained: Mapping[str, Tensor],
) -> tuple[dict[str, Tensor], ClassPlan]:
    """Return the state under our names with a row for each category, and the origin of the rows."""
    try:
        file.require_known()
        rows, own = file.classes.rows_and_categories
        if how == "by_name" and own == categories and rows == list(range(file.classes.num_rows)):
            plan = ClassPlan(tuple(rows), ())
        else:
            plan = plan_classes(file.classes, categories, how)
        if how == "drop":
            state = {n: t for n, t in file.tensors.items() if not is_class_head(n)} | {**untrained}
        else:
            state = layouts_of(model).select_classes(file.tensors, plan.rows, untrained)
        return layouts_of(model).fit(state, model), plan
    except ValueError as error:
        raise ValueError(f"{file.path}: {error}") from error
