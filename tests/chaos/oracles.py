"""What is compared: losses bit for bit, samples, weights, rows in MLflow, files, processes."""

from __future__ import annotations

import hashlib
import json
import math
import sqlite3
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tests.chaos.runs import Event, ScenarioError

# What the names of the rows begin with that belong to a step; others are of the whole run.
ROWS_OF_STEPS = ("train/", "val/", "AP_of_class/", "AR_of_class/")


def losses(events: Iterable[Event], *, same_again: bool = True) -> dict[int, str]:
    """The loss of each step as a hex float; of a step done twice, the last.

    Args:
        same_again: a step that is done again must have the loss it had, bit for bit.
    """
    found: dict[int, str] = {}
    for event in events:
        if event["kind"] == "progress":
            first = event["step"] - len(event["losses"]) + 1
            for step, loss in enumerate(event["losses"], first):
                text = loss.hex() if loss is not None else "not finite"
                if same_again and found.get(step, text) != text:
                    raise ScenarioError(f"step {step} had loss {found[step]}, done again {text}")
                found[step] = text
    return found


def worst_difference(ours: dict[int, str], theirs: dict[int, str]) -> float:
    """The largest relative difference of two runs' losses."""
    if ours.keys() != theirs.keys():
        raise ScenarioError(f"other steps: {sorted(ours.keys() ^ theirs.keys())[:10]}")
    pairs = [(float.fromhex(ours[s]), float.fromhex(theirs[s])) for s in ours]
    return max(abs(a - b) / abs(b) for a, b in pairs)


def useful_seconds(events: Iterable[Event]) -> float:
    """Of each step the time since the step, or the begin, before it; of one done twice, the last.

    Of plain Ray's job, the steps are called "step".
    """
    before_s = math.nan
    seconds: dict[int, float] = {}
    for event in events:
        if event["kind"] == "begin":
            before_s = event["time_s"]
        elif event["kind"] in ("progress", "step"):
            seconds[event["step"]] = event["time_s"] - before_s
            before_s = event["time_s"]
    return sum(seconds.values())


def samples(records: Path) -> dict[int, list[tuple[int, str]]]:
    """Of each step its positions in the stream of samples, sorted; hashes of pixels beside.

    Of a step done more than once, the last of each.
    """
    latest: dict[int, tuple[float, dict[tuple[int, int], dict[str, Any]]]] = {}
    for file in sorted(records.glob("*.jsonl"), key=lambda path: path.stat().st_mtime):
        for row in map(json.loads, file.read_text().splitlines()):
            if "positions" in row:
                _, rows = latest.setdefault(row["step"], (0.0, {}))
                for position in row["positions"]:
                    rows[(position, 0)] = row
    return {
        step: [(position, row["pixels"]) for (position, _), row in sorted(rows.items())]
        for step, (_, rows) in latest.items()
    }


def weights_by_rank(records: Path) -> dict[int, dict[int, str]]:
    """Of each step and rank, the hash of the weights after its update; the last one."""
    found: dict[int, dict[int, str]] = {}
    for file in sorted(records.glob("*.jsonl"), key=lambda path: path.stat().st_mtime):
        for row in map(json.loads, file.read_text().splitlines()):
            if "weights" in row:
                found.setdefault(row["step"], {})[row["rank"]] = row["weights"]
    return found


def newest_checkpoint(folder: Path) -> Path | None:
    """By name and with a manifest whose hashes are right; our own few lines."""
    for path in sorted((folder / "checkpoints").glob("step-*"), reverse=True):
        if is_whole(path):
            return path
    return None


def is_whole(checkpoint: Path) -> bool:
    try:
        manifest = json.loads((checkpoint / "MANIFEST.json").read_text())
        files = manifest.get("files", manifest)
        return all(
            _sha256(checkpoint / name) == entry["sha256"]
            for name, entry in files.items()
            if isinstance(entry, dict)
        )
    except (OSError, ValueError, KeyError):
        return False


def step_of(checkpoint: Path | None) -> int:
    return int(checkpoint.name.split("-")[1]) if checkpoint else 0


def weights_sha256(folder: Path) -> str:
    """Of the tensors of the newest checkpoint of a run, model and all else."""
    from safetensors.numpy import load_file

    path = newest_checkpoint(folder)
    if path is None:
        raise ScenarioError(f"{folder}: has no whole checkpoint")
    digest = hashlib.sha256(path.name.encode())
    for file in sorted(path.glob("*.safetensors")):
        for name, tensor in sorted(load_file(file).items()):
            digest.update(name.encode() + tensor.tobytes())
    return digest.hexdigest()


def leftovers(folder: Path) -> list[str]:
    """Files of interrupted saves."""
    bad = [
        path
        for path in folder.rglob("*")
        if path.suffix in (".tmp", ".unfinished") or path.name.startswith(".step-")
    ]
    return sorted(str(path.relative_to(folder)) for path in bad)


def folder_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def rows_in_journal(events: Iterable[Event]) -> dict[tuple[str, int], set[float]]:
    """The rows that MLflow must hold, one for each name and step; the values it may have.

    A step that was done again after a fault is in the journal twice.
    """
    rows: dict[tuple[str, int], set[float]] = {}
    for event in events:
        metrics = {}
        if event["kind"] in ("progress", "evaluation"):
            metrics = event["metrics"]
        elif event["kind"] == "evaluation_kept":
            metrics = {"val/keep_seconds": event["seconds"]}
        for name, value in metrics.items():
            rows.setdefault((name, event["step"]), set()).add(float(value))
    return rows


def rows_in_mlflow(
    database: Path, run_id: str, prefixes: tuple[str, ...] = ROWS_OF_STEPS
) -> list[tuple[str, int, float, int]]:
    """As they lie in the server's database, duplicates and all."""
    with sqlite3.connect(f"file:{database}?mode=ro", uri=True, timeout=30) as connection:
        rows = connection.execute(
            "select key, step, value, timestamp from metrics where run_uuid = ?", (run_id,)
        ).fetchall()
    return [
        (key, step, value, time_ms)
        for key, step, value, time_ms in rows
        if key.startswith(prefixes)
    ]


def mlflow_status(database: Path, run_id: str) -> str:
    with sqlite3.connect(f"file:{database}?mode=ro", uri=True, timeout=30) as connection:
        (status,) = connection.execute(
            "select status from runs where run_uuid = ?", (run_id,)
        ).fetchone()
    return str(status)


def mlflow_run_id(folder: Path) -> str:
    return str(json.loads((folder / "mlflow.json").read_text())["run_id"])


def missing_and_wrong(
    journal: dict[tuple[str, int], set[float]], stored: list[tuple[str, int, float, int]]
) -> tuple[int, int]:
    """How many rows are missing; how many are there twice, or with a value nobody wrote."""
    by_place = Counter((name, step) for name, step, _, _ in stored)
    missing = len(journal.keys() - by_place.keys())
    twice = sum(number - 1 for number in by_place.values())
    foreign = sum(value not in journal.get((name, step), ()) for name, step, value, _ in stored)
    return missing, twice + foreign


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
