"""The state of a run on disk: whole, or not there.

A checkpoint is a folder. It is written under another name, every file is hashed into a manifest
and forced to disk, and only then does it get its name. So whatever carries a name is whole, unless
the disk changed it later, which the hashes show. What is in it: `checkpoint_format`.

    checkpoints/
        step-00001200/                       whole
        damaged-step-00001300/               was whole, and has changed: the last one of these
        .step-00001400.1a2b3c4d.unfinished/  being written, or the writer died
        .step-00001200.1a2b3c4d.replaced/    the same step was written again, and this is the former
        .step-00001000.1a2b3c4d.deleted/     being deleted
"""

from __future__ import annotations

import contextlib
import copy
import logging
import math
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
from deta.platform.checkpoint.host_snapshot import (
    HostTensors,
    WrittenFile,
    copy_tensors,
    write_file,
)
from deta.platform.data.coco_dataset import Category
from deta.platform.run.config import RunConfig, to_json
from deta.platform.run.fence import Fence
from deta.platform.run.run_state import RunState
from deta.platform.system.atomic_write import force_to_disk

logger = logging.getLogger(__name__)

_LEFTOVER = re.compile(r"\.(step-\d{8,})\.(?:[0-9a-f]+\.)?(unfinished|replaced|deleted)")


@dataclass(frozen=True)
class Snapshot:
    """All that a checkpoint will hold, in host memory of its own."""

    state: RunState
    config: RunConfig
    categories: tuple[Category, ...]
    model: HostTensors
    training: HostTensors

    @property
    def num_bytes(self) -> int:
        """What the checkpoint will take on disk, the small files generously rounded up."""
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
    """Copy the state of a run, which may then go on. Nothing is shared with it.

    Args:
        into: a snapshot that nobody needs any more; its memory is used again.
    """
    model = copy_tensors(model_state, into.model if into is not None else None)
    training = copy_tensors(training_state, into.training if into is not None else None)
    tensors = [*model_state.values(), *training_state.values()]
    for device in {tensor.device for tensor in tensors if tensor.is_cuda}:
        torch.cuda.current_stream(device).synchronize()
    return Snapshot(copy.deepcopy(state), config, tuple(categories), model, training)


def write_checkpoint(folder: Path, snapshot: Snapshot, fence: Fence | None = None) -> Path:
    """Write a checkpoint into the folder and return its path.

    Writing the same step again replaces what is there. What a failure leaves is removed.

    Args:
        fence: asked right before the checkpoint gets its name.

    Raises:
        OSError: the disk is full, read-only or broken.
        FencedOffError: somebody else writes the checkpoints of this run by now.
    """
    final = folder / f"step-{snapshot.state.step:08d}"
    token = secrets.token_hex(4)
    unfinished = folder / f".{final.name}.{token}.unfinished"
    unfinished.mkdir(parents=True)
    try:
        state = state_to_json(snapshot.state, snapshot.categories)
        files = {
            "model.safetensors": snapshot.model.write(unfinished / "model.safetensors"),
            "training.safetensors": snapshot.training.write(unfinished / "training.safetensors"),
            "config.json": _write_text(unfinished / "config.json", to_json(snapshot.config)),
            "state.json": _write_text(unfinished / "state.json", state),
        }
        _write_text(unfinished / MANIFEST, manifest_to_json(snapshot.state.step, files))
        force_to_disk(unfinished)
        if fence is not None:
            fence.check()
        if final.exists():  # dying between the two renames: `_put_back_replaced`
            final.rename(folder / f".{final.name}.{token}.replaced")
        unfinished.rename(final)
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise
    force_to_disk(folder)
    shutil.rmtree(folder / f".{final.name}.{token}.replaced", ignore_errors=True)
    return final


def all_checkpoints(folder: Path) -> list[Path]:
    """By step, oldest first; not verified."""
    if not folder.is_dir():
        return []
    found = [path for path in folder.iterdir() if NAME.fullmatch(path.name)]
    return sorted(found, key=lambda path: (int(path.name.removeprefix("step-")), path.name))


