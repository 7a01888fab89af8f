"""The summary in Markdown holds the verdict and every mean, and its tables stay tables."""

from __future__ import annotations

import re
from pathlib import Path

from deta.platform.study_report.content import StudyReport
from deta.platform.study_report.html_report import write_study_report
from deta.platform.study_report.markdown_report import escape_markdown
from tests.platform.study_report.cases import HOSTILE, study


def written(report: StudyReport, folder: Path) -> str:
    return write_study_report(folder, report)[1].read_text(encoding="utf-8")


def test_verdict_and_every_mean_stand_in_the_summary(tmp_path: Path):
    report = study()
    assert report.analysis is not None
    text = written(report, tmp_path)
    assert text.splitlines()[2].startswith("**16 vs 8")
    for cell in report.analysis.cells:
        assert escape_markdown(cell.cell.key) in text
        assert cell.mean is not None
        assert f"{cell.mean:.1f}" in text
    assert "not finite: 8" in text
    assert "sha256:1" in text


def test_tables_of_the_summary_are_rectangular_with_hostile_names(tmp_path: Path):
    text = written(study(HOSTILE), tmp_path)
    widths = None
    for line in text.splitlines():
        if line.startswith("|"):
            bars = len(re.findall(r"(?<!\\)\|", line))
            assert widths in (None, bars)
            widths = bars
        else:
            widths = None
    assert not re.search(r"(?<!\\)<", text)
    assert not re.search("[\u2028\u202e]", text)
