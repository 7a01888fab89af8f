"""Who may use a Ray cluster: whoever knows its token, and nobody else.

Whoever reaches a Ray cluster without a token can run code on it as the one who started it: another
account of the machine, another machine of the network, or a web page in a browser of this machine.
So clusters that are started here always ask for a token and listen on loopback alone; and of one
that is joined, it is said if it asks for none. The token is no encryption, and it has no roles.
"""

from __future__ import annotations

import logging
import os
import secrets
import sys
import urllib.error
import urllib.request
from pathlib import Path

logger = logging.getLogger(__name__)

LOOK_WITHIN_S = 5.0
OPEN_CLUSTER = (
    "it asks for NO TOKEN, so whoever reaches it can run code on it, and read what runs pass to "
    "it; start its nodes with RAY_AUTH_MODE=token and RAY_AUTH_TOKEN_PATH (docs/SAFETY.md)"
)


class OpenClusterError(RuntimeError):
    """A cluster would be, or is, open to everybody."""


def starts_a_cluster() -> bool:
    """Whether this process is to start a cluster of its own, rather than to join one."""
    return os.environ.get("RAY_ADDRESS", "") in ("", "local")


def set_rules_of_own_cluster() -> None:
    """The variables that Ray reads when it is imported: ask for a token, listen on loopback."""
    # By default it depends on what ran in this home before whether Ray asks for one.
    os.environ.setdefault("RAY_AUTH_MODE", "token")
    # Not only there, in spite of its name: with 0, the address of a node is 127.0.0.1, and then all
    # of its services listen there. Otherwise 11 of 13 sockets are open to the network, and the
    # ports of its metrics ask for no token.
    os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
    # How torch's workers talk. By default it is where the name of this machine leads to.
    if sys.platform == "linux":
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")


def make_private_token() -> None:
    """See to it that there is a token which only its owner can read, for a cluster started here.

    Where no variable names one, it is Ray's usual file, which all of Ray's commands find; and where
    that exists, a plain `ray start --head` asks for a token, too.

    Raises:
        OpenClusterError: authentication is switched off, or others could read the token.
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
    path = Path.home() / ".ray" / "auth_token"
    path.parent.mkdir(mode=0o700, exist_ok=True)
    path.parent.chmod(0o700)
    if not path.exists():
        _write_new(path)
    elif path.stat().st_mode & 0o077:  # as Ray writes it
        logger.warning(
            "%s could be read by others until now; if others have accounts on this machine, end "
            "your Ray clusters and delete it: a new one is made",
            path,
        )
        path.chmod(0o600)
    _refuse_wide(path)


def _write_new(path: Path) -> None:
    """Complete or not at all: another process may be about to read it, or to make it."""
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    descriptor = os.open(unfinished, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        with os.fdopen(descriptor, "w", encoding="ascii") as file:
            file.write(secrets.token_hex(32))
        os.link(unfinished, path)
    except FileExistsError:
        return
    finally:
        unfinished.unlink()


def _refuse_wide(path: Path) -> None:
    try:
        status = path.stat()
    except OSError as error:
        raise OpenClusterError(f"{path}: the token cannot be read: {error.strerror}") from error
    if status.st_mode & 0o077:
        raise OpenClusterError(
            f"{path}: others can read the token (mode {status.st_mode & 0o777:o}); chmod 600 it, "
            "or better write a new one"
        )
    if status.st_uid != os.getuid():
        raise OpenClusterError(f"{path}: the token belongs to somebody else; use one of your own")


def is_open(dashboard: str) -> bool:
    """Whether the dashboard of a cluster, HOST:PORT or an address, takes jobs without a token.

    False, too, where it does not answer from here.
    """
    address = dashboard if "://" in dashboard else f"http://{dashboard}"
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with direct.open(f"{address}/api/jobs/", timeout=LOOK_WITHIN_S) as answer:
            return answer.status == 200
    except (OSError, ValueError):  # HTTPError is an OSError: 401 or 403
        return False