def newest_checkpoint(
    folder: Path, tell: Callable[[str], None] = logger.warning
) -> Checkpoint | None:
    """The newest one that verifies, or none where there is none.

    A damaged one is set aside as `damaged-…`, of which the last is kept. One that the disk does
    not let be read is passed over and left.

    Args:
        tell: gets a line about each that is not used.

    Raises:
        OtherVersionError: the newest whole one is of another version. Going on from an older one
            would undo work silently.
        OSError: there are checkpoints, and the disk lets none of them be read.
    """
    _put_back_replaced(folder)
    unreadable: OSError | None = None
    for path in reversed(all_checkpoints(folder)):
        try:
            return read_checkpoint(path)
        except OtherVersionError:
            raise
        except CheckpointError as error:
            if path.exists():  # else deleted meanwhile, by retention
                tell(f"{error}; {_set_aside(path)}")
        except OSError as error:
            if path.exists():
                tell(f"{path}: cannot be read ({error}); an older checkpoint is tried")
                unreadable = error
    if unreadable is not None:
        raise unreadable
    return None


def best_checkpoint(folder: Path) -> Path | None:
    """The one with the highest AP, the newest of equals; not verified."""
    best, best_ap = None, -math.inf
    for path in all_checkpoints(folder):
        ap = read_metrics(path).get("AP")
        if ap is not None and ap >= best_ap:
            best, best_ap = path, ap
    return best


def keep_newest_and_best(folder: Path, keep: int = 1, protect: Collection[Path] = ()) -> None:
    """Delete all whole checkpoints but the newest and the best, and what dead saves left.

    Args:
        keep: how many of the newest.
        protect: others that stay.
    """
    paths = [path for path in all_checkpoints(folder) if _is_whole(path)]
    kept = {*paths[-keep:], *protect, best_checkpoint(folder)}
    for path in paths:
        if path not in kept:
            delete_checkpoint(path)
    clean_leftovers(folder)


def delete_checkpoint(path: Path) -> None:
    """Delete a checkpoint such that dying on the way leaves nothing that looks like one."""
    doomed = path.with_name(f".{path.name}.{secrets.token_hex(4)}.deleted")
    path.rename(doomed)
    shutil.rmtree(doomed, ignore_errors=True)


def clean_leftovers(folder: Path) -> None:
    """Remove what saves and deletions that were cut short have left.

    Only for the one who writes the checkpoints, while no save is under way.
    """
    _put_back_replaced(folder)
    for path in list(folder.iterdir()) if folder.is_dir() else ():
        if _LEFTOVER.fullmatch(path.name):
            shutil.rmtree(path, ignore_errors=True)


def _put_back_replaced(folder: Path) -> None:
    """Where a save died between its two renames, the former checkpoint gets its name back."""
    for path in folder.glob(".step-*.replaced"):
        match = _LEFTOVER.fullmatch(path.name)
        if match is not None and not (folder / match.group(1)).exists():
            with contextlib.suppress(OSError):  # a read-only disk, or the save goes on after all
                path.rename(folder / match.group(1))


def _set_aside(path: Path) -> str:
    """Rename a damaged checkpoint out of the way, and say what became of it."""
    aside = path.with_name(f"damaged-{path.name}")
    former = [other for other in path.parent.glob("damaged-step-*") if other.is_dir()]
    try:
        if aside.exists():
            shutil.rmtree(aside)
        path.rename(aside)
    except OSError as error:  # a read-only disk is no reason not to use the one before
        return f"left in place, since it cannot be renamed ({error.strerror or error})"
    for other in former:
        if other != aside:
            shutil.rmtree(other, ignore_errors=True)
    return f"set aside as {aside.name}"


def _is_whole(path: Path) -> bool:
    """Whether all files are there in full length; also if another version wrote it."""
    try:
        read_manifest(path)
    except OtherVersionError:
        return True
    except (CheckpointError, OSError):
        return False
    return True


def _write_text(path: Path, text: str) -> WrittenFile:
    return write_file(path, [memoryview(text.encode())])


def find_checkpoint(path: Path) -> Path:
    """The checkpoint that a person means by a path; not verified.

    Args:
        path: a checkpoint; or a run's folder, its `checkpoints` folder, or `best` in either, all
            of which mean the run's checkpoint with the highest AP. Where none has an AP, because
            the validation set had no boxes, the newest.

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
