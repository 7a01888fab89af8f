"""Checkpoints on disk: write, find, verify and delete them.

A checkpoint is a folder. It is written under a temporary name. Every file is hashed into a
manifest and forced to the disk, and only then is the folder renamed. So a folder with its final
name is complete, unless the disk changed it later, which the hashes detect. Its files:
platform/checkpoint/format.py.

    checkpoints/
        step-00001200/                       complete
        damaged-step-00001300/               was complete and changed later; only the last is kept
        .step-00001400.1a2b3c4d.unfinished/  being written, or the writer died
        .step-00001200.1a2b3c4d.replaced/    the former checkpoint of a step that is written again
        .step-00001000.1a2b3c4d.deleted/     being deleted
"""

from __future__ import annotations

import contextlib
import copy
import logging
import re
import secrets
import shutil
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from deta.platform.checkpoint.format import (
    MANIFEST,
    NAME,
    Checkpoint,
    CheckpointError,
    OtherVersionError,
    manifest_to_json,
    read_checkpoint,
    read_manifest,
    read_metrics,
    state_to_json,
)
from deta.platform.checkpoint.host_snapshot import HostTensors, copy_tensors, write_file
from deta.platform.data.coco_dataset import Category
from deta.platform.run.config import RunConfig, to_json
from deta.platform.run.fence import Fence
from deta.platform.run.run_state import RunState
from deta.platform.system.atomic_write import force_to_disk, make_folder

logger = logging.getLogger(__name__)

_LEFTOVER = re.compile(r"\.(step-\d{8,})\.(?:[0-9a-f]+\.)?(unfinished|replaced|deleted)")


