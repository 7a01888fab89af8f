"""README and docs: links resolve, commands exist with their options, every room is in the tree."""

from __future__ import annotations

import ast
import re
import shlex
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "README.md"
PAGES = [README, ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\(([^()\s]+(?:\([^()\s]*\))?)\)")
TREE = README.read_text(encoding="utf-8").partition("## The tree")[2]


def prose(page: Path) -> str:
    """Return the text of a page without its blocks and spans of code."""
    return re.sub(r"`[^`\n]*`", "", FENCE.sub("", page.read_text(encoding="utf-8")))


@cache
def anchors(page: Path) -> set[str]:
    """Return the anchors of the headings of a page, as GitHub and MkDocs make them."""
    text = FENCE.sub("", page.read_text(encoding="utf-8"))
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", one.lower()).strip().replace(" ", "-") for one in headings}


def commands(page: Path) -> list[list[str]]:
    """Return the commands of the `sh` blocks of a page, split into words."""
    lines = [
        line
        for language, block in FENCE.findall(page.read_text(encoding="utf-8"))
        if language == "sh"
        for line in block.replace("\\\n", " ").splitlines()
    ]
    return [words for line in lines if (words := shlex.split(line, comments=True))]


@cache
def options(source: Path) -> frozenset[str]:
    """Return the options that a job declares, in its file and in the files of jobs/ it imports.

    They are the fields of its dataclass of options.
    """
    tree = ast.parse(source.read_text(encoding="utf-8"))
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef) and node.name.endswith("Options"):
            names = [one.target.id for one in node.body if isinstance(one, ast.AnnAssign)]
            found |= {re.escape(f"--{name.replace('_', '-')}") for name in names}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("deta.jobs."):
            imported = ROOT / "jobs" / f"{node.module.split('.')[2]}.py"
            found |= options(imported)
    return frozenset(one for one in found if one.startswith(("\\-\\-", "--")))


def test_the_readme_has_at_most_120_lines():
    assert len(README.read_text(encoding="utf-8").splitlines()) <= 120


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_relative_link_leads_to_a_file_and_a_heading(page: Path):
    for target in LINK.findall(prose(page)):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.is_file(), f"{target}: there is no such file"
        assert not anchor or anchor in anchors(file), f"{target}: there is no such heading"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_job_and_benchmark_that_is_named_exists(page: Path):
    named = re.findall(r"\b(?:jobs|benchmarks)/\w+\.py\b", page.read_text(encoding="utf-8"))
    assert [one for one in named if not (ROOT / one).is_file()] == []


@pytest.mark.parametrize(
    ("page", "words"),
    [(page, words) for page in PAGES for words in commands(page) if "jobs/" in " ".join(words)],
    ids=lambda value: value.name if isinstance(value, Path) else " ".join(value)[:60],
)
def test_every_option_of_a_command_is_declared_by_its_job(page: Path, words: list[str]):
    place = next(i for i, word in enumerate(words) if re.fullmatch(r"jobs/\w+\.py", word))
    known = options(ROOT / words[place])
    assert known
    for word in words[place + 1 :]:
        if word.startswith("--") and word not in ("--help",):
            option = word.partition("=")[0]
            assert any(re.fullmatch(one, option) for one in known), f"{words[place]}: {option}"


def test_commands_were_found():
    """Else the test above would check nothing."""
    assert len([words for words in commands(README) if words[0] == "python"]) >= 8


def test_every_target_of_make_that_is_named_exists():
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text("utf-8"), re.MULTILINE))
    named = {words[1] for page in PAGES for words in commands(page) if words[0] == "make"}
    assert named
    assert named <= targets


def test_the_tree_has_every_room_and_folder():
    rooms = {path.name for path in (ROOT / "platform").iterdir() if (path / "__init__.py").exists()}
    folders = {"ops", "model", "platform", "jobs", "dashboards", "tests", "benchmarks", "docs"}
    assert set(re.findall(r"^  (\w+)/ +\w", TREE, re.MULTILINE)) == rooms
    assert folders <= set(re.findall(r"\b(\w+)/", TREE))
