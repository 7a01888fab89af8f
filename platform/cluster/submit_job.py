"""Submits a script as a job to a Ray cluster, and follows it to its end."""

from __future__ import annotations

import asyncio
import os
import shlex
import signal
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from urllib.parse import urlsplit

import aiohttp
import requests
from ray.exceptions import AuthenticationError
from ray.job_submission import JobDetails, JobStatus, JobSubmissionClient

from deta.platform.cluster.auth_token import OPEN_CLUSTER, is_open
from deta.platform.cluster.job_project import STOP_WAIT_S, excludes, job_environment, project_root
from deta.platform.system.places import bypass_proxies
from deta.platform.system.redaction import redact_value

DEFAULT_ADDRESS = "http://127.0.0.1:8265"
CONNECT_WITHIN_S, ANSWER_WITHIN_S = 5.0, 20.0  # otherwise there is no working cluster
READY_WITHIN_S = 60.0  # the dashboard answers some time before the cluster accepts jobs
RECONNECT_WITHIN_S = 60.0  # if the connection is lost while following
INTERRUPTED = 130  # the exit code of a shell command that Ctrl-C ended


class ClusterError(RuntimeError):
    """The cluster cannot be reached, or rejects the token."""


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
    echo: Callable[[str], None] = print,
) -> int:
    """Run a script as a job of a Ray cluster, and print its output to stdout.

    Args:
        address: the cluster's dashboard; see `cluster_address`.
        working_dir: the folder to send; by default the script's project.
        follow: wait for the end. Otherwise only the job's id is printed.
        stop_on_interrupt: Ctrl-C also stops the job. Otherwise the job continues.
        python: the interpreter on the cluster. The default is this one if the address is of this
            machine, otherwise `python`.
        env: variables of the job, in addition to those of `job_environment`.
        echo: prints a line about the submission.

    Returns:
        The exit code of the script; 143 for a job that was stopped, 130 if Ctrl-C ended the
        following, 0 at once without `follow`.

    Raises:
        ValueError: the script, the project or the address is invalid.
        ClusterError: the cluster does not answer or rejects the token; says what to set.
    """
    if not script.is_file():
        raise ValueError(f"{script}: no such script (relative to {Path.cwd()})")
    script = script.resolve()
    root = project_root(script) if working_dir is None else working_dir.resolve()
    if not script.is_relative_to(root):
        raise ValueError(f"{script} is not in {root}, so it would not be sent with it")
    variables = {**job_environment(root, os.environ), **(env or {})}
    client, address = connect_client(address)
    if is_open(address):
        _refuse_secrets(address, variables)
        echo(f"WARNING, {address}: {OPEN_CLUSTER}")
    echo(f"project: {root} at {variables.get('DETA_COMMIT', 'no commit')}\ncluster: {address}")
    passed_on = sorted(set(variables) - {"DETA_COMMIT", "RAY_JOB_STOP_WAIT_TIME_S"})
    if passed_on:
        echo(f"passed on: {', '.join(passed_on)}")
    # A job's `python` is the first on the PATH of the shell that started Ray. That one has no Ray
    # if the command was `.venv/bin/ray start`.
    python = python or (sys.executable if _is_this_machine(address) else "python")
    entrypoint = shlex.join([python, str(script.relative_to(root)), *arguments])
    runtime_env = {"working_dir": str(root), "excludes": excludes(root), "env_vars": variables}
    job_id = _hand_over(
        lambda: client.submit_job(entrypoint=entrypoint, runtime_env=runtime_env), address
    )
    if not follow:
        print(job_id, flush=True)
        return 0
    echo(f"job:     {job_id}")
    try:
        try:
            return _exit_code(_follow(client, job_id), echo)
        except KeyboardInterrupt:
            if not stop_on_interrupt:
                raise
        echo(f"\nstopping {job_id}; it has {STOP_WAIT_S} s to write its state")
        client.stop_job(job_id)
        return _exit_code(_follow(client, job_id, show=False), echo)
    except KeyboardInterrupt:
        echo(f"\nno longer following {job_id}\n{_next_commands(job_id, address)}")
        return INTERRUPTED


def _refuse_secrets(address: str, variables: Mapping[str, str]) -> None:
    """Refuse to send secrets to an open cluster elsewhere: who reaches it can read them."""
    named = sorted(name for name, value in variables.items() if redact_value(name, value) != value)
    if named and not _is_this_machine(address):
        raise ClusterError(
            f"{', '.join(named)} must not be sent to the Ray cluster at {address}: {OPEN_CLUSTER}; "
            "or unset these variables"
        )


