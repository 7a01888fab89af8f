"""Weights with what is known of them: the model that they are of, and their classes.

Four kinds of file or folder come to one form: a checkpoint of ours, a file that jobs/convert.py
wrote, a published file, and a bare file of tensors under our names.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import cast, get_args

from torch import Tensor

from deta.model import pretrained, pretrained_anchor
from deta.model.anchor_detr import AnchorDETRConfig
from deta.model.architectures import DetectorConfig
from deta.model.detector import ModelConfig
from deta.model.pretrained import Renamed
from deta.model.published_names import Format
from deta.model.published_sizes import with_sizes_of
from deta.platform.checkpoint.format import MANIFEST, read_checkpoint
from deta.platform.data.coco_dataset import Category
from deta.platform.run.config import RunConfig
from deta.platform.weights.class_mapping import (
    FileClasses,
    listed_classes,
    own_classes,
    plan_classes,
    published_classes,
)
from deta.platform.weights.converted_file import is_converted, read_converted
from deta.platform.weights.weight_files import WeightsError, read_weights

OURS = "ours"


@dataclass(frozen=True)
class ModelFile:
    """Weights under our names, complete or not, for a model of a configuration."""

    path: Path
    layout: str  # ours, official, detrex or huggingface
    config: RunConfig  # its own; of a published file the given one with the sizes that show
    tensors: dict[str, Tensor]  # under our names
    classes: FileClasses
    # Of a published file, under its names; of ours, each name is its own source.
    sources: dict[str, list[str]]
    computed: list[str]
    unknown: list[str]
    knows_config: bool  # otherwise what tensors do not show is as the caller gave it

    @property
    def origin(self) -> str:
        """For people."""
        return f"{self.path} ({self.layout} layout, {self.classes.origin})"

    def rows_of(
        self, categories: Sequence[Category] | None
    ) -> tuple[list[int], tuple[Category, ...]]:
        """The rows of the class heads that stand for some categories.

        Args:
            categories: found by name; where the file names none, as many as it has rows. None: all
                of the file's.

        Raises:
            ValueError: a category is not among the file's classes.
        """
        if categories is None:
            return self.classes.rows_and_categories
        if not self.classes.by_row:
            if len(categories) != self.classes.num_rows:
                raise ValueError(
                    f"has {self.classes.origin}, and {len(categories)} are asked for. Give them "
                    "with jobs/convert.py --classes FILE and use what it writes"
                )
            return list(range(len(categories))), tuple(categories)
        plan = plan_classes(self.classes, categories)
        unknown = [c.name for c, row in zip(categories, plan.rows, strict=True) if row is None]
        if unknown:
            raise ValueError(
                f"has {self.classes.origin}; among them are no {', '.join(unknown[:10])}"
                f"{f' and {len(unknown) - 10} more' if len(unknown) > 10 else ''}. Use a data set "
                "of its classes, or train it on this one first (init_checkpoint)"
            )
        return [row for row in plan.rows if row is not None], tuple(categories)

    def state_of(self, rows: Sequence[int], model: DetectorConfig) -> dict[str, Tensor]:
        """The tensors for a model that has these rows of the class heads.

        Raises:
            ValueError: a tensor is missing, left over or of another shape.
        """
        self.require_known()
        every = list(rows) == list(range(self.classes.num_rows))
        return fit(
            self.tensors if every else select_classes(self.tensors, rows, None, model), model
        )

    def require_known(self) -> None:
        """Raises ValueError if there are tensors that have no place in the detector."""
        if self.unknown:
            shown = ", ".join(self.unknown[:10])
            more = f" and {len(self.unknown) - 10} more" if len(self.unknown) > 10 else ""
            raise ValueError(
                f"{shown}{more}: no such tensor in this detector as {self.layout} stores it; if "
                "they are known to be unused, convert the file with jobs/convert.py "
                "--allow-unused PATTERN first"
            )


def open_model_file(path: Path, base: RunConfig) -> ModelFile:
    """Read weights, whatever they are.

    Args:
        path: a checkpoint's folder, or a file.
        base: for a published file, whose tensors do not show all: the backbone where it is none
            of the published ones, heads, points, queries, image size, suppression.

    Raises:
        ValueError: there is nothing, or it is refused; says which file and what to do.
    """
    if path.is_dir() and (path / MANIFEST).is_file():
        checkpoint = read_checkpoint(path)
        classes = own_classes(checkpoint.categories, "the classes that it was trained on")
        tensors = checkpoint.model_state()
        return _ours(path, checkpoint.config, tensors, classes, knows_config=True)
    if path.parent.is_dir() and (path.parent / MANIFEST).is_file() and path.is_file():
        raise WeightsError(f"{path}: is one file of a checkpoint; give its folder, {path.parent}")
    if is_converted(path):
        converted = read_converted(path)
        return _ours(
            path, converted.config, converted.tensors, converted.classes, knows_config=True
        )
    return identify(path, read_weights(path), base)


def identify(path: Path, tensors: dict[str, Tensor], base: RunConfig) -> ModelFile:
    """`open_model_file` for tensors that have been read from a file that knows nothing else."""
    try:
        return _identify(path, tensors, base)
    except WeightsError:
        raise
    except ValueError as error:
        raise WeightsError(f"{path}: {error}") from error


def _identify(path: Path, tensors: dict[str, Tensor], base: RunConfig) -> ModelFile:
    model = base.model
    if has_our_names(tensors):
        if isinstance(model, ModelConfig):
            model = with_sizes_of(tensors, model)
        classes = published_classes(model.num_classes)
        config = replace(base, model=model)
        return _ours(path, config, tensors, classes, knows_config=False)
    if isinstance(model, ModelConfig) and pretrained_anchor.is_anchor_detr(tensors):
        raise ValueError("holds the weights of an Anchor DETR; give --variant with one of those")
    renamed = trace_published(tensors, model)
    if isinstance(model, AnchorDETRConfig):
        known = {name: tensors[name] for names in renamed.sources.values() for name in names}
        model = pretrained_anchor.with_sizes_of(known, model)
    else:
        model = with_sizes_of(renamed.tensors, model)
        eps = pretrained.published_logit_eps(cast(Format, renamed.layout))
        model = replace(model, logit_eps=eps)
    classes = published_classes(model.num_classes)
    labels = path.with_name("config.json")
    if renamed.layout == "huggingface" and labels.is_file():
        classes = _with_labels(labels, classes)
    return ModelFile(
        path=path,
        layout=renamed.layout,
        config=replace(base, model=model),
        tensors=renamed.tensors,
        classes=classes,
        sources=renamed.sources,
        computed=renamed.computed,
        unknown=renamed.unknown,
        knows_config=False,
    )


def _with_labels(labels: Path, classes: FileClasses) -> FileClasses:
    """The names in a configuration of Hugging Face, if it has any."""
    try:
        listed = listed_classes(labels, classes.num_rows)
    except ValueError:
        return classes
    return listed if listed.by_row else classes


def has_our_names(names: Mapping[str, object]) -> bool:
    return "level_embedding" in names or "class_head.bias" in names


def trace_published(tensors: Mapping[str, Tensor], model: DetectorConfig) -> Renamed:
    if isinstance(model, AnchorDETRConfig):
        return pretrained_anchor.trace_published(tensors)
    return pretrained.trace_published(tensors)


def fit(state: Mapping[str, Tensor], config: DetectorConfig) -> dict[str, Tensor]:
    """The state as a model of this configuration wants it.

    Raises:
        ValueError: a tensor is missing, left over or of another shape.
    """
    if isinstance(config, AnchorDETRConfig):
        return pretrained_anchor.fit(state, config)
    return pretrained.fit(state, config)


def shapes_of(config: DetectorConfig) -> Mapping[str, tuple[int, ...]]:
    if isinstance(config, AnchorDETRConfig):
        return pretrained_anchor.shapes_of(config)
    return pretrained.shapes_of(config)


def select_classes(
    state: Mapping[str, Tensor],
    rows: Sequence[int | None],
    fresh: Mapping[str, Tensor] | None,
    config: DetectorConfig,
) -> dict[str, Tensor]:
    """Keep, reorder or add classes, see `pretrained.select_classes`."""
    if isinstance(config, AnchorDETRConfig):
        return pretrained_anchor.select_classes(state, rows, fresh)
    return pretrained.select_classes(state, rows, fresh)


def to_published(
    state: Mapping[str, Tensor], config: DetectorConfig, layout: str
) -> dict[str, Tensor]:
    """Our weights under the names of a published layout, with the copies that it stores.

    Raises:
        ValueError: a tensor is missing or left over, or the architecture has no such layout.
    """
    if isinstance(config, AnchorDETRConfig):
        if layout not in get_args(pretrained_anchor.Format):
            raise ValueError(f"Anchor DETR has no {layout} layout; choose official or detrex")
        return pretrained_anchor.to_published(
            pretrained_anchor.fit(state, config), config, cast(pretrained_anchor.Format, layout)
        )
    return pretrained.to_published(state, config, cast(Format, layout))


def is_class_head(name: str) -> bool:
    """Whether a tensor of ours has a row for each class."""
    return name.startswith(("class_heads.", "class_head."))


def _ours(
    path: Path,
    config: RunConfig,
    tensors: dict[str, Tensor],
    classes: FileClasses,
    *,
    knows_config: bool,
) -> ModelFile:
    sources = {name: [name] for name in tensors}
    return ModelFile(path, OURS, config, tensors, classes, sources, [], [], knows_config)
