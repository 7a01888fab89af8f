"""Fixtures that tests of several rooms share: a Ray cluster and a browser."""

from __future__ import annotations

import os

# One thread everywhere: two processes then sum the same numbers in the same order, so tests can
# require equal bits. Torch reads the variable at its import, so it is set before.
os.environ["OMP_NUM_THREADS"] = "1"

import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

# A shell's background jobs and their children ignore SIGINT, but the tests of Ctrl-C send it.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

START_WITHIN_S = 240  # usually 7; minutes on a busy machine
# On Linux all of 127.0.0.0/8 is this machine. Ray replaces 127.0.0.1 by an address of the network.
NODE_IP = "127.0.0.2" if sys.platform == "linux" else "127.0.0.1"
PORT_OPTIONS = (
    "--port", "--dashboard-port", "--node-manager-port", "--object-manager-port",
    "--dashboard-agent-listen-port", "--dashboard-agent-grpc-port", "--metrics-export-port",
    "--runtime-env-agent-port", "--ray-client-server-port",
)  # fmt: skip


@dataclass(frozen=True)
class RayCluster:
    """A running cluster of one node with two CPUs.

    Pass `env` to a process (`subprocess.run(..., env=cluster.env)`). It is this process's
    environment with the address and token of this cluster, and without other clusters and MLflow
    servers. `os.environ` stays unchanged, so other tests do not see the cluster.
    """

    dashboard: str  # http://127.0.0.1:PORT, for jobs
    address: str  # HOST:PORT, for `ray.init`
    env: dict[str, str]
    folder: Path  # the node's temporary files: logs, copies of working directories


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[RayCluster]:
    """A Ray cluster for the whole session, with token authentication and the dashboard.

    It starts at its first use (about 7 s) and listens on loopback at free ports. It joins and
    stops no other cluster on this machine. The output of its jobs and workers is below `folder`.
    """
    pytest.importorskip("ray")
    # Short: the path of a Unix socket has at most 107 characters, and Ray's are long.
    folder = Path(tempfile.mkdtemp(prefix="deta-", dir="/tmp"))
    token = folder / "token"
    token.touch(mode=0o600)
    token.write_text(secrets.token_hex(32), encoding="ascii")
    env = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("RAY_", "MLFLOW_", "DETA_"))
    }
    env |= {
        # A job's `python` is the one that runs the tests.
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}",
        "OMP_NUM_THREADS": "1",
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(token),
        "RAY_DASHBOARD_STARTUP_TIMEOUT_S": str(START_WITHIN_S),
        "RAY_gcs_server_port_wait_time_s": str(START_WITHIN_S),
        "RAY_TMPDIR": str(folder),  # where Ray records this machine's cluster
    }
    head: subprocess.Popen[bytes] | None = None
    try:
        for attempt in (1, 2, 3):  # Ray's limit is 30 s, which a busy machine can exceed
            ports = dict(zip(PORT_OPTIONS, _free_ports(len(PORT_OPTIONS)), strict=True))
            head = _start_head(folder, env, ports)
            if _is_up(head, folder, ports):
                break
            _end_tree(head)
            if attempt == 3:
                log = (folder / "head.log").read_text(encoding="utf-8", errors="replace")
                pytest.fail(f"the test cluster did not start:\n{log[-3000:]}")
        dashboard = f"http://127.0.0.1:{ports['--dashboard-port']}"
        address = f"{NODE_IP}:{ports['--port']}"
        env |= {"RAY_ADDRESS": address, "RAY_API_SERVER_ADDRESS": dashboard}
        yield RayCluster(dashboard, address, env, folder)
    finally:
        # Never `ray stop`: it stops every cluster on this machine.
        if head is not None:
            _end_tree(head)
        shutil.rmtree(folder, ignore_errors=True)


def _free_ports(number: int) -> list[int]:
    """Return distinct ports that are free at the moment."""
    sockets = [socket.socket() for _ in range(number)]
    try:
        for each in sockets:
            each.bind(("", 0))  # all addresses, since Ray listens on all with some ports
        return [each.getsockname()[1] for each in sockets]
    finally:
        for each in sockets:
            each.close()


def _start_head(
    folder: Path, env: dict[str, str], ports: dict[str, int]
) -> subprocess.Popen[bytes]:
    command = [str(Path(sys.executable).parent / "ray"), "start", "--head", "--block"]
    command += ["--num-cpus=2", "--object-store-memory=200000000", f"--node-ip-address={NODE_IP}"]
    command += ["--include-dashboard=true", "--dashboard-host=127.0.0.1", "--disable-usage-stats"]
    command += ["--min-worker-port=0", "--max-worker-port=0", f"--temp-dir={folder}"]
    command += [f"{option}={port}" for option, port in ports.items()]
    with (folder / "head.log").open("wb") as log:
        return subprocess.Popen(
            command, env=env, cwd=folder, stdout=log, stderr=log, start_new_session=True
        )


def _is_up(head: subprocess.Popen[bytes], folder: Path, ports: dict[str, int]) -> bool:
    """Wait for the node, its dashboard and its job agent; return False if they do not start."""
    token = (folder / "token").read_text(encoding="ascii")
    request = urllib.request.Request(
        f"http://127.0.0.1:{ports['--dashboard-port']}/api/version",
        headers={"Authorization": f"Bearer {token}"},
    )
    agent = (NODE_IP, ports["--dashboard-agent-listen-port"])
    deadline_s = time.monotonic() + START_WITHIN_S
    while head.poll() is None and time.monotonic() < deadline_s:
        if b"Ray runtime started" in (folder / "head.log").read_bytes():
            try:
                with (
                    urllib.request.urlopen(request, timeout=5),
                    socket.create_connection(agent, timeout=5),
                ):
                    return True
            except OSError:
                pass
        time.sleep(0.2)
    return False


def _end_tree(head: subprocess.Popen[bytes]) -> None:
    """Kill the cluster's processes, including those in other sessions, and nothing else."""
    import ray  # noqa: F401  its import makes its copy of psutil importable
    from psutil import NoSuchProcess, Process, wait_procs

    try:
        family = [Process(head.pid), *Process(head.pid).children(recursive=True)]
    except NoSuchProcess:  # it did not start
        return
    head.send_signal(signal.SIGTERM)
    _, alive = wait_procs(family, timeout=3)  # Ray's GCS ignores SIGTERM
    for process in alive:
        try:
            process.kill()  # psutil also compares the start time, so a reused id is safe
        except NoSuchProcess:
            continue
    wait_procs(alive, timeout=10)
    head.wait(timeout=10)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """The system's Chromium, driven by playwright; skips where either is missing."""
    api = pytest.importorskip("playwright.sync_api")
    chromium = shutil.which("chromium") or shutil.which("chromium-browser")
    if chromium is None:
        pytest.skip("no chromium")
    with api.sync_playwright() as playwright:
        running = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        yield running
        running.close()
