"""The page on which a picture is dropped to see what a model finds in it.

One answer holds it all, and its policy lets the browser run this script, call this service and
nothing else. What comes from a model or a file is set as text, never as HTML.
"""

from __future__ import annotations

from functools import cache

from deta.platform.pages.html import Markup, document, element, paragraph, policy_hash
from deta.platform.pages.theme import STYLE
from deta.platform.serving.page_assets import PAGE_SCRIPT, PAGE_STYLE

TITLE = "Objects in a picture"
STYLES = (STYLE, PAGE_STYLE)


@cache
def serving_page() -> str:
    """The whole page, the same for every service and everybody."""
    body = [
        element("header", element("h1", TITLE), element("p", "…", id="model")),
        element("main", *_main()),
        element("script", Markup(PAGE_SCRIPT)),
    ]
    return document(TITLE, STYLES, body, class_="serving")


@cache
def page_policy() -> str:
    """The page's Content-Security-Policy, for the answer's header."""
    return (
        f"default-src 'none'; script-src {policy_hash(PAGE_SCRIPT)}; "
        f"style-src {policy_hash(''.join(STYLES))}; "
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
