"""A report as one page: title, summary, and sections of text, tables, figures and images."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from deta.platform.pages.content import Figure, ImageGrid, Paragraph, Section, SlideShow
from deta.platform.pages.render import PLOTLY, content_policy, render_page
from deta.platform.system.atomic_write import write_atomic


def write_page(path: Path, **content: Any) -> None:
    """Write the page atomically. For `content`, see `page`."""
    write_atomic(path, page(**content))


def page(
    *, title: str, summary: Sequence[Paragraph], sections: Sequence[Section], footer: str = ""
) -> str:
    """Return the page. Text and tables need no JavaScript; figures do.

    Args:
        summary: what a reader must see who reads nothing else; shown below the title.

    Raises:
        ValueError: two sections or figures have one name.
    """
    parts = [part for section in sections for part in section.parts]
    figures = [part for part in parts if isinstance(part, Figure)]
    names = [section.name for section in sections] + [figure.name for figure in figures]
    if twice := {name for name in names if names.count(name) > 1}:
        raise ValueError(f"names are used twice on one page: {', '.join(sorted(twice))}")
    plots = {
        f"{figure.name}-{number}": plot.to_plotly_json()
        for figure in figures
        for number, plot in enumerate(figure.plots, start=1)
    }
    has_slides = any(isinstance(part, SlideShow) for part in parts)
    has_boxes = has_slides or any(isinstance(part, ImageGrid) for part in parts)
    scripts = [PLOTLY, "pages/figures.js"] * bool(figures) + ["pages/slideshow.js"] * has_slides
    return render_page(
        "pages/page.html.j2",
        title=title,
        styles=["pages/images.css"] if has_boxes else [],
        scripts=scripts,
        data={"figures": plots} if figures else {},
        policy=content_policy(scripts),
        summary=summary,
        sections=sections,
        footer=footer,
    )
