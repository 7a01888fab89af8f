"""A child server never outlives its parent."""

from __future__ import annotations

import signal
import socket
import stat
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest

from deta.platform.system.child_server import (
    ChildServerError,
    free_port,
    start_child_server,
)
from deta.platform.system.places import child_environment

ROOT = Path(__file__).resolve().parents[3]
# Ignores SIGTERM, and has a child that gets no signal.
STUBBORN = """
import signal, subprocess, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
open(sys.argv[1], "w").write(str(child.pid))
time.sleep(600)
"""


def is_alive(process: int) -> bool:
    try:
        state = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"


def wait_for_end(process: int, within_s: float = 60.0) -> None:
    deadline_s = time.monotonic() + within_s
    while is_alive(process):
        assert time.monotonic() < deadline_s, f"{process} is still there"
        time.sleep(0.05)


def test_a_server_answers_and_ends(tmp_path: Path):
    port = free_port("127.0.0.1", 0)

    def answers() -> bool:
        try:
            return urllib.request.urlopen(f"http://127.0.0.1:{port}", timeout=2).status == 200
        except OSError:
            return False

    command = [sys.executable, "-m", "http.server", str(port), "--bind", "127.0.0.1"]
    service = start_child_server("it", command, tmp_path / "log", answers)
    assert service.is_alive()
    assert stat.S_IMODE((tmp_path / "log").stat().st_mode) == 0o600
    service.stop()
    assert not service.is_alive()
    assert not answers()
    service.stop()


def test_the_error_of_a_failed_start_quotes_the_log(tmp_path: Path):
    command = [sys.executable, "-c", "raise SystemExit('no such database')"]
    with pytest.raises(ChildServerError, match="no such database"):
        start_child_server("it", command, tmp_path / "log", lambda: False)


@pytest.mark.parametrize("ending", ["stop", "killed"])
def test_no_process_is_left_of_a_server_that_ignores_signals(tmp_path: Path, ending: str):
    """Also if the parent is killed and cannot clean up."""
    code = (
        "import sys, time; from pathlib import Path\n"
        "from deta.platform.system.child_server import start_child_server\n"
        f"told = Path({str(tmp_path / 'child')!r})\n"
        f"one = start_child_server('it', [sys.executable, '-c', {STUBBORN!r}, str(told)],"
        f" Path({str(tmp_path / 'log')!r}), lambda: told.exists() and told.read_text() != '')\n"
        "print('up', flush=True)\n"
        "sys.stdin.readline()\n"
        "one.stop()\n"
    )
    owner = subprocess.Popen(
        [sys.executable, "-c", code], cwd=ROOT, env=child_environment(),
        stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    )  # fmt: skip
    assert owner.stdin is not None
    assert owner.stdout is not None
    assert owner.stdout.readline() == b"up\n"
    child = int((tmp_path / "child").read_text())
    assert is_alive(child)
    if ending == "stop":
        owner.stdin.close()
    else:
        owner.send_signal(signal.SIGKILL)
    owner.wait()
    wait_for_end(child)


def test_a_taken_port_is_replaced_by_a_free_one():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert free_port("127.0.0.1", port) not in (0, port)
    with pytest.raises(ValueError, match="nothing can listen there"):
        free_port("203.0.113.7", 5000)  # a documentation address: no machine has it