@dataclass(frozen=True)
class Snapshot:
    """The complete content of a checkpoint, in host memory of its own."""

    state: RunState
    config: RunConfig
    categories: tuple[Category, ...]
    model: HostTensors
    training: HostTensors

    @property
    def num_bytes(self) -> int:
        """Return the size of the checkpoint on disk, with a generous allowance for small files."""
        small = 4096 * (8 + (len(self.state.broken_images) + len(self.categories)) // 16)
        return self.model.num_bytes + self.training.num_bytes + small


def take_snapshot(
    state: RunState,
    config: RunConfig,
    categories: tuple[Category, ...],
    model_state: Mapping[str, Tensor],
    training_state: Mapping[str, Tensor],
    into: Snapshot | None = None,
) -> Snapshot:
    """Copy the state of a run, which may continue at once. No memory is shared.

    Args:
        into: an earlier snapshot that is not needed any more; its memory is reused.
    """
    model = copy_tensors(model_state, into.model if into is not None else None)
    training = copy_tensors(training_state, into.training if into is not None else None)
    tensors = [*model_state.values(), *training_state.values()]
    for device in {tensor.device for tensor in tensors if tensor.is_cuda}:
        torch.cuda.current_stream(device).synchronize()
    return Snapshot(copy.deepcopy(state), config, tuple(categories), model, training)


def write_checkpoint(folder: Path, snapshot: Snapshot, fence: Fence | None = None) -> Path:
    """Write a checkpoint into the folder and return its path.

    Writing the same step again replaces the former checkpoint. A failure leaves nothing behind.

    Args:
        fence: checked right before the checkpoint gets its final name.

    Raises:
        OSError: the disk is full, read-only or broken.
        FencedOffError: another worker group writes this run now.
    """
    final = folder / f"step-{snapshot.state.step:08d}"
    token = secrets.token_hex(4)
    unfinished = folder / f".{final.name}.{token}.unfinished"
    make_folder(folder)
    unfinished.mkdir()
    try:
        files: dict[str, list[memoryview] | str] = {
            "model.safetensors": snapshot.model.parts,
            "training.safetensors": snapshot.training.parts,
            "config.json": to_json(snapshot.config),
            "state.json": state_to_json(snapshot.state, snapshot.categories),
        }
        written = {name: write_file(unfinished / name, parts) for name, parts in files.items()}
        write_file(unfinished / MANIFEST, manifest_to_json(snapshot.state.step, written))
        force_to_disk(unfinished)
        if fence is not None:
            fence.check()
        if final.exists():  # death between the two renames: `_restore_replaced`
            final.rename(folder / f".{final.name}.{token}.replaced")
        unfinished.rename(final)
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise
    force_to_disk(folder)
    shutil.rmtree(folder / f".{final.name}.{token}.replaced", ignore_errors=True)
    return final


def all_checkpoints(folder: Path) -> list[Path]:
    """Return the checkpoints by step, oldest first; not verified."""
    if not folder.is_dir():
        return []
    found = [path for path in folder.iterdir() if NAME.fullmatch(path.name)]
    return sorted(found, key=lambda path: int(path.name.removeprefix("step-")))


def newest_checkpoint(
    folder: Path, warn: Callable[[str], None] = logger.warning
) -> Checkpoint | None:
    """Return the newest intact checkpoint; None if there is none.

    A damaged one is renamed to `damaged-…`; only the last of these is kept. One that the disk
    cannot read is skipped and stays.

    Args:
        warn: receives a line about each checkpoint that is not used.

    Raises:
        OtherVersionError: the newest intact one has another version. Continuing from an older one
            would silently undo work.
        OSError: there are checkpoints, and the disk can read none of them.
    """
    _restore_replaced(folder)
    unreadable: OSError | None = None
    for path in reversed(all_checkpoints(folder)):
        try:
            return read_checkpoint(path)
        except OtherVersionError:
            raise
        except CheckpointError as error:
            if path.exists():  # else retention deleted it meanwhile
                warn(f"{error}; {_set_aside(path)}")
        except OSError as error:
            if path.exists():
                warn(f"{path}: cannot be read ({error}); trying an older checkpoint")
                unreadable = error
    if unreadable is not None:
        raise unreadable
    return None


def best_checkpoint(folder: Path) -> Path | None:
    """Return the checkpoint with the highest AP, the newest of equals; not verified."""
    aps = [(read_metrics(path).get("AP"), path) for path in reversed(all_checkpoints(folder))]
    rated = [(ap, path) for ap, path in aps if ap is not None]
    return max(rated, key=lambda one: one[0])[1] if rated else None


def keep_newest_and_best(folder: Path, keep: int = 1, protect: Collection[Path] = ()) -> None:
    """Delete all complete checkpoints but the newest and the best; remove leftovers.

    Args:
        keep: how many of the newest to keep.
        protect: others to keep.
    """
    paths = [path for path in all_checkpoints(folder) if _is_complete(path)]
    for path in set(paths) - {*paths[-keep:], *protect, best_checkpoint(folder)}:
        delete_checkpoint(path)
    clean_leftovers(folder)


def delete_checkpoint(path: Path) -> None:
    """Delete a checkpoint; a crash on the way leaves nothing that looks like one."""
    doomed = path.with_name(f".{path.name}.{secrets.token_hex(4)}.deleted")
    path.rename(doomed)
    shutil.rmtree(doomed, ignore_errors=True)


def clean_leftovers(folder: Path) -> None:
    """Remove what interrupted saves and deletions left.

    Only for the writer of the checkpoints, while no save is in progress.
    """
    _restore_replaced(folder)
    for path in folder.glob(".step-*"):
        if _LEFTOVER.fullmatch(path.name):
            shutil.rmtree(path, ignore_errors=True)


def _restore_replaced(folder: Path) -> None:
    """Rename a replaced checkpoint back if its save died between the two renames."""
    for path in folder.glob(".step-*.replaced"):
        final = folder / path.name.split(".")[1]
        if NAME.fullmatch(final.name) and not final.exists():
            with contextlib.suppress(OSError):  # a read-only disk, or the save is still running
                path.rename(final)


def _set_aside(path: Path) -> str:
    """Rename a damaged checkpoint out of the way; return what was done."""
    aside = path.with_name(f"damaged-{path.name}")
    try:
        for former in path.parent.glob("damaged-step-*"):
            shutil.rmtree(former)
        path.rename(aside)
    except OSError as error:  # on a read-only disk, the previous one can still be used
        return f"left in place, since it cannot be renamed ({error.strerror or error})"
    return f"set aside as {aside.name}"


def _is_complete(path: Path) -> bool:
    """Return whether all files exist in full length, also for another format version."""
    try:
        read_manifest(path)
    except (CheckpointError, OSError) as error:
        return isinstance(error, OtherVersionError)
    return True


def find_checkpoint(path: Path) -> Path:
    """Return the checkpoint that a path given by a user refers to; not verified.

    Args:
        path: a checkpoint; or the folder of a run, its `checkpoints` folder, or `best` in either.
            These refer to the checkpoint with the highest AP, or the newest one if none has an AP
            because the validation set has no boxes.

    Raises:
        ValueError: there is none.
    """
    if (path / MANIFEST).is_file():
        return path
    folder = path.parent if path.name == "best" and not path.exists() else path
    for candidates in (folder / "checkpoints", folder):
        if found := all_checkpoints(candidates):
            return best_checkpoint(candidates) or found[-1]
    if not folder.exists():
        raise ValueError(f"{path}: there is no such file or folder")
    raise ValueError(
        f"{path}: is neither a checkpoint (no {MANIFEST} in it) nor a run with checkpoints; give "
        "…/NAME or …/NAME/checkpoints/step-…"
    )
