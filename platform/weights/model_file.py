"""Open weights together with their model configuration and classes.

Four kinds of files are read into one form: a checkpoint folder, a file that jobs/convert.py wrote,
a published file, and a plain file of tensors under our names.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

from torch import Tensor

from deta.model.architectures import DetectorConfig, layouts_of
from deta.model.config import ModelConfig
from deta.model.pretrained_anchor import is_anchor_detr
from deta.model.published_sizes import with_sizes_of
from deta.platform.checkpoint.format import MANIFEST, read_checkpoint
from deta.platform.data.coco_dataset import Category
from deta.platform.run.config import RunConfig
from deta.platform.system.short_list import short_list
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
    """Weights under our names, complete or not, with the configuration of their model."""

    path: Path
    layout: str  # ours, official, detrex or huggingface
    config: RunConfig  # its own; for a published file the given one with the sizes of its tensors
    tensors: dict[str, Tensor]  # under our names
    classes: FileClasses
    # The following use the names of a published file; in ours, each name is its own source.
    sources: dict[str, list[str]]
    computed: list[str]
    unknown: list[str]
    notes: tuple[str, ...] = ()  # on what was chosen in the file, such as averaged weights

    @property
    def origin(self) -> str:
        """The source of these weights, for messages."""
        about = "; ".join((f"{self.layout} layout", *self.notes, self.classes.origin))
        return f"{self.path} ({about})"

    def rows_of(
        self, categories: Sequence[Category] | None
    ) -> tuple[list[int], tuple[Category, ...]]:
        """Return the rows of the class heads for some categories.

        Args:
            categories: matched by name; if the file has no names, one per row. None: all
                categories of the file.

        Raises:
            ValueError: a category is not among the file's classes.
        """
        if categories is None:
            return self.classes.rows_and_categories
        if not self.classes.by_row:
            if len(categories) != self.classes.num_rows:
                raise ValueError(
                    f"has {self.classes.origin}, but {len(categories)} are needed. Name them "
                    "with jobs/convert.py --classes FILE and use the converted file"
                )
            return list(range(len(categories))), tuple(categories)
        rows = plan_classes(self.classes, categories).rows
        unknown = [c.name for c, row in zip(categories, rows, strict=True) if row is None]
        if unknown:
            raise ValueError(
                f"has {self.classes.origin}; among them are no {short_list(unknown, 10)}. Use a "
                "data set of its classes, or fine-tune it on this one first (init_checkpoint)"
            )
        return [row for row in rows if row is not None], tuple(categories)

    def state_of(self, rows: Sequence[int], model: DetectorConfig) -> dict[str, Tensor]:
        """Return the tensors for a model with these rows of the class heads.

        Raises:
            ValueError: a tensor is missing, unused or of another shape.
        """
        self.require_known()
        layouts, tensors = layouts_of(model), self.tensors
        if list(rows) != list(range(self.classes.num_rows)):
            tensors = layouts.select_classes(tensors, rows)
        return layouts.fit(tensors, model)

    def require_known(self) -> None:
        """Raise ValueError if there are tensors that the detector does not have."""
        if self.unknown:
            raise ValueError(
                f"{short_list(self.unknown, 10)}: no such tensor in this detector in {self.layout} "
                "layout; if they are known to be unused, convert the file with jobs/convert.py "
                "--allow-unused PATTERN first"
            )


def open_model_file(path: Path, base: RunConfig) -> ModelFile:
    """Read weights of any kind.

    Args:
        path: a checkpoint folder; a file; or weights in several parts (`weight_parts.py`).
        base: for a published file: settings that its tensors do not show, such as heads, points,
            queries, image size, suppression, and a backbone that is not a published one.

    Raises:
        ValueError: there is no such file, or it is refused; names the file and a remedy.
    """
    if path.is_dir() and (path / MANIFEST).is_file():
        checkpoint = read_checkpoint(path)
        classes = own_classes(checkpoint.categories, "the classes that it was trained on")
        return _ours(path, checkpoint.config, checkpoint.model_state(), classes)
    if path.parent.is_dir() and (path.parent / MANIFEST).is_file() and path.is_file():
        raise WeightsError(f"{path}: is one file of a checkpoint; give its folder, {path.parent}")
    if is_converted(path):
        converted = read_converted(path)
        return _ours(path, converted.config, converted.tensors, converted.classes)
    notes: list[str] = []
    return replace(identify(path, read_weights(path, notes.append), base), notes=tuple(notes))


def identify(path: Path, tensors: dict[str, Tensor], base: RunConfig) -> ModelFile:
    """Do as `open_model_file` does, for tensors read from a file without other information."""
    try:
        return _identify(path, tensors, base)
    except WeightsError:
        raise
    except ValueError as error:
        raise WeightsError(f"{path}: {error}") from error


def _identify(path: Path, tensors: dict[str, Tensor], base: RunConfig) -> ModelFile:
    model = base.model
    if "level_embedding" in tensors or "class_head.bias" in tensors:  # names of ours alone
        if isinstance(model, ModelConfig):
            model = with_sizes_of(tensors, model)
        classes = published_classes(model.num_classes)
        return _ours(path, replace(base, model=model), tensors, classes)
    if isinstance(model, ModelConfig) and is_anchor_detr(tensors):
        raise ValueError("contains weights of an Anchor DETR; choose an Anchor DETR with --variant")
    layouts = layouts_of(model)
    renamed = layouts.trace_published(tensors)
    model = layouts.published_config(renamed, model)
    classes = published_classes(model.num_classes)
    labels = path / "config.json" if path.is_dir() else path.with_name("config.json")
    if renamed.layout == "huggingface" and labels.is_file():
        with suppress(ValueError):  # a configuration without usable names
            listed = listed_classes(labels, classes.num_rows)
            classes = listed if listed.by_row else classes
    config = replace(base, model=model)
    return ModelFile(
        path, renamed.layout, config, renamed.tensors, classes,
        renamed.sources, renamed.computed, renamed.unknown,
    )  # fmt: skip


def is_class_head(name: str) -> bool:
    """Return True if a tensor has a row for each class, given our name of it."""
    return name.startswith(("class_heads.", "class_head."))


def _ours(
    path: Path, config: RunConfig, tensors: dict[str, Tensor], classes: FileClasses
) -> ModelFile:
    sources = {name: [name] for name in tensors}
    return ModelFile(path, OURS, config, tensors, classes, sources, [], [])
