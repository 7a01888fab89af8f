"""The leaderboard as a page: live, which asks its server for what is new, or whole in one file.

The live page carries the best runs, so that they are there with its first byte; the others come
in one answer behind it, and drawing code last. The file carries everything and asks nobody.
"""

from __future__ import annotations

import re
from typing import Any

from deta.platform.leaderboard.page_css import BOARD_STYLE
from deta.platform.leaderboard.page_js import BOARD_SCRIPT
from deta.platform.pages.html import (
    Markup,
    document,
    element,
    json_text,
    paragraph,
    plotly_source,
    policy_hash,
)
from deta.platform.pages.theme import STYLE

TITLE = "Leaderboard"
ADDRESS = re.compile(r"https?://[A-Za-z0-9.:\[\]-]+(?:/[A-Za-z0-9._~/-]*)?", re.ASCII)


def live_page(content: dict[str, Any], mlflow: str, of: str) -> str:
    """The page that a server answers with.

    Args:
        content: the first rows, as `Board.changes` gives them.
        mlflow: address of MLflow's pages; empty: no links.
        of: names the server's process: revisions of another one mean nothing.
    """
    source = Markup('<script id="plotly" src="plotly.js" defer></script>')
    setup = {"content": content, "mlflow": _address(mlflow), "of": of, "is_live": True}
    return _page(setup, [source], None)


def whole_page(content: dict[str, Any], mlflow: str) -> str:
    """The page in one file, which needs nothing else.

    Raises:
        RuntimeError: plotly is not installed.
    """
    plotly = plotly_source()
    setup = {"content": content, "mlflow": _address(mlflow), "of": "", "is_live": False}
    policy = (
        f"default-src 'none'; script-src {policy_hash(BOARD_SCRIPT)} {policy_hash(plotly)}; "
        "style-src 'unsafe-inline'; img-src data: blob:; base-uri 'none'; form-action 'none'"
    )
    return _page(setup, [element("script", Markup(plotly))], policy)


def live_policy() -> str:
    """The live page's Content-Security-Policy, for the answer's header.

    plotly sets styles while it draws, so these cannot be forbidden. The only script that the
    server has is plotly's.
    """
    return (
        f"default-src 'none'; script-src {policy_hash(BOARD_SCRIPT)} 'self'; "
        "style-src 'unsafe-inline'; connect-src 'self'; img-src data: blob:; base-uri 'none'; "
        "form-action 'none'; frame-ancestors 'none'"
    )


def _page(setup: dict[str, Any], scripts: list[Markup], policy: str | None) -> str:
    body = [
        element("a", "Skip to the runs", href="#runs", class_="skip"),
        element(
            "header",
            element("h1", TITLE),
            element("p", id="note", role="status"),
            element("p", id="error", role="alert", hidden=""),
        ),
        element("main", _runs(), _figure(), _champions()),
        element("script", json_text(setup), type="application/json", id="setup"),
        element("script", Markup(BOARD_SCRIPT)),
        *scripts,
    ]
    return document(TITLE, [STYLE, BOARD_STYLE], body, policy=policy, class_="board")


def _runs() -> Markup:
    return element(
        "section",
        element(
            "div",
            element(
                "label",
                "Find (press /)",
                element(
                    "input", type="search", id="text", autocomplete="off", spellcheck="false",
                    placeholder="name, recipe, data, model, commit",
                ),
            ),
            *(
                element("label", title, element("select", id=key))
                for key, title in (("recipe", "Recipe"), ("data", "Data set"), ("status", "Status"))
            ),
            element(
                "label",
                element("input", type="checkbox", id="registered"),
                "Registered only",
                class_="check",
            ),
            element("button", "Clear filters", type="button", id="clear", class_="check"),
            class_="filters",
            role="search",
        ),
        element("noscript", paragraph("This page needs JavaScript; MLflow's own has all runs.")),
        element(
            "div",
            element(
                "table",
                element("thead", element("tr", id="heads")),
                element("tbody", id="rows"),
            ),
            class_="scroll",
            tabindex="0",
            role="region",
            aria_label="Table: runs",
        ),
        element("p", id="empty", hidden=""),
        element("button", "Show more", type="button", id="more", hidden=""),
        paragraph(
            "AP is COCO's, 0 to 100, of a run's best checkpoint; while it runs, the last one. "
            "Intervals are over the evaluated images, or of the mean over runs that differ in the "
            "seed alone. Latency is shown where it was measured; images/s are of the whole "
            "evaluation, on the run's own machine.",
            class_="aside",
        ),
        id="runs",
        aria_label="Runs",
    )  # fmt: skip


def _figure() -> Markup:
    return element(
        "section",
        element("h2", "What AP costs", id="figure-heading"),
        element(
            "div",
            element("label", "Against", element("select", id="x")),
            class_="filters",
        ),
        element(
            "figure",
            element(
                "div",
                id="pareto",
                class_="plot",
                role="img",
                aria_label="AP against cost of the runs in the table above",
            ),
            element("figcaption", element("p", id="figure-note")),
        ),
        id="figure",
        aria_labelledby="figure-heading",
    )


def _champions() -> Markup:
    titles = ("Version", "When, UTC", "Decision", "Champion then", "Who", "Why", "Run")
    return element(
        "section",
        element("h2", "Champions", id="champions-heading"),
        element(
            "div",
            element(
                "table",
                element(
                    "caption",
                    "Every decision on a registered model, the newest first; jobs/promote.py "
                    "history has the figures and checks that none was changed.",
                ),
                element(
                    "thead",
                    element(
                        "tr", *(element("th", one, scope="col", class_="word") for one in titles)
                    ),
                ),
                element("tbody", id="promotions"),
            ),
            class_="scroll",
            tabindex="0",
            role="region",
            aria_label="Table: champions",
        ),
        id="champions",
        aria_labelledby="champions-heading",
        hidden="",
    )


def _address(mlflow: str) -> str:
    """Where links lead; none where the address is not one of http(s), or holds a password."""
    mlflow = mlflow.rstrip("/")
    return mlflow if ADDRESS.fullmatch(mlflow) else ""
