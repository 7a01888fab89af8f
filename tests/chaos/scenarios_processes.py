"""A: processes of a run are killed, are stopped, or fail repeatedly."""

from __future__ import annotations

import math
import random
import signal
import time

from tests.chaos import oracles
from tests.chaos.direct import undisturbed
from tests.chaos.runs import (
    STEPS_PER_EPOCH,
    TINY,
    Place,
    TinyRun,
    expect,
    log_progress,
)
from tests.chaos.scenario import BETWEEN_KILLS_S, Options, Outcome

INTERVAL = int(TINY["checkpoint.every_steps"])


def worker_killed(place: Place, options: Options) -> Outcome:
    """A1: SIGKILL of a worker."""
    return _hit_and_recover(place, options, "a1", "worker", 3, limit_s=15)


def controller_killed(place: Place, options: Options) -> Outcome:
    """A2: SIGKILL of Ray's controller."""
    return _hit_and_recover(place, options, "a2", "controller", 1, limit_s=30)


def worker_stopped(place: Place, options: Options) -> Outcome:
    """A6: SIGSTOP of a worker; the stacks of its threads must be written."""
    return _hit_and_recover(
        place, options, "a6", "worker", 1, limit_s=45, number=signal.SIGSTOP, stacks=True
    )


def raylet_killed(place: Place, options: Options) -> Outcome:
    """A7: SIGKILL of the raylet."""
    return _hit_and_recover(place, options, "a7", "raylet", 1, limit_s=60)


def gcs_killed(place: Place, options: Options) -> Outcome:
    """A8: SIGKILL of the GCS."""
    return _hit_and_recover(place, options, "a8", "gcs", 1, limit_s=120)


def _hit_and_recover(
    place: Place,
    options: Options,
    name: str,
    role: str,
    few: int,
    *,
    limit_s: float,
    number: signal.Signals = signal.SIGKILL,
    stacks: bool = False,
) -> Outcome:
    """Repeatedly signal a process of a role and wait for the first new step.

    Then compare the whole run with the undisturbed one.
    """
    times = options.times(few)
    epochs = max(4, math.ceil((20 * times + 24) / STEPS_PER_EPOCH))
    chance = random.Random(name)
    seconds, redone = [], []
    with TinyRun(
        place, name, record=True, schedule__epochs=epochs, evaluate_every_epochs=epochs
    ) as run:
        run.start()
        step = 0
        for _ in range(times):
            run.wait_for_step(step + chance.randint(7, 16), timeout_s=300)
            victim = chance.choice(run.family.alive(role) or [run.one(role)])
            hit_s = time.time()
            victim.send(number)
            took_s, again, step = recovery(run, hit_s, timeout_s=max(120.0, 2 * limit_s))
            log_progress(
                f"{name}: hit {role}, new step after {took_s:.1f} s, {again} repeated steps"
            )
            seconds.append(took_s)
            redone.append(again)

        run.finish()
        if stacks:
            found = list((run.folder / "stacks").glob("*"))
            expect(found, "no stacks of the frozen worker were written")
        same_as_undisturbed(place, run, epochs)
        expect(status_in_mlflow(run) == "FINISHED", f"status in MLflow: {status_in_mlflow(run)}")
        within = max(seconds) <= run.limit_s(limit_s, options.slack)
    return Outcome(
        round(max(seconds), 1),
        "s",
        within and max(redone) <= INTERVAL,
        f"{times}/{times} recovered; {max(redone)} repeated steps at most, "
        f"a checkpoint every {INTERVAL}; losses, samples and weights bit-equal to undisturbed",
    )


