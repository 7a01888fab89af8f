"""Starts MLflow's own server, with its web pages and REST interface, in a safe configuration.

By default any web page can read it (names that begin like private addresses pass its check of
hosts), it has no password, and it starts eight helper processes that a tracking server does not
need. Here it answers to exact host names only and cannot be framed. Beyond loopback it requires a
password, which is generated once and stored in a file that only its owner can read.
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

PORT = 5000
USER = "admin"
START_WITHIN_S = 600.0  # it takes 10 s, or minutes if all cores are busy; an exit is seen at once
# A name or an address, and a port. No patterns, since MLflow would interpret them.
EXACT_HOST = re.compile(r"(?:[A-Za-z0-9][A-Za-z0-9.-]*|\[[0-9A-Fa-f:.]+\]):[0-9]{1,5}", re.ASCII)


@dataclass(frozen=True)
class MlflowServer:
    """A running server of MLflow."""

    address: str  # for browsers, such as http://127.0.0.1:5000
    inner: str  # the address for this machine
    service: ChildServer
    allowed_hosts: tuple[str, ...]
    password_file: Path | None  # of the user `admin`; None without a password

    def is_healthy(self) -> bool:
        return self.service.is_alive() and is_mlflow_at(self.inner)

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
) -> MlflowServer:
    """Start the server and wait until it answers.

    Args:
        uri: database with the runs, such as sqlite:////runs/mlflow.db.
        folder: for logs, new artifacts and, beyond loopback, the password.
        port: on loopback, another one is used if this one is taken.
        allowed_hosts: beyond loopback, the exact addresses that people enter in their browsers,
            such as "gpu1:5000". Needed if `host` is not such a name (0.0.0.0). A proxy must forward
            one of them.

    Raises:
        ValueError: an address that cannot be used, a pattern for a host, or a password file that
            others can read.
        ChildServerError: the server does not start.
    """
    if uri.startswith(("http://", "https://")):
        raise ValueError(f"{uri} is a running server already; open it in a browser")
    wanted, port = port, free_port(host, port)
    own = [f"127.0.0.1:{port}", f"localhost:{port}"]
    names = own if is_loopback(host) else check_hosts(host, port, allowed_hosts)
    if port != wanted and not is_loopback(host):
        raise ValueError(f"port {wanted} of {host} is taken; choose another one with --port")
    password_file = None
    env = {
        "MLFLOW_BACKEND_STORE_URI": uri,  # not in the command: it may hold a password
        "MLFLOW_ARTIFACTS_DESTINATION": str(folder.resolve() / "mlartifacts"),
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
        "MLFLOW_SERVER_DISABLE_SECURITY_MIDDLEWARE": "false",
        "MLFLOW_SERVER_CORS_ALLOWED_ORIGINS": "",
        "MLFLOW_SERVER_X_FRAME_OPTIONS": "DENY",
        "MLFLOW_ALLOW_PICKLE_DESERIALIZATION": "false",
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "MLFLOW_TRACKING_URI": "",  # the server is its own
        "FORWARDED_ALLOW_IPS": "",  # trust no X-Forwarded-For header
    }
    command = [sys.executable, "-m", "mlflow", "server", "--host", host, "--port", str(port)]
    command += ["--workers", "1"]
    if not is_loopback(host):
        password_file = ensure_password_file(folder)
        env |= _auth_settings(password_file.parent)
        command += ["--app-name", "basic-auth"]
    env["MLFLOW_SERVER_ALLOWED_HOSTS"] = ",".join(names)
    inner = f"http://{_reachable(host)}:{port}"
    service = start_child_server(
        "MLflow", command, folder / "mlflow-server.log", lambda: is_mlflow_at(inner),
        env=env, within_s=within_s,
    )  # fmt: skip
    return MlflowServer(f"http://{names[0]}", inner, service, tuple(names), password_file)


def check_hosts(host: str, port: int, allowed: Sequence[str]) -> list[str]:
    """Return the host names that a server beyond loopback answers to.

    Raises:
        ValueError: none is given and `host` is not a name, or a name is not exact.
    """
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
    if not path.exists():
        if (place / "users.db").exists():
            raise ValueError(
                f"{path}: is missing, and {place / 'users.db'} has only a hash of the password; "
                "restore it, or remove that file for a new password"
            )
        _write_secret(path, secrets.token_urlsafe(24))
    for one in (place, path):
        mode = stat.S_IMODE(one.stat().st_mode)
        if mode & 0o077 or one.stat().st_uid != os.getuid():
            raise ValueError(
                f"{one}: others can read it (mode {mode:04o}); chmod go-rwx it, and make a new "
                "password if somebody may have read it"
            )
    return path


def is_mlflow_at(address: str, timeout_s: float = 2.0) -> bool:
    """Return whether MLflow's server answers at an address."""
    # Not through a proxy of the environment, since it is this machine.
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(f"{address}/health", timeout=timeout_s) as response:
            return response.status == 200 and response.read(16).strip() == b"OK"
    except (OSError, urllib.error.URLError, ValueError):
        return False


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
    users = (place / "users.db").resolve()
    _write_secret(
        settings,
        "[mlflow]\n"
        "default_permission = NO_PERMISSIONS\n"
        f"database_uri = sqlite:///{users}\n"
        f"admin_username = {USER}\n"
        "authorization_function = mlflow.server.auth:authenticate_request_basic_auth\n"
        # A page of MLflow makes ten requests; without a cache, each computes a slow password hash.
        "auth_cache_ttl_seconds = 60\n",
    )
    key = place / "session-key"
    if not key.exists():
        _write_secret(key, secrets.token_hex(32))
    return {
        "MLFLOW_AUTH_CONFIG_PATH": str(settings.resolve()),
        "MLFLOW_AUTH_ADMIN_USERNAME": USER,
        "MLFLOW_AUTH_ADMIN_PASSWORD": (place / "password").read_text(encoding="ascii").strip(),
        "MLFLOW_FLASK_SERVER_SECRET_KEY": key.read_text(encoding="ascii").strip(),
    }


def _write_secret(path: Path, text: str) -> None:
    """Write a file that only its owner can read, from the first byte on."""
    write_atomic(path, text, mode=0o600)


def _reachable(host: str) -> str:
    """Return the host by which this machine reaches a server that listens on `host`."""
    if host in ("0.0.0.0", ""):
        return "127.0.0.1"
    if host == "::":
        return "[::1]"
    return f"[{host}]" if ":" in host else host
