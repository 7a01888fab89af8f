"""A page is whole, closed, and says of hostile names only what they are called."""

from __future__ import annotations

import base64
import hashlib
import html
import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from deta.platform.pages.html import (
    Column,
    Figure,
    Link,
    Markup,
    Section,
    Table,
    element,
    figure_text,
    join,
    json_text,
    link,
    page,
    write_page,
)
from deta.platform.pages.theme import DARK, LIGHT

HOSTILE = (
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "' onmouseover='alert(1)",
    "line\u2028separator\u2029and \u202eright to left",
    "</title></style></noscript><svg onload=alert(1)>",
    "--><!--<script>",
    "]]>&lt;b&gt; &amp; $x$ %{y}",
    "\x00\x1b[31m\ud800",
)


class Reader(HTMLParser):
    """Elements with their attributes, and the text of each kind of element."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: dict[str, list[str]] = {}
        self._open: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in ("meta", "br", "link"):
            self._open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag, f"</{tag}> closes something else"

    def handle_data(self, data: str) -> None:
        if self._open:
            self.texts.setdefault(self._open[-1], []).append(data)


def table(cells: tuple[str, ...]) -> Table:
    return Table(
        caption="A table",
        columns=[Column(title="name"), Column(title="AP", unit="points", is_number=True)],
        rows=[[cell, "1.0"] for cell in cells],
    )


def figure(name: str, text: str) -> Figure:
    plot = {
        "data": [{"type": "scatter", "x": [1], "y": [2], "hovertext": [figure_text(text)]}],
        "layout": {"height": 120},
    }
    return Figure(name=name, title=text, description=text, wide=plot, note=text, table=None)


def hostile_page() -> str:
    sections = [
        Section(
            name="one",
            title=HOSTILE[0],
            parts=[table(HOSTILE), *(figure(f"f{i}", t) for i, t in enumerate(HOSTILE))],
        )
    ]
    return page(title=HOSTILE[4], lead=[element("p", HOSTILE[1])], sections=sections, foot="end")


def test_hostile_names_stay_text():
    text = hostile_page()
    found = Reader(text)
    kinds = [tag for tag, _ in found.elements]
    assert kinds.count("script") == 3  # the data, plotly, and the page's own
    assert "img" not in kinds
    assert "svg" not in kinds
    for _, attributes in found.elements:
        assert not [name for name in attributes if name.startswith("on")]
    assert HOSTILE[0] in "".join(found.texts["th"])
    body = text.split("<script", 1)[0]
    assert not re.search("[\u2028\u2029\u202e\x00\x1b]", body)
    text.encode()  # a lone surrogate would not pass


def test_data_cannot_leave_its_script():
    values = {"names": HOSTILE[:7], "not a number": [math.nan, math.inf, 1.5]}
    text = json_text(values)
    assert not re.search("[<>&\u2028\u2029]", text)
    assert json.loads(text) == {"names": list(HOSTILE[:7]), "not a number": [None, None, 1.5]}


def test_the_policy_allows_exactly_the_scripts_of_the_page():
    found = Reader(hostile_page())
    (policy,) = [
        a["content"] or ""
        for tag, a in found.elements
        if tag == "meta" and a.get("http-equiv") == "Content-Security-Policy"
    ]
    assert "default-src 'none'" in policy
    assert "unsafe-eval" not in policy
    _, plotly, own = found.texts["script"]
    for script in (plotly, own):
        digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
        assert f"'sha256-{digest}'" in policy
    assert policy.count("sha256-") == 2
    scripts = policy.split("script-src")[1].split(";")[0]
    assert "unsafe" not in scripts
    assert "http" not in policy


def test_a_page_without_figures_runs_no_script():
    text = page(title="t", lead=[], sections=[Section(name="a", title="A", parts=[])])
    assert "<script" not in text
    assert "script-src 'none'" in html.unescape(text)
    assert len(text) < 20_000


def test_nothing_is_fetched():
    for tag, attributes in Reader(hostile_page()).elements:
        assert not {"src", "srcset", "data", "action"} & attributes.keys(), tag
        assert tag not in ("link", "iframe", "object", "embed", "form", "base")


@pytest.mark.parametrize(
    "address",
    ["javascript:alert(1)", " https://a", "data:text/html,x", "//host", "https://a b", "file:///x"],
)
def test_only_web_addresses_become_links(address: str):
    assert link(address, "run") == "<span>run</span>"
    with pytest.raises(ValueError, match="no http"):
        element("a", "run", href=address)
    row = Table(caption="", columns=[Column(title="x")], rows=[[Link("run", address)]])
    text = page(title="t", lead=[], sections=[Section(name="a", title="A", parts=[row])])
    assert address not in text


def test_attributes_that_run_scripts_are_refused():
    for name in ("onclick", "onload", "src", "srcdoc"):
        with pytest.raises(ValueError, match="could run a script"):
            element("p", **{name: "x"})


def test_text_is_escaped_once_and_markup_is_left():
    inner = element("b", "a < b & c")
    assert element("p", inner, " > d") == "<p><b>a &lt; b &amp; c</b> &gt; d</p>"
    assert join(["<", Markup("<br>")], "&") == "&lt;&amp;<br>"


def test_names_of_figures_are_shown_as_they_are_written():
    assert figure_text("<b>x</b> & y\nz\u2028") == "&lt;b&gt;x&lt;/b&gt; &amp; y z\ufffd"


def test_two_parts_of_one_name_are_refused():
    section = Section(name="a", title="A", parts=[])
    with pytest.raises(ValueError, match="twice"):
        page(title="t", lead=[], sections=[section, section])


def test_tables_have_captions_and_headings_of_rows_and_columns(tmp_path: Path):
    part = Section(name="a", title="A", parts=[table(("x", "y"))])
    write_page(tmp_path / "p.html", title="t", lead=[], sections=[part])
    found = Reader((tmp_path / "p.html").read_text(encoding="utf-8"))
    scopes = [a["scope"] for tag, a in found.elements if tag == "th"]
    assert scopes == ["col", "col", "row", "row"]
    assert found.texts["caption"] == ["A table"]
    assert [path.name for path in tmp_path.iterdir()] == ["p.html"]  # and no draft


def luminance(color: str) -> float:
    parts = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("palette", [LIGHT, DARK], ids=["light", "dark"])
def test_colours_can_be_read_on_their_ground(palette: dict[str, str]):
    def contrast(a: str, b: str) -> float:
        low, high = sorted((luminance(palette[a]), luminance(palette[b])))
        return (high + 0.05) / (low + 0.05)

    assert contrast("ink", "paper") > 7
    assert contrast("muted", "paper") > 4.5  # WCAG 2.2, text
    for i in range(6):
        assert contrast(f"c{i}", "paper") > 4.5  # they are the colours of labels too
