#!/usr/bin/env python
"""Write docs/recipes/*.md and the table in docs/RESULTS.md from the recipes and published.toml.

  python jobs/recipe_pages.py           # write the files that have changed
  python jobs/recipe_pages.py --check   # write nothing; exit with 1 if a file is out of date

The pages compare each configuration with the published one. A difference without an explanation in
published.toml is an error.
"""

from __future__ import annotations

import inspect
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, NoReturn

from deta.jobs.command_line import echo, read_options, run_tool
from deta.jobs.differences import compare_configs, unexplained, value_text
from deta.jobs.published import PUBLISHED, Published
from deta.jobs.recipes import RECIPES, VARIANTS
from deta.platform.run.config import RunConfig

ROOT = Path(__file__).resolve().parents[1]
FOLDER = Path("docs") / "recipes"
RESULTS = Path("docs") / "RESULTS.md"
BEGIN, END = "<!-- recipes: begin, written by jobs/recipe_pages.py -->", "<!-- recipes: end -->"
NOTE = "<!-- Written by jobs/recipe_pages.py; change the recipe or jobs/published.toml. -->"


def pages(root: Path) -> dict[Path, str]:
    """Return the wanted content of every file, by its path.

    Raises:
        ValueError: a recipe differs from its publication without a reason, or docs/RESULTS.md has
            no place for the table.
    """
    problems = [
        f"{name}: {', '.join(keys)}"
        for name, published in PUBLISHED.items()
        if (keys := unexplained(compare_configs(VARIANTS[name](), published)))
    ]
    if problems:
        raise ValueError(
            "these recipes differ from what was published without a reason. Change the recipe, or "
            "give the fact in jobs/published.toml a `why`:\n  " + "\n  ".join(problems)
        )
    written = {
        root / FOLDER / f"{recipe}.md": recipe_page(recipe, module)
        for recipe, module in RECIPES.items()
    }
    results = root / RESULTS
    text = results.read_text(encoding="utf-8")
    if text.count(BEGIN) != 1 or text.count(END) != 1:
        raise ValueError(f"{results}: must contain the lines {BEGIN!r} and {END!r}, once each")
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    written[results] = f"{before}{BEGIN}\n\n{results_table()}\n\n{END}{after}"
    return written


def recipe_page(recipe: str, module: ModuleType) -> str:
    """Return the page of one recipe with all its variants."""
    title, _, text = inspect.cleandoc(module.__doc__ or "").partition("\n")
    parts = [f"# `jobs/{recipe}.py`", NOTE, title, _code(text.strip("\n"))]
    for variant, make in module.VARIANTS.items():
        published = PUBLISHED.get(f"{recipe}.{variant}")
        parts.append(_section(recipe, variant, make, published))
    return "\n\n".join(part for part in parts if part) + "\n"


def results_table() -> str:
    """Return a table with one row for each published system."""
    rows = []
    for name, published in PUBLISHED.items():
        recipe, _, variant = name.partition(".")
        config = VARIANTS[name]()
        different = [row.key for row in compare_configs(config, published) if not row.is_same]
        number = f"{len(different)}, explained" if different else "none"
        is_default = variant == next(iter(RECIPES[recipe].VARIANTS))
        command = f"`jobs/{recipe}.py`" + ("" if is_default else f" `--variant {variant}`")
        rows.append(
            (
                f"{published.system} ([{published.origin}]({published.url}))",
                value_text(config.schedule.epochs),
                published.ap,
                command,
                f"[{number}]({FOLDER.name}/{recipe}.md#{variant})",
            )
        )
    return _table(("system", "epochs", "published AP", "command", "differences"), rows)


def _section(
    recipe: str, variant: str, make: Callable[[], RunConfig], published: Published | None
) -> str:
    first, _, text = inspect.cleandoc(make.__doc__ or "").partition("\n")
    parts = [f"## {variant}", f"{first[:1].upper()}{first[1:]}.", text.strip()]
    if published is None:
        return "\n\n".join(parts)
    rows = compare_configs(make(), published)
    different = [row for row in rows if not row.is_same]
    parts.append(
        f"Published: [{published.system}, {published.origin}]({published.url}), AP {published.ap}."
        + (f" [Weights]({published.weights})." if published.weights else "")
    )
    if different:
        cells = [
            (f"`{r.key}`", value_text(r.ours), value_text(r.published), r.verdict, r.source)
            for r in different
        ]
        parts.append(_table(("key", "ours", "published", "why", "source"), cells))
    else:
        parts.append("Every number is the published one.")
    if published.remarks:
        remarks = [(one.published, one.ours, one.source) for one in published.remarks]
        parts.append("Beyond the configuration:")
        parts.append(_table(("published", "here", "source"), remarks))
    same = _table(
        ("key", "both", "source"),
        [(f"`{row.key}`", value_text(row.ours), row.source) for row in rows if row.is_same],
    )
    summary = f"<summary>the same: {len(rows) - len(different)} numbers</summary>"
    parts.append(f"<details>{summary}\n\n{same}\n\n</details>")
    parts.append(f"`python jobs/{recipe}.py --variant {variant} --compare` prints this table.")
    return "\n\n".join(parts)


def _table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(map(_cell, line)) + " |" for line in lines)


def _cell(text: Any) -> str:
    return str(text).replace("|", "\\|").replace("\n", " ")


def _code(text: str) -> str:
    """Turn the indented commands in a module's description into blocks of code."""
    paragraphs = []
    for paragraph in text.split("\n\n"):
        if all(line.startswith("  ") for line in paragraph.splitlines()):
            paragraphs.append(f"```sh\n{textwrap.dedent(paragraph)}\n```")
        else:
            paragraphs.append(paragraph)
    return "\n\n".join(paragraphs)


@dataclass(frozen=True, kw_only=True)
class PageOptions:
    check: bool = False  # write nothing; exit with 1 if a file is out of date


def main() -> NoReturn:
    options = read_options(PageOptions, __doc__)
    run_tool(lambda: pages(ROOT), lambda wanted: _write(wanted, check=options.check))


def _write(wanted: dict[Path, str], *, check: bool) -> int:
    stale = [
        path
        for path, text in wanted.items()
        if not path.exists() or path.read_text(encoding="utf-8") != text
    ]
    for path in stale:
        echo(f"{'out of date' if check else 'written'}: {path.relative_to(ROOT)}")
        if not check:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(wanted[path], encoding="utf-8")
    return 1 if check and stale else 0


if __name__ == "__main__":
    main()
