"""Write a report as GitHub-flavoured Markdown: the verdict, then the tables, no figures."""

from __future__ import annotations

import re

from deta.platform.pages.content import Link, Table
from deta.platform.pages.safe_text import is_web_address, visible
from deta.platform.study_report.content import StudyReport
from deta.platform.study_report.result_tables import (
    anchors_table,
    cells_table,
    design_table,
    differences_table,
    effects_table,
    steps_table,
)
from deta.platform.study_report.trial_tables import (
    changed_table,
    cost_table,
    facts_line,
    failures_table,
    how_table,
    required_seeds_table,
    searched_table,
)

# Characters that Markdown or HTML would interpret; a pipe would end the cell of a table.
SPECIAL = re.compile(r"([\\`*_{}\[\]<>#|~&!$@])")


def markdown_summary(report: StudyReport) -> str:
    """Return the complete text."""
    analysis = report.analysis
    first, *others = report.verdicts
    parts = [f"# {escape_markdown(report.title)}", f"**{escape_markdown(first)}**"]
    parts += [escape_markdown(sentence) for sentence in others]
    parts += [escape_markdown(facts_line(report)), "## What was compared"]
    if report.method:
        parts.append(escape_markdown(report.method))
    parts.append(_table(design_table(report) or searched_table(report)))
    if analysis:
        parts += ["## Results of the cells", _table(cells_table(analysis))]
        if analysis.answers:
            title = "The questions of this study, with the noise of all its cells."
            table = differences_table(analysis, analysis.answers, title)
            parts += ["## Differences", _table(table)]
        if analysis.effects:
            parts += ["## Effects and interactions", _table(effects_table(analysis))]
        parts.append("\n".join(f"- {escape_markdown(note)}" for note in analysis.notes))
    if (costs := cost_table(report)).rows:
        parts += ["## Cost", _table(costs)]
    if pilot := report.pilot:
        parts += ["## What more seeds would show", _table(required_seeds_table(report, pilot))]
    failures = failures_table(report)
    parts += ["## Failures and early stops", _table(failures) or "Every trial finished."]
    if report.decomposition or report.anchors:
        parts.append("## Published numbers")
    if report.decomposition:
        parts += [escape_markdown(text) for text in report.decomposition.text.split("\n\n")]
        parts.append(_table(steps_table(report.decomposition, report.metric)))
    if report.anchors:
        parts.append(_table(anchors_table(report.anchors)))
    how = how_table(report.provenance)
    if how.rows:
        parts += ["## How it was run", _table(how)]
        parts.append(_table(changed_table(report.provenance)))
    return "\n\n".join(part for part in parts if part) + "\n"


def escape_markdown(text: str) -> str:
    """Return text that Markdown shows as it is written, on one line."""
    return SPECIAL.sub(r"\\\1", visible(text)).strip()


def _table(table: Table | None) -> str:
    if table is None or not table.rows:
        return ""
    titles = [escape_markdown(f"{c.title}, {c.unit}" if c.unit else c.title) for c in table.columns]
    rules = ["---:" if column.is_number else "---" for column in table.columns]
    rows = [[_cell(cell) for cell in row] for row in table.rows]
    lines = [titles, rules, *rows]
    return f"{escape_markdown(table.caption)}\n\n" + "\n".join(
        f"| {' | '.join(row)} |" for row in lines
    )


def _cell(cell: str | Link) -> str:
    if not isinstance(cell, Link):
        return escape_markdown(cell)
    if not is_web_address(cell.address) or set(cell.address) & set("()<>|"):
        return escape_markdown(cell.text)
    return f"[{escape_markdown(cell.text)}]({cell.address})"
