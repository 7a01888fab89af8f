"""Name the first of many things in one line."""

from __future__ import annotations

from collections.abc import Sequence


def short_list(values: Sequence[object], limit: int = 5) -> str:
    """Return such as "a, b and 3 more"."""
    shown = ", ".join(str(value) for value in values[:limit])
    return shown if len(values) <= limit else f"{shown} and {len(values) - limit} more"
