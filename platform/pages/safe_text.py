"""Text from people, made safe for HTML, plotly labels, JSON in a page, and links."""

from __future__ import annotations

import html
import math
import re
from collections.abc import Mapping
from typing import Any

from jinja2.utils import htmlsafe_json_dumps
from markupsafe import Markup

# Invisible characters, and those that turn the text around them: shown as a replacement.
UNSEEN = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200b-\u200f\u2028-\u202e\u2060-\u206f\ud800-\udfff\ufeff]"
)
LINK = re.compile(r"(https?://[^\s]+|#[A-Za-z][\w-]*)", re.ASCII)


def without_unseen(text: str) -> str:
    """Return the text with a replacement for each invisible character; lines stay lines."""
    return UNSEEN.sub("\ufffd", text.replace("\r", " "))


def visible(text: str) -> str:
    """Return the text on one line, without invisible characters; for places outside HTML too."""
    return without_unseen(text.replace("\n", " "))


def figure_text(text: str) -> str:
    """Return a name for plotly, which reads a few HTML tags in labels, as it is written."""
    return html.escape(visible(text), quote=False)


def is_web_address(address: str) -> bool:
    """Return whether a link may have this address: http(s), or a fragment of its own page."""
    return LINK.fullmatch(address) is not None


def checked_address(address: str) -> str:
    """Return the address unchanged; templates write no other into a link.

    Raises:
        ValueError: the address could run a script, or is not one of the web.
    """
    if not is_web_address(address):
        raise ValueError(f"{address!r} is no http(s) address; write it as text, or use a Link")
    return address


def json_text(value: Any) -> Markup:
    """Return JSON that is safe within <script type="application/json">. NaN becomes null."""
    return htmlsafe_json_dumps(
        _finite(value), ensure_ascii=True, allow_nan=False, separators=(",", ":")
    )


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return value
