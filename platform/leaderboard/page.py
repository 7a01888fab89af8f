"""The leaderboard as a page: live, which polls its server for changes, or whole in one file.

The live page contains the best runs, so that they are there with its first byte. It polls for the
others and loads plotly last. The file contains everything and fetches nothing.
"""

from __future__ import annotations

import re
from typing import Any

from deta.platform.pages.render import PLOTLY, content_policy, render_page
from deta.platform.pages.theme import PALETTES

TITLE = "Leaderboard"
SCRIPT = "leaderboard/page.js"
ADDRESS = re.compile(r"https?://[A-Za-z0-9.:\[\]-]+(?:/[A-Za-z0-9._~/-]*)?", re.ASCII)


def live_page(content: dict[str, Any], mlflow: str, server_id: str) -> str:
    """Return the page that a server sends.

    Args:
        content: the first rows, as `Board.changes` returns them.
        mlflow: address of MLflow's pages; empty: no links.
        server_id: of the server's process: revisions of another one mean nothing.
    """
    setup = {"content": content, "mlflow": _address(mlflow), "of": server_id, "is_live": True}
    return _page(setup, [SCRIPT], None)


def whole_page(content: dict[str, Any], mlflow: str) -> str:
    """Return the page as one file, which needs nothing else.

    Raises:
        RuntimeError: plotly is not installed.
    """
    setup = {"content": content, "mlflow": _address(mlflow), "of": "", "is_live": False}
    scripts = [SCRIPT, PLOTLY]
    return _page(setup, scripts, content_policy(scripts))


def live_policy() -> str:
    """Return the live page's Content-Security-Policy, which the server sends as a header.

    The only script that the server has besides the page's own is plotly's.
    """
    return content_policy([SCRIPT], is_served=True, has_served_scripts=True)


def _page(setup: dict[str, Any], scripts: list[str], policy: str | None) -> str:
    return render_page(
        "leaderboard/page.html.j2",
        title=TITLE,
        styles=["leaderboard/page.css"],
        scripts=scripts,
        data={"setup": {**setup, "palettes": PALETTES}},
        policy=policy,
        is_live=setup["is_live"],
    )


def _address(mlflow: str) -> str:
    """Return where links lead; empty if it is no http(s) address or contains a password."""
    mlflow = mlflow.rstrip("/")
    return mlflow if ADDRESS.fullmatch(mlflow) else ""
