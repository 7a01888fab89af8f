"""C: MLflow is unreachable, mute, slow, faulty or killed; a network partition. And A5."""

from __future__ import annotations

import math
import os
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from tests.chaos import oracles
from tests.chaos.cluster import NetnsCluster
from tests.chaos.mlflow_server import MlflowServer, Mode, Proxy
from tests.chaos.runs import (
    ROOT,
    STEPS_PER_EPOCH,
    Event,
    Place,
    ScenarioError,
    TinyRun,
    clean_environment,
    expect,
    log_progress,
)
from tests.chaos.scenario import Options, Outcome
from tests.chaos.scenarios_processes import recovery

PHASE_STEPS = 160
WARM_UP_STEPS = 40  # allocators, caches, and MLflow's client, which takes seconds to import
ELASTIC_EPOCHS = 40  # for a run on several nodes


@dataclass(frozen=True)
class Phase:
    """Some steps of a run, and MLflow's behaviour during them."""

    id: str  # the scenario; empty: without a fault, for comparison
    mode: Mode | None  # None: the server itself is killed
    first: int = 0
    last: int = 0


def mlflow_refused(place: Place, options: Options) -> Outcome:
    """C1: MLflow refuses connections from the start."""
    return _tracking(place, "C1")


def mlflow_mute_or_slow(place: Place, options: Options) -> Outcome:
    """C2: MLflow accepts calls and never answers; then it answers after 5 s."""
    return _tracking(place, "C2")


def mlflow_errors(place: Place, options: Options) -> Outcome:
    """C3: half of the calls fail, and half of these after they were executed."""
    return _tracking(place, "C3")


def mlflow_killed(place: Place, options: Options) -> Outcome:
    """C4: SIGKILL of the server, which starts again later."""
    return _tracking(place, "C4")


def mlflow_away_at_the_end(place: Place, options: Options) -> Outcome:
    """C5: MLflow is unreachable at the end; the command exits, and jobs/sync.py sends the rest."""
    result = _tracking_run(place)
    return Outcome(
        round(result.exit_s, 1),
        "s to exit",
        result.exit_s <= 10 * options.slack and _is_complete(result, "C5"),
        f"rows missing / duplicate after sync {result.rows['C5']}",
    )


@dataclass(frozen=True)
class TrackingResult:
    """The measurements of one run through all phases."""

    ratio: dict[str, tuple[float, float]]  # step time over the undisturbed one, and its error
    cpu: dict[str, float]  # the uploader's share of all cores by fault; "": without a fault
    rows: dict[str, tuple[int, int]]  # missing, and duplicate or foreign, after sync
    exit_s: float
    num_rows: int


def _tracking(place: Place, id: str) -> Outcome:
    result = _tracking_run(place)
    ratio, error = result.ratio[id]
    # On a busy machine the ratio means little. The uploader's CPU time means more, since nobody
    # waits for the uploader.
    cheap = ratio - 2 * error <= 1.02 and result.cpu[id] <= 0.02
    return Outcome(
        round(ratio, 3), "of the step time", cheap and _is_complete(result, id),
        f"± {error:.3f}; the uploader took {result.cpu[id]:.2%} of the cores, "
        f"{result.cpu['']:.2%} without a fault; rows missing / duplicate {result.rows[id]} of "
        f"{result.num_rows} in all",
    )  # fmt: skip


def _is_complete(result: TrackingResult, id: str) -> bool:
    return result.rows[id] == (0, 0)


def _tracking_run(place: Place) -> TrackingResult:
    """Run once for all requested scenarios of C1 to C5, in phases with and without a fault."""
    if "tracking" not in place.shared:
        place.shared["tracking"] = _play(place, place.shared.get("requested", set()))
    found: TrackingResult = place.shared["tracking"]
    return found


