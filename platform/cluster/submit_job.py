"""A script as a job on a Ray cluster: what travels with it, where to, and how it ended.

The project folder that holds the script is copied to the cluster, without what git ignores and
without what is private. The job runs the copy, so code that was edited here is the code that runs.
"""

from __future__ import annotations

import asyncio
import logging
import os
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

import aiohttp
import requests
from ray._private.runtime_env.packaging import _dir_travel, _get_excludes
from ray.exceptions import AuthenticationError
from ray.job_submission import JobDetails, JobStatus, JobSubmissionClient

from deta.platform.cluster.auth_token import OPEN_CLUSTER, is_open
from deta.platform.system.redaction import redact_value

DEFAULT_ADDRESS = "http://127.0.0.1:8265"
CONNECT_WITHIN_S, ANSWER_WITHIN_S = 5.0, 20.0  # or there is no cluster, or none that works
READY_WITHIN_S = 60.0  # the dashboard answers some time before the cluster takes jobs
RECONNECT_WITHIN_S = 60.0  # after the connection was lost while following
STOP_WAIT_S = 30  # from SIGTERM to SIGKILL; Ray gives 3, too few to write a run's last state
MAX_UPLOAD_BYTES = 100 * 2**20  # Ray refuses 512 MiB, but only after it has read all of them
INTERRUPTED = 130  # the exit code of a shell command that Ctrl-C ended

# Beside what git ignores. Patterns as in .gitignore.
NEVER_SENT = (
    ".git", ".venv", "venv", "__pycache__", "*.egg-info", ".*_cache", ".hypothesis",
    "/runs", "/build", "/dist", "mlflow.db*", "mlruns", "mlartifacts", "node_modules",
    ".env", ".env.*", ".netrc", ".ssh", ".aws", ".kube", "*.pem", "*.key", "auth_token",
)  # fmt: skip


class ClusterError(RuntimeError):
    """The cluster cannot be reached, or does not let us in."""


@dataclass(frozen=True)
class Project:
    """The folder that travels with a job."""

    root: Path
    excludes: tuple[str, ...]  # patterns as in .gitignore
    num_files: int
    size_bytes: int

    @staticmethod
    def holding(script: Path, root: Path | None = None) -> Project:
        """The project of a script: `root`, or the nearest folder above with pyproject.toml or .git.

        Raises:
            ValueError: no such script, it lies outside `root`, or the project is too big to send;
                names the largest of its folders.
        """
        if not script.is_file():
            raise ValueError(f"{script}: there is no such script (looked in {Path.cwd()})")
        script = script.resolve()
        root = project_root(script) if root is None else root.resolve()
        if not script.is_relative_to(root):
            raise ValueError(f"{script} is not in {root}, so it would not travel with it")
        excludes = (*NEVER_SENT, *_ignored_by_git(root), *_own_token(root))
        return Project(root, excludes, *_measure(root, excludes))


def submit_job(
    script: Path,
    arguments: Sequence[str],
    *,
    address: str | None = None,
    working_dir: Path | None = None,
    follow: bool = True,
    stop_on_interrupt: bool = False,
    python: str | None = None,
    env: Mapping[str, str] | None = None,
    note: Callable[[str], None] = print,
) -> int:
    """Run a script as a job of a Ray cluster; its output appears on stdout.

    Args:
        arguments: for the script, handed over as they are.
        address: of the cluster's dashboard; see `cluster_address`.
        working_dir: the folder that travels; by default the script's project.
        follow: wait for the end. Otherwise only the job's id is printed.
        stop_on_interrupt: Ctrl-C stops the job, too. Otherwise it goes on without us.
        python: the interpreter on the cluster. By default this one where the cluster runs on this
            machine, otherwise `python`.
        env: variables of the job, beside those of `job_environment`.
        note: where lines about the submission go.

    Returns:
        The exit code of the script; 143 for a job that was stopped, 130 if Ctrl-C ended the
        following, 0 at once without `follow`.

    Raises:
        ValueError: the script, the project or the address.
        ClusterError: nobody answers, or the token is not right; says what to set.
    """
    project = Project.holding(script, working_dir)
    variables = {**job_environment(project.root, os.environ), **(env or {})}
    client, address = connect(address)
    if is_open(address):
        _refuse_secrets(address, variables)
        note(f"WARNING, {address}: {OPEN_CLUSTER}")
    note(
        f"project: {project.root} ({project.num_files} files, {project.size_bytes / 1e6:.1f} MB) "
        f"at {variables.get('DETA_COMMIT', 'no commit')}"
    )
    note(f"cluster: {address}")
    passed_on = sorted(set(variables) - {"DETA_COMMIT", "RAY_JOB_STOP_WAIT_TIME_S"})
    if passed_on:
        note(f"passed on: {', '.join(passed_on)}")
    python = python or _wait_for(lambda: _our_python(client), address)
    entrypoint = [python, str(script.resolve().relative_to(project.root)), *arguments]
    runtime_env: dict[str, object] = {
        "working_dir": str(project.root),
        "excludes": list(project.excludes),
        "env_vars": variables,
    }
    job_id = _wait_for(lambda: _hand_over(client, shlex.join(entrypoint), runtime_env), address)
    if not follow:
        print(job_id, flush=True)
        return 0
    note(f"job:     {job_id}")
    try:
        return _exit_code(_follow(client, job_id), note)
    except KeyboardInterrupt:
        if not stop_on_interrupt:
            note(f"\nno longer following {job_id}; it goes on\n{_what_next(job_id, address)}")
            return INTERRUPTED
    note(f"\nstopping {job_id}; it has {STOP_WAIT_S} s to write its state")
    client.stop_job(job_id)
    try:
        return _exit_code(_follow(client, job_id, show=False), note)
    except KeyboardInterrupt:
        note(f"no longer waiting for its end\n{_what_next(job_id, address)}")
        return INTERRUPTED


