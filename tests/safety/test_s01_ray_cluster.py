"""S1 to S3: a Ray cluster that a run starts requires its token and listens on loopback only."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from deta.platform.system.places import child_environment
from deta.platform.system.process_tree import ATTEMPT_MARK, marked_processes, new_mark, terminate

pytestmark = pytest.mark.cluster

LOOPBACK = re.compile(r"127\.|::1$|::ffff:127\.")
# The first part of a run's driver: a run reaches its cluster only through `join_cluster`.
START = """
import json, os, sys
from deta.platform.cluster.connection import join_cluster
line = join_cluster()
import ray
print(json.dumps({
    "line": line,
    "dashboard": ray._private.worker.get_dashboard_url(),
    "gcs": ray.get_runtime_context().gcs_address,
    "session": ray._private.worker._global_node.get_session_dir_path(),
    "in_worker": ray.get(ray.remote(lambda: os.environ.get("RAY_AUTH_MODE")).remote()),
}), flush=True)
sys.stdin.read()
"""


@dataclass(frozen=True)
class Started:
    """A cluster as a run starts it, in a home folder that Ray has never used."""

    home: Path
    token: str
    about: dict[str, str]
    mark: str
    env: dict[str, str]

    @property
    def processes(self) -> list[int]:
        return marked_processes(ATTEMPT_MARK, self.mark)


@pytest.fixture(scope="module")
def started() -> Iterator[Started]:
    for attempt in (1, 2, 3):  # Ray's limit for a start is 30 s, which a busy machine can exceed
        home = Path(tempfile.mkdtemp(prefix="deta-home-", dir="/tmp"))
        (home / ".ray").mkdir(mode=0o755)  # as Ray leaves it
        mark = new_mark()
        env = {
            name: value
            for name, value in child_environment({ATTEMPT_MARK: mark, "HOME": str(home)}).items()
            if not name.startswith("RAY_")
        }
        log = home / "log"
        with log.open("wb") as file:
            process = subprocess.Popen(
                [sys.executable, "-c", START],
                env=env,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=file,
                start_new_session=True,
            )
        try:
            assert process.stdout is not None
            printed = process.stdout.readline()
            if printed:
                token = (home / ".ray" / "auth_token").read_text()
                yield Started(home, token, json.loads(printed), mark, env)
                return
            if attempt == 3:
                pytest.fail(log.read_text(errors="replace")[-3000:])
        finally:
            terminate(process, mark)
            shutil.rmtree(home, ignore_errors=True)


def request_jobs(started: Started, token: str | None, job: dict[str, str] | None = None) -> int:
    """Request the list of jobs, or submit a job, and return the HTTP status."""
    request = urllib.request.Request(f"http://{started.about['dashboard']}/api/jobs/")
    if job is not None:
        request.data = json.dumps(job).encode()
        request.add_header("Content-Type", "application/json")
    if token is not None:
        request.add_header("Authorization", f"Bearer {token}")
    try:
        with urllib.request.urlopen(request, timeout=30) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as error:
        return error.code


def listening(pids: list[int]) -> dict[str, int]:
    """Map address and port of every TCP socket that these processes listen on to the process."""
    wanted = {}
    for pid in pids:
        for descriptor in Path(f"/proc/{pid}/fd").glob("*"):
            try:
                target = os.readlink(descriptor)
            except OSError:
                continue
            if target.startswith("socket:["):
                wanted[target[8:-1]] = pid
    found = {}
    for name in ("tcp", "tcp6"):
        for line in Path(f"/proc/net/{name}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A" and fields[9] in wanted:
                found[_readable(fields[1])] = wanted[fields[9]]
    return found


def _readable(address: str) -> str:
    host, _, port = address.partition(":")
    # The kernel prints groups of four bytes, each in reverse order.
    words = [bytes.fromhex(host[i : i + 8])[::-1] for i in range(0, len(host), 8)]
    whole = b"".join(words)
    if len(whole) == 4:
        text = ".".join(map(str, whole))
    elif whole[:12] == bytes(10) + b"\xff\xff":
        text = "::ffff:" + ".".join(map(str, whole[12:]))
    else:
        text = "::1" if whole == bytes(15) + b"\1" else whole.hex(":", 2)
    return f"{text} {int(port, 16)}"


def test_jobs_are_refused_without_the_token_and_none_runs(started: Started):
    trace = started.home / "trace"
    job = {"entrypoint": f"touch {trace}"}

    assert request_jobs(started, None, job) == 401
    assert request_jobs(started, "0" * 64, job) == 403
    assert request_jobs(started, None) == 401
    assert request_jobs(started, started.token) == 200  # the same request works with the token

    time.sleep(3)
    assert not trace.exists()
    assert "NO TOKEN" not in started.about["line"]


def test_a_wrong_token_does_not_join(started: Started):
    code = (
        f"import ray; ray.init(address={started.about['gcs']!r}, log_to_driver=False); "
        "print('joined', ray.get(ray.remote(lambda: 1).remote()))"
    )
    wrong = started.env | {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "0" * 64}
    wrong |= {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0", ATTEMPT_MARK: "of another"}

    tried = subprocess.run(
        [sys.executable, "-c", code], env=wrong, capture_output=True, text=True, timeout=300
    )

    assert tried.returncode != 0
    assert "joined" not in tried.stdout
    assert "uthenticat" in tried.stderr, tried.stderr[-2000:]


def test_workers_have_the_same_rules(started: Started):
    assert started.about["in_worker"] == "token"


def test_the_token_is_readable_for_its_owner_alone(started: Started):
    path = started.home / ".ray" / "auth_token"

    assert path.stat().st_mode & 0o777 == 0o600
    assert path.parent.stat().st_mode & 0o777 == 0o700
    assert len(started.token) == 64


def test_the_token_is_in_no_command_line_and_no_log(started: Started):
    pids = started.processes
    assert len(pids) >= 6  # GCS, raylet, dashboard, its agents, the driver, a worker
    for pid in pids:
        assert started.token.encode() not in Path(f"/proc/{pid}/cmdline").read_bytes()
    logs = [path for path in Path(started.about["session"]).rglob("*") if path.is_file()]
    assert len(logs) > 10
    for path in [*logs, started.home / "log"]:
        assert started.token.encode() not in path.read_bytes(), path


def test_nothing_listens_but_on_loopback(started: Started):
    sockets = listening(started.processes)

    assert len(sockets) >= 8
    assert [address for address in sockets if not LOOPBACK.match(address)] == []
