"""A page is complete and closed, and shows hostile names as the text that they are."""

from __future__ import annotations

import html
import json
import re
from pathlib import Path

import pytest

from deta.platform.pages.content import (
    Box,
    BulletList,
    Figure,
    ImageCard,
    ImageGrid,
    Jpeg,
    Link,
    Number,
    Paragraph,
    Section,
    Slide,
    SlideShow,
    Table,
    table,
)
from deta.platform.pages.figures import figure as plot_of
from deta.platform.pages.page import page, write_page
from deta.platform.pages.render import policy_hash
from deta.platform.pages.safe_text import figure_text
from tests.platform.pages.hostile import HOSTILE, PageReader


def names_table(cells: tuple[str, ...]) -> Table:
    return table("A table", ["name", Number("AP", "points", 1)], [[cell, 1.0] for cell in cells])


def figure(name: str, text: str) -> Figure:
    plot = plot_of([{"type": "scatter", "x": [1], "hovertext": [figure_text(text)]}], height=120)
    return Figure(f"{name} {text}", [plot, plot], text)


def images(text: str) -> list[ImageGrid | SlideShow | BulletList]:
    jpeg, boxes, key = (
        Jpeg(b"bytes", (4, 3)),
        [Box(0.1, 0.2, 0.3, 0.4, "right", text)],
        [("r", text)],
    )
    return [
        BulletList(text, [text]),
        ImageGrid([ImageCard(text, [text], jpeg, boxes), ImageCard(text, [], jpeg, [])], key),
        SlideShow("slides", [Slide(text, text, text, jpeg, [(text, boxes), (text, [])])], key),
    ]


def hostile_page() -> str:
    parts = [
        names_table(HOSTILE),
        *(figure(f"f{i}", text) for i, text in enumerate(HOSTILE)),
        *(part for text in HOSTILE for part in images(text)),
    ]
    sections = [Section("one", HOSTILE[0], parts)]
    return page(
        title=HOSTILE[4], summary=[Paragraph(HOSTILE[1])], sections=sections, footer=HOSTILE[2]
    )


def section_page(*parts: Table | Paragraph) -> str:
    return page(title="t", summary=[], sections=[Section("a", "A", parts)])


def test_hostile_names_stay_text():
    text = hostile_page()
    found = PageReader(text)
    kinds = [tag for tag, _ in found.elements]
    assert kinds.count("script") == 4  # the data, plotly, the figures' script and the slides'
    assert "img" not in kinds
    assert "svg" not in kinds
    for _, attributes in found.elements:
        assert not [name for name in attributes if name.startswith("on")]
        assert "src" not in attributes
        if "href" in attributes:
            assert (attributes["href"] or "").startswith("#")
    assert HOSTILE[0] in "".join(found.texts["th"])
    assert HOSTILE[2] in "".join(found.texts["footer"])
    body = text.split("<script", 1)[0]
    assert not re.search("[\u2028\u2029\u202e\x00\x1b]", body)
    text.encode()  # a lone surrogate would not pass


def test_the_policy_allows_exactly_the_scripts_of_the_page():
    found = PageReader(hostile_page())
    (policy,) = [
        a["content"] or ""
        for tag, a in found.elements
        if tag == "meta" and a.get("http-equiv") == "Content-Security-Policy"
    ]
    assert "default-src 'none'" in policy
    assert "unsafe-eval" not in policy
    _, *scripts = found.texts["script"]
    for script in scripts:
        assert policy_hash(script) in policy
    assert policy.count("sha256-") == len(scripts) == 3
    assert "unsafe" not in policy.split("script-src")[1].split(";")[0]
    assert "http" not in policy


def test_a_page_without_figures_runs_no_script():
    text = section_page()
    assert "<script" not in text
    assert "script-src 'none'" in html.unescape(text)
    assert len(text) < 20_000


def test_nothing_is_fetched():
    for tag, attributes in PageReader(hostile_page()).elements:
        assert not {"srcset", "data", "action"} & attributes.keys(), tag
        assert tag not in ("link", "iframe", "object", "embed", "form", "base")


def test_a_link_to_no_web_address_is_text():
    links = [Link("bad", "javascript:alert(1)"), Link("run", "https://a.example/?b&c")]
    cells = table("", ["x", "y"], [links])
    text = section_page(cells)
    assert "<span>bad</span>" in text
    assert "javascript:" not in text
    assert '<a href="https://a.example/?b&amp;c" rel="noopener noreferrer">run</a>' in text


def test_text_is_escaped_once():
    text = section_page(Paragraph("a < b & c"), Paragraph(Link("d", "#a"), "aside"))
    assert "<p>a &lt; b &amp; c</p>" in text
    assert '<p class="aside"><a href="#a" rel="noopener noreferrer">d</a></p>' in text


def test_each_plot_of_a_figure_has_its_element():
    text = page(title="t", summary=[], sections=[Section("a", "A", [figure("f", "<x>")])])
    data = json.loads(re.search(r'id="figures">(.*?)</script>', text)[1])  # type: ignore[index]
    assert list(data) == ["f-x-1", "f-x-2"]
    for name in data:
        assert f'id="{name}" class="plot"' in text


def test_two_parts_of_one_name_are_refused():
    section = Section("a", "A", [])
    with pytest.raises(ValueError, match="twice"):
        page(title="t", summary=[], sections=[section, section])


def test_tables_have_captions_and_headings_of_rows_and_columns(tmp_path: Path):
    part = Section("a", "A", [names_table(("x", "y"))])
    write_page(tmp_path / "p.html", title="t", summary=[], sections=[part])
    found = PageReader((tmp_path / "p.html").read_text(encoding="utf-8"))
    scopes = [a["scope"] for tag, a in found.elements if tag == "th"]
    assert scopes == ["col", "col", "row", "row"]
    assert found.texts["caption"] == ["A table"]
    assert [path.name for path in tmp_path.iterdir()] == ["p.html"]  # and no draft
