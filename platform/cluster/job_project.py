"""The project that a job takes along: which files, and which environment variables.

The project folder that contains the script is copied to the cluster, without what git ignores and
without private files. The job runs the copy, so edited code is the code that runs.
"""

from __future__ import annotations

import logging
import os
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ray._private.runtime_env.packaging import _dir_travel, _get_excludes

STOP_WAIT_S = 30  # from SIGTERM to SIGKILL; Ray's 3 s are too short to write a run's last state
MAX_UPLOAD_BYTES = 100 * 2**20  # Ray refuses 512 MiB, but only after it has read all of them
# Excluded besides what git ignores. Patterns as in .gitignore.
NEVER_SENT = (
    ".git", ".venv", "venv", "__pycache__", "*.egg-info", ".*_cache", ".hypothesis",
    "/runs", "/build", "/dist", "mlflow.db*", "mlruns", "mlartifacts", "node_modules",
    ".env", ".env.*", ".netrc", ".ssh", ".aws", ".kube", "*.pem", "*.key", "auth_token",
)  # fmt: skip


@dataclass(frozen=True)
class Project:
    """The folder that is sent with a job."""

    root: Path
    excludes: tuple[str, ...]  # patterns as in .gitignore
    num_files: int
    size_bytes: int

    @staticmethod
    def holding(script: Path, root: Path | None = None) -> Project:
        """Return the project of a script: `root`, or the one that `project_root` finds.

        Raises:
            ValueError: the script does not exist or is outside `root`, or the project is too large
                to send; names the largest of its folders.
        """
        if not script.is_file():
            raise ValueError(f"{script}: no such script (relative to {Path.cwd()})")
        script = script.resolve()
        root = project_root(script) if root is None else root.resolve()
        if not script.is_relative_to(root):
            raise ValueError(f"{script} is not in {root}, so it would not be sent with it")
        excludes = (*NEVER_SENT, *_ignored_by_git(root), *_own_token(root))
        return Project(root, excludes, *_measure(root, excludes))


def project_root(script: Path) -> Path:
    """Return the nearest parent folder with pyproject.toml or .git; else the script's folder."""
    for folder in script.resolve().parents:
        if (folder / "pyproject.toml").exists() or (folder / ".git").exists():
            return folder
    return script.resolve().parent


def job_environment(root: Path, environment: Mapping[str, str]) -> dict[str, str]:
    """Return the job's environment variables: its commit, and MLflow's address and credentials."""
    variables = {"RAY_JOB_STOP_WAIT_TIME_S": str(STOP_WAIT_S)}
    # The copy has no .git folder.
    if commit := _git(root, "describe", "--always", "--dirty", "--abbrev=40"):
        variables["DETA_COMMIT"] = commit.strip()
    for name, value in environment.items():
        if name.startswith("MLFLOW_TRACKING_") or name == "MLFLOW_REGISTRY_URI":
            variables[name] = value
    for name in ("MLFLOW_TRACKING_URI", "MLFLOW_REGISTRY_URI"):
        uri = variables.get(name, "")
        path = uri.removeprefix("sqlite:///")
        if path and ":" not in path and not path.startswith("/"):  # would be in the job's copy
            variables[name] = uri.removesuffix(path) + str(Path(path).resolve())
    return variables


def _ignored_by_git(root: Path) -> list[str]:
    """Return patterns for all that git ignores here; Ray itself reads only .gitignore files."""
    listing = _git(
        root, "ls-files", "-z", "--others", "--ignored", "--exclude-standard", "--directory"
    )
    paths = [path.rstrip("/") for path in listing.split("\0") if path]
    escaped = ["".join("\\" + c if c in "\\*?[]!# " else c for c in path) for path in paths]
    # What is in a folder is excluded at any depth, since it appears again through the links in
    # deta/. What is in the root is not: `data` must not exclude platform/data.
    return [f"**/{path}" if "/" in path else f"/{path}" for path in escaped]


def _own_token(root: Path) -> list[str]:
    path = os.environ.get("RAY_AUTH_TOKEN_PATH")
    if not path or not Path(path).resolve().is_relative_to(root):
        return []
    return [f"/{Path(path).resolve().relative_to(root)}"]


def _git(folder: Path, *arguments: str) -> str:
    """Return git's output; empty without git or a repository."""
    try:
        command = ["git", "-C", str(folder), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return ""


def _measure(root: Path, excludes: Sequence[str]) -> tuple[int, int]:
    """Return number and bytes of the files that Ray would send."""
    num_files, bytes_by_part = 0, dict[str, int]()

    def count(path: Path) -> None:
        nonlocal num_files
        if not path.is_file():
            return
        num_files += 1
        part = path.relative_to(root).parts[0]
        bytes_by_part[part] = bytes_by_part.get(part, 0) + path.stat().st_size
        if sum(bytes_by_part.values()) > MAX_UPLOAD_BYTES:
            largest = max(bytes_by_part, key=lambda name: bytes_by_part[name])
            raise ValueError(
                f"{root} has more than {MAX_UPLOAD_BYTES // 2**20} MB that would be sent with the "
                f"job, most of it in {largest}; list data in .gitignore or .rayignore, so that it "
                "is not sent"
            )

    quiet = logging.getLogger(f"{__name__}.travel")
    quiet.setLevel(logging.CRITICAL)
    use_gitignore = os.environ.get("RAY_RUNTIME_ENV_IGNORE_GITIGNORE") != "1"
    _dir_travel(root, [_get_excludes(root, list(excludes))], count, use_gitignore, quiet)
    return num_files, sum(bytes_by_part.values())
