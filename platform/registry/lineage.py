"""The lineage of a model: the facts about its origin that registration requires.

A checkpoint records its code, configuration and data. The folder of its run records the installed
packages and the run in MLflow. All of them are read at once, so that an error names all that is
missing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from deta.platform.checkpoint.format import Checkpoint, read_manifest
from deta.platform.run.run_file import RUN_FILE, read_run_file
from deta.platform.tracking.upload_plan import RECORD_FILE, read_record

DIRTY = "-dirty"  # suffix of `git describe --dirty` if code was not committed


class LineageError(ValueError):
    """Some of a model's lineage is unknown."""


@dataclass(frozen=True, kw_only=True)
class Lineage:
    """The origin of a version."""

    run_id: str  # in MLflow
    run_name: str
    code_commit: str
    code_is_dirty: bool  # some of the code was not committed
    config_sha256: str  # of config.json
    data_fingerprint: str  # of the training data
    val_fingerprint: str
    python: str
    system: str
    packages: tuple[str, ...]  # name==version, all that were installed
    step: int
    epoch: float


# The fields that each part requires, and what to do if one is unknown.
PARTS = {
    "commit": (("code_commit",), "train from a git checkout, or set DETA_COMMIT for a copy of it"),
    "configuration": (("config_sha256",), "use a checkpoint that was written by this project"),
    "data fingerprint": (
        ("data_fingerprint", "val_fingerprint"), f"{RUN_FILE} has it; evaluate and train there"
    ),
    "environment": (("python", "packages"), f"{RUN_FILE} has it; keep the checkpoint in its run"),
    "run": (("run_id",), "jobs/sync.py sends the run to MLflow"),
}  # fmt: skip


def missing_parts(lineage: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the names of the unknown parts."""
    return tuple(
        part for part, (names, _) in PARTS.items() if not all(lineage.get(name) for name in names)
    )


def read_lineage(checkpoint: Checkpoint) -> Lineage:
    """Read the lineage of a checkpoint in the folder of its run.

    Raises:
        LineageError: names all that is missing, and what to do.
    """
    run = run_folder(checkpoint.path)
    try:
        description = read_run_file(run)
    except (OSError, ValueError):
        description = {}
    environment = description.get("environment") or {}
    state = checkpoint.state
    commit = state.code_commit or str(description.get("code_commit") or "")
    lineage = Lineage(
        run_id=read_record(run).run_id,
        run_name=checkpoint.config.name,
        code_commit=commit.removesuffix(DIRTY),
        code_is_dirty=commit.endswith(DIRTY),
        config_sha256=read_manifest(checkpoint.path)["config.json"].sha256,
        data_fingerprint=state.data_fingerprint or str(description.get("train_fingerprint") or ""),
        val_fingerprint=str(description.get("val_fingerprint") or ""),
        python=str(environment.get("python") or ""),
        system=str(environment.get("system") or ""),
        packages=tuple(environment.get("packages") or ()),
        step=state.step,
        epoch=state.epoch,
    )
    if missing := missing_parts(asdict(lineage)):
        where = f"searched {checkpoint.path}, {run / RUN_FILE} and {RECORD_FILE}"
        advice = "\n  ".join(f"{part}: {PARTS[part][1]}" for part in missing)
        raise LineageError(
            f"{checkpoint.path}: cannot be registered, since its {', '.join(missing)} is unknown "
            f"({where}):\n  {advice}"
        )
    return lineage


def run_folder(checkpoint: Path) -> Path:
    """Return the folder of the run that a checkpoint is in."""
    folder = checkpoint.resolve().parent
    return folder.parent if folder.name == "checkpoints" else folder
