"""List published weights and their addresses, which published_weights.toml holds."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any


def published_files() -> list[dict[str, Any]]:
    """Return the published files, with the keys of published_weights.toml."""
    text = Path(__file__).with_name("published_weights.toml").read_text(encoding="utf-8")
    files: list[dict[str, Any]] = tomllib.loads(text)["file"]
    return files


def format_catalogue() -> str:
    """Return the list of published files as text."""
    lines = []
    for file in published_files():
        ap = f", AP {file['ap']}" if "ap" in file else ""
        page = " (a page: download it with a browser and give the file's path)"
        page = page if file.get("is_page") else ""
        lines.append(f"{file['name']}{ap}, {file['layout']} layout{page}")
        lines.append(f"  {file['url']}")
        if "note" in file:
            lines.append(f"  {file['note']}")
    lines.append(
        "\nNo publisher states a SHA-256 of these. The first download prints it: append it to the "
        "address as\n#sha256=… so that later downloads give the same bytes or an error."
    )
    return "\n".join(lines)
