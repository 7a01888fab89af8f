"""G: the same result in spite of interruptions, and no growth of resources."""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import numpy as np
from safetensors.numpy import load_file, save_file

from tests.chaos import oracles
from tests.chaos.direct import Direct, kill, undisturbed
from tests.chaos.runs import Place, ScenarioError, expect, log_progress
from tests.chaos.scenario import Options, Outcome

PARALLEL = 2  # resumed runs, one on each core


def killed_at_every_step(place: Place, options: Options) -> Outcome:
    """G1: the loop is killed after step 1, after step 2, … and resumed each time."""
    kills = min(options.times(10), 30)
    steps = sorted(random.Random("g1").sample(range(1, 31), kills))
    clean = Direct(
        place, "g1-undisturbed", schedule__epochs=2, ema_decay=0.9, evaluate_every_epochs=2
    )
    clean.finish(1)
    run = Direct(
        place, "g1", schedule__epochs=2, ema_decay=0.9, evaluate_every_epochs=2,
        checkpoint__every_steps=1,
    )  # fmt: skip
    for step in steps:
        processes = run.start(1)
        run.wait_for_step(step, processes)
        kill(processes)
    run.finish(1)
    begun = sum(row["kind"] == "begin" for row in _journal(run))
    equal = run.losses() == clean.losses()
    expect(
        oracles.samples(run.records) == oracles.samples(clean.records), "samples or pixels differ"
    )
    expect(run.weights() == clean.weights(), "the last weights, EMA or moments differ")
    return Outcome(
        kills, "kills bit-equal", equal, f"{begun} starts; 2 micro-batches per step, EMA weights"
    )


def world_sizes_change(place: Place, options: Options) -> Outcome:
    """G2: 2 -> 1 -> 2 workers, and 4 -> 3."""
    worst, num_equal = 0.0, 0
    for name, first, batch, later in (
        ("g2-212", 2, 4, [(1, 21), (2, None)]),
        ("g2-43", 4, 12, [(3, None)]),
    ):
        epochs = 2 if batch == 4 else 6
        fixed: dict[str, Any] = {
            "schedule__epochs": epochs, "evaluate_every_epochs": epochs, "total_batch_size": batch
        }  # fmt: skip
        clean = Direct(place, f"{name}-clean", record=batch == 4, **fixed)
        clean.finish(first)
        run = Direct(
            place, name, record=batch == 4, checkpoint__every_steps=1, **fixed
        )  # fmt: skip
        processes = run.start(first)
        run.wait_for_step(10, processes)
        kill(processes)
        for world_size, until in later:
            if until is None:
                run.finish(world_size)
                continue
            processes = run.start(world_size)
            run.wait_for_step(until, processes)
            kill(processes)
        difference = oracles.worst_difference(run.losses(same_again=False), clean.losses())
        log_progress(f"{name}: losses differ by {difference:.1e} at most")
        worst = max(worst, difference)
        if batch == 4:
            expect(
                oracles.samples(run.records) == oracles.samples(clean.records),
                "samples or pixels differ",
            )
        num_equal += run.weights() == clean.weights()
        aps = [_last(one, "end")["metrics"].get("AP", 0.0) for one in (run, clean)]
        expect(abs(aps[0] - aps[1]) < 1, f"AP {aps[0]:.2f}, undisturbed {aps[1]:.2f}")
    return Outcome(
        f"{worst:.1e}", "relative", worst <= 1e-5,
        f"samples and pixels equal; last weights bit-equal in {num_equal} of 2",
    )  # fmt: skip


def loader_workers_change(place: Place, options: Options) -> Outcome:
    """G3: 0, 2 and 4 loader processes, changed at each resume."""
    clean = undisturbed(place, 2, 1)
    run = Direct(
        place, "g3", schedule__epochs=2, evaluate_every_epochs=2, checkpoint__every_steps=1
    )
    for loader_workers, until in ((0, 8), (2, 17), (4, None)):
        if until is None:
            run.finish(1, data__loader_workers=loader_workers)
            continue
        processes = run.start(1, data__loader_workers=loader_workers)
        run.wait_for_step(until, processes)
        kill(processes)
    samples, expected = oracles.samples(run.records), oracles.samples(clean.records)
    same = sum(samples.get(step) == expected[step] for step in expected)
    expect(run.losses() == clean.losses(), "losses differ")
    expect(run.weights() == clean.weights(), "the last weights differ")
    return Outcome(
        round(100 * same / len(expected), 1), "% of steps with equal samples and pixels",
        same == len(expected),
    )  # fmt: skip


