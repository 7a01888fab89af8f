"""Files of weights, read without running the code that a pickle can carry."""

from __future__ import annotations

import argparse
import os
import re
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

TORCH_SUFFIXES = (".pth", ".pt", ".bin")
# Where training code puts the weights among other things; the first that is there counts.
WRAPPERS = ("model", "state_dict", "model_state_dict", "ema")
PREFIXES = ("module.", "_orig_mod.")  # of DistributedDataParallel and torch.compile


def read_weights(path: Path) -> dict[str, Tensor]:
    """The tensors of a file, on the CPU, by name.

    A checkpoint that holds more than weights gives those under `model`, `state_dict`,
    `model_state_dict` or `ema`, in this order and nested if need be. A prefix `module.` or
    `_orig_mod.` that all names share is removed.

    Args:
        path: `.safetensors`, or what `torch.save` wrote: `.pth`, `.pt` or `.bin`.

    Raises:
        ValueError: there is no such file, it is damaged, would need code to be run, or holds
            something else than tensors.
    """
    _require_file(path)
    if path.suffix == ".safetensors":
        try:
            return _without_prefixes(load_file(path))
        except SafetensorError as error:
            raise ValueError(_damaged(path, error)) from error
    if path.suffix not in TORCH_SUFFIXES:
        raise ValueError(
            f"{path}: files of weights end in .safetensors, {', '.join(TORCH_SUFFIXES)}; "
            "rename it if it is one of these, or convert it with the code that wrote it"
        )
    return _without_prefixes(_unwrap(path, _load_without_code(path)))


def read_metadata(path: Path) -> dict[str, str]:
    """What `write_weights` was given along with the weights; empty for files of other origin.

    Raises:
        ValueError: there is no such file, or it is damaged.
    """
    _require_file(path)
    if path.suffix != ".safetensors":
        return {}
    try:
        with safe_open(path, framework="pt") as file:
            metadata = dict(file.metadata() or {})
    except SafetensorError as error:
        raise ValueError(_damaged(path, error)) from error
    metadata.pop("format", None)
    return metadata


def write_weights(
    path: Path, state: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> None:
    """Write a safetensors file, complete or not at all.

    Tensors that share memory are written out one by one.

    Raises:
        ValueError: the name does not end in .safetensors.
    """
    if path.suffix != ".safetensors":
        raise ValueError(f"{path}: weights are written as safetensors; end the name in that")
    tensors = {}
    storages = set()
    for name, tensor in state.items():
        tensor = tensor.detach().cpu().contiguous()
        storage = tensor.untyped_storage().data_ptr()
        tensors[name] = tensor.clone() if storage in storages else tensor
        storages.add(storage)

    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.unfinished")
    try:
        unfinished.touch()
        mode = unfinished.stat().st_mode  # safetensors would let nobody else read the file
        # Hugging Face's loader wants to read which framework wrote the tensors.
        save_file(tensors, unfinished, {**(metadata or {}), "format": "pt"})
        unfinished.chmod(mode)
        _flush_to_disk(unfinished)
        os.replace(unfinished, path)
    except BaseException:
        unfinished.unlink(missing_ok=True)
        raise
    _flush_to_disk(path.parent)


def _load_without_code(path: Path) -> object:
    try:
        # Official checkpoints carry their command line, which is nothing but names and values.
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:  # damaged pickles fail in as many ways as there are opcodes
        code = re.search(r"GLOBAL (\S+)", str(error))
        if code is None:
            raise ValueError(
                f"{path}: damaged, or not written by torch.save ({type(error).__name__}); copy or "
                "download it again, or rename it to .safetensors if it is that"
            ) from error
        raise ValueError(
            f"{path}: refused, because reading it would run the code of {code[1]}. Where its "
            "origin is trusted, keep nothing but its tensors: safetensors.torch.save_file("
            "torch.load(path, weights_only=False)['model'], new_path)"
        ) from error


def _unwrap(path: Path, content: object) -> dict[str, Tensor]:
    while isinstance(content, Mapping):
        wrapped = [content[key] for key in WRAPPERS if isinstance(content.get(key), Mapping)]
        if not wrapped:
            break
        content = wrapped[0]
    if not isinstance(content, Mapping) or not content:
        raise ValueError(
            f"{path}: holds {type(content).__name__} and no weights by name; save a model's "
            "state_dict(), not the model"
        )
    others = [str(name) for name, value in content.items() if not isinstance(value, Tensor)]
    if others:
        raise ValueError(
            f"{path}: {len(others)} of {len(content)} entries are no tensors "
            f"({', '.join(others[:10])}); save a model's state_dict() alone or under 'model'"
        )
    return {str(name): value.detach() for name, value in content.items()}


def _without_prefixes(state: dict[str, Tensor]) -> dict[str, Tensor]:
    for prefix in PREFIXES * 2:  # either may surround the other
        if state and all(name.startswith(prefix) for name in state):
            state = {name.removeprefix(prefix): tensor for name, tensor in state.items()}
    return state


def _require_file(path: Path) -> None:
    if path.is_dir():
        raise ValueError(f"{path}: a folder; give the file of weights inside it")
    if not path.exists():
        raise ValueError(f"{path}: no such file")


def _damaged(path: Path, error: Exception) -> str:
    return f"{path}: not a complete safetensors file ({error}); copy or download it again"


def _flush_to_disk(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
