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
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from deta.jobs.command_line import echo, read_options, run_tool
from deta.jobs.differences import compare_configs, unexplained, value_text
from deta.jobs.published import PUBLISHED
from deta.jobs.recipes import RECIPES, VARIANTS

ROOT = Path(__file__).resolve().parents[1]
FOLDER = Path("docs") / "recipes"
RESULTS = Path("docs") / "RESULTS.md"
BEGIN, END = "<!-- recipes: begin, written by jobs/recipe_pages.py -->", "<!-- recipes: end -->"


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
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        undefined=StrictUndefined,
        trim_blocks=True,
        keep_trailing_newline=True,
        autoescape=False,  # Markdown
    )
    environment.filters |= {"cell": _cell, "code": _code}
    environment.globals |= {
        "systems": PUBLISHED,
        "recipes": RECIPES,
        "variants": VARIANTS,
        "compare": compare_configs,
        "description": _description,
    }
    page = environment.get_template("recipe_pages.md.j2")
    written = {
        root / FOLDER / f"{recipe}.md": page.render(recipe=recipe, module=module)
        for recipe, module in RECIPES.items()
    }
    results = root / RESULTS
    text = results.read_text(encoding="utf-8")
    if text.count(BEGIN) != 1 or text.count(END) != 1:
        raise ValueError(f"{results}: must contain the lines {BEGIN!r} and {END!r}, once each")
    before, _, rest = text.partition(BEGIN)
    table = environment.get_template("results.md.j2").render()
    written[results] = f"{before}{BEGIN}\n\n{table}\n{END}{rest.partition(END)[2]}"
    return written


def _description(thing: object) -> tuple[str, str]:
    """Return the first line of a docstring, and the others."""
    title, _, text = (inspect.getdoc(thing) or "").partition("\n")
    return title, text.strip("\n")


def _cell(value: Any) -> str:
    return value_text(value).replace("|", "\\|").replace("\n", " ")


def _code(text: str) -> str:
    """Turn the indented commands in a module's description into blocks of code."""
    return "\n\n".join(
        f"```sh\n{textwrap.dedent(paragraph)}\n```" if paragraph.startswith("  ") else paragraph
        for paragraph in text.split("\n\n")
    )


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
