"""The project that a job takes along: which files, and which environment variables.

The project folder that contains the script is copied to the cluster, without what git ignores and
without private files. The job runs the copy, so edited code is the code that runs.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Mapping
from pathlib import Path

STOP_WAIT_S = 30  # from SIGTERM to SIGKILL; Ray's 3 s are too short to write a run's last state
# Excluded besides what git ignores. Patterns as in .gitignore.
NEVER_SENT = (
    ".git", ".venv", "venv", "__pycache__", "*.egg-info", ".*_cache", ".hypothesis",
    "/runs", "/build", "/dist", "mlflow.db*", "mlruns", "mlartifacts", "node_modules",
    ".env", ".env.*", ".netrc", ".ssh", ".aws", ".kube", "*.pem", "*.key", "auth_token",
)  # fmt: skip


def project_root(script: Path) -> Path:
    """Return the nearest parent folder with pyproject.toml or .git; else the script's folder."""
    for folder in script.resolve().parents:
        if (folder / "pyproject.toml").exists() or (folder / ".git").exists():
            return folder
    return script.resolve().parent


def excludes(root: Path) -> list[str]:
    """Return patterns, as in .gitignore, of files of a project that are not sent."""
    # What git ignores here; Ray itself reads only .gitignore files.
    listing = _git(
        root, "ls-files", "-z", "--others", "--ignored", "--exclude-standard", "--directory"
    )
    paths = [path.rstrip("/") for path in listing.split("\0") if path]
    escaped = ["".join("\\" + c if c in "\\*?[]!# " else c for c in path) for path in paths]
    # What is in a folder is excluded at any depth, since it appears again through the links in
    # deta/. What is in the root is not: `data` must not exclude platform/data.
    ignored = [f"**/{path}" if "/" in path else f"/{path}" for path in escaped]
    token = Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or "/").resolve()
    own_token = [f"/{token.relative_to(root)}"] if token.is_relative_to(root) else []
    return [*NEVER_SENT, *ignored, *own_token]


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


def _git(folder: Path, *arguments: str) -> str:
    """Return git's output; empty without git or a repository."""
    try:
        command = ["git", "-C", str(folder), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return ""
