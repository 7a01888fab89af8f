"""Where this code is installed, and how child processes import it."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from deta.platform.system.loopback import bypass_proxies

# The folder that holds deta/. Not resolved: in a checkout, deta/ consists of links.
PROJECT_ROOT = Path(__file__).absolute().parents[3]


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
