"""The weights a run starts from: one of our checkpoints, or a published file."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from deta.model.detector import DETA, ModelConfig
from deta.model.pretrained import from_published
from deta.platform.checkpoint import read_checkpoint
from deta.platform.coco import Category
from deta.platform.weights import read_weights


def load_initial_weights(model: DETA, path: Path, categories: tuple[Category, ...]) -> None:
    """Fill the model.

    Args:
        path: a checkpoint folder of ours, or a published file (official, detrex, Hugging Face).
        categories: of the data set; must be the checkpoint's. A published file with one row for
            every COCO id up to 90 gives the rows of these categories.

    Raises:
        ValueError: the file does not fit the model; names what is missing or left over.
    """
    if path.is_dir():
        checkpoint = read_checkpoint(path)
        if checkpoint.categories != categories:
            raise ValueError(
                f"{path}: was trained on {len(checkpoint.categories)} classes "
                f"({_names(checkpoint.categories)}), the data set has {len(categories)} "
                f"({_names(categories)}); they must be the same"
            )
        model.load_state_dict(checkpoint.model_state())
        return
    model.load_state_dict(published_state(model.config, path, categories))


def published_state(
    config: ModelConfig, path: Path, categories: tuple[Category, ...]
) -> dict[str, Tensor]:
    """The tensors of a published file under our names, with the rows of the given categories.

    Raises:
        ValueError: as `from_published`; or the file's classes cannot be those of the data set.
    """
    tensors = read_weights(path)
    # A file without class heads, or with unequal ones, is refused below, by name.
    rows = {len(t) for name, t in tensors.items() if name.endswith("class_embed.0.bias")}
    file_classes = rows.pop() if len(rows) == 1 else len(categories)
    class_rows = None
    if file_classes != len(categories):
        class_rows = [category.id for category in categories]
        if not all(0 <= row < file_classes for row in class_rows):
            raise ValueError(
                f"{path}: has {file_classes} classes, the data set has {len(categories)} "
                f"({_names(categories)}), and their ids are not rows of the file"
            )
    try:
        return from_published(tensors, config, class_rows)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _names(categories: tuple[Category, ...]) -> str:
    names = [category.name for category in categories]
    return ", ".join(names[:4]) + (", …" if len(names) > 4 else "")
