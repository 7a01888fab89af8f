"""The options by which a command line names a model: weights, variant, device, key=value."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from deta.jobs.command_line import described_parser, echo, read_changes
from deta.jobs.recipes import VARIANTS, find_variant
from deta.platform.run.config import RunConfig, flatten

# Before anything slow is imported: --help does not need it.
if TYPE_CHECKING:
    from deta.platform.data.coco_dataset import Category
    from deta.platform.inference.predictor import Predictor

# What changes the numbers or the speed of predictions. Other keys are refused, not ignored.
PREDICTION_KEYS = (
    "model.",
    "postprocess.",
    "data.evaluation_size.",
    "data.max_pixels",
    "precision",
)


def model_parser(doc: str | None, epilog: str) -> argparse.ArgumentParser:
    """Return a parser for a job that takes weights."""
    variants = "\n  ".join(VARIANTS)
    parser = described_parser(doc, f"{epilog}\n\nvariants:\n  {variants}")
    parser.add_argument(
        "weights", metavar="WEIGHTS", help="run, checkpoint, file, https://… or models:/…"
    )
    parser.add_argument(
        "--variant",
        metavar="NAME",
        help=f"model of a published file, default {next(iter(VARIANTS))}",
    )
    parser.add_argument(
        "--device", choices=("auto", "cpu", "cuda"), default="auto", help="default: cuda if any"
    )
    return parser


def known_changes(texts: Sequence[str], allowed: tuple[str, ...]) -> dict[str, str]:
    """Split `key=value` arguments, of keys that have an effect here.

    Args:
        allowed: how the keys that have an effect begin.

    Raises:
        ValueError: not of that form, or a key of the configuration that changes nothing here.
    """
    known = flatten(RunConfig())
    changes = read_changes(texts)
    for key in changes:
        if key in known and not key.startswith(allowed):
            raise ValueError(f"{key} changes nothing here; leave it out")
    return changes


def open_predictor(
    arguments: argparse.Namespace,
    changes: Mapping[str, str],
    categories: tuple[Category, ...] | None = None,
) -> Predictor:
    """Open the model that a command line names.

    Args:
        categories: for a published file; a checkpoint has its own.

    Raises:
        ValueError: the weights, the changes or the device cannot be used.
    """
    import torch

    from deta.platform.checkpoint.local import find_checkpoint
    from deta.platform.inference.predictor import Predictor
    from deta.platform.weights.converted_file import is_converted

    weights = local_weights(arguments.weights)
    device = arguments.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    elif device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: torch finds no CUDA device; leave it out to use the CPU")
    if weights.is_file() and not is_converted(weights):
        return Predictor.from_published(
            weights, named_variant(arguments), categories, device, changes
        )
    if arguments.variant is not None:
        raise ValueError(
            "--variant is for published files; a checkpoint or a file of jobs/convert.py "
            "holds its own configuration, so leave it out"
        )
    if weights.is_file():
        return Predictor.from_published(weights, RunConfig(), categories, device, changes)
    checkpoint = find_checkpoint(weights)
    return Predictor.from_checkpoint(checkpoint, device, changes)


def local_weights(weights: str | Path) -> Path:
    """Return the path that WEIGHTS means; download an address or a registered version first.

    Raises:
        ValueError: the download failed, or the file is not the pinned or registered one.
    """
    from deta.platform.system.download import fetch

    if str(weights).startswith("models:/"):
        from deta.platform.registry.model_uri import resolve_model

        model = resolve_model(weights)
        echo(f"registered: {model}")
        return model.path
    return fetch(str(weights), echo=echo)


def named_variant(arguments: argparse.Namespace) -> RunConfig:
    return find_variant(arguments.variant or next(iter(VARIANTS)))