def state_audit(place: Place, options: Options) -> Outcome:
    """G4: a change of any part of a checkpoint, as by a careless save, must be detected.

    It is detected if the run ends with an error or with another result than the undisturbed run.
    """
    fixed: dict[str, Any] = {
        "schedule__epochs": 2, "evaluate_every_epochs": 1, "ema_decay": 0.9,
        "checkpoint__every_steps": 1, "checkpoint__keep": 40, "schedule__patience": 2,
        "record": False,
    }  # fmt: skip
    run = Direct(place, "g4", **fixed)
    run.finish(1)
    expected = _signature(run)
    middle = next(
        path
        for path in sorted((run.folder / "checkpoints").glob("step-*"))
        if oracles.step_of(path) == 20
    )

    def resume_from(audit: Direct, change: Callable[[Path], None]) -> str:
        shutil.rmtree(audit.folder)
        target = audit.folder / "checkpoints" / middle.name
        shutil.copytree(middle, target)
        change(target)
        _sign(target)
        codes = audit.run(1)
        if codes != [0]:
            return "refused"
        return "equal" if _signature(audit) == expected else "differs"

    free: SimpleQueue[Direct] = SimpleQueue()
    for number in range(PARALLEL):
        free.put(Direct(place, f"g4-audit-{number}", as_launched=True, **fixed))

    def one(change: Callable[[Path], None]) -> str:
        audit = free.get()
        try:
            return resume_from(audit, change)
        finally:
            free.put(audit)

    first = free.get()
    unchanged = resume_from(first, lambda path: None)
    expect(unchanged == "equal", f"resumed without a change: {unchanged}: {first.tail()}")
    free.put(first)
    mutations = _mutations(middle)
    with ThreadPoolExecutor(PARALLEL) as pool:
        results = dict(zip(mutations, pool.map(one, mutations.values()), strict=True))
    missed = [name for name, result in results.items() if result == "equal"]
    log_progress(f"g4: {results}")
    caught = len(results) - len(missed)
    return Outcome(
        f"{caught}/{len(results)}", "mutations detected", not missed,
        f"not detected: {', '.join(missed)}" if missed else "",
    )  # fmt: skip


def _mutations(checkpoint: Path) -> dict[str, Callable[[Path], None]]:
    tensors = load_file(checkpoint / "training.safetensors")
    first = {kind: next((n for n in tensors if n.startswith(kind)), None) for kind in (
        "weights/", "optimizer/exp_avg/", "optimizer/exp_avg_sq/", "optimizer/step/", "num_averaged"
    )}  # fmt: skip

    def tensor(file: str, name: str | None, drop: bool = False) -> Callable[[Path], None]:
        def change(path: Path) -> None:
            content = load_file(path / file)
            key = name or next(n for n, t in content.items() if t.dtype.kind == "f" and t.size)
            if drop:
                del content[key]
            else:
                content[key] = np.asarray(content[key] + content[key].dtype.type(1))
            save_file(content, path / file)

        return change

    def state(**values: Any) -> Callable[[Path], None]:
        def change(path: Path) -> None:
            content = json.loads((path / "state.json").read_text())
            for name in values:
                expect(name in content, f"the state has no {name}")
            (path / "state.json").write_text(json.dumps(content | values))

        return change

    def config(key: str, value: Any) -> Callable[[Path], None]:
        def change(path: Path) -> None:
            content = json.loads((path / "config.json").read_text())
            *outer, last = key.split(".")
            part = content
            for name in outer:
                part = part[name]
            part[last] = value
            (path / "config.json").write_text(json.dumps(content))

        return change

    return {
        "EMA weights": tensor("model.safetensors", None),
        "weights": tensor("training.safetensors", first["weights/"]),
        "a weight is missing": tensor("training.safetensors", first["weights/"], drop=True),
        "first moment": tensor("training.safetensors", first["optimizer/exp_avg/"]),
        "second moment": tensor("training.safetensors", first["optimizer/exp_avg_sq/"]),
        "a moment is missing": tensor(
            "training.safetensors", first["optimizer/exp_avg/"], drop=True
        ),
        "optimizer's step count": tensor("training.safetensors", first["optimizer/step/"]),
        "EMA's step count": tensor("training.safetensors", first["num_averaged"]),
        "position (step: order, rate, random numbers)": state(step=19),
        "samples seen": state(samples_seen=76),
        "history of AP (early stopping)": state(ap_history=[99.0, 98.0]),
        "best AP": state(best_ap=99.0),
        "skipped in a row": state(skipped_in_a_row=3),
        "skipped steps": state(skipped_steps=3),
        "broken images": state(broken_images={"1": "planted"}),
        "data fingerprint": state(data_fingerprint="0" * 64),
        "configuration: seed": config("seed", 7),
        "configuration: total batch (accumulation)": config("total_batch_size", 8),
        "configuration: learning rate": config("optim.lr", 3e-3),
        "format version": state(format_version=99),
    }


