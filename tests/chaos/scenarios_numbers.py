"""D: losses, gradients and metrics that are not finite."""

from __future__ import annotations

import math
import signal
import time
from typing import Any

from safetensors.numpy import load_file

from tests.chaos import oracles
from tests.chaos.direct import Direct
from tests.chaos.runs import Place, TinyRun, expect, log_progress, read_journal
from tests.chaos.scenario import Options, Outcome
from tests.chaos.scenarios_processes import recovery

MAX_SKIPPED = 10


def nan_loss(place: Place, options: Options) -> Outcome:
    """D1: NaN on rank 1 at step 20, then from step 40 on; in a complete run."""
    faults = [
        {"kind": "nan_loss", "rank": 1, "steps": [20, 20]},
        {"kind": "nan_loss", "rank": 1, "steps": [40, 99]},
    ]
    with TinyRun(place, "d1", faults=faults, record=True) as run:
        run.start()
        code = run.wait(300)
        expect(code == 1, f"exit code {code}: {run.tail()}")
        return _skipped_alike(run.events(), run, run.tail(4000))


def inf_gradient(place: Place, options: Options) -> Outcome:
    """D2: an infinite gradient on rank 0, with EMA weights; without a cluster."""
    faults = [
        {"kind": "inf_grad", "rank": 0, "steps": [20, 20]},
        {"kind": "inf_grad", "rank": 0, "steps": [40, 99]},
    ]
    run = Direct(place, "d2", faults=faults, ema_decay=0.9)
    codes = run.run(2)
    expect(0 not in codes, f"exit codes {codes}")
    outcome = _skipped_alike(read_journal(run.folder), run, run.tail(6000))
    newest = oracles.newest_checkpoint(run.folder)
    assert newest is not None
    tensors = load_file(newest / "training.safetensors")
    expected = oracles.step_of(newest) - (1 if oracles.step_of(newest) >= 20 else 0)
    averaged = int(tensors["num_averaged"])
    # Steps from 40 on were skipped.
    expected -= max(0, oracles.step_of(newest) - 39)
    expect(averaged == expected, f"averaged {averaged} times in {oracles.step_of(newest)} steps")
    return outcome


def _skipped_alike(events: list[dict[str, Any]], run: TinyRun | Direct, output: str) -> Outcome:
    skipped = [e for e in events if e["kind"] == "skipped"]
    log_progress(f"{run.name}: skipped steps {[e['step'] for e in skipped]}")
    expect(skipped and skipped[0]["step"] == 20, f"skipped {[e['step'] for e in skipped]}")
    last = skipped[-1]
    expect(
        last["in_a_row"] == MAX_SKIPPED and last["total"] == MAX_SKIPPED + 1,
        f"stopped after {last['in_a_row']} in a row, {last['total']} in all",
    )
    expect(
        all(str(image) in output for image in last["images"]),
        f"the message does not name images {last['images']}: {output[-600:]}",
    )
    expect(list(run.folder.glob("not-finite-step-*.json")), "no dump was written")
    weights = oracles.weights_by_rank(run.records)
    # The optimizer's kernel skips the update itself, so its call is recorded in any case.
    expect(weights.get(20, weights[19]) == weights[19], "an update was made at step 20")
    unequal = [step for step, of in weights.items() if len(of) != 2 or len(set(of.values())) != 1]
    expect(not unequal, f"the ranks' weights differ at steps {unequal[:5]}")
    poisoned = sum(
        not all(math.isfinite(v) for v in (float(t.min()), float(t.max())))
        for path in (run.folder / "checkpoints").glob("step-*/*.safetensors")
        for t in load_file(path).values()
        if t.size and t.dtype.kind == "f"
    )
    return Outcome(
        poisoned, "poisoned tensors", poisoned == 0,
        f"all ranks skipped step 20, bit-equal in {len(weights)} updates; stopped after "
        f"{MAX_SKIPPED} in a row with a dump of the images",
    )  # fmt: skip


def bad_metrics(place: Place, options: Options) -> Outcome:
    """D4: the APs of three evaluations are NaN, infinite and none; then a worker is killed."""
    faults: list[dict[str, Any]] = [
        {"kind": "metric", "calls": [2], "value": "nan"},
        {"kind": "metric", "calls": [3], "value": "inf"},
        {"kind": "metric", "calls": [4], "value": None},
    ]
    with TinyRun(
        place, "d4", faults=faults, schedule__epochs=7, evaluate_every_epochs=1,
        checkpoint__every_steps=8,
    ) as run:  # fmt: skip
        run.start()
        run.wait_for_step(4 * 16 + 4, 240)
        hit_s = time.time()
        run.one("worker").send(signal.SIGKILL)
        recovery(run, hit_s, 120)
        run.finish()
        events = run.events()
    restarts = sum(e["kind"] == "restart" for e in events)
    evaluations = [e for e in events if e["kind"] == "evaluation"]
    expect(len(evaluations) >= 7, f"{len(evaluations)} evaluations")
    from deta.platform.checkpoint.local import best_checkpoint

    best = best_checkpoint(run.folder / "checkpoints")
    finite = {e["step"]: e["metrics"]["val/AP"] for e in evaluations if "val/AP" in e["metrics"]}
    top = max(finite.values())
    expect(best is not None and best.name.startswith("step-"), "there is no best checkpoint")
    chosen = finite.get(oracles.step_of(best))
    expect(
        chosen == top,
        f"best is step {oracles.step_of(best)} with AP {chosen}; the finite ones are {finite}",
    )
    return Outcome(
        restarts, "restarts by the supervisor", True,
        "NaN, infinity and none never became the best; a worker killed afterwards was replaced",
    )  # fmt: skip
