"""Keep traffic on this machine off proxies.

A proxy that `HTTP_PROXY` names cannot reach the loopback of this machine. It would answer for the
services here, and read passwords and tokens that are meant for them.
"""

from __future__ import annotations

import os
from collections.abc import MutableMapping

# curl and urllib compare names and addresses, requests also networks.
LOOPBACK = ("localhost", "127.0.0.1", "::1", "127.0.0.0/8")


def bypass_proxies(env: MutableMapping[str, str] = os.environ) -> None:
    """Let HTTP clients of an environment connect to loopback directly; keep other exceptions.

    Clients read one of two variables, so both get the exceptions of both. Without a proxy in the
    environment nothing changes.
    """
    if not any(name.lower().endswith("_proxy") and name.lower() != "no_proxy" for name in env):
        return
    given = [env.get("no_proxy", ""), env.get("NO_PROXY", "")]
    names = [name.strip() for text in given for name in text.split(",")]
    value = ",".join(dict.fromkeys(name for name in [*names, *LOOPBACK] if name))
    env["no_proxy"] = env["NO_PROXY"] = value
