"""Read and write weight files without running code that a pickle may contain."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from deta.platform.system.atomic_write import replacing
from deta.platform.weights.restricted_unpickler import (
    ArrayRecord,
    RefusedNameError,
    TensorRecord,
    UnreadableError,
)
from deta.platform.weights.torch_files import read_pickled_weights

PICKLE_SUFFIXES = (".pth", ".pt", ".bin", ".pkl")
# Keys under which training code stores the weights; the first existing one is read.
WRAPPERS = ("model", "state_dict", "model_state_dict", "ema", "blobs")
PREFIXES = ("module.", "_orig_mod.")  # of DistributedDataParallel and torch.compile
NUM_SHOWN = 10  # names listed in one message
CHECKED_TYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


class WeightsError(ValueError):
    """A refused weight file; the message names the file, the reason and a remedy."""


def read_weights(path: Path) -> dict[str, Tensor]:
    """Read the tensors of a file by name, on the CPU.

    From a checkpoint with other content, the tensors under `model`, `state_dict`,
    `model_state_dict`, `ema` or `blobs` are read, in this order, also nested; the rest is not
    read. A prefix `module.` or `_orig_mod.` that all names share is removed.

    Args:
        path: `.safetensors`; a file of `torch.save`: `.pth`, `.pt` or `.bin`; or a pickle of
            numpy arrays, `.pkl`.

    Raises:
        WeightsError: there is no such file, it is damaged, would run code, declares more data than
            it has, or contains something other than finite tensors.
    """
    _require_file(path)
    if path.suffix == ".safetensors":
        _require_weights_inside(path)
        try:
            tensors = load_file(path)
        except (SafetensorError, KeyError, TypeError, RuntimeError) as error:
            raise _damaged(path, error) from error
        return _without_prefixes(_require_finite(path, tensors))
    if path.suffix not in PICKLE_SUFFIXES:
        raise WeightsError(
            f"{path}: files of weights end in .safetensors, {', '.join(PICKLE_SUFFIXES)}; "
            "rename it if it is one of these, or convert it with the code that wrote it"
        )
    _require_weights_inside(path)
    try:
        tensors = read_pickled_weights(path, lambda content: _unwrap(path, content))
    except RefusedNameError as error:
        raise WeightsError(
            f"{path}: refused, because reading it would run the code of {error}. Where its "
            "origin is trusted, save its tensors alone: safetensors.torch.save_file("
            "torch.load(path, weights_only=False)['model'], new_path)"
        ) from error
    except UnreadableError as error:
        raise WeightsError(
            f"{path}: damaged, or not written by torch.save: {error}. Copy or download it again, "
            "or rename it to .safetensors if it is one"
        ) from error
    return _without_prefixes(_require_finite(path, tensors))


def read_metadata(path: Path) -> dict[str, str]:
    """Read the metadata of a safetensors file; empty for other files.

    Raises:
        WeightsError: there is no such file, or it is damaged.
    """
    _require_file(path)
    if path.suffix != ".safetensors":
        return {}
    try:
        with safe_open(path, framework="pt") as file:
            return dict(file.metadata() or {})
    except (SafetensorError, OSError) as error:
        raise _damaged(path, error) from error


def write_weights(
    path: Path, state: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> None:
    """Write a safetensors file atomically.

    Tensors that share memory are written separately.

    Raises:
        WeightsError: the name does not end in .safetensors.
    """
    if path.suffix != ".safetensors":
        raise WeightsError(
            f"{path}: weights are written as safetensors; end the name in .safetensors"
        )
    tensors = {}
    storages = set()
    for name, tensor in state.items():
        tensor = tensor.detach().cpu().contiguous()
        storage = tensor.untyped_storage().data_ptr()
        tensors[name] = tensor.clone() if storage in storages else tensor
        storages.add(storage)

    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path, durable=True) as unfinished:
        unfinished.touch()
        mode = unfinished.stat().st_mode  # safetensors would deny other users to read it
        # Hugging Face's loader requires the framework that wrote the tensors.
        save_file(tensors, unfinished, {**(metadata or {}), "format": "pt"})
        unfinished.chmod(mode)


def write_torch_file(path: Path, content: Mapping[str, object]) -> None:
    """Write a file for torch.load atomically, for other implementations."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path, durable=True) as unfinished:
        torch.save(content, unfinished)


