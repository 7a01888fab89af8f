"""The parts of a page as plain data: paragraphs, lists, tables, figures, images with boxes.

The templates of this room turn them into HTML and escape every text, so a class may be called
`<script>`. A part names the macro of `parts.html.j2` that shows it.
"""

from __future__ import annotations

import base64
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, NamedTuple, Protocol

from deta.platform.pages.number_format import MISSING, number_text

if TYPE_CHECKING:
    import plotly.graph_objects as go

MAX_LETTERS_IN_A_LINE = 24  # a longer text of a table may wrap, but keeps some width
TOP_SHARE = 0.08  # of the image: a box that begins above has its name within
RIGHT_SHARE = 0.62  # a box that begins beyond has its name at its right edge


class Part(Protocol):
    """Anything that a section can show."""

    macro: ClassVar[str]


class Link(NamedTuple):
    """Text that leads somewhere if the address is one of http(s); otherwise the text alone."""

    text: str
    address: str


@dataclass(frozen=True)
class Paragraph:
    """A paragraph of text."""

    macro: ClassVar[str] = "paragraph"

    content: str | Link
    style: str = ""  # a class of theme.css: verdict, facts or aside


@dataclass(frozen=True)
class BulletList:
    """A list of sentences below a small heading."""

    macro: ClassVar[str] = "bullet_list"

    title: str
    items: Sequence[str]


class Number(NamedTuple):
    """A column of numbers, aligned right, so that their digits can be compared."""

    title: str
    unit: str = ""
    decimals: int = 0


Text = str | Link
Cell = Text | float | None  # a number is written with the decimals of its column


@dataclass(frozen=True)
class Table:
    """Texts in rows; the first of a row is its heading. `table` makes one of numbers."""

    macro: ClassVar[str] = "table"

    caption: str
    columns: Sequence[str | Number]  # a text is the title of a column of text
    rows: Sequence[Sequence[Text]]

    def cell_class(self, column: int, cell: Text = "") -> str:
        """Return the CSS class of a cell."""
        if isinstance(self.columns[column], Number):
            return "number"
        is_long = isinstance(cell, str) and len(cell) > MAX_LETTERS_IN_A_LINE
        return "word long" if is_long else "word"


def table(caption: str, columns: Sequence[str | Number], rows: Sequence[Sequence[Cell]]) -> Table:
    """Return a table with its numbers written; a number that is None or NaN is missing.

    A column in which no row has anything is left out.

    Raises:
        ValueError: a row has more or fewer cells than the table has columns.
    """
    for place, row in enumerate(rows, start=1):
        if len(row) != len(columns):
            raise ValueError(
                f"table {caption!r}: row {place} has {len(row)} cells, not {len(columns)}, one "
                "for each column"
            )
    decimals = [one.decimals if isinstance(one, Number) else 0 for one in columns]
    written = [
        [cell if isinstance(cell, (str, Link)) else number_text(cell, decimals[i])
         for i, cell in enumerate(row)]
        for row in rows
    ]  # fmt: skip
    kept = [
        i for i in range(len(columns))
        if i == 0 or not rows or any(row[i] not in ("", MISSING) for row in written)
    ]  # fmt: skip
    return Table(caption, [columns[i] for i in kept], [[row[i] for i in kept] for row in written])


@dataclass(frozen=True)
class Figure:
    """One plot, or several side by side where the window has room, and their numbers as a table."""

    macro: ClassVar[str] = "figure"

    title: str  # unique on its page
    plots: Sequence[go.Figure]  # from figures.py
    note: str = ""  # a sentence below: how to read it
    table: Table | None = None  # None where the section shows the same table beside the figure

    @property
    def name(self) -> str:
        """Return the title as an id and a name of files: letters, digits, hyphens."""
        return re.sub(r"\W+", "-", self.title, flags=re.ASCII).strip("-")


@dataclass(frozen=True)
class Jpeg:
    """A JPEG that becomes part of the page."""

    content: bytes
    size_px: tuple[int, int]  # (width, height), so that nothing moves while the page loads

    @property
    def base64(self) -> str:
        return base64.b64encode(self.content).decode()


@dataclass(frozen=True)
class Box:
    """A box over an image, in shares of its width and height, and within it.

    It is an element of the page: sharp at any width, and read by a screen reader.
    """

    left: float
    top: float
    width: float
    height: float
    kind: str  # right, wrong or missed
    text: str
    is_strong: bool = False

    @property
    def css_class(self) -> str:
        names = ["box", self.kind] + ["strong"] * self.is_strong
        names += ["within"] * (self.top < TOP_SHARE) + ["to-left"] * (self.left > RIGHT_SHARE)
        return " ".join(names)

    @property
    def css_style(self) -> str:
        shares = {"left": self.left, "top": self.top, "width": self.width, "height": self.height}
        return ";".join(f"{name}:{share:.2%}" for name, share in shares.items())


@dataclass(frozen=True)
class ImageCard:
    """An image with boxes, a title and lines of text."""

    title: str
    lines: Sequence[str]
    jpeg: Jpeg
    boxes: Sequence[Box]


@dataclass(frozen=True)
class ImageGrid:
    """Cards in as many columns as the window has room for, with the key to their boxes."""

    macro: ClassVar[str] = "image_grid"

    cards: Sequence[ImageCard]
    key: Sequence[tuple[str, str]]  # kind of a box, or "strong", and what it means
    is_small: bool = False


@dataclass(frozen=True)
class Slide:
    """One image, shown once for each view side by side."""

    title: str
    note: str
    group: str  # a button shows the slides of one group alone
    jpeg: Jpeg
    views: Sequence[tuple[str, Sequence[Box]]]  # caption, and boxes over the image


@dataclass(frozen=True)
class SlideShow:
    """Slides to step through. Without JavaScript all are in a column."""

    macro: ClassVar[str] = "slide_show"

    name: str  # unique on its page; letters, digits, hyphens
    slides: Sequence[Slide]
    key: Sequence[tuple[str, str]]


@dataclass(frozen=True)
class Section:
    """A heading of the page and the parts below it."""

    name: str  # the fragment of its address; letters, digits, hyphens
    title: str
    parts: Sequence[Part]
