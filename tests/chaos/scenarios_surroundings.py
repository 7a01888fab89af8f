"""What surrounds a run: the load of its machine, its clock, its disks and its environment."""

from __future__ import annotations

import contextlib
import itertools
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator

from tests.chaos import oracles
from tests.chaos.direct import Direct, kill, undisturbed
from tests.chaos.mlflow_server import MlflowServer
from tests.chaos.runs import (
    ROOT,
    Event,
    Place,
    TinyRun,
    clean_environment,
    expect,
    log_progress,
    read_journal,
)
from tests.chaos.scenario import Options, Outcome
from tests.chaos.scenarios_processes import same_as_undisturbed, status_in_mlflow

BUSY_PER_CORE = 3
STARVED_S, STARVED_TIMEOUT_S = 45.0, 3.0
SLOW_READ_S = 30.0  # longer than `cluster.hang_timeout_s`
HOUR_S = 3600.0


def busy_machine(place: Place, options: Options) -> Outcome:
    """A9: other processes take nearly all of the processors, then most of them.

    First beside workers of low priority, whose steps then take longer than the hang timeout; then
    beside a run as a user starts it.
    """
    number = BUSY_PER_CORE * (os.cpu_count() or 1)
    starved = Direct(
        place, "a9-starved", prefix=["nice", "-n", "15"], cluster__hang_timeout_s=STARVED_TIMEOUT_S
    )
    processes = starved.start(2)
    try:
        starved.wait_for_step(8, processes)
        with busy_processes(number):
            log_progress(f"a9: {number} busy processes beside workers of low priority")
            until_s = time.monotonic() + STARVED_S
            while time.monotonic() < until_s and not any(p.poll() for p in processes):
                time.sleep(0.2)
        codes = [process.wait(300 * place.patience) for process in processes]
    finally:
        kill(processes)
    expect(codes == [0, 0], f"a starved worker was ended: exit codes {codes}: {starved.tail()}")
    expect(starved.losses() == undisturbed(place, 4).losses(), "losses of the starved run differ")
    starved_s = slowest_step_s(read_journal(starved.folder))

    with TinyRun(place, "a9", record=True) as run:
        run.start()
        run.wait_for_step(8)
        with busy_processes(number):
            log_progress(f"a9: {number} busy processes beside a run")
            run.finish(600)
        slowdown = run.family.slowdown()
        starts = count_starts(run)
        same_as_undisturbed(place, run, 4)
        stacks = list((run.folder / "stacks").glob("*"))
    return Outcome(
        starts - 1, "restarts", starts == 1 and not stacks,
        f"{number} busy processes; a step of starved workers took {starved_s:.1f} s, with "
        f"cluster.hang_timeout_s={STARVED_TIMEOUT_S:g}; a run as usual was slowed down "
        f"{slowdown:.1f}×; bit-equal to undisturbed",
    )  # fmt: skip


def slowest_step_s(events: list[Event]) -> float:
    times = [event["time_s"] for event in events if event["kind"] == "progress"]
    return max(b - a for a, b in itertools.pairwise(times))


@contextlib.contextmanager
def busy_processes(number: int) -> Iterator[None]:
    processes = [
        subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(number)
    ]
    try:
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()


def count_starts(run: TinyRun) -> int:
    return sum(event["kind"] == "begin" for event in run.events())


def slow_disk(place: Place, options: Options) -> Outcome:
    """A10: one worker waits long for an image, and the other one for it."""
    faults = [{"kind": "slow_read", "rank": 1, "steps": [20, 20], "seconds": SLOW_READ_S}]
    with TinyRun(place, "a10", faults=faults, record=True) as run:
        run.start()
        run.finish()
        starts = count_starts(run)
        same_as_undisturbed(place, run, 4)
        slowest_s = slowest_step_s(run.events())
    expect(slowest_s >= SLOW_READ_S, f"nothing was slow: {slowest_s:.1f} s")
    return Outcome(
        starts - 1, "restarts", starts == 1,
        f"waited {slowest_s:.0f} s for one image, with cluster.hang_timeout_s=20; bit-equal to "
        "undisturbed",
    )  # fmt: skip


