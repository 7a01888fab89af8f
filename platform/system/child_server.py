"""Run a third-party server, such as MLflow's, as a child that never outlives its parent.

A small guard process, `python -m deta.platform.system.child_server -- COMMAND`, starts the server
and reads a pipe from the parent. The pipe closes when the parent closes it or dies. The guard then
terminates the server and everything that the server started. Ctrl-C at a terminal reaches neither
of them, so the parent stops its servers in its own order.
"""

from __future__ import annotations

import contextlib
import ipaddress
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from deta.platform.system.places import child_environment
from deta.platform.system.redaction import redact

GRACE_S = 8.0  # between SIGTERM and SIGKILL
MAX_LOG_BYTES = 5_000_000
TAIL_LINES = 8  # of the log, in the error about a server that did not start


class ChildServerError(RuntimeError):
    """A server did not start, or has exited. Names it and quotes the end of its log."""


@dataclass(frozen=True)
class ChildServer:
    """A running server."""

    name: str
    log: Path
    process: subprocess.Popen[bytes]  # the guard

    def is_alive(self) -> bool:
        return self.process.poll() is None

    def stop(self) -> None:
        """Stop the server, cleanly if possible, and wait for it. May be called twice."""
        if self.process.stdin is not None:
            with contextlib.suppress(OSError):
                self.process.stdin.close()
        try:
            self.process.wait(GRACE_S + 5)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()

    def log_tail(self) -> str:
        """Return the end of the log, without secrets."""
        try:
            lines = self.log.read_text(encoding="utf-8", errors="replace").splitlines()
        except OSError:
            return ""
        return redact("\n".join(line for line in lines[-TAIL_LINES:] if line.strip()))


def start_child_server(
    name: str,
    command: Sequence[str],
    log: Path,
    is_ready: Callable[[], bool],
    *,
    env: Mapping[str, str] | None = None,
    within_s: float = 300.0,
) -> ChildServer:
    """Start a server and wait until it answers, which `is_ready` finds out.

    Args:
        log: file for its output; readable for its owner alone.
        env: variables besides those of this process. Put secrets here: every user of the machine
            can read a command line.

    Raises:
        ChildServerError: it exited, or does not answer in time. It is stopped then.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    too_long = log.exists() and log.stat().st_size > MAX_LOG_BYTES
    flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | (os.O_TRUNC if too_long else 0)
    with os.fdopen(os.open(log, flags, 0o600), "wb") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "deta.platform.system.child_server", "--", *command],
            stdin=subprocess.PIPE,
            stdout=output,
            stderr=output,
            env=child_environment(env),
            start_new_session=True,  # Ctrl-C is the parent's
        )
    server = ChildServer(name, log, process)
    deadline_s = time.monotonic() + within_s
    try:
        while not is_ready():
            late = time.monotonic() > deadline_s
            if late or not server.is_alive():
                problem = f"does not answer after {within_s:.0f} s" if late else "exited at once"
                raise ChildServerError(f"{name} {problem}; {log} ends with:\n{server.log_tail()}")
            time.sleep(0.1)
    except BaseException:
        server.stop()
        raise
    return server


def is_loopback(host: str) -> bool:
    """Return whether only this machine can reach a server that listens on `host`."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def free_port(host: str, wanted: int) -> int:
    """Return the wanted port if it is free on this address, else another free port.

    Raises:
        ValueError: the machine has no such address.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        with socket.create_server((host, wanted), family=family) as probe:
            return int(probe.getsockname()[1])
    except OSError as error:
        if wanted:
            return free_port(host, 0)
        raise ValueError(
            f"--host {host}: nothing can listen there ({error}); give an address of this machine, "
            "or omit --host to serve this machine alone"
        ) from error


def run_guarded(command: Sequence[str]) -> int:
    """Run the command until it exits or standard input closes. This is the guard process."""
    ended = threading.Event()
    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
        signal.signal(number, lambda *_: ended.set())
    # A process group of its own, which everything that it starts joins.
    server = subprocess.Popen(command, stdin=subprocess.DEVNULL, start_new_session=True)

    def watch() -> None:
        while os.read(0, 1024):
            pass
        ended.set()

    threading.Thread(target=watch, daemon=True).start()
    while server.poll() is None and not ended.wait(0.2):
        pass
    with contextlib.suppress(ProcessLookupError, PermissionError):  # the group has no process left
        for number, wait_s in ((signal.SIGTERM, GRACE_S), (signal.SIGKILL, 1.0)):
            os.killpg(server.pid, number)
            deadline_s = time.monotonic() + wait_s
            while time.monotonic() < deadline_s:
                server.poll()
                os.killpg(server.pid, 0)
                time.sleep(0.05)
    return server.wait()


if __name__ == "__main__":
    sys.exit(run_guarded(sys.argv[sys.argv.index("--") + 1 :]))
