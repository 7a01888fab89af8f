"""Render a template as a self-contained page: one file that works offline and fetches nothing.

Templates, style sheets and scripts are files of their rooms, named from `platform/` on, such as
"pages/theme.css". Templates escape every text. Each page extends `pages/base.html.j2` and forbids
by its Content-Security-Policy every script but those it was rendered with.
"""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Mapping, Sequence
from functools import cache
from importlib import resources
from typing import Any

from jinja2 import Environment, FunctionLoader, StrictUndefined
from markupsafe import Markup

from deta.platform.pages.content import Link, Number
from deta.platform.pages.safe_text import (
    checked_address,
    is_web_address,
    json_text,
    without_unseen,
)

THEME = "pages/theme.css"
PLOTLY = "plotly.min.js"  # as a script of a page: plotly.js, whose source the page then contains
END_OF_ELEMENT = re.compile(r"</(script|style)|<!--|\x00", re.IGNORECASE)


@cache
def read_asset(path: str) -> str:
    """Return the text of a file of a room, such as "pages/theme.css"."""
    room, _, name = path.partition("/")
    return resources.files(f"deta.platform.{room}").joinpath(name).read_text(encoding="utf-8")


@cache
def plotly_source() -> str:
    """Return plotly.js as the installed Python package has it (MIT license, in its first lines)."""
    from plotly.offline import get_plotlyjs

    # A browser reads the text of a page with \n for every end of line, and hashes that.
    return get_plotlyjs().replace("\r\n", "\n").replace("\r", "\n")


def render(template: str, **values: Any) -> str:
    """Return the text of a template, which sees `values` and nothing else."""
    return _environment().get_template(template).render(**values)


def render_page(
    template: str,
    *,
    title: str,
    styles: Sequence[str] = (),
    scripts: Sequence[str] = (),
    data: Mapping[str, Any] | None = None,
    policy: str | None = None,
    **values: Any,
) -> str:
    """Return a complete page.

    Args:
        template: extends `pages/base.html.j2`.
        styles: style sheets beyond the theme.
        scripts: scripts and `PLOTLY`, in the order in which they run. All share one page, so each
            is in a function of its own, or the page's only one.
        data: what scripts read: JSON by the id of its element.
        policy: the Content-Security-Policy; None where the server sends it.
        values: for the template.

    Raises:
        RuntimeError: a script cannot be part of a page.
    """
    return render(
        template,
        title=title,
        style=_part_of_page(style_source(styles), ", ".join([THEME, *styles])),
        scripts=[_part_of_page(script_source(name), name) for name in scripts],
        data={name: json_text(value) for name, value in (data or {}).items()},
        policy=policy,
        **values,
    )


def content_policy(
    scripts: Sequence[str],
    *,
    styles: Sequence[str] | None = None,
    is_served: bool = False,
    has_served_scripts: bool = False,
) -> str:
    """Return the Content-Security-Policy of a page.

    Args:
        scripts: as for `render_page`; no others run.
        styles: as for `render_page`; no others apply. None allows all, as plotly needs, which sets
            styles while it draws.
        is_served: a server answers the page and its requests, and no other page may frame it.
        has_served_scripts: the page also loads scripts from its server.
    """
    allowed = [policy_hash(script_source(name)) for name in scripts]
    allowed += ["'self'"] * has_served_scripts
    style = "'unsafe-inline'" if styles is None else policy_hash(style_source(styles))
    script = " ".join(allowed) or "'none'"
    return (
        f"default-src 'none'; script-src {script}; "
        f"style-src {style}; img-src data: blob:; base-uri 'none'; form-action 'none'"
        + ("; connect-src 'self'; frame-ancestors 'none'" if is_served else "")
    )


def style_source(styles: Sequence[str]) -> str:
    """Return the text of a page's style element: the theme, then these style sheets."""
    return "".join(read_asset(name) for name in (THEME, *styles))


def script_source(name: str) -> str:
    """Return the text of a script, or of plotly.js."""
    return plotly_source() if name == PLOTLY else read_asset(name)


@cache
def policy_hash(text: str) -> str:
    """Return a script or style as a Content-Security-Policy names it, in quotation marks."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=FunctionLoader(read_asset),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=_without_unseen,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["checked_address"] = checked_address
    environment.tests["web_address"] = is_web_address
    environment.tests["link"] = lambda value: isinstance(value, Link)
    environment.tests["number_column"] = lambda value: isinstance(value, Number)
    return environment


def _without_unseen(value: Any) -> Any:
    """Clean every text that a template shows, before it is escaped."""
    is_text = isinstance(value, str) and not isinstance(value, Markup)
    return without_unseen(value) if is_text else value


def _part_of_page(text: str, name: str) -> Markup:
    if END_OF_ELEMENT.search(text):
        raise RuntimeError(f"{name} holds text that would end its element in the page")
    return Markup(text)
