"""S11: every page is made by the elements of platform/pages/html.py, and forbids what it does not need.

What these make of hostile names is tested in tests/platform/pages/test_html.py, and in a browser in
tests/platform/study_report/test_html_report.py. Here: that no page is made in another way.
"""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
MODULES = sorted(
    path for room in ("platform", "jobs", "dashboards") for path in (ROOT / room).rglob("*.py")
)
# Text that begins a page or a script, or lets a script make markup of data.
MARKUP = (
    "<html", "<!doctype", "<script", "<body", "<iframe", "innerHTML", "outerHTML",
    "insertAdjacentHTML", "document.write", "javascript:",
)  # fmt: skip
PAGES = ("platform/pages/html.py", "platform/leaderboard/page.py", "platform/serving/page.py")
MAY = {
    **dict.fromkeys(PAGES, "the page"),
    "platform/system/download.py": "knows a web page when it gets one in place of a file",
    "platform/weights/weight_files.py": "the same",
}


def texts(path: Path) -> list[tuple[int, str]]:
    """Every text in a module that is no docstring."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    docstrings = {
        id(node.body[0].value)
        for node in ast.walk(tree)
        if isinstance(node, documented) and node.body and isinstance(node.body[0], ast.Expr)
    }
    return [
        (node.lineno, node.value)
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant)
        and isinstance(node.value, str)
        and id(node) not in docstrings
    ]


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_nothing_else_writes_markup(path: Path):
    place = path.relative_to(ROOT).as_posix()
    found = [
        f"{place}:{line}: {word}"
        for line, text in texts(path)
        for word in MARKUP
        if word.lower() in text.lower() and place not in MAY
    ]
    assert found == []


@pytest.mark.parametrize("place", PAGES)
def test_a_page_has_a_policy_that_begins_with_nothing(place: str):
    text = (ROOT / place).read_text(encoding="utf-8")
    assert "default-src 'none'" in text
    assert "base-uri 'none'; form-action 'none'" in text
    for line in text.splitlines():  # styles may be in line, scripts never
        if "script-src" in line:
            assert "unsafe" not in line.partition("script-src")[2].partition(";")[0], line


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_markup_is_made_of_what_is_written_here_and_not_of_data(path: Path):
    """`Markup(…)` switches escaping off: of literals and constants, but where it is made."""
    place = path.relative_to(ROOT).as_posix()
    if place == "platform/pages/html.py":
        return
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "Markup":
            for part in node.args:
                name = getattr(part, "id", "")
                is_ours = isinstance(part, ast.Constant) or name.isupper() or name == "plotly"
                assert is_ours, f"{place}:{node.lineno}: Markup of something else than a literal"