def recovery(run: TinyRun, hit_s: float, timeout_s: float) -> tuple[float, int, int]:
    """Return the seconds from the fault to the first new step, the repeated steps, the new step."""

    def new_step() -> tuple[float, int, int] | None:
        events = [e for e in run.events() if e["kind"] in ("begin", "progress")]
        before = max(
            (e["step"] for e in events if e["kind"] == "progress" and e["time_s"] <= hit_s),
            default=0,
        )
        begins = [e for e in events if e["kind"] == "begin" and e["time_s"] > hit_s]
        if not begins:
            if not any(e["kind"] == "end" for e in run.events()):
                return None
            # Workers can outlive the process that was hit. These reached their last step.
            on = [e for e in events if e["kind"] == "progress" and e["time_s"] > hit_s]
            return on[0]["time_s"] - hit_s, 0, on[-1]["step"]
        # Steps that a group still made between the fault and its end are not new.
        before = max(
            [before]
            + [
                e["step"]
                for e in events
                if e["kind"] == "progress" and e["time_s"] < begins[0]["time_s"]
            ]
        )
        for event in events:
            if (
                event["kind"] == "progress"
                and event["time_s"] > begins[0]["time_s"]
                and event["step"] > before
            ):
                return event["time_s"] - hit_s, before - begins[0]["step"], event["step"]
        return None

    found: tuple[float, int, int] = run.wait_for("a new step after the fault", new_step, timeout_s)
    return found


def same_as_undisturbed(place: Place, run: TinyRun, epochs: int) -> None:
    """Require bit-equal losses and samples of all steps and bit-equal last weights."""
    clean = undisturbed(place, epochs)
    ours, theirs = oracles.losses(run.events()), clean.losses()
    expect(ours.keys() == theirs.keys(), f"steps {len(ours)}, undisturbed {len(theirs)}")
    differ = [step for step in ours if ours[step] != theirs[step]]
    expect(not differ, f"losses differ from step {differ[:1]} on, {len(differ)} of {len(ours)}")
    if any(run.records.iterdir()):
        expect(
            oracles.samples(run.records) == oracles.samples(clean.records),
            "samples or pixels differ from the undisturbed run",
        )
    expect(oracles.weights_sha256(run.folder) == clean.weights(), "the last weights differ")


def status_in_mlflow(run: TinyRun) -> str:
    database = run.storage / "mlflow.db"
    return oracles.mlflow_status(database, oracles.mlflow_run_id(run.folder))


def driver_killed(place: Place, options: Options) -> Outcome:
    """A3: kill the driver, which the supervisor replaces; then kill the command itself."""
    with TinyRun(place, "a3", record=True) as run:
        run.start()
        run.wait_for_step(8)
        if run.family.alive("attempt"):
            hit_s = time.time()
            run.one("attempt").send(signal.SIGKILL)
            attempt_s, _, step = recovery(run, hit_s, timeout_s=180)
            log_progress(f"a3: driver killed, new step after {attempt_s:.1f} s")
            run.wait_for_step(step + 3)
        at_step = run.step()
        run.signal(signal.SIGKILL)
        killed_s = time.monotonic()
        run.wait()
        gone_s, left = run.family.wait_until_gone(run.limit_s(60, options.slack))
        log_progress(f"a3: all processes gone after {gone_s:.1f} s, {len(left)} left")
        status = ""
        while time.monotonic() - killed_s < run.limit_s(90, options.slack) and status != "KILLED":
            status = status_in_mlflow(run)
            time.sleep(0.5)
        marked_s = time.monotonic() - killed_s
        expect(not left, f"still there: {[process.command[:60] for process in left]}")
        expect(status == "KILLED", f"status in MLflow of a killed run: {status}")
        run.start(resume=True)
        run.finish()
        same_as_undisturbed(place, run, 4)
        resumed = [e["step"] for e in run.events() if e["kind"] == "begin"][-1]
        within = gone_s <= run.limit_s(30, options.slack)
        within = within and marked_s <= run.limit_s(60, options.slack)
    return Outcome(
        round(max(gone_s, 0.0), 1),
        "s until 0 orphans",
        within and at_step - resumed <= INTERVAL,
        f"KILLED in MLflow after {marked_s:.0f} s; resumed at step {resumed} of {at_step}; "
        "bit-equal to undisturbed",
    )


