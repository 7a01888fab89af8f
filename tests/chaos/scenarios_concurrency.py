"""F: two jobs in the same folder, or a name that is already used."""

from __future__ import annotations

import contextlib
import random
import subprocess
import sys
import time
from pathlib import Path

from tests.chaos.runs import ROOT, Place, TinyRun, clean_environment, expect, log_progress
from tests.chaos.scenario import Options, Outcome

HOLDER = """
import sys, time
from pathlib import Path
from deta.platform.run.run_lock import RunLock, RunLockedError
folder = Path(sys.argv[1])
for line in sys.stdin:
    began_s = time.monotonic()
    try:
        lock = RunLock.acquire(folder)
    except RunLockedError as error:
        print("refused", time.monotonic() - began_s, flush=True)
    else:
        print("held", time.monotonic() - began_s, flush=True)
        if line.strip() == "hold":
            time.sleep(3600)
        lock.release()
"""


class _Contender:
    """A process that tries to take the lock of a folder on request."""

    def __init__(self, folder: Path) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", HOLDER, str(folder)], cwd=ROOT, env=clean_environment(),
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip

    def request(self, command: str) -> tuple[str, float]:
        self.send(command)
        return self.answer()

    def send(self, command: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(f"{command}\n")
        self.process.stdin.flush()

    def answer(self) -> tuple[str, float]:
        assert self.process.stdout is not None
        words = self.process.stdout.readline().split()
        expect(len(words) == 2, "a contender died")
        return words[0], float(words[1])

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()


def two_jobs(place: Place, options: Options) -> Outcome:
    """F1: the second is refused while the first runs, and takes over once it was killed."""
    times = options.times(20)
    folder = place.folder / "f1"
    folder.mkdir()
    refused, slowest_s, takeovers_s = 0, 0.0, []
    second = _Contender(folder)
    for _ in range(3):
        first = _Contender(folder)
        held, _ = first.request("hold")
        expect(held == "held", "the first could not take the lock")
        for _ in range(-(-times // 3)):
            result, took_s = second.request("try")
            refused += result == "refused"
            slowest_s = max(slowest_s, took_s)
        first.kill()
        began_s = time.monotonic()
        while second.request("try")[0] != "held":
            expect(time.monotonic() - began_s < 90, "a stale lock was never taken over")
            time.sleep(0.2)
        takeovers_s.append(time.monotonic() - began_s)
    second.kill()
    total = 3 * -(-times // 3)
    return Outcome(
        f"{refused}/{total}", "refused",
        refused == total and slowest_s <= 5 and max(takeovers_s) <= 60,
        f"in {slowest_s:.2f} s at most; took the lock of a killed owner after "
        f"{max(takeovers_s):.1f} s",
    )  # fmt: skip


def one_name_twice(place: Place, options: Options) -> Outcome:
    """F2: several jobs want one new name at the same moment; only one gets it.

    A stale lock does not change that.
    """
    rounds = options.times(20)
    contenders = [_Contender(place.folder / "f2") for _ in range(4)]
    chance = random.Random("f2")
    mixed = 0
    try:
        for _ in range(rounds):
            chance.shuffle(contenders)
            for contender in contenders:
                contender.send("hold" if contender is contenders[0] else "try")
            for contender in contenders[1:]:
                contender.answer()
            # Contenders that only try release the lock at once, so several may hold it in turn.
            # None may get it while the one that holds it still does.
            if contenders[0].answer()[0] == "held":
                mixed += contenders[1].request("try")[0] == "held"
                contenders[0].kill()
                contenders[0] = _Contender(place.folder / "f2")
    finally:
        for contender in contenders:
            contender.kill()
    return Outcome(mixed, f"mixed in {rounds} races of 4", mixed == 0)


def name_of_a_finished_run(place: Place, options: Options) -> Outcome:
    """F3: the same command again, with and without --resume, during the run and after success."""
    with TinyRun(place, "f3", schedule__epochs=2, evaluate_every_epochs=2) as run:
        run.start()
        run.wait_for_step(2)
        for resume in (False, True):
            code, took_s, output = run.again(resume=resume)
            log_progress(f"f3: during the run, resume={resume}: exit code {code}, {took_s:.1f} s")
            expect(code == 2, f"during the run: exit code {code}: {output[-400:]}")
        run.finish()
        before = _content(run.folder)
        slowest_s = 0.0
        for resume in (False, True):
            code, took_s, output = run.again(resume=resume)
            slowest_s = max(slowest_s, took_s)
            expect(code == 2, f"resume={resume}: exit code {code}: {output[-400:]}")
        expect(_content(run.folder) == before, "the finished run was changed")
    return Outcome(
        round(slowest_s, 1), "s to refuse", True,
        "exit code 2, with and without --resume, during the run and after success; "
        "nothing changed",
    )  # fmt: skip


def _content(folder: Path) -> dict[str, bytes]:
    found = {}
    for path in folder.rglob("*"):
        with contextlib.suppress(OSError):
            if path.is_file() and path.suffix not in (".log",):
                found[str(path.relative_to(folder))] = path.read_bytes()
    return found