def _unwrap(path: Path, content: object) -> dict[str, object]:
    while isinstance(content, Mapping):
        wrapped = [content[key] for key in WRAPPERS if isinstance(content.get(key), Mapping)]
        if not wrapped:
            break
        content = wrapped[0]
    if not isinstance(content, Mapping) or not content:
        kind = "Tensor" if isinstance(content, TensorRecord) else type(content).__name__
        raise WeightsError(
            f"{path}: contains {kind} and no named weights; save a model's state_dict(), not the "
            "model"
        )
    kinds = (TensorRecord, ArrayRecord)
    others = [str(name) for name, value in content.items() if not isinstance(value, kinds)]
    if others:
        raise WeightsError(
            f"{path}: {len(others)} of {len(content)} entries are not tensors "
            f"({', '.join(others[:NUM_SHOWN])}); save a model's state_dict() alone or under 'model'"
        )
    return {str(name): value for name, value in content.items()}


def _require_finite(path: Path, state: dict[str, Tensor]) -> dict[str, Tensor]:
    bad = [
        name
        for name, tensor in state.items()
        if tensor.dtype in CHECKED_TYPES and not tensor.isfinite().all()
    ]
    if bad:
        raise WeightsError(
            f"{path}: {len(bad)} of {len(state)} tensors contain values that are not finite "
            f"({', '.join(bad[:NUM_SHOWN])}); its training had diverged, or it is damaged; "
            "use an earlier checkpoint"
        )
    return state


def _without_prefixes(state: dict[str, Tensor]) -> dict[str, Tensor]:
    for prefix in PREFIXES * 2:  # either may surround the other
        if state and all(name.startswith(prefix) for name in state):
            state = {name.removeprefix(prefix): tensor for name, tensor in state.items()}
    return state


def _require_file(path: Path) -> None:
    if path.is_dir():
        raise WeightsError(
            f"{path}: a folder; give the file of weights inside it. Convert a distributed "
            "checkpoint, which runs code when it is loaded, where it was written, with "
            "torch.distributed.checkpoint.format_utils.dcp_to_torch_save"
        )
    if not path.exists():
        raise WeightsError(f"{path}: no such file, or a link to one that does not exist")
    if not path.is_file():
        raise WeightsError(f"{path}: a device or pipe, not a file of weights")


# How files that are often taken for weights begin, in lower case, and what to do about them.
_OTHER_FILES = {
    (b"<!doctype", b"<html", b"<?xml"): "a web page, not weights, from a link that needs a login "
    "or a confirmation; open it in a browser and download again",
    (b"version https://git-lfs",): "a pointer of git-lfs; run `git lfs pull` in its clone",
    (b"\x1f\x8b", b"bzh", b"\xfd7zxz", b"7z\xbc\xaf"): "an archive; unpack it first",
}


def _require_weights_inside(path: Path) -> None:
    """Raise an error that names common files that are not weights."""
    with path.open("rb") as file:
        beginning = file.read(512)
    text = beginning.removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    what = next((advice for begins, advice in _OTHER_FILES.items() if text.startswith(begins)), "")
    if not beginning:
        what = "an empty file; copy or download it again"
    elif beginning[257:262] == b"ustar":
        what = "a tar archive; unpack it first"
    elif path.suffix == ".safetensors" and beginning.startswith((b"PK\x03\x04", b"\x80")):
        what = "a file of torch.save, not a safetensors file; rename it to .pth"
    if what:
        raise WeightsError(f"{path}: {what}")


def _damaged(path: Path, error: object) -> WeightsError:
    return WeightsError(
        f"{path}: not a complete safetensors file ({error}); copy or download it again"
    )
