"""The parts of a page as plain data: paragraphs, lists, tables, figures, images.

The templates of this room turn them into HTML and escape every text, so a class may be called
`<script>`. A part names the macro of `parts.html.j2` that shows it.
"""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol

MAX_LETTERS_IN_A_LINE = 24  # a longer text of a table may wrap, but keeps some width


class Part(Protocol):
    """Anything that a section can show."""

    macro: ClassVar[str]


@dataclass(frozen=True)
class Link:
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


@dataclass(frozen=True, kw_only=True)
class Column:
    """One column of a table. Numbers are aligned right, so that their digits can be compared."""

    title: str
    unit: str = ""
    is_number: bool = False

    @property
    def css_class(self) -> str:
        return "number" if self.is_number else "word"


@dataclass(frozen=True, kw_only=True)
class Table:
    """Rows of text; the first cell of a row is its heading.

    Raises:
        ValueError: a row has more or fewer cells than the table has columns.
    """

    macro: ClassVar[str] = "table"

    caption: str
    columns: Sequence[Column]
    rows: Sequence[Sequence[str | Link]]

    def __post_init__(self) -> None:
        for number, row in enumerate(self.rows, start=1):
            if len(row) != len(self.columns):
                raise ValueError(
                    f"table {self.caption!r}: row {number} has {len(row)} cells, not "
                    f"{len(self.columns)}, one for each column"
                )

    def cell_class(self, row: int, column: int) -> str:
        """Return the CSS class of a cell."""
        kind, cell = self.columns[column].css_class, self.rows[row][column]
        is_long = kind == "word" and isinstance(cell, str) and len(cell) > MAX_LETTERS_IN_A_LINE
        return "word long" if is_long else kind


@dataclass(frozen=True, kw_only=True)
class Figure:
    """A plotly figure in its JSON form, and the same numbers as a table.

    A colour written "@name" is looked up in the page's palette, of which there is one for light
    and one for dark. In a narrow window `narrow` replaces `wide`, if it is not empty.
    """

    macro: ClassVar[str] = "figure"

    name: str  # unique on its page; letters, digits, hyphens
    title: str
    description: str  # what it shows, for those who do not see it
    wide: Mapping[str, Any]  # {"data": [...], "layout": {...}}
    narrow: Mapping[str, Any] = field(default_factory=dict)
    note: str = ""  # a sentence below: how to read it
    table: Table | None = None  # None where the section shows the same table beside the figure


@dataclass(frozen=True)
class Jpeg:
    """A JPEG that becomes part of the page."""

    content: bytes
    size_px: tuple[int, int]  # (width, height), so that nothing moves while the page loads

    @property
    def base64(self) -> str:
        return base64.b64encode(self.content).decode()


@dataclass(frozen=True)
class ImageCard:
    """One image, or two side by side, with a title and lines of text below."""

    title: str
    lines: Sequence[str]
    images: Sequence[Jpeg]

    @property
    def description(self) -> str:
        return f"{self.title}: {', '.join(self.lines)}"


@dataclass(frozen=True)
class ImageGrid:
    """Cards in as many columns as the window has room for."""

    macro: ClassVar[str] = "image_grid"

    cards: Sequence[ImageCard]
    is_small: bool = False


@dataclass(frozen=True, kw_only=True)
class Section:
    """A heading of the page and the parts below it."""

    name: str  # the fragment of its address; letters, digits, hyphens
    title: str
    parts: Sequence[Part]
