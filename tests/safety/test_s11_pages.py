"""S11: every page is made from templates that escape all text, and forbids what it does not need.

What pages make of hostile names is tested in tests/platform/pages/test_page.py, and in a browser in
tests/platform/study_report/test_html_report.py. Here: that no page is made in another way, and
that no template has a place in which a text could become more than text.
"""

from __future__ import annotations

import ast
import itertools
import re
from pathlib import Path

import pytest

from deta.platform.pages.render import PLOTLY, content_policy

ROOT = Path(__file__).resolve().parents[2]
MODULES = sorted(
    path for room in ("platform", "jobs", "dashboards") for path in (ROOT / room).rglob("*.py")
)
TEMPLATES = sorted((ROOT / "platform").rglob("*.j2"))
BASE = "platform/pages/base.html.j2"
# Text that begins a page or a script, or lets a script make markup of data.
MARKUP = (
    "<html", "<!doctype", "<script", "<body", "<iframe", "innerHTML", "outerHTML",
    "insertAdjacentHTML", "document.write", "javascript:",
)  # fmt: skip
MAY = {
    "platform/pages/safe_text.py": "documents where JSON is safe",
    "platform/system/download.py": "detects a web page in place of a file",
    "platform/weights/weight_files.py": "the same",
}
# Markup switches escaping off: only these make it, of JSON and of files of the program.
MARKUP_MAKERS = (
    "platform/pages/render.py",
    "platform/pages/safe_text.py",
    "jobs/recipe_pages.py",  # Markdown of this repository's own docs
)
TAG = re.compile(r"<[a-zA-Z](?:\{\{.*?\}\}|\{%.*?%\}|\"[^\"]*\"|[^\">])*>", re.DOTALL)
ATTRIBUTE = re.compile(r"([\w-]+)\s*=\s*(\"[^\"]*\"|[^\s>]+)")
IMAGE = re.compile(r"data:image/jpeg;base64,\{\{ [\w.]+\.base64 \}\}")


def place_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def texts(path: Path) -> list[tuple[int, str]]:
    """Return every text in a module that is no docstring, with its line."""
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


@pytest.mark.parametrize("path", MODULES, ids=place_of)
def test_no_python_writes_markup(path: Path):
    place = place_of(path)
    found = [
        f"{place}:{line}: {word}"
        for line, text in texts(path)
        for word in MARKUP
        if word.lower() in text.lower() and place not in MAY
    ]
    assert found == []


@pytest.mark.parametrize("path", MODULES, ids=place_of)
def test_escaping_is_switched_off_in_one_place_only(path: Path):
    if place_of(path) in MARKUP_MAKERS:
        return
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), start=1):
        for word in ("Markup", "jinja2"):
            assert word not in line, f"{place_of(path)}:{number}: {word} belongs to pages/render.py"


@pytest.mark.parametrize(
    ("scripts", "is_served", "has_served_scripts"),
    itertools.product([[], [PLOTLY, "pages/figures.js"]], [False, True], [False, True]),
)
def test_a_policy_begins_with_nothing(
    scripts: list[str], is_served: bool, has_served_scripts: bool
):
    for styles in (None, []):
        policy = content_policy(
            scripts, styles=styles, is_served=is_served, has_served_scripts=has_served_scripts
        )
        assert policy.startswith("default-src 'none'; ")
        assert "base-uri 'none'; form-action 'none'" in policy
        # Styles may be in line, scripts never.
        assert "unsafe" not in policy.partition("script-src")[2].partition(";")[0]


def faults(text: str, is_base: bool = False) -> list[str]:
    """Return the places of a template in which a text could become more than text."""
    text = re.sub(r"\{#.*?#\}", "", text, flags=re.DOTALL)
    found = [word for word in ("|safe", "| safe", "autoescape", "Markup", "~") if word in text]
    for tag in TAG.findall(text):
        for key, value in ATTRIBUTE.findall(tag):
            key, inner = key.lower(), value.strip('"')
            if key.startswith("on") or key in ("srcdoc", "action", "formaction", "background"):
                found.append(f"{key} could run a script: {tag}")
            elif "{{" in value and not value.startswith('"'):
                found.append(f"{key} has no quotation marks: {tag}")
            elif key in ("href", "src") and "{{" in inner:
                is_fragment = re.fullmatch(r"#\{\{ section\.name \}\}", inner)
                is_checked = re.fullmatch(r"\{\{ [\w.]+\|checked_address \}\}", inner)
                if not (is_fragment or is_checked or (key == "src" and IMAGE.fullmatch(inner))):
                    found.append(f"{key} is not checked: {tag}")
            elif key in ("href", "src") and not re.fullmatch(r"#[\w-]+|[\w-]+\.js", inner):
                found.append(f"{key} leads outside: {tag}")
    for content in re.findall(r"<(?:script|style)\b[^>]*>(.*?)</", text, re.DOTALL | re.IGNORECASE):
        if content and not (is_base and content in ("{{ script }}", "{{ json }}", "{{ style }}")):
            found.append(f"a script or style in a template: {content[:40]}")
    return found


@pytest.mark.parametrize("path", TEMPLATES, ids=place_of)
def test_a_template_has_no_place_for_code(path: Path):
    assert faults(path.read_text(encoding="utf-8"), place_of(path) == BASE) == []


@pytest.mark.parametrize(
    "text",
    [
        '<p onclick="x">', '<p class={{ a }}>', '<a href="{{ a }}">', '<img src="{{ a }}">',
        '<a href="https://a.example">', "<script>{{ script }}</script>", "<style>p {}</style>",
        "{{ a|safe }}", "{% autoescape false %}", '<iframe srcdoc="{{ a }}">',
    ],
)  # fmt: skip
def test_a_template_with_a_place_for_code_is_found(text: str):
    assert faults(text)
