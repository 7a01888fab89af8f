"""Read and write weight files without running code that a pickle may contain."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from deta.platform.system.atomic_write import make_folder, replacing
from deta.platform.system.short_list import short_list
from deta.platform.weights.restricted_unpickler import (
    ArrayRecord,
    RefusedNameError,
    TensorRecord,
    UnreadableError,
)
from deta.platform.weights.torch_files import outline, read_pickled_weights
from deta.platform.weights.weight_parts import PartsError, weight_parts
from deta.platform.weights.wrapped_names import select_weights

logger = logging.getLogger(__name__)

PICKLE_SUFFIXES = (".pth", ".pt", ".bin", ".pkl", ".ckpt", ".tar")
NUM_SHOWN = 10  # names listed in one message
CHECKED_TYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


class WeightsError(ValueError):
    """A refused weight file; the message names the file, the reason and a remedy."""


def read_weights(path: Path, say: Callable[[str], object] = logger.info) -> dict[str, Tensor]:
    """Read the tensors of a file by name, on the CPU.

    Of a checkpoint with other content only the weights are read, the averaged ones where there are
    any, and parts of names that wrappers add are taken off (`wrapped_names.py`). Weights in several
    parts are read as one (`weight_parts.py`).

    Args:
        path: `.safetensors`; a file of `torch.save`: `.pth`, `.pt`, `.bin`, `.ckpt`; a pickle of
            numpy arrays, `.pkl`; or the folder, the index or one part of weights in several parts.
        say: called with a line about each choice, for people.

    Raises:
        WeightsError: there is no such file, it is damaged, would run code, declares more data than
            it has, or contains something other than finite tensors.
    """
    try:
        parts = weight_parts(path)
    except PartsError as error:
        raise WeightsError(str(error)) from error
    if len(parts) > 1:
        say(f"read {len(parts)} files: {short_list([part.name for part in parts])}")
    notes: list[str] = []
    tensors: dict[str, Tensor] = {}

    def select(content: object) -> object:
        selected, about = select_weights(content)
        notes.extend(about)
        return selected

    # Names in a part alone do not show which prefix all names share.
    in_pickle = len(parts) == 1 and parts[0].suffix != ".safetensors"
    for part in parts:
        found = _read_file(part, select if in_pickle else lambda content: content)
        if twice := found.keys() & tensors.keys():
            raise WeightsError(f"{part}: holds {short_list(sorted(twice))}, as another part does")
        tensors |= found
    chosen = tensors if in_pickle else select(tensors)
    for note in notes:
        say(note)
    assert isinstance(chosen, Mapping)
    return dict(chosen)


def _read_file(path: Path, select: Callable[[object], object]) -> dict[str, Tensor]:
    _require_file(path)
    if path.suffix == ".safetensors":
        _require_weights_inside(path)
        try:
            return _require_finite(path, load_file(path))
        except (SafetensorError, KeyError, TypeError, RuntimeError) as error:
            raise _damaged(path, error) from error
    if path.suffix not in PICKLE_SUFFIXES:
        raise WeightsError(
            f"{path}: files of weights end in .safetensors, {', '.join(PICKLE_SUFFIXES)}; "
            "rename it if it is one of these, or convert it with the code that wrote it"
        )
    _require_weights_inside(path)
    try:
        tensors = read_pickled_weights(path, lambda content: _named(path, select(content)))
    except RefusedNameError as error:
        raise WeightsError(
            f"{path}: refused, because reading it would run the code of {error}. "
            f"{_advice_on_code(path)}"
        ) from error
    except UnreadableError as error:
        raise WeightsError(
            f"{path}: damaged, or not written by torch.save: {error}. Copy or download it again, "
            "or rename it to .safetensors if it is one"
        ) from error
    return _require_finite(path, tensors)


def _advice_on_code(path: Path) -> str:
    """Return what makes a readable file of one that names code."""
    is_module, keys = outline(path)
    load = "torch.load(path, weights_only=False)" + "".join(f"[{key!r}]" for key in keys)
    state = f"{load}.state_dict()" if is_module else load
    what = "It holds a whole pickled model instead of its state_dict. " if is_module else ""
    return (
        f"{what}Where its origin is trusted, save its tensors alone, with the code that wrote it "
        f"on the path: torch.save({state}, new_path)"
    )


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

    make_folder(path.parent)
    with replacing(path, durable=True) as unfinished:
        unfinished.touch()
        mode = unfinished.stat().st_mode  # safetensors would deny other users to read it
        # Hugging Face's loader requires the framework that wrote the tensors.
        save_file(tensors, unfinished, {**(metadata or {}), "format": "pt"})
        unfinished.chmod(mode)


def write_torch_file(path: Path, content: Mapping[str, object]) -> None:
    """Write a file for torch.load atomically, for other implementations."""
    make_folder(path.parent)
    with replacing(path, durable=True) as unfinished:
        torch.save(content, unfinished)


def _named(path: Path, weights: object) -> dict[str, object]:
    if not isinstance(weights, Mapping) or not weights:
        kind = "Tensor" if isinstance(weights, TensorRecord) else type(weights).__name__
        raise WeightsError(
            f"{path}: contains {kind} and no named weights; save a model's state_dict(), not the "
            "model"
        )
    kinds = (TensorRecord, ArrayRecord)
    others = [str(name) for name, value in weights.items() if not isinstance(value, kinds)]
    if others:
        raise WeightsError(
            f"{path}: {len(others)} of {len(weights)} entries are not tensors "
            f"({', '.join(others[:NUM_SHOWN])}); save a model's state_dict() alone or under 'model'"
        )
    return {str(name): value for name, value in weights.items()}


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


def _require_file(path: Path) -> None:
    if path.is_dir():
        raise WeightsError(
            f"{path}: a folder without model.safetensors, pytorch_model.bin or an index of parts; "
            "give the file of weights inside it. Convert a distributed "
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
    elif path.suffix == ".safetensors" and _is_of_torch(beginning):
        what = "a file of torch.save, not a safetensors file; rename it to .pth"
    if what:
        raise WeightsError(f"{path}: {what}")


def _is_of_torch(beginning: bytes) -> bool:
    # A header of 128 bytes makes a safetensors file begin like a pickle; a brace follows.
    return beginning.startswith((b"PK\x03\x04", b"\x80")) and beginning[8:9] != b"{"


def _damaged(path: Path, error: object) -> WeightsError:
    return WeightsError(
        f"{path}: not a complete safetensors file ({error}); copy or download it again"
    )