def cluster_address(address: str | None, environment: Mapping[str, str]) -> str:
    """Return the address of the cluster's dashboard.

    The first of: `address`, RAY_API_SERVER_ADDRESS, RAY_ADDRESS, the default on this machine.

    Raises:
        ValueError: RAY_ADDRESS names a port of the cluster that does not accept jobs.
    """
    address = address or environment.get("RAY_API_SERVER_ADDRESS")
    if not address:
        address = environment.get("RAY_ADDRESS", "")
        if address in ("", "auto", "local"):
            return DEFAULT_ADDRESS
        if not address.startswith(("http://", "https://")):
            # The dashboard can be anywhere; a guess could reach another user's cluster.
            raise ValueError(
                f"RAY_ADDRESS={address} is where workers join; jobs go to the dashboard of the "
                "cluster: give --address http://HOST:8265, or set RAY_API_SERVER_ADDRESS"
            )
    if "://" not in address:
        address = f"http://{address}"
    if not address.startswith(("http://", "https://")):
        raise ValueError(f"{address} is not the http address of a dashboard, http://HOST:8265")
    return address.rstrip("/")


def connect_client(address: str | None) -> tuple[JobSubmissionClient, str]:
    """Return a client of the cluster, and the address of the cluster.

    Raises:
        ClusterError: no answer within seconds, or the token is wrong.
    """
    address = cluster_address(address, os.environ)
    bypass_proxies()
    try:
        # Ray's own client has no timeout.
        requests.get(f"{address}/api/version", timeout=(CONNECT_WITHIN_S, ANSWER_WITHIN_S))
        os.environ["RAY_API_SERVER_ADDRESS"] = address  # overrides the argument in Ray
        return JobSubmissionClient(address), address
    except AuthenticationError as error:
        raise ClusterError(
            f"the Ray cluster at {address} rejected the request: "
            f"{str(error).partition('. ')[0].partition(chr(10))[0]}\n"
            "Set RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN_PATH to the file with the cluster's token "
            "(or RAY_AUTH_TOKEN; the default is ~/.ray/auth_token)"
        ) from error
    except (OSError, RuntimeError, ValueError) as error:  # those of requests are OSErrors
        late = f"no answer within {ANSWER_WITHIN_S:.0f} s"
        found = late if isinstance(error, requests.ReadTimeout) else type(error).__name__
        raise ClusterError(
            f"no Ray cluster answers at {address} ({found}). Start one on this machine with `ray "
            "start --head`, or give the dashboard of another with --address or "
            "RAY_API_SERVER_ADDRESS"
        ) from error


def _is_this_machine(address: str) -> bool:
    return urlsplit(address).hostname in ("127.0.0.1", "localhost", "::1")


def _hand_over(submit: Callable[[], str], address: str) -> str:
    """Submit a job and return its id, also to a cluster that is still starting."""
    deadline_s = time.monotonic() + READY_WITHIN_S
    while True:
        try:
            return submit()
        except (OSError, RuntimeError) as error:
            if "No available agent" not in str(error):
                raise ClusterError(f"the cluster at {address} refused the job: {error}") from error
            if time.monotonic() > deadline_s:
                raise ClusterError(
                    f"the dashboard at {address} answers, but the cluster has accepted no job for "
                    f"{READY_WITHIN_S:.0f} s; check with `ray status` on its head that it has a "
                    "node"
                ) from error
        time.sleep(0.5)


def _follow(client: JobSubmissionClient, job_id: str, *, show: bool = True) -> JobDetails:
    """Print the job's output until it ends."""
    printed = 0  # characters; after a lost connection Ray starts again from the first

    async def print_output() -> None:
        nonlocal printed
        position = 0
        async for text in client.tail_job_logs(job_id):
            new = text[max(0, printed - position) :]
            position += len(text)
            if new:
                print(new, end="", flush=True)
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
                    f"still run\n{_next_commands(job_id, client.get_address())}"
                ) from error
        else:
            lost_at_s = None
            if details.status.is_terminal():
                return details
        time.sleep(0.5)


def _exit_code(details: JobDetails, echo: Callable[[str], None]) -> int:
    if details.status == JobStatus.SUCCEEDED:
        return 0
    if details.status == JobStatus.STOPPED:
        echo(f"{details.submission_id} was stopped")
        return 128 + signal.SIGTERM
    code = details.driver_exit_code
    if not code:  # it never started
        echo(f"{details.submission_id} failed: {details.message}")
        return 1
    hint = "; if the cluster has no such Python, give its path with --python"
    echo(f"{details.submission_id} ended with exit code {code}{hint if code in (126, 127) else ''}")
    return code if code > 0 else 128 - code  # killed by a signal


def _next_commands(job_id: str, address: str) -> str:
    # As a variable, since RAY_ADDRESS overrides --address in Ray.
    command = f"RAY_API_SERVER_ADDRESS={address} ray job"
    return f"  follow: {command} logs --follow {job_id}\n  stop:   {command} stop {job_id}"