def clock_set(place: Place, options: Options) -> Outcome:
    """H1: the clock is set back and forward by an hour; a worker is killed after each."""
    clock = place.folder / "h1-clock"
    epochs = 6
    slow = [{"kind": "sleep", "steps": [1, 1000], "seconds": 0.6}]  # else it ends too early
    with TinyRun(
        place, "h1", record=True, clock=clock, faults=slow, schedule__epochs=epochs,
        evaluate_every_epochs=epochs,
    ) as run:  # fmt: skip
        run.start()
        step = 0
        for kills, offset_s in enumerate((-HOUR_S, HOUR_S)):
            run.wait_for_step(step + 8)
            # Replaced at once: a reader never sees half of it.
            (new := clock.with_suffix(".new")).write_text(str(offset_s))
            new.replace(clock)
            log_progress(f"h1: the clock is wrong by {offset_s:+.0f} s")
            run.wait_for_step(run.step() + 8)
            time.sleep(16)  # three heartbeats of a watchdog
            expect(count_starts(run) == kills + 1, "the clock ended a living run")
            expect(run.process is not None and run.process.poll() is None, "it has ended too early")
            run.one("worker").send(signal.SIGKILL)
            step = run.step()
            run.wait_for("a start after the kill", lambda k=kills: count_starts(run) == k + 2, 240)
        run.finish()
        starts = count_starts(run)
        same_as_undisturbed(place, run, epochs)
        expect(status_in_mlflow(run) == "FINISHED", f"status in MLflow: {status_in_mlflow(run)}")
    return Outcome(
        starts - 3, "restarts by the clock", starts == 3,
        "set back and forward by 1 h; two killed workers replaced; bit-equal to undisturbed",
    )  # fmt: skip


def home_absent(place: Place, options: Options) -> Outcome:
    """H2: HOME is not set, names no folder, or is empty."""
    cases = {
        "unset": ["env", "-u", "HOME"],
        "no folder": ["env", "HOME=/dev/null/home"],
        "empty": ["env", "HOME="],
    }
    found = []
    for number, (case, prefix) in enumerate(cases.items()):
        with TinyRun(place, f"h2-{number}", prefix=prefix, schedule__epochs=1) as run:
            run.start()
            code = run.wait(300)
            starts = count_starts(run)
            log_progress(f"h2: HOME {case}: exit code {code}, {starts} starts")
            refused = code == 2 and starts == 0 and "HOME" in run.tail(3000)
            expect(code == 0 or refused, f"HOME {case}: exit code {code}: {run.tail()}")
            expect(starts <= 1, f"HOME {case}: {starts} starts")
            found.append("refused" if refused else "trained")
    return Outcome(
        f"{found.count('trained')}/{len(cases)}", "trained", True,
        f"HOME {', '.join(cases)}; {found.count('refused')} refused with exit code 2",
    )  # fmt: skip


class SilentProxy:
    """A proxy that counts who comes, and closes every connection."""

    def __init__(self) -> None:
        self.visitors: list[bytes] = []
        self._socket = socket.create_server(("127.0.0.1", 0))
        self.uri = f"http://127.0.0.1:{self._socket.getsockname()[1]}"
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        with contextlib.suppress(OSError):  # closed
            while True:
                connection, _ = self._socket.accept()
                with connection, contextlib.suppress(OSError):
                    connection.settimeout(2)
                    self.visitors.append(connection.recv(200))

    def close(self) -> None:
        self._socket.close()


def proxy_set(place: Place, options: Options) -> Outcome:
    """C7: the environment names a proxy, and no exception from it."""
    folder = place.folder / "c7-mlflow"
    folder.mkdir()
    server, proxy = MlflowServer(folder), SilentProxy()
    server.start()
    names = ("HTTP_PROXY", "http_proxy", "HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy")
    environment = dict.fromkeys(names, proxy.uri) | {"NO_PROXY": "", "no_proxy": ""}
    environment["MLFLOW_TRACKING_URI"] = server.uri
    try:
        with TinyRun(place, "c7", environment=environment, record=True) as run:
            run.start()
            run.finish()
            same_as_undisturbed(place, run, 4)
            run_id = oracles.mlflow_run_id(run.folder)
            journal = oracles.rows_in_journal(run.events())
            stored = oracles.rows_in_mlflow(server.database, run_id)
            rows = oracles.missing_and_wrong(journal, stored)
            status = oracles.mlflow_status(server.database, run_id)
    finally:
        server.kill()
        proxy.close()
    expect(status == "FINISHED", f"status in MLflow: {status}")
    for one in proxy.visitors:
        log_progress(f"c7: at the proxy: {one.partition(bytes([13]))[0]!r}")
    ours = [one for one in proxy.visitors if b"127.0.0.1" in one or b"localhost" in one]
    return Outcome(
        len(ours), "requests for loopback at the proxy", not ours and rows == (0, 0),
        f"rows missing / twice {rows} of {len(journal)}; {len(proxy.visitors)} requests in all",
    )  # fmt: skip


