"""The options by which a command line names a model: weights, variant, device, key=value."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypeVar

from tyro.conf import Positional

from deta.jobs.command_line import echo, read_command_line, refuse
from deta.jobs.recipes import VARIANTS, find_variant
from deta.platform.run.config import RunConfig, flatten
from deta.platform.run.run_paths import require_paths

# Before anything slow is imported: --help does not need it.
if TYPE_CHECKING:
    from deta.platform.data.coco_dataset import Category
    from deta.platform.inference.predictor import Predictor

# What changes the numbers or the speed of predictions. Other keys are refused, not ignored.
MODEL_KEYS = ("model.", "postprocess.", "data.evaluation_size.")
PREDICTION_KEYS = (*MODEL_KEYS, "data.max_pixels", "data.exif", "data.sixteen_bit", "precision")


@dataclass(frozen=True, kw_only=True)
class ModelOptions:
    """A model, and where it runs."""

    weights: Positional[str]  # a run, checkpoint, file, https://… or models:/…
    # Model of a published file; without it, the first of the list above.
    variant: str | None = None
    device: Literal["auto", "cpu", "cuda"] = "auto"  # auto: cuda if there is any


Options = TypeVar("Options")


def read_model_options(
    kind: type[Options], doc: str | None, allowed: tuple[str, ...]
) -> tuple[Options, dict[str, str]]:
    """Read the command line of a job that takes weights; see `read_command_line`.

    Args:
        allowed: how the keys begin that have an effect here. Others are refused.
    """
    keys = ", ".join(f"{key}*" if key.endswith(".") else key for key in allowed)
    doc = f"{doc}\nKeys of the configuration that matter here: {keys}\n\nvariants:\n  "
    options, changes = read_command_line(kind, doc + "\n  ".join(VARIANTS), RunConfig())
    known = flatten(RunConfig())
    if idle := [key for key in changes if key in known and not key.startswith(allowed)]:
        refuse(ValueError(f"{idle[0]} changes nothing here; leave it out"))
    return options, changes


def pick_device(name: str) -> str:
    """Return cpu or cuda.

    Raises:
        ValueError: there is no CUDA device.
    """
    import torch

    has_cuda = torch.cuda.is_available()
    if name == "cuda" and not has_cuda:
        raise ValueError("--device cuda: torch finds no CUDA device; leave it out to use the CPU")
    return "cuda" if has_cuda and name != "cpu" else "cpu"


def open_predictor(
    options: ModelOptions,
    changes: Mapping[str, str],
    categories: tuple[Category, ...] | None = None,
) -> Predictor:
    """Open the model that a command line names.

    Args:
        categories: for a published file; a checkpoint has its own.

    Raises:
        ValueError: the weights, the changes or the device cannot be used.
    """
    require_weights(options.weights)
    from deta.platform.checkpoint.local import find_checkpoint
    from deta.platform.inference.predictor import Predictor
    from deta.platform.weights.converted_file import is_converted

    weights = local_weights(options.weights)
    device = pick_device(options.device)
    holds_config = not holds_tensors(weights) or is_converted(weights)
    if holds_config and options.variant is not None:
        raise ValueError(
            "--variant is for published files; a checkpoint or a file of jobs/convert.py "
            "holds its own configuration, so leave it out"
        )
    if not holds_tensors(weights):
        return Predictor.from_checkpoint(find_checkpoint(weights), device, changes)
    config = RunConfig() if holds_config else named_variant(options)
    return Predictor.from_published(weights, config, categories, device, changes)


def holds_tensors(weights: Path) -> bool:
    """Return True for a file, or a folder of weights in parts; False for a run or checkpoint."""
    from deta.platform.weights.weight_parts import is_weights_folder

    return weights.is_file() or is_weights_folder(weights)


def local_weights(weights: str | Path) -> Path:
    """Return the path that WEIGHTS means; download an address or a registered version first.

    Raises:
        ValueError: the download failed, or the file is not the pinned or registered one.
    """
    require_weights(weights)
    from deta.platform.system.download import fetch

    if str(weights).startswith("models:/"):
        from deta.platform.registry.model_uri import resolve_model

        model = resolve_model(weights)
        echo(f"registered: {model}")
        return model.path
    return fetch(str(weights), echo=echo)


def require_weights(weights: str | Path) -> None:
    """Refuse a path that does not exist, before anything slow is imported."""
    require_paths({"": str(weights).removesuffix("/best")})


def named_variant(options: ModelOptions) -> RunConfig:
    """Return the variant of a published file, which was trained in float32."""
    return replace(find_variant(options.variant or next(iter(VARIANTS))), precision="tf32")
