"""Starts MLflow's own server, with its web pages and REST interface, in a safe configuration.

The configuration is dashboards/mlflow/server.env. The server answers to exact host names only.
Beyond loopback it requires a password, which is generated once and stored in a file that only its
owner can read.
"""

from __future__ import annotations

import importlib.util
import os
import re
import secrets
import stat
import sys
import urllib.error
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from deta.platform.system.atomic_write import write_atomic
from deta.platform.system.child_server import (
    ChildServer,
    free_port,
    is_loopback,
    start_child_server,
)
from deta.platform.system.places import PROJECT_ROOT

PORT = 5000
USER = "admin"
START_WITHIN_S = 600.0  # it takes 10 s, or minutes if all cores are busy; an exit is seen at once
SETTINGS = PROJECT_ROOT / "deta" / "dashboards" / "mlflow" / "server.env"
# A name or an address, and a port. No patterns, since MLflow would interpret them.
EXACT_HOST = re.compile(r"(?:[A-Za-z0-9][A-Za-z0-9.-]*|\[[0-9A-Fa-f:.]+\]):[0-9]{1,5}", re.ASCII)


@dataclass(frozen=True)
class Server:
    """A server that runs until it is stopped or this process ends."""

    service: ChildServer
    url: str  # for browsers, such as http://127.0.0.1:5000
    password_file: Path | None = None  # of the user `admin`; None without a password

    def stop(self) -> None:
        self.service.stop()


def start_mlflow_server(
    uri: str,
    folder: Path,
    *,
    host: str = "127.0.0.1",
    port: int = PORT,
    allowed_hosts: Sequence[str] = (),
    within_s: float = START_WITHIN_S,
) -> Server:
    """Start the server and wait until it answers.

    Args:
        uri: database with the runs, such as sqlite:////runs/mlflow.db.
        folder: for logs, new artifacts and, beyond loopback, the password.
        port: on loopback, another one is used if this one is taken.
        allowed_hosts: see `host_names`. A proxy must forward one of them.

    Raises:
        ValueError: an address that cannot be used, a pattern for a host, or a password file that
            others can read.
        ChildServerError: the server does not start.
    """
    names = host_names(host, port, allowed_hosts)
    port = int(names[0].rpartition(":")[2]) if is_loopback(host) else port
    lines = SETTINGS.read_text(encoding="utf-8").splitlines()
    env = dict(line.split("=", 1) for line in lines if line and not line.startswith("#"))
    env |= {
        "MLFLOW_BACKEND_STORE_URI": uri,  # not in the command: it may hold a password
        "MLFLOW_ARTIFACTS_DESTINATION": str(folder.resolve() / "mlartifacts"),
        "MLFLOW_SERVER_ALLOWED_HOSTS": ",".join(names),
    }
    command = [sys.executable, "-m", "mlflow", "server", f"--host={host}", f"--port={port}"]
    command += ["--workers=1"]
    password_file = None
    if not is_loopback(host):
        password_file = ensure_password_file(folder)
        env |= _auth_settings(password_file.parent)
        command += ["--app-name", "basic-auth"]
    health = f"{address_here(host, port)}/health"
    service = start_child_server(
        "MLflow", command, folder / "mlflow-server.log", lambda: answers(health),
        env=env, within_s=within_s,
    )  # fmt: skip
    return Server(service, f"http://{names[0]}", password_file)


def host_names(host: str, port: int, allowed: Sequence[str]) -> list[str]:
    """Return the names, with ports, that a server answers to, after checking host and port.

    Args:
        port: on loopback, another one is in the names if this one is taken.
        allowed: beyond loopback, the exact addresses that people enter in their browsers, such as
            "gpu1:5000". Needed if `host` is every address of the machine (0.0.0.0).

    Raises:
        ValueError: nothing can listen there, no name is given for every address, or one is not
            exact.
    """
    free = free_port(host, port)
    if is_loopback(host):
        return [f"127.0.0.1:{free}", f"localhost:{free}"]
    if free != port:
        raise ValueError(f"port {port} of {host} is taken; choose another one")
    if not allowed and host not in ("0.0.0.0", "::", ""):
        allowed = [f"[{host}]:{port}" if ":" in host else f"{host}:{port}"]
    if not allowed:
        raise ValueError(
            f"--host {host} is every address of this machine; give the names that people use in "
            f"their browsers with --allow-host NAME:{port}"
        )
    for name in allowed:
        if not EXACT_HOST.fullmatch(name):
            raise ValueError(f"--allow-host {name!r}: give one exact NAME:PORT, without patterns")
    return list(allowed)


def ensure_password_file(folder: Path) -> Path:
    """Return the file with the password; create it if there is none.

    Raises:
        ValueError: others can read it, or its folder.
    """
    place = folder / "mlflow-auth"
    place.mkdir(parents=True, mode=0o700, exist_ok=True)
    path = place / "password"
    if not path.exists() and (place / "users.db").exists():
        raise ValueError(
            f"{path}: is missing, and {place / 'users.db'} has only a hash of the password; "
            "restore it, or remove that file for a new password"
        )
    ensure_secret(path)
    for one in (place, path):
        mode = stat.S_IMODE(one.stat().st_mode)
        if mode & 0o077 or one.stat().st_uid != os.getuid():
            raise ValueError(
                f"{one}: others can read it (mode {mode:04o}); chmod go-rwx it, and make a new "
                "password if somebody may have read it"
            )
    return path


def ensure_secret(path: Path) -> str:
    """Return the random secret in a file, which is created for its owner alone."""
    if not path.exists():
        write_atomic(path, secrets.token_urlsafe(24), mode=0o600)
    return path.read_text(encoding="ascii").strip()


def answers(address: str) -> bool:
    """Return whether a server answers, if only to ask for a password or refuse this name of it."""
    # Not through a proxy of the environment, since it is this machine.
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(address, timeout=2):
            return True
    except urllib.error.HTTPError as error:
        return error.code < 500
    except (OSError, ValueError):
        return False


def address_here(host: str, port: int) -> str:
    """Return the address by which this machine reaches a server that listens on `host`."""
    host = {"0.0.0.0": "127.0.0.1", "": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def _auth_settings(place: Path) -> dict[str, str]:
    """
    Raises:
        ValueError: MLflow's password check is not installed.
    """
    if importlib.util.find_spec("flask_wtf") is None:
        raise ValueError(
            "beyond loopback MLflow requires a password, which needs pip install 'mlflow[auth]'; "
            "install it, or leave --host out"
        )
    settings = place / "basic_auth.ini"
    write_atomic(
        settings,
        "[mlflow]\n"
        "default_permission = NO_PERMISSIONS\n"
        f"database_uri = sqlite:///{(place / 'users.db').resolve()}\n"
        f"admin_username = {USER}\n"
        "authorization_function = mlflow.server.auth:authenticate_request_basic_auth\n"
        # A page of MLflow makes ten requests; without a cache, each computes a slow password hash.
        "auth_cache_ttl_seconds = 60\n",
        mode=0o600,
    )
    return {
        "MLFLOW_AUTH_CONFIG_PATH": str(settings.resolve()),
        "MLFLOW_AUTH_ADMIN_USERNAME": USER,
        "MLFLOW_AUTH_ADMIN_PASSWORD": ensure_secret(place / "password"),
        "MLFLOW_FLASK_SERVER_SECRET_KEY": ensure_secret(place / "session-key"),
    }
