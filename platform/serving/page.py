"""The page that shows what a model detects in an image that a person drops on it.

The page is one response. Its policy lets the browser run this script, call this service and do
nothing else.
"""

from __future__ import annotations

from functools import cache

from deta.platform.pages.render import content_policy, render_page

TITLE = "Objects in an image"
STYLES, SCRIPTS = ["serving/page.css"], ["serving/page.js"]


@cache
def serving_page() -> str:
    """Return the page, which is the same for every service and everybody."""
    return render_page("serving/page.html.j2", title=TITLE, styles=STYLES, scripts=SCRIPTS)


@cache
def page_policy() -> str:
    """Return the page's Content-Security-Policy, which the server sends as a header."""
    return content_policy(SCRIPTS, styles=STYLES, is_served=True)
