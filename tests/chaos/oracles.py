"""Values that scenarios compare: losses bit for bit, samples, weights, MLflow rows, files."""

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

# Prefixes of metrics that belong to a step; other metrics belong to the whole run.
ROWS_OF_STEPS = ("train/", "val/", "AP_of_class/", "AR_of_class/")


def losses(events: Iterable[Event], *, same_again: bool = True) -> dict[int, str]:
    """Return the loss of each step as a hex float; the last one of a repeated step.

    Args:
        same_again: require that a repeated step has the same loss, bit for bit.
    """
    found: dict[int, str] = {}
    for event in events:
        if event["kind"] == "progress":
            first = event["step"] - len(event["losses"]) + 1
            for step, loss in enumerate(event["losses"], first):
                text = loss.hex() if loss is not None else "not finite"
                if same_again and found.get(step, text) != text:
                    raise ScenarioError(f"step {step} had loss {found[step]}, repeated {text}")
                found[step] = text
    return found


def worst_difference(ours: dict[int, str], theirs: dict[int, str]) -> float:
    """Return the largest relative difference of two runs' losses."""
    if ours.keys() != theirs.keys():
        raise ScenarioError(f"steps of one run: {sorted(ours.keys() ^ theirs.keys())[:10]}")
    pairs = [(float.fromhex(ours[s]), float.fromhex(theirs[s])) for s in ours]
    return max(abs(a - b) / abs(b) for a, b in pairs)


def useful_seconds(events: Iterable[Event]) -> float:
    """Sum the durations of all steps; of a repeated step, only the last counts.

    A step lasts from the step or the `begin` before it. The plain Ray job calls its events "step".
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
    """Return each step's positions in the sample order, sorted, with hashes of the pixels.

    Of a repeated step, the last record of each position counts.
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
    """Return the hash of the weights after each step and rank; the last of a repeated step."""
    found: dict[int, dict[int, str]] = {}
    for file in sorted(records.glob("*.jsonl"), key=lambda path: path.stat().st_mtime):
        for row in map(json.loads, file.read_text().splitlines()):
            if "weights" in row:
                found.setdefault(row["step"], {})[row["rank"]] = row["weights"]
    return found


def newest_checkpoint(folder: Path) -> Path | None:
    """Return the newest checkpoint whose files match its manifest, without the product's code."""
    for path in sorted((folder / "checkpoints").glob("step-*"), reverse=True):
        if is_intact(path):
            return path
    return None


def is_intact(checkpoint: Path) -> bool:
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
    """Return the hash of all tensors in a run's newest checkpoint."""
    from safetensors.numpy import load_file

    path = newest_checkpoint(folder)
    if path is None:
        raise ScenarioError(f"{folder}: has no intact checkpoint")
    digest = hashlib.sha256(path.name.encode())
    for file in sorted(path.glob("*.safetensors")):
        for name, tensor in sorted(load_file(file).items()):
            digest.update(name.encode() + tensor.tobytes())
    return digest.hexdigest()


def leftovers(folder: Path) -> list[str]:
    """List the files that interrupted saves left."""
    bad = [
        path
        for path in folder.rglob("*")
        if path.suffix in (".tmp", ".unfinished") or path.name.startswith(".step-")
    ]
    return sorted(str(path.relative_to(folder)) for path in bad)


def folder_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def rows_in_journal(events: Iterable[Event]) -> dict[tuple[str, int], set[float]]:
    """Return the rows that MLflow must hold, by name and step, with the values allowed for each.

    The journal contains a step twice if a fault made the run repeat it.
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
    """Return the rows in the server's database, with duplicates."""
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
    """Count rows that are missing, and rows that are duplicate or have a value nobody wrote."""
    by_place = Counter((name, step) for name, step, _, _ in stored)
    missing = len(journal.keys() - by_place.keys())
    twice = sum(number - 1 for number in by_place.values())
    foreign = sum(value not in journal.get((name, step), ()) for name, step, value, _ in stored)
    return missing, twice + foreign


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
