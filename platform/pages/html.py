"""A web page in one file: text, tables and plotly figures, with nothing fetched from anywhere.

Names in it come from people: a class may be called `<script>`. Whatever is not `Markup` is escaped,
figures travel as JSON text, and the page forbids by its own Content-Security-Policy every script
but its two, and every request. Text and tables need no JavaScript; figures do, and each comes with
the table of its numbers.
"""

from __future__ import annotations

import base64
import hashlib
import html
import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

from deta.platform.pages.theme import SCRIPT, STYLE

# Characters that have no picture, or that turn the text around them: shown as a replacement.
UNSEEN = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200b-\u200f\u2028-\u202e\u2060-\u206f\ud800-\udfff\ufeff]"
)
LINK = re.compile(r"(https?://[^\s]+|#[A-Za-z][\w-]*)", re.ASCII)
VOID = {"meta", "br", "col", "link", "input"}


class Markup(str):
    """HTML that is safe as it stands. Plain text becomes Markup in `element` only."""

    __slots__ = ()


@dataclass(frozen=True, kw_only=True)
class Column:
    """One column of a table. Numbers stand right, so that their digits can be compared."""

    title: str
    unit: str = ""
    is_number: bool = False


@dataclass(frozen=True)
class Link:
    """Text in a table that leads somewhere, if the address is http(s)."""

    text: str
    address: str


@dataclass(frozen=True, kw_only=True)
class Table:
    """Rows of text; the first cell of a row is its heading."""

    caption: str
    columns: Sequence[Column]
    rows: Sequence[Sequence[str | Link]]


@dataclass(frozen=True, kw_only=True)
class Figure:
    """A drawing for plotly, in its JSON form, and the same numbers as a table.

    A colour written "@name" is looked up in the page's palette, of which there is one for light
    and one for dark. In a narrow window `narrow` stands in for `wide`, if it is not empty.
    """

    name: str  # unique on its page; letters, digits, hyphens
    title: str
    description: str  # what it shows, for those who do not see it
    wide: Mapping[str, Any]  # {"data": [...], "layout": {...}}
    narrow: Mapping[str, Any] = field(default_factory=dict)
    note: str = ""  # a sentence below: how to read it
    table: Table | None = None  # None where the same table stands beside the figure anyway


@dataclass(frozen=True, kw_only=True)
class Section:
    """A heading of the page and what stands below it."""

    name: str  # the fragment of its address; letters, digits, hyphens
    title: str
    parts: Sequence[Markup | Table | Figure]


def element(name: str, *content: str, **attributes: str) -> Markup:
    """An HTML element. Content that is not Markup is escaped; `class_` and `for_` lose their bar.

    Raises:
        ValueError: a link that is neither http(s) nor a fragment of this page, or an attribute
            that would run a script.
    """
    parts = [f"<{name}"]
    for key, value in attributes.items():
        key = key.rstrip("_").replace("_", "-")
        if key.startswith("on") or key in ("src", "srcdoc", "action", "formaction"):
            raise ValueError(f"<{name}> may not have the attribute {key!r}: it could run a script")
        if key == "href" and not LINK.fullmatch(value):
            raise ValueError(f"{value!r} is no http(s) address; write it as text, or use link()")
        parts.append(f' {key}="{_escaped(value)}"')
    parts.append(">")
    if name in VOID:
        return Markup("".join(parts))
    parts += [item if isinstance(item, Markup) else _escaped(item) for item in content]
    parts.append(f"</{name}>")
    return Markup("".join(parts))


def join(parts: Iterable[str], between: str = "") -> Markup:
    """Parts one behind the other; plain text among them is escaped."""
    return Markup(
        _escaped(between).join(p if isinstance(p, Markup) else _escaped(p) for p in parts)
    )


def paragraph(*content: str, class_: str = "") -> Markup:
    return element("p", *content, class_=class_) if class_ else element("p", *content)


def link(address: str, text: str) -> Markup:
    """A link where the address is http(s); else the text alone."""
    if not LINK.fullmatch(address):
        return element("span", text)
    return element("a", text, href=address, rel="noopener noreferrer")


