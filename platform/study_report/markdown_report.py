"""Write the text and tables of a page as GitHub-flavoured Markdown, without its figures."""

from __future__ import annotations

import re
from collections.abc import Sequence

from deta.platform.pages.content import (
    BulletList,
    Link,
    Number,
    Paragraph,
    Part,
    Section,
    Table,
    Text,
)
from deta.platform.pages.safe_text import is_web_address, visible

# Characters that Markdown or HTML would interpret; a pipe would end the cell of a table.
SPECIAL = re.compile(r"([\\`*_{}\[\]<>#|~&!$@])")


def markdown_report(title: str, summary: Sequence[Paragraph], sections: Sequence[Section]) -> str:
    """Return the same content as `page`."""
    first, *others = [_text(paragraph.content) for paragraph in summary]
    blocks = [f"# {escape_markdown(title)}", f"**{first}**", *others]
    for section in sections:
        shown = [block for part in section.parts if (block := _block(part))]
        blocks += [f"## {escape_markdown(section.title)}", *shown] if shown else []
    return "\n\n".join(blocks) + "\n"


def escape_markdown(text: str) -> str:
    """Return text that Markdown shows as it is written, on one line."""
    return SPECIAL.sub(r"\\\1", visible(text)).strip()


def _block(part: Part) -> str:
    if isinstance(part, Paragraph) and part.style != "aside":
        return _text(part.content)
    if isinstance(part, BulletList):
        return "\n".join(f"- {escape_markdown(item)}" for item in part.items)
    if not isinstance(part, Table):
        return ""
    titles = [
        escape_markdown(f"{c.title}, {c.unit}" if c.unit else c.title)
        if isinstance(c, Number) else escape_markdown(c)
        for c in part.columns
    ]  # fmt: skip
    rules = ["---:" if isinstance(column, Number) else "---" for column in part.columns]
    lines = [titles, rules, *([_text(cell) for cell in row] for row in part.rows)]
    rows = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    return f"{escape_markdown(part.caption)}\n\n{rows}"


def _text(text: Text) -> str:
    if not isinstance(text, Link):
        return escape_markdown(text)
    if not is_web_address(text.address) or set(text.address) & set("()<>|"):
        return escape_markdown(text.text)
    return f"[{escape_markdown(text.text)}]({text.address})"
