"""Type every command of the README, shortened, in the environment that the README installs.

    .venv/bin/python tests/front_door.py

The commands are those of the `sh` blocks, in their order. Trainings get fewer images and one epoch;
COCO's folders become the drawn data of the demo; servers run until they answer. A command fails if
its exit code is not 0 or if it prints a line that begins with `!`. Python's standard library is
enough to run this, so nothing is installed that the README does not install. At the end it looks
for the pages that the commands promise.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
WITHIN_S = 420  # any command takes less; the slowest trains
READY_WITHIN_S = 180  # of a server
# Typed by people to get here, or in a shell of their own.
SKIPPED = (r"git clone ", r"\. \.venv/bin/activate", r"make (install|test|site|chaos|check)")
SERVERS = {  # how it begins: what it answers under
    "python jobs/serve.py": "http://127.0.0.1:8000/ready",
    "make dashboards": "http://127.0.0.1:5050/",
    "python jobs/dashboards.py": "http://127.0.0.1:5050/",
    "python jobs/leaderboard.py": "http://127.0.0.1:5050/",
}
HOME = ROOT / "runs" / "front-door"  # the home folder of the commands, so that yours is untouched
DATA = f"{HOME}/deta-runs/data/demo"
STANDS_FOR = {  # in the README: here
    "train2017": f"{DATA}/train",
    "val2017": f"{DATA}/val",
    "annotations/instances_train2017.json": f"{DATA}/annotations/instances_train.json",
    "annotations/instances_val2017.json": f"{DATA}/annotations/instances_val.json",
}
# Enough boxes of each class for a training not to warn of too few.
FEW_IMAGES = ["data.train_first=100", "data.val_first=20"]
SHORT = [*FEW_IMAGES, "schedule.epochs=1", "schedule.warmup_epochs=0"]
PRINTS_ONLY = ("--help", "--show", "--compare")


@dataclass(frozen=True)
class Outcome:
    command: str
    seconds: float
    fault: str = ""


def commands(readme: str) -> list[str]:
    """Return the commands of the `sh` blocks, each on one line and without its comment."""
    found: list[str] = []
    for block in re.findall(r"^```sh\n(.*?)^```", readme, re.MULTILINE | re.DOTALL):
        for line in block.replace("\\\n", " ").splitlines():
            text = re.sub(r"(^|\s)#.*", "", line).strip()
            if text:
                found.append(re.sub(r"\s+", " ", text))
    return found


def shortened(command: str) -> str:
    """Return the command with small data and few steps, the rest as the README has it."""
    for long, short in STANDS_FOR.items():
        command = re.sub(rf"(?<![\w/]){re.escape(long)}(?![\w.])", short, command)
    if command.startswith("make demo"):
        return f'{command} ARGS="{" ".join(SHORT)}"'
    words = command.split()
    job = Path(words[1]).stem if words[0] == "python" and len(words) > 1 else ""
    if job == "export":
        return f"{command} --check-first 4"
    if job == "promote":  # a model of few steps has next to no AP
        return f"{command} min_first_ap=0"
    if job.startswith(("sweep_", "study_")):
        return " ".join([command, "--trials 2 --no-probe", *SHORT])
    if not job.startswith(("deta_", "anchor_", "improved_")) or words[-1] in PRINTS_ONLY:
        return command
    if words[2] == "finetune":
        return " ".join([command, "--samples 100", *FEW_IMAGES])
    variant = [] if "--variant" in words else ["--variant small"]
    return " ".join([command, *variant, *SHORT])


def run(command: str, log: Path) -> str:
    """Run a command to its end; return what is wrong with it, or nothing."""
    with log.open("wb") as file:
        try:
            done = subprocess.run(
                ["bash", "-c", command], cwd=ROOT, env=environment(), stdout=file, stderr=file,
                stdin=subprocess.DEVNULL, timeout=WITHIN_S, check=False,
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            return f"still running after {WITHIN_S} s"
    return f"exit code {done.returncode}" if done.returncode else marked_line(log)


def marked_line(log: Path) -> str:
    """Return the first line of a log that begins with an exclamation mark."""
    text = log.read_text(encoding="utf-8", errors="replace")
    for line in re.split(r"[\r\n]+", re.sub(r"\x1b\[[\d;?]*[A-Za-z]", "", text)):
        if line.lstrip().startswith("!"):
            return f"printed: {line.strip()}"
    return ""


class Server:
    """A server of the README while the commands after it ask it."""

    def __init__(self, command: str, address: str, log: Path) -> None:
        self.address, self.log = address, log
        with log.open("wb") as file:
            self.process = subprocess.Popen(
                ["bash", "-c", f"exec {command}"], cwd=ROOT, env=environment(), stdout=file,
                stderr=file, stdin=subprocess.DEVNULL, start_new_session=True,
            )  # fmt: skip

    def wait(self) -> str:
        began_s = time.monotonic()
        while time.monotonic() - began_s < READY_WITHIN_S:
            if self.process.poll() is not None:
                return f"ended with exit code {self.process.returncode}"
            try:
                urllib.request.urlopen(self.address, timeout=5).close()
                return ""
            except (urllib.error.URLError, OSError):
                time.sleep(0.5)
        return f"{self.address} does not answer after {READY_WITHIN_S} s"

    def stop(self) -> str:
        """Press Ctrl-C, which everything that was started here has to heed."""
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGINT)
        try:
            code = self.process.wait(60)
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, signal.SIGKILL)
            return "still running 60 s after Ctrl-C"
        return f"exit code {code} after Ctrl-C" if code not in (0, 130) else marked_line(self.log)


def environment() -> dict[str, str]:
    """Return this process's variables without those that lead to other clusters and servers."""
    env = {k: v for k, v in os.environ.items() if not k.startswith(("RAY_", "MLFLOW_", "DETA_"))}
    return env | {
        "HOME": str(HOME),
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
    }


def main() -> None:
    # In the background of a shell SIGINT is ignored, and so by all that is started from here.
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    shutil.rmtree(HOME, ignore_errors=True)
    logs = HOME / "logs"
    logs.mkdir(parents=True)
    outcomes: list[Outcome] = []
    server: Server | None = None
    for number, written in enumerate(commands((ROOT / "README.md").read_text("utf-8"))):
        if any(re.match(skipped, written) for skipped in SKIPPED):
            continue
        command, log, began_s = shortened(written), logs / f"{number:02d}.log", time.monotonic()
        print(f"$ {command}", flush=True)
        address = next((a for start, a in SERVERS.items() if command.startswith(start)), None)
        if server is not None and not command.startswith("curl "):
            outcomes.append(Outcome("Ctrl-C", 0.0, server.stop()))
            server = None
        if address is None or "--out" in command:
            fault = run(command, log)
        else:
            server = Server(command, address, log)
            fault = server.wait()
        outcomes.append(Outcome(written, time.monotonic() - began_s, fault))
        print(f"  {outcomes[-1].seconds:.1f} s  {fault or 'ok'}", flush=True)
        if fault:
            print(log.read_text(encoding="utf-8", errors="replace")[-3000:], flush=True)
    if server is not None:
        outcomes.append(Outcome("Ctrl-C", 0.0, server.stop()))
    reports = sorted((HOME / "deta-runs").glob("*/evaluations/*/report.html"))
    outcomes.append(Outcome("report.html in a run", 0.0, "" if reports else "there is none"))
    failed = [one for one in outcomes if one.fault]
    for one in failed:
        print(f"FAILED {one.command}: {one.fault}")
    print(f"{len(outcomes) - len(failed)} passed, {len(failed)} failed")
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