def _refuse_secrets(address: str, variables: Mapping[str, str]) -> None:
    """What a job is told can be read by all who reach its cluster.

    Raises:
        ClusterError: a password would go to an open cluster that is not this machine alone.
    """
    named = sorted(name for name, value in variables.items() if redact_value(name, value) != value)
    host = urlsplit(address).hostname or ""
    if named and host not in ("127.0.0.1", "localhost", "::1"):
        raise ClusterError(
            f"the Ray cluster at {address} is not told {', '.join(named)}, for {OPEN_CLUSTER}; or "
            "unset these variables"
        )


def project_root(script: Path) -> Path:
    """The nearest folder above with pyproject.toml or .git; the script's own if there is none."""
    for folder in script.resolve().parents:
        if (folder / "pyproject.toml").exists() or (folder / ".git").exists():
            return folder
    return script.resolve().parent


def cluster_address(address: str | None, environment: Mapping[str, str]) -> str:
    """The dashboard of the cluster: as given, RAY_API_SERVER_ADDRESS, RAY_ADDRESS, this machine's.

    Raises:
        ValueError: RAY_ADDRESS names a port of the cluster that takes no jobs.
    """
    address = address or environment.get("RAY_API_SERVER_ADDRESS")
    if not address:
        address = environment.get("RAY_ADDRESS", "")
        if address in ("", "auto", "local"):
            return DEFAULT_ADDRESS
        if not address.startswith(("http://", "https://")):
            # The dashboard can be anywhere: a guess could reach someone else's cluster.
            raise ValueError(
                f"RAY_ADDRESS={address} is where workers join; jobs go to the dashboard of the "
                "cluster: give --address http://HOST:8265, or set RAY_API_SERVER_ADDRESS"
            )
    if "://" not in address:
        address = f"http://{address}"
    if not address.startswith(("http://", "https://")):
        raise ValueError(f"{address} is not the http address of a dashboard, http://HOST:8265")
    return address.rstrip("/")


def connect(address: str | None) -> tuple[JobSubmissionClient, str]:
    """A client of the cluster, and the address it was found at.

    Raises:
        ClusterError: nobody answers within seconds, or the token is not right.
    """
    address = cluster_address(address, os.environ)
    try:
        # Ray's client waits for an answer as long as it takes.
        requests.get(f"{address}/api/version", timeout=(CONNECT_WITHIN_S, ANSWER_WITHIN_S))
        with _environment_variable("RAY_API_SERVER_ADDRESS", address):  # beats its argument
            return JobSubmissionClient(address), address
    except AuthenticationError as error:
        raise ClusterError(_no_entry(address, error)) from error
    except requests.ReadTimeout as error:
        raise ClusterError(
            f"something listens at {address}, but gave no answer within {ANSWER_WITHIN_S:.0f} s: "
            "not the dashboard of a Ray cluster, or one that is overloaded"
        ) from error
    except (OSError, RuntimeError, ValueError) as error:  # those of requests are OSErrors
        raise ClusterError(
            f"no Ray cluster answers at {address} ({type(error).__name__}). Start one on this "
            "machine with `ray start --head`, or give the dashboard of another with --address or "
            "RAY_API_SERVER_ADDRESS"
        ) from error