def picture(jpeg: bytes, size_px: tuple[int, int], shows: str) -> Markup:
    """A JPEG that is part of the page, no wider than the page.

    Args:
        size_px: (width, height), so that nothing moves while the page is read.
        shows: for those who do not see it.
    """
    data = base64.b64encode(jpeg).decode()
    width, height = size_px
    return Markup(
        f'<img src="data:image/jpeg;base64,{data}" width="{width}" height="{height}" '
        f'alt="{_escaped(shows)}" loading="lazy">'
    )


def visible(text: str) -> str:
    """Text on one line, in which everything can be seen; for places outside HTML also."""
    return UNSEEN.sub("\ufffd", text.replace("\n", " ").replace("\r", " "))


def figure_text(text: str) -> str:
    """A name for plotly, which reads a few HTML tags in labels: shown as it is written."""
    return html.escape(visible(text), quote=False)


def json_text(value: Any) -> Markup:
    """JSON that can stand within <script type="application/json">. Not-a-number becomes null."""
    text = json.dumps(_finite(value), ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    for character in "<>&":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return Markup(text)


def write_page(
    path: Path,
    *,
    title: str,
    lead: Sequence[Markup],
    sections: Sequence[Section],
    foot: str = "",
    styles: Sequence[str] = (),
    scripts: Sequence[str] = (),
) -> None:
    """Write the page, whole or not at all; see `page`."""
    text = page(
        title=title, lead=lead, sections=sections, foot=foot, styles=styles, scripts=scripts
    )
    draft = path.with_name(f".{path.name}.draft")
    draft.write_text(text, encoding="utf-8")
    draft.replace(path)


def page(
    *,
    title: str,
    lead: Sequence[Markup],
    sections: Sequence[Section],
    foot: str = "",
    styles: Sequence[str] = (),
    scripts: Sequence[str] = (),
) -> Markup:
    """The whole page.

    Args:
        lead: what a reader must see who reads nothing else; stands below the title.
        styles, scripts: further ones of this page, of our own text; a script runs in a function
            of its own, since all share one page.

    Raises:
        ValueError: two sections or figures have one name.
        RuntimeError: there are figures, and plotly is not installed.
    """
    figures = [part for section in sections for part in section.parts if isinstance(part, Figure)]
    names = [section.name for section in sections] + [figure.name for figure in figures]
    if twice := {name for name in names if names.count(name) > 1}:
        raise ValueError(f"names are used twice on one page: {', '.join(sorted(twice))}")
    scripts = [*([plotly_source(), SCRIPT] if figures else []), *scripts]
    data = {figure.name: {"wide": figure.wide, "narrow": figure.narrow} for figure in figures}
    body = [
        element("a", "Skip to the text", href="#text", class_="skip"),
        element("header", element("h1", title), *lead),
        _contents(sections),
        element(
            "main",
            *(_section(section) for section in sections),
            *([element("footer", foot)] if foot else []),
            id="text",
        ),
    ]
    if figures:
        body.append(element("script", json_text(data), type="application/json", id="figures"))
    body += [element("script", Markup(script)) for script in scripts]
    return document(title, [STYLE, *styles], body, policy=_policy(scripts))


def document(
    title: str,
    styles: Sequence[str],
    body: Sequence[Markup],
    *,
    policy: str | None = None,
    **attributes: str,
) -> Markup:
    """What every page of ours is around its content.

    Args:
        styles: of our own text; they become one element.
        policy: the Content-Security-Policy; none where the server sends it.
        attributes: of the body.
    """
    by_policy = element("meta", http_equiv="Content-Security-Policy", content=policy or "")
    head = [
        element("meta", charset="utf-8"),
        *([by_policy] if policy else []),
        element("meta", name_="viewport", content="width=device-width, initial-scale=1"),
        element("meta", name_="color-scheme", content="light dark"),
        element("meta", name_="referrer", content="no-referrer"),
        element("title", title),
        element("style", Markup("".join(styles))),
    ]
    html = element("html", element("head", *head), element("body", *body, **attributes), lang="en")
    return join([Markup("<!DOCTYPE html>\n"), html, Markup("\n")])


@cache
def plotly_source() -> str:
    """plotly.js as the installed Python package carries it (MIT license, in its first lines).

    Raises:
        RuntimeError: plotly is not installed, or its script cannot stand within a page.
    """
    try:
        path = metadata.distribution("plotly").locate_file("plotly/package_data/plotly.min.js")
    except metadata.PackageNotFoundError as error:
        raise RuntimeError(
            "figures need plotly: pip install 'deta-platform[report]', or write the summary alone"
        ) from error
    # A browser reads the text of a page with \n for every end of line, and hashes that.
    text = Path(str(path)).read_text(encoding="utf-8").replace("\r\n", "\n").replace("\r", "\n")
    if re.search(r"</script|<!--|\x00", text, re.IGNORECASE):
        raise RuntimeError(f"{path} holds text that would end the script; take another plotly")
    return text


def _escaped(text: str) -> str:
    return html.escape(UNSEEN.sub("\ufffd", text.replace("\r", " ")), quote=True)


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return value


def _policy(scripts: Sequence[str]) -> str:
    """Nothing is fetched; only these scripts run. plotly sets its styles while it draws."""
    hashes = " ".join(policy_hash(script) for script in scripts) or "'none'"
    return (
        f"default-src 'none'; script-src {hashes}; style-src 'unsafe-inline'; "
        "img-src data: blob:; base-uri 'none'; form-action 'none'"
    )


@cache
def policy_hash(text: str) -> str:
    """How a Content-Security-Policy names a script or a style, with its quotation marks."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def _contents(sections: Sequence[Section]) -> Markup:
    items = [
        element("li", element("a", section.title, href=f"#{section.name}")) for section in sections
    ]
    return element("nav", element("ol", *items), aria_label="Contents")


def _section(section: Section) -> Markup:
    heading = f"{section.name}-heading"
    return element(
        "section",
        element("h2", section.title, id=heading),
        *(_part(part) for part in section.parts),
        id=section.name,
        aria_labelledby=heading,
    )


def _part(part: Markup | Table | Figure) -> Markup:
    if isinstance(part, Table):
        return table_markup(part)
    return _figure(part) if isinstance(part, Figure) else part


def table_markup(table: Table) -> Markup:
    """A table that scrolls within itself, also by keyboard, where the window is narrow."""
    number = ["number" if column.is_number else "word" for column in table.columns]
    head = [
        element(
            "th",
            column.title,
            *([element("span", column.unit, class_="unit")] if column.unit else []),
            scope="col",
            class_=kind,
        )
        for column, kind in zip(table.columns, number, strict=True)
    ]
    rows = [
        element(
            "tr",
            element("th", _cell(row[0]), scope="row", class_=number[0]),
            *(
                element("td", _cell(cell), class_=_kind(cell, kind))
                for cell, kind in zip(row[1:], number[1:], strict=True)
            ),
        )
        for row in table.rows
    ]
    return element(
        "div",
        element(
            "table",
            element("caption", table.caption),
            element("thead", element("tr", *head)),
            element("tbody", *rows),
        ),
        class_="scroll",
        tabindex="0",
        role="region",
        aria_label=f"Table: {table.caption}",
    )


def _kind(cell: str | Link, kind: str) -> str:
    """Sentences keep some width where the window is narrow."""
    return "word long" if kind == "word" and isinstance(cell, str) and len(cell) > 24 else kind


def _cell(cell: str | Link) -> str:
    return link(cell.address, cell.text) if isinstance(cell, Link) else cell


def _figure(figure: Figure) -> Markup:
    note = [paragraph(figure.note)] if figure.note else []
    where = "in the table of this section" if figure.table is None else "in the table below it"
    numbers = (
        []
        if figure.table is None
        else [element("details", element("summary", "The numbers"), table_markup(figure.table))]
    )
    return element(
        "figure",
        element("h3", figure.title),
        element("div", id=figure.name, class_="plot", role="img", aria_label=figure.description),
        element("noscript", paragraph(f"This figure needs JavaScript; its numbers are {where}.")),
        element("figcaption", *note, *numbers),
    )
