"""Style sheets, scripts and templates of all rooms are well formed."""

from __future__ import annotations

import shutil
import subprocess
import tomllib
from pathlib import Path
from typing import Any

import pytest
from jinja2 import Environment
from setuptools import find_namespace_packages

ROOMS = Path(__file__).resolve().parents[3] / "platform"
STYLES, SCRIPTS, TEMPLATES = (sorted(ROOMS.rglob(f"*.{end}")) for end in ("css", "js", "j2"))


def name(path: Path) -> str:
    return path.relative_to(ROOMS).as_posix()


def errors_of(css: str) -> list[str]:
    """Return what a browser would skip: rules and declarations that do not parse."""
    tinycss2 = pytest.importorskip("tinycss2")
    found: list[str] = []

    def walk(nodes: list[Any]) -> None:
        for node in nodes:
            if node.type == "error":
                found.append(f"line {node.source_line}: {node.message}")
            elif node.type == "declaration":
                walk(node.value)
                if not [one for one in node.value if one.type != "whitespace"]:
                    found.append(f"line {node.source_line}: {node.name} has no value")
            elif node.type in ("qualified-rule", "at-rule") and node.content is not None:
                walk(node.prelude)
                walk(tinycss2.parse_blocks_contents(node.content, skip_whitespace=True))
            elif getattr(node, "content", None) is not None:
                walk(node.content)

    walk(tinycss2.parse_stylesheet(css, skip_comments=True, skip_whitespace=True))
    return found


@pytest.mark.parametrize("path", STYLES, ids=name)
def test_a_style_sheet_parses(path: Path):
    assert errors_of(path.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize("css", ["a { color }", "a { color: ; }", "a } b {}", "x"])
def test_a_broken_style_sheet_is_found(css: str):
    assert errors_of(css)


@pytest.mark.parametrize("path", SCRIPTS, ids=name)
def test_a_script_parses(path: Path):
    node = shutil.which("node")
    if node is None:
        pytest.skip("no node")
    checked = subprocess.run([node, "--check", str(path)], capture_output=True, text=True)
    assert checked.returncode == 0, checked.stderr


@pytest.mark.parametrize("path", SCRIPTS, ids=name)
def test_a_script_is_strict_and_makes_no_code_or_markup_of_text(path: Path):
    text = path.read_text(encoding="utf-8")
    assert '"use strict";\n' in text
    for word in ("eval(", "new Function", "innerHTML", "outerHTML", "insertAdjacentHTML",
                 "document.write", "javascript:"):  # fmt: skip
        assert word not in text


@pytest.mark.parametrize("path", TEMPLATES, ids=name)
def test_a_template_parses(path: Path):
    Environment().parse(path.read_text(encoding="utf-8"))


@pytest.mark.parametrize("path", [*STYLES, *SCRIPTS], ids=name)
def test_lines_are_short_and_clean(path: Path):
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), start=1):
        assert len(line) <= 100, f"line {number} is longer than 100"
        assert line == line.rstrip(), f"line {number} ends in blanks"
        assert "\t" not in line, f"line {number} has a tab"


def test_a_wheel_ships_every_asset():
    root = ROOMS.parent
    settings = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))
    patterns = settings["tool"]["setuptools"]["package-data"]["*"]
    packages = find_namespace_packages(str(root), include=["deta.platform*"])
    for path in (*STYLES, *SCRIPTS, *TEMPLATES):
        package = ".".join(["deta", *path.relative_to(root).parent.parts])
        assert package in packages
        assert any(path.match(pattern) for pattern in patterns), f"{name(path)} is not shipped"