def terminated(place: Place, options: Options) -> Outcome:
    """A4: SIGTERM to the command; the last step is saved and the exit code is 143."""
    times = options.times(2)
    epochs = max(4, math.ceil((12 * times + 16) / STEPS_PER_EPOCH))
    slowest_s, lost = 0.0, 0
    with TinyRun(
        place, "a4", record=True, schedule__epochs=epochs, evaluate_every_epochs=epochs
    ) as run:
        step = 0
        for number in range(times):
            run.start(resume=number > 0)
            run.wait_for_step(step + 6)
            asked_s = time.monotonic()
            run.signal(signal.SIGTERM)
            code = run.wait(120)
            took_s = time.monotonic() - asked_s
            step = run.step()
            saved = oracles.step_of(oracles.newest_checkpoint(run.folder))
            log_progress(
                f"a4: exit code {code} after {took_s:.1f} s, at step {step}, saved {saved}"
            )
            expect(code == 143, f"exit code {code}: {run.tail()}")
            expect(status_in_mlflow(run) == "KILLED", f"status in MLflow: {status_in_mlflow(run)}")
            _, left = run.family.wait_until_gone(30)
            expect(not left, f"still there: {[process.command[:60] for process in left]}")
            slowest_s, lost = max(slowest_s, took_s), max(lost, step - saved)
        within = slowest_s <= run.limit_s(10, options.slack)
        run.start(resume=True)
        run.finish()
        same_as_undisturbed(place, run, epochs)
    return Outcome(
        round(slowest_s, 1),
        "s to exit 143",
        lost == 0 and within,
        f"{times}/{times}; {lost} steps lost; bit-equal to undisturbed",
    )


def crash_loop(place: Place, options: Options) -> Outcome:
    """A11: a bug that always raises at step 7."""
    faults = [{"kind": "raise", "steps": [7, 7]}]
    with TinyRun(place, "a11", faults=faults) as run:
        run.start()
        run.wait_for_step(6)
        first_s = time.time()
        code = run.wait(360)
        took_s = time.time() - first_s
        starts = sum(event["kind"] == "begin" for event in run.events())
        expect(code == 1, f"exit code {code}: {run.tail()}")
        expect("step 7" in run.tail(4000), f"no message names the cause: {run.tail()}")
        expect(status_in_mlflow(run) == "FAILED", f"status in MLflow: {status_in_mlflow(run)}")
        _, left = run.family.wait_until_gone(30)
        expect(not left, f"still there: {[process.command[:60] for process in left]}")
        within = took_s <= run.limit_s(60, options.slack)
    return Outcome(starts, "attempts", starts == 3 and within, f"{took_s:.0f} s")


def killed_every_two_minutes(place: Place, options: Options) -> Outcome:
    """GP: measure goodput, the seconds in useful steps over all seconds since the command started.

    The scenario computes it from the journal: each step counts with the time since the step before
    it, in the last group that made it. The run's own goodput must agree.
    """
    times = options.times(3)
    chance = random.Random("gp")
    with TinyRun(place, "gp", schedule__epochs=5000, evaluate_every_epochs=5000) as run:
        began_s = time.time()
        run.start()
        run.wait_for_step(8)
        begun_s = time.time()
        for number in range(times):
            time.sleep(max(0.0, begun_s + 60 + BETWEEN_KILLS_S * number - time.time()))
            hit_s = time.time()
            chance.choice(run.family.alive("worker") or [run.one("worker")]).send(signal.SIGKILL)
            took_s, again, _ = recovery(run, hit_s, timeout_s=120)
            log_progress(
                f"gp: worker killed, new step after {took_s:.1f} s, {again} repeated steps"
            )
        time.sleep(max(0.0, begun_s + BETWEEN_KILLS_S * times - time.time()))
        run.signal(signal.SIGTERM)
        expect(run.wait(60) == 143, f"exit code of a stopped run: {run.tail()}")
        events = run.events()
    ended = next(e for e in reversed(events) if e["kind"] == "ended")
    useful_s = oracles.useful_seconds(events)
    since_command = useful_s / (ended["time_s"] - began_s)
    since_begun = useful_s / (ended["time_s"] - begun_s)
    reported = ended["goodput"]
    expect(
        abs(reported - since_command) < 0.05,
        f"the run reports {reported:.3f}, the journal gives {since_command:.3f}",
    )
    return Outcome(
        round(100 * since_begun, 1), "% since the first step",
        since_begun >= 1 - 15 / BETWEEN_KILLS_S,
        f"{100 * since_command:.1f} % since the command started, {100 * reported:.1f} % by its "
        f"own count; {times} kills in {ended['time_s'] - began_s:.0f} s",
    )  # fmt: skip
