"""The leaderboard as a page: served, which asks its server for changes, or whole in one file.

A served page contains the best runs, so that they are there with its first byte. It asks for the
others and loads plotly last. The file contains everything and fetches nothing.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from deta.platform.pages.render import PLOTLY, content_policy, render_page

SCRIPT = "leaderboard/page.js"
ADDRESS = re.compile(r"https?://[A-Za-z0-9.:\[\]-]+(?:/[A-Za-z0-9._~/-]*)?", re.ASCII)


def leaderboard_page(content: Mapping[str, Any], mlflow: str, *, is_live: bool = False) -> str:
    """Return the page.

    Args:
        content: of a `Board`.
        mlflow: address of MLflow's pages; no links if it is empty, no http(s) address, or contains
            a password.
        is_live: for a server, which sends `live_policy()`; else the page needs nothing else.

    Raises:
        RuntimeError: plotly is not installed, which the whole page needs.
    """
    mlflow = mlflow.rstrip("/")
    setup = {
        "content": content,
        "mlflow": mlflow if ADDRESS.fullmatch(mlflow) else "",
        "is_live": is_live,
    }
    scripts = [SCRIPT] if is_live else [SCRIPT, PLOTLY]
    return render_page(
        "leaderboard/page.html.j2",
        title="Leaderboard",
        styles=["leaderboard/page.css"],
        scripts=scripts,
        data={"setup": setup},
        policy=None if is_live else content_policy(scripts),
        is_live=is_live,
    )


def live_policy() -> str:
    """Return the served page's policy: of other scripts, only plotly's may run."""
    return content_policy([SCRIPT], is_served=True, has_served_scripts=True)