# Promotes one version by force. With "exact", the process dies between the decision and the alias.
PROMOTE = """
import os, signal, sys
from deta.platform.registry.decision_store import DecisionStore
from deta.platform.registry.mlflow_registry import Registry
from deta.platform.registry.promote import promote

uri, name, number, how = sys.argv[1:]
class Doomed(DecisionStore):
    appended = False
    def append(self, *arguments):
        position = super().append(*arguments)
        self.appended = True
        return position
    def sync_alias(self, name):
        if self.appended and how == "exact":
            os.kill(os.getpid(), signal.SIGKILL)
        return super().sync_alias(name)
def gate(challenger, champion):
    raise ValueError("no evaluation")
registry = Registry(uri)
registry.decisions = Doomed(registry._client)
print("ready", flush=True)
sys.stdin.readline()
result = promote(registry, name, int(number), gate, by="chaos", force=True, reason="a drill")
print(result.champion, flush=True)
"""


def promotion_killed(place: Place, options: Options) -> Outcome:
    """F4: killed between decision and alias, then at random moments; then the same again."""
    from mlflow import MlflowClient

    from deta.platform.registry.mlflow_registry import MANIFEST_TAG, SHA256_TAG, Registry

    times = options.times(6)
    folder = place.folder / "f4"
    (folder / "part").mkdir(parents=True)
    (folder / "part" / "file.txt").write_text("weights")
    uri, name = f"sqlite:///{folder / 'mlflow.db'}", "f4"
    client = MlflowClient(tracking_uri=uri)
    experiment = client.create_experiment("f4", artifact_location=(folder / "files").as_uri())
    registry = Registry(uri)
    files = registry.upload("f4", client.create_run(experiment).info.run_id, {"": folder / "part"})
    chance, apart, agreed = random.Random("f4"), 0, 0
    for number in range(1, times + 1):
        tags = {SHA256_TAG: f"{number:064d}", MANIFEST_TAG: f"{number:064d}"}
        version = registry.add_version(name, files, tags, "", f"f4-{number}").number
        how = "exact" if number <= 2 else "random"
        doomed = _promotion(uri, name, version, how)
        if how == "random":
            time.sleep(chance.uniform(0.0, 0.3))
            doomed.kill()
        doomed.wait(120)
        expect(doomed.returncode in (0, -9), f"exit code {doomed.returncode}")
        log = registry.decisions.read(name)
        is_apart = registry.aliases(name).get("champion") != log.champion
        apart += is_apart
        expect(is_apart or how != "exact", "the kill did not come between decision and alias")
        done = doomed.returncode == 0
        if not done:
            again = _promotion(uri, name, version, "whole")
            output, _ = again.communicate(timeout=120)
            done = again.returncode == 0 and output.split()[-1] == str(version)
            # It was whole, and only its process was killed late: said so, and nothing to do.
            done = done or (not is_apart and log.champion == version)
        log = registry.decisions.read(name)
        entries = [entry for _, entry in log.entries if entry.version == version]
        same = registry.aliases(name) == {"champion": version} and log.champion == version
        agreed += done and same and len(entries) == 1 and log.problems == ()
    return Outcome(
        f"{agreed}/{times}", "finished by the same command", agreed == times,
        f"{apart} kills left log and alias apart; one decision each",
    )  # fmt: skip


def _promotion(uri: str, name: str, version: int, how: str) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-c", PROMOTE, uri, name, str(version), how], cwd=ROOT,
        env=clean_environment(), stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL, text=True,
    )  # fmt: skip
    assert process.stdin is not None
    assert process.stdout is not None
    expect(process.stdout.readline() == "ready\n", "a promotion did not start")
    process.stdin.write("\n")
    process.stdin.flush()
    return process