def job_environment(root: Path, environment: Mapping[str, str]) -> dict[str, str]:
    """What the job must be told: the commit of its code, where MLflow is, how to log in there."""
    variables = {"RAY_JOB_STOP_WAIT_TIME_S": str(STOP_WAIT_S)}
    # The copy has no .git to ask.
    if commit := _git(root, "describe", "--always", "--dirty", "--abbrev=40"):
        variables["DETA_COMMIT"] = commit.strip()
    for name, value in environment.items():
        if name.startswith("MLFLOW_TRACKING_") or name == "MLFLOW_REGISTRY_URI":
            variables[name] = value
    for name in ("MLFLOW_TRACKING_URI", "MLFLOW_REGISTRY_URI"):
        uri = variables.get(name, "")
        path = uri.removeprefix("sqlite:///")
        if path and ":" not in path and not path.startswith("/"):  # would be in the job's copy
            variables[name] = uri.removesuffix(path) + str(Path(path).resolve())
    return variables


def _ignored_by_git(root: Path) -> list[str]:
    """Patterns for what git ignores here for any reason; Ray itself reads .gitignore files only."""
    listing = _git(
        root, "ls-files", "-z", "--others", "--ignored", "--exclude-standard", "--directory"
    )
    paths = [path.rstrip("/") for path in listing.split("\0") if path]
    # At any depth: the same files are seen again through the links in deta/.
    return ["**/" + "".join("\\" + c if c in "\\*?[]!# " else c for c in path) for path in paths]


def _own_token(root: Path) -> list[str]:
    path = os.environ.get("RAY_AUTH_TOKEN_PATH")
    if not path or not Path(path).resolve().is_relative_to(root):
        return []
    return [f"/{Path(path).resolve().relative_to(root)}"]


