"""Where this code is installed, and the environment in which child processes import it."""

from __future__ import annotations

import os
from collections.abc import Mapping, MutableMapping
from pathlib import Path

# The folder that holds deta/. Not resolved: in a checkout, deta/ consists of links.
PROJECT_ROOT = Path(__file__).absolute().parents[3]
# curl and urllib compare names and addresses, requests also networks.
LOOPBACK = ("localhost", "127.0.0.1", "::1", "127.0.0.0/8")


def child_environment(
    changes: Mapping[str, str] | None = None, base: Mapping[str, str] | None = None
) -> dict[str, str]:
    """Return the environment of a child process that imports the same code.

    Args:
        changes: variables to add or replace.
        base: default: the environment of this process.
    """
    env = dict(os.environ if base is None else base)
    env["PYTHONPATH"] = os.pathsep.join(filter(None, [str(PROJECT_ROOT), env.get("PYTHONPATH")]))
    env |= dict(changes or {})
    bypass_proxies(env)
    return env


def bypass_proxies(env: MutableMapping[str, str] = os.environ) -> None:
    """Let HTTP clients of an environment connect to loopback directly; keep other exceptions.

    A proxy that `HTTP_PROXY` names cannot reach the loopback of this machine. It would answer for
    the services here, and read passwords and tokens that are meant for them.

    Clients read one of two variables, so both get the exceptions of both. Without a proxy in the
    environment nothing changes.
    """
    if not any(name.lower().endswith("_proxy") and name.lower() != "no_proxy" for name in env):
        return
    given = [env.get("no_proxy", ""), env.get("NO_PROXY", "")]
    names = [name.strip() for text in given for name in text.split(",")]
    value = ",".join(dict.fromkeys(name for name in [*names, *LOOPBACK] if name))
    env["no_proxy"] = env["NO_PROXY"] = value
