"""The page on which a picture is dropped to see what a model finds in it.

One answer holds it all, and its policy lets the browser run this script, call this service and
nothing else. What comes from a model or a file is set as text, never as HTML.
"""

from __future__ import annotations

import base64
import hashlib
from functools import cache

from deta.platform.page import Markup, element, join, paragraph
from deta.platform.page_look import STYLE
from deta.platform.serving_page_look import PAGE_SCRIPT, PAGE_STYLE

TITLE = "Objects in a picture"


@cache
def serving_page() -> str:
    """The whole page, the same for every service and everybody."""
    return join(
        [
            Markup("<!DOCTYPE html>\n"),
            element(
                "html",
                element(
                    "head",
                    element("meta", charset="utf-8"),
                    element(
                        "meta", name_="viewport", content="width=device-width, initial-scale=1"
                    ),
                    element("meta", name_="color-scheme", content="light dark"),
                    element("title", TITLE),
                    element("style", Markup(STYLE)),
                    element("style", Markup(PAGE_STYLE)),
                ),
                element(
                    "body",
                    element("header", element("h1", TITLE), element("p", "…", id="model")),
                    element("main", *_main()),
                    element("script", Markup(PAGE_SCRIPT)),
                    class_="serving",
                ),
                lang="en",
            ),
            Markup("\n"),
        ]
    )


@cache
def page_policy() -> str:
    """The page's Content-Security-Policy, for the answer's header."""
    styles = " ".join(_hash(style) for style in (STYLE, PAGE_STYLE))
    return (
        f"default-src 'none'; script-src {_hash(PAGE_SCRIPT)}; style-src {styles}; "
        "connect-src 'self'; img-src blob: data:; base-uri 'none'; form-action 'none'; "
        "frame-ancestors 'none'"
    )


def _main() -> list[Markup]:
    return [
        element("noscript", paragraph("This page needs JavaScript; programs use /v1/detect.")),
        element(
            "div",
            element("label", "Token of this service", for_="token"),
            element("input", type="password", id="token", autocomplete="off", spellcheck="false"),
            element("button", "Use it", type="button", id="use-token"),
            id="token-row",
            hidden="",
        ),
        # The whole area is the label of the file field, which stays in reach of the keyboard.
        element(
            "div",
            element(
                "label",
                element("strong", "Choose a picture"),
                element("span", " or drop or paste it here. JPEG or PNG."),
                for_="file",
            ),
            element("input", type="file", id="file", accept="image/jpeg,image/png,.jpg,.jpeg,.png"),
            id="drop",
        ),
        element("p", id="error", role="alert", hidden=""),
        element("p", id="status", role="status"),
        element(
            "div",
            element("figure", id="shown"),
            element(
                "div",
                element(
                    "div",
                    element("label", "Show from score ", for_="score"),
                    element("output", "0.40", id="score-value", for_="score"),
                    element(
                        "input", type="range", id="score", min="0.01", max="1", step="0.01",
                        value="0.4",
                    ),
                    class_="slider",
                ),
                element("ol", id="found"),
                element("p", id="timing", class_="aside"),
            ),
            id="result",
            hidden="",
        ),
    ]  # fmt: skip


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