def _play(place: Place, requested: set[str]) -> TrackingResult:
    all_phases = [
        Phase("C1", "refuse"), Phase("", "pass"), Phase("C2", "black_hole"), Phase("", "pass"),
        Phase("C2", "slow"), Phase("", "pass"), Phase("C3", "errors"), Phase("", "pass"),
        Phase("C4", None), Phase("", "pass"),
    ]  # fmt: skip
    chosen = [
        phase
        for index, phase in enumerate(all_phases)
        if (phase.id or all_phases[index - 1].id) in requested
    ] or [Phase("", "pass")]
    if chosen[0].id != "C1":
        chosen.insert(0, Phase("", "pass"))
    phases = [
        Phase(p.id, p.mode, 1 + i * PHASE_STEPS, (i + 1) * PHASE_STEPS)
        for i, p in enumerate(chosen)
    ]
    epochs = math.ceil((phases[-1].last + 24) / STEPS_PER_EPOCH)
    server = MlflowServer(place.folder / "mlflow")
    server.start()
    proxy = Proxy(server.port)
    try:
        with TinyRun(
            place, "c", schedule__epochs=epochs, evaluate_every_epochs=5,
            checkpoint__every_steps=1000, environment={"MLFLOW_TRACKING_URI": proxy.uri},
        ) as run:  # fmt: skip
            used: dict[Phase, float] = {}
            for phase in phases:
                log_progress(f"c: from step {phase.first}: {phase.mode or 'server killed'}")
                if phase.mode is None:
                    server.kill()
                else:
                    proxy.mode = phase.mode
                if phase is phases[0]:
                    run.start()
                run.wait_for_step(phase.first + PHASE_STEPS // 4, timeout_s=400)
                began_s, before_s = time.monotonic(), _uploader_cpu_s(run)
                run.wait_for_step(phase.last, timeout_s=400)
                used[phase] = (_uploader_cpu_s(run) - before_s) / (time.monotonic() - began_s)
                if phase.mode is None:
                    server.start()  # while the training continues
            proxy.mode = "refuse"  # until after the end
            run.wait_for("the end", lambda: any(e["kind"] == "end" for e in run.events()), 240)
            run.finish(60)
            ended_s = time.time()
            end_s = next(e["time_s"] for e in run.events() if e["kind"] == "end")
            events = run.events()
            proxy.mode = "pass"
            _sync(run.storage, run.folder, proxy.uri)
            run_id = oracles.mlflow_run_id(run.folder)
            status = oracles.mlflow_status(server.database, run_id)
            stored = oracles.rows_in_mlflow(server.database, run_id)
    finally:
        proxy.close()
        server.kill()
    expect(status == "FINISHED", f"status in MLflow after sync: {status}")
    wanted = oracles.rows_in_journal(events)
    rows = {}
    for id in ("C1", "C2", "C3", "C4", "C5"):
        spans = [p for p in phases if p.id == id] or [Phase(id, None, phases[-1].last + 1, 10**9)]
        steps = {s for p in spans for s in range(p.first, min(p.last, 10**6) + 1)}
        rows[id] = oracles.missing_and_wrong(
            {place: values for place, values in wanted.items() if place[1] in steps},
            [row for row in stored if row[1] in steps],
        )
    cpu = {p.id: max(share for q, share in used.items() if q.id == p.id) for p in phases}
    return TrackingResult(_ratios(events, phases), cpu, rows, ended_s - end_s, len(wanted))


def _uploader_cpu_s(run: TinyRun) -> float:
    """Return the uploader's CPU time in seconds of all cores."""
    used_s = sum(process.cpu_s() for process in run.family.alive("uploader"))
    return used_s / len(os.sched_getaffinity(0))


def _ratios(events: list[Event], phases: list[Phase]) -> dict[str, tuple[float, float]]:
    """Return median step time over that of neighbouring phases without a fault, with its error."""
    time_s = {e["step"]: e["time_s"] for e in events if e["kind"] == "progress"}
    evaluated = {e["step"] + 1 for e in events if e["kind"] == "evaluation"}
    steps_s = {
        step: time_s[step] - time_s[step - 1]
        for step in time_s
        if step - 1 in time_s and step not in evaluated and step > WARM_UP_STEPS
    }

    def within(phase: Phase) -> list[float]:
        # Without the first steps, in which the fault may not have taken effect yet.
        return [steps_s[s] for s in range(phase.first + 3, phase.last + 1) if s in steps_s]

    # Other load on the machine makes undisturbed phases differ among themselves, too.
    quiet = [statistics.median(within(phase)) for phase in phases if not phase.id]
    noise = statistics.stdev(quiet) / statistics.mean(quiet) if len(quiet) > 1 else 0.0
    found: dict[str, tuple[float, float]] = {}
    for index, phase in enumerate(phases):
        if not phase.id:
            continue
        beside = [
            second
            for other in phases[max(0, index - 1) : index + 2]
            if not other.id
            for second in within(other)
        ]
        (a, a_error), (b, b_error) = _median(within(phase)), _median(beside)
        ratio = a / b
        error = ratio * math.hypot(a_error / a, b_error / b, noise)
        log_progress(
            f"c: {phase.id} {phase.mode}: step {1000 * a:.0f} ms, beside {1000 * b:.0f} ms"
        )
        if phase.id not in found or ratio > found[phase.id][0]:
            found[phase.id] = (ratio, error)
    log_progress(f"c: undisturbed phases {', '.join(f'{1000 * one:.0f}' for one in quiet)} ms")
    return found


def _median(values: list[float]) -> tuple[float, float]:
    """Return the median and its standard error, from the median absolute deviation."""
    if len(values) < 8:
        raise ScenarioError(f"too few steps were timed: {len(values)}")
    median = statistics.median(values)
    spread = 1.4826 * statistics.median(abs(value - median) for value in values)
    return median, 1.2533 * spread / math.sqrt(len(values))


def _sync(storage: Path, folder: Path, uri: str) -> None:
    done = subprocess.run(
        [sys.executable, "jobs/sync.py", str(folder)], cwd=ROOT, capture_output=True, text=True,
        env=clean_environment() | {"MLFLOW_TRACKING_URI": uri}, timeout=180, check=False,
    )  # fmt: skip
    expect(done.returncode == 0, f"jobs/sync.py: {done.stdout[-400:]} {done.stderr[-800:]}")


def partition(place: Place, options: Options) -> Outcome:
    """C6: two nodes with one worker each; the second one's link goes down, and later up again."""
    with NetnsCluster(place) as cluster:
        run = _elastic_run(place, cluster, "c6")
        with run:
            run.start()
            run.wait_for_step(12, timeout_s=300)
            cut_s = time.time()
            cluster.cut(1)
            log_progress("c6: cut")
            took_s, _, step = recovery(run, cut_s, timeout_s=240)
            log_progress(f"c6: new step after {took_s:.1f} s")
            run.wait_for_step(step + 5)
            cluster.heal(1)
            run.finish(400)
            events = run.events()
    groups = [e for e in events if e["kind"] == "begin"]
    losses = oracles.losses(events, same_again=False)
    expect(len(losses) == ELASTIC_EPOCHS * STEPS_PER_EPOCH, f"{len(losses)} steps in the journal")
    sizes = [group.get("world_size") for group in groups]
    expect(1 in sizes, f"groups of {sizes} workers; the run did not continue with one")
    writers = _most_writers(events)
    expect(writers == 1, f"{writers} groups wrote at once")
    return Outcome(
        round(took_s, 1), "s", took_s <= 60 * options.slack,
        f"groups of {sizes} workers, one writer at any time; node declared dead after 10-30 s "
        "(RAY_health_check_*)",
    )  # fmt: skip


def _most_writers(events: list[Event]) -> int:
    """Return 2 if the lines of two groups interleave: a step jumps back without a `begin`."""
    last = -1
    for event in events:
        if event["kind"] == "begin":
            last = event["step"]
        elif event["kind"] == "progress":
            if event["step"] <= last:
                return 2
            last = event["step"]
    return 1


def node_drained(place: Place, options: Options) -> Outcome:
    """A5: the cluster announces the preemption of a node in 30 s; then the node is gone."""
    grace_s = 30
    with NetnsCluster(place) as cluster:
        run = _elastic_run(place, cluster, "a5")
        with run:
            run.start()
            run.wait_for_step(12, timeout_s=300)
            cluster.drain(1, grace_s)
            noticed_s = time.monotonic()
            log_progress(f"a5: announced the preemption of node 1 in {grace_s} s")
            # Its workers may leave before that; otherwise the node is killed.
            first = len([e for e in run.events() if e["kind"] == "begin"])

            def left() -> bool:
                return len([e for e in run.events() if e["kind"] == "begin"]) > first

            while time.monotonic() - noticed_s < grace_s and not left():
                time.sleep(0.2)
            gone_s = time.time()
            before = run.step()
            cluster.kill_node(1)
            run.wait_for("a new group", left, 240)
            events = run.events()
            begin = [e for e in events if e["kind"] == "begin"][first]
            reached = max(
                e["step"]
                for e in events
                if e["kind"] == "progress" and e["time_s"] < begin["time_s"]
            )
            wasted = max(reached, before if begin["time_s"] > gone_s else 0) - begin["step"]
            log_progress(f"a5: at step {reached}, continued from {begin['step']}")
            run.finish(400)
    return Outcome(
        wasted, "steps wasted", wasted <= 2, f"continued with {begin.get('world_size')} worker(s)"
    )


def _elastic_run(place: Place, cluster: NetnsCluster, name: str) -> TinyRun:
    return TinyRun(
        place, name, prefix=cluster.within(0), schedule__epochs=ELASTIC_EPOCHS,
        evaluate_every_epochs=ELASTIC_EPOCHS, cluster__min_workers=1, cluster__num_workers=2,
        environment=cluster.environment
        | {"MLFLOW_TRACKING_URI": f"sqlite:///{place.folder}/{name}-mlflow.db"},
    )  # fmt: skip
