"""The token of Ray clusters: who does not know it cannot use the cluster.

Without a token, everybody who reaches a Ray cluster can run code on it as its owner: another user
of the machine, another machine in the network, or a web page in a browser on this machine. So
clusters that are started here always require a token and listen on loopback only. If a cluster that
is joined requires none, a warning is printed. The token is no encryption, and it has no roles.
"""

from __future__ import annotations

import logging
import os
import secrets
import sys
import urllib.error
import urllib.request
from contextlib import suppress
from pathlib import Path

from deta.platform.system.atomic_write import write_atomic

logger = logging.getLogger(__name__)

CHECK_WITHIN_S = 5.0
OPEN_CLUSTER = (
    "it requires NO TOKEN, so everybody who reaches it can run code on it, and read what runs send "
    "to it; start its nodes with RAY_AUTH_MODE=token and RAY_AUTH_TOKEN_PATH (docs/SAFETY.md)"
)


class OpenClusterError(RuntimeError):
    """A cluster is open to everybody, or would be."""


def starts_own_cluster() -> bool:
    """Return whether this process starts its own cluster instead of joining one."""
    return os.environ.get("RAY_ADDRESS", "") in ("", "local")


def configure_own_cluster() -> None:
    """Set the variables that Ray reads when it is imported: require a token, use loopback."""
    # Ray's default depends on whether a token exists in this home directory.
    os.environ.setdefault("RAY_AUTH_MODE", "token")
    # In spite of its name this also works on Linux: with 0, the address of a node is 127.0.0.1, and
    # all of its services listen there. Otherwise 11 of 13 sockets are open to the network, and the
    # ports for metrics require no token.
    os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
    # The interface of torch's workers. The default is the one that the host name resolves to.
    if sys.platform == "linux":
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")


def ensure_private_token() -> None:
    """Ensure that a token exists that only its owner can read, for a cluster started here.

    If no variable names a token, it is in Ray's default file, where all of Ray's commands find it.
    Once that file exists, a plain `ray start --head` requires a token too.

    Raises:
        OpenClusterError: authentication is disabled, others could read the token, or it has no
            place since HOME cannot be written.
    """
    mode = os.environ.get("RAY_AUTH_MODE")
    if mode != "token":
        raise OpenClusterError(
            f"RAY_AUTH_MODE={mode}: a cluster of this machine without a token lets every account "
            "and every web page on it run code; unset the variable, or set it to token"
        )
    if os.environ.get("RAY_AUTH_TOKEN"):
        return
    if named := os.environ.get("RAY_AUTH_TOKEN_PATH"):
        _refuse_wide(Path(named).expanduser())
        return
    path = _default_path()
    if not path.exists():
        # Atomically: another process may read or create it at the same time.
        unfinished = path.with_name(f".{path.name}.{os.getpid()}")
        write_atomic(unfinished, secrets.token_hex(32), mode=0o600)
        with suppress(FileExistsError):
            os.link(unfinished, path)
        unfinished.unlink()
    elif path.stat().st_mode & 0o077:  # as Ray writes it
        logger.warning(
            "%s could be read by others until now; if others have accounts on this machine, stop "
            "your Ray clusters and delete it: a new one will be created",
            path,
        )
        path.chmod(0o600)
    _refuse_wide(path)


def require_token_folder() -> None:
    """Refuse a home in which no token can be kept, unless a variable names one, before any work.

    Raises:
        OpenClusterError: names HOME.
    """
    if not (os.environ.get("RAY_AUTH_TOKEN") or os.environ.get("RAY_AUTH_TOKEN_PATH")):
        _default_path()


def _default_path() -> Path:
    """Return where Ray looks for a token that no variable names; its folder exists then."""
    advice = "set HOME to a folder that can be written, or RAY_AUTH_TOKEN_PATH to a private file"
    try:
        path = Path.home() / ".ray" / "auth_token"
    except RuntimeError as error:
        raise OpenClusterError(f"the home of this user is unknown; {advice}") from error
    try:
        path.parent.mkdir(mode=0o700, exist_ok=True)
        path.parent.chmod(0o700)
    except OSError as error:
        raise OpenClusterError(
            f"{path.parent}: no place for the token of the cluster ({error.strerror}); {advice}"
        ) from error
    return path


def _refuse_wide(path: Path) -> None:
    try:
        status = path.stat()
    except OSError as error:
        raise OpenClusterError(f"{path}: the token cannot be read: {error.strerror}") from error
    if status.st_mode & 0o077 or status.st_uid != os.getuid():
        mode = f"mode {status.st_mode & 0o777:o}"
        raise OpenClusterError(
            f"{path}: others can read the token ({mode}), or it is theirs; chmod 600 your own"
        )


def is_open(dashboard: str) -> bool:
    """Return whether a cluster's dashboard, HOST:PORT or a URL, accepts jobs without a token.

    The result is also False if the dashboard does not answer.
    """
    address = dashboard if "://" in dashboard else f"http://{dashboard}"
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with direct.open(f"{address}/api/jobs/", timeout=CHECK_WITHIN_S) as answer:
            return bool(answer.status == 200)
    except (OSError, ValueError):  # HTTPError is an OSError: 401 or 403
        return False