def _sign(checkpoint: Path) -> None:
    """Update the manifest's hashes, so that it is not what detects the change."""
    path = checkpoint / "MANIFEST.json"
    manifest = json.loads(path.read_text())
    for name, entry in manifest["files"].items():
        content = (checkpoint / name).read_bytes()
        entry["bytes"], entry["sha256"] = len(content), hashlib.sha256(content).hexdigest()
    from deta.platform.checkpoint.format import Written, manifest_to_json

    files = {n: Written(e["bytes"], e["sha256"]) for n, e in manifest["files"].items()}
    path.write_text(manifest_to_json(manifest["step"], files))


def _signature(run: Direct) -> tuple[str, str, str]:
    """Return the end of a run: its tensors, its state without times, its last checkpoint's name."""
    newest = oracles.newest_checkpoint(run.folder)
    if newest is None:
        raise ScenarioError(f"{run.name}: no checkpoint")
    state = json.loads((newest / "state.json").read_text())
    state.pop("useful_s", None)
    return run.weights(), json.dumps(state, sort_keys=True), newest.name


def soak(place: Place, options: Options) -> Outcome:
    """G5: many tiny steps with checkpoints and evaluations; no resource may grow."""
    epochs = 2000
    run = Direct(
        place, "g5", record=False, schedule__epochs=epochs, evaluate_every_epochs=2,
        checkpoint__every_steps=20, num_pictures=1,
    )  # fmt: skip
    (process,) = run.start(1)
    seen: list[tuple[float, int, int, int, int]] = []
    try:
        run.wait_for_step(64, [process], 180)  # by then allocators and threads stop growing
        began_s = time.monotonic()
        shm = _shm_bytes()
        while time.monotonic() - began_s < options.soak_s:
            expect(process.poll() is None, f"ended with {process.returncode}: {run.tail()}")
            seen.append((time.monotonic() - began_s, *_resources(process)))
            time.sleep(1)
        steps = run.step()
        checkpoints = len(list((run.folder / "checkpoints").iterdir()))
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    slope, margin = _slope([row[0] / 60 for row in seen], [row[1] / 2**20 for row in seen])
    thirds = len(seen) // 3
    more_files = min(r[2] for r in seen[-thirds:]) - min(r[2] for r in seen[:thirds])
    more_threads = min(r[3] for r in seen[-thirds:]) - min(r[3] for r in seen[:thirds])
    more_shm = _shm_bytes() - shm
    log_progress(
        f"g5: {steps} steps; files +{more_files}, threads +{more_threads}, shm +{more_shm}"
    )
    good = slope - margin <= 1 and more_files <= 0 and more_threads <= 0 and checkpoints <= 5
    return Outcome(
        round(slope, 2), "MB/min", good,
        f"± {margin:.2f}; {steps} steps in {options.soak_s:.0f} s, open files +{more_files}, "
        f"threads +{more_threads}, {checkpoints} checkpoints on disk",
    )  # fmt: skip


def _resources(process: subprocess.Popen[bytes]) -> tuple[int, int, int, int]:
    """Return bytes of memory, open files, threads, processes."""
    folder = Path(f"/proc/{process.pid}")
    pages = int((folder / "statm").read_text().split()[1])
    files, threads = len(os.listdir(folder / "fd")), len(os.listdir(folder / "task"))
    return pages * os.sysconf("SC_PAGE_SIZE"), files, threads, 1


def _slope(times: list[float], values: list[float]) -> tuple[float, float]:
    """Return the least-squares slope and the half-width of its 95 % confidence interval.

    Neighbouring values are correlated, so the interval comes from the means of twelve spans.
    """
    count = min(12, len(times))
    edges = [round(i * len(times) / count) for i in range(count + 1)]
    spans = list(pairwise(edges))
    x = [sum(times[a:b]) / (b - a) for a, b in spans]
    y = [sum(values[a:b]) / (b - a) for a, b in spans]
    mean_x, mean_y = sum(x) / count, sum(y) / count
    spread = sum((xi - mean_x) ** 2 for xi in x)
    slope = sum((xi - mean_x) * (yi - mean_y) for xi, yi in zip(x, y, strict=True)) / spread
    rest = [yi - mean_y - slope * (xi - mean_x) for xi, yi in zip(x, y, strict=True)]
    error = (sum(r * r for r in rest) / max(1, count - 2) / spread) ** 0.5
    return slope, 2.2 * error  # Student's t, ten degrees of freedom


def _shm_bytes() -> int:
    return sum(p.stat().st_size for p in Path("/dev/shm").glob("torch_*"))


def _journal(run: Direct) -> list[dict[str, Any]]:
    from tests.chaos.runs import read_journal

    return read_journal(run.folder)


def _last(run: Direct, kind: str) -> dict[str, Any]:
    return [event for event in _journal(run) if event["kind"] == kind][-1]