def _git(folder: Path, *arguments: str) -> str:
    """What git says, or nothing where there is no git or no repository."""
    try:
        command = ["git", "-C", str(folder), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return ""


def _measure(root: Path, excludes: Sequence[str]) -> tuple[int, int]:
    """Number and bytes of the files that Ray would send."""
    num_files, bytes_by_part = 0, dict[str, int]()

    def count(path: Path) -> None:
        nonlocal num_files
        if not path.is_file():
            return
        num_files += 1
        part = path.relative_to(root).parts[0]
        bytes_by_part[part] = bytes_by_part.get(part, 0) + path.stat().st_size
        if sum(bytes_by_part.values()) > MAX_UPLOAD_BYTES:
            largest = max(bytes_by_part, key=lambda name: bytes_by_part[name])
            raise ValueError(
                f"{root} holds more than {MAX_UPLOAD_BYTES // 2**20} MB that would travel with the "
                f"job, most of it in {largest}; data stays where it is: list it in .gitignore or "
                ".rayignore"
            )

    quiet = logging.getLogger(f"{__name__}.travel")
    quiet.setLevel(logging.CRITICAL)
    use_gitignore = os.environ.get("RAY_RUNTIME_ENV_IGNORE_GITIGNORE") != "1"
    _dir_travel(root, [_get_excludes(root, list(excludes))], count, use_gitignore, quiet)
    return num_files, sum(bytes_by_part.values())


def _wait_for(step: Callable[[], str | None], address: str) -> str:
    """The first result of a step that has none while the cluster is still starting.

    Raises:
        ClusterError: it does not become ready, or refuses.
    """
    deadline_s = time.monotonic() + READY_WITHIN_S
    while True:
        try:
            result = step()
        except (OSError, RuntimeError) as error:
            raise ClusterError(f"the cluster at {address} did not take the job: {error}") from error
        if result is not None:
            return result
        if time.monotonic() > deadline_s:
            raise ClusterError(
                f"the dashboard at {address} answers, but the cluster takes no job since "
                f"{READY_WITHIN_S:.0f} s; does `ray status` on its head show a node?"
            )
        time.sleep(0.5)


def _hand_over(
    client: JobSubmissionClient, entrypoint: str, runtime_env: dict[str, object]
) -> str | None:
    """The id of the job; nothing if the cluster cannot take it yet."""
    try:
        return client.submit_job(entrypoint=entrypoint, runtime_env=runtime_env)
    except RuntimeError as error:
        if "No available agent" in str(error):
            return None
        raise


def _our_python(client: JobSubmissionClient) -> str | None:
    """This interpreter if the head of the cluster shares our file system, otherwise `python`.

    A job's `python` is the first on the path of the shell that started Ray, which has no Ray if
    that was `.venv/bin/ray start`. Behind a forwarded port there may be another machine. Nothing
    if the cluster does not know its head yet.
    """
    try:
        nodes = client._do_request("GET", "/nodes?view=summary").json()["data"]["summary"]
        head = next((node for node in nodes if node["raylet"].get("isHeadNode")), None)
        if head is None:
            return None
        same_name = head["raylet"].get("nodeManagerHostname") == socket.gethostname()
    except (OSError, ValueError, KeyError, TypeError):  # not how Ray 2.60 answers
        return "python"
    # Many machines share a name such as "localhost". Ray reports this some seconds after its start.
    booted_at_s, our_own_s = head.get("bootTime"), _booted_at_s()
    same_start = not booted_at_s or not our_own_s or abs(booted_at_s - our_own_s) < 3
    return sys.executable if same_name and same_start else "python"


def _booted_at_s() -> float | None:
    """Seconds since 1970 when Linux started; elsewhere nothing."""
    try:
        lines = Path("/proc/stat").read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    return next((float(line.split()[1]) for line in lines if line.startswith("btime ")), None)


def _follow(client: JobSubmissionClient, job_id: str, *, show: bool = True) -> JobDetails:
    """Print the job's output until it ends.

    Raises:
        ClusterError: the connection was lost and did not come back.
    """
    printed = 0  # characters; after a lost connection Ray begins from the first again

    async def print_output() -> None:
        nonlocal printed
        position = 0
        async for text in client.tail_job_logs(job_id):
            fresh = text[max(0, printed - position) :]
            position += len(text)
            if fresh:
                print(fresh, end="", flush=True)
                printed = position

    lost_at_s: float | None = None
    while True:
        try:
            if show:
                asyncio.run(print_output())
            details = client.get_job_info(job_id)
        except (OSError, RuntimeError, aiohttp.ClientError) as error:
            lost_at_s = lost_at_s or time.monotonic()
            if time.monotonic() - lost_at_s > RECONNECT_WITHIN_S:
                raise ClusterError(
                    f"the cluster has not answered for {RECONNECT_WITHIN_S:.0f} s; {job_id} may "
                    f"still run\n{_what_next(job_id, client.get_address())}"
                ) from error
        else:
            lost_at_s = None
            if details.status.is_terminal():
                return details
        time.sleep(0.5)


def _exit_code(details: JobDetails, note: Callable[[str], None]) -> int:
    if details.status == JobStatus.SUCCEEDED:
        return 0
    if details.status == JobStatus.STOPPED:
        note(f"{details.submission_id} was stopped")
        return 128 + signal.SIGTERM
    code = details.driver_exit_code
    if not code:  # it never began
        note(f"{details.submission_id} failed: {details.message}")
        return 1
    note(f"{details.submission_id} ended with exit code {code}")
    if code in (126, 127):
        note("if the cluster has no such Python: give its path with --python")
    return code if code > 0 else 128 - code  # killed by a signal


def _what_next(job_id: str, address: str) -> str:
    # As a variable: Ray lets RAY_ADDRESS win over --address.
    return "\n".join(
        f"  {what} RAY_API_SERVER_ADDRESS={address} ray job {command} {job_id}"
        for what, command in (("follow:", "logs --follow"), ("stop:  ", "stop"))
    )


def _no_entry(address: str, error: AuthenticationError) -> str:
    mode = os.environ.get("RAY_AUTH_MODE", "not set")
    source = next(
        (name for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH") if os.environ.get(name)),
        "~/.ray/auth_token",
    )
    reason = str(error).partition("\n")[0].partition(". ")[0]
    return (
        f"the Ray cluster at {address} did not let us in: {reason}\n"
        f"RAY_AUTH_MODE is {mode}, the token would come from {source}. Set RAY_AUTH_MODE=token, "
        "and RAY_AUTH_TOKEN_PATH to the file that holds the cluster's token (or RAY_AUTH_TOKEN)"
    )


@contextmanager
def _environment_variable(name: str, value: str) -> Iterator[None]:
    before = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before
