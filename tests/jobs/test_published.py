"""Our configurations beside the published ones, and the pages that show them."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from deta.jobs import published as published_module
from deta.jobs import recipe_pages
from deta.jobs.differences import as_text, compare_configs, unexplained
from deta.jobs.published import PUBLISHED, Fact
from deta.jobs.recipes import VARIANTS
from deta.platform.run.config import override

ROOT = Path(__file__).resolve().parents[2]
SHARED = Path(os.environ.get("DETA_SHARED", ROOT / "../shared")).resolve()


@pytest.mark.parametrize("name", PUBLISHED)
def test_every_difference_to_the_published_system_is_explained(name: str):
    assert unexplained(compare_configs(VARIANTS[name](), PUBLISHED[name])) == []


def test_every_variant_that_follows_a_publication_is_compared_with_it():
    ours = {
        name for name, make in VARIANTS.items() if "No published source" in (make.__doc__ or "")
    }
    assert set(PUBLISHED) == set(VARIANTS) - ours


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("optim.lr", "1e-4"),  # published with another value
        ("model.backbone.width", "0.5"),  # published by nobody
        ("model.backbone.frozen_parts", "[]"),
        ("schedule.warmup_epochs", "1"),
        ("postprocess.nms_iou", "none"),
    ],
)
def test_a_change_that_nobody_explains_is_flagged(key: str, value: str):
    changes = {key: value, "model.backbone.pretrained": "false"}
    config = override(VARIANTS["deta_r50.official_12ep"](), changes)
    rows = compare_configs(config, PUBLISHED["deta_r50.official_12ep"])
    assert key in unexplained(rows)
    assert "NOT EXPLAINED" in as_text(rows, PUBLISHED["deta_r50.official_12ep"])


def test_keys_that_only_say_how_a_run_is_executed_are_no_difference():
    changes = {"name": "other", "data.loader_workers": "0", "cluster.gpu": "false"}
    config = override(VARIANTS["deta_r50.official_12ep"](), changes)
    assert unexplained(compare_configs(config, PUBLISHED["deta_r50.official_12ep"])) == []


def test_a_fact_about_a_key_that_does_not_exist_is_refused():
    one = PUBLISHED["deta_r50.official_12ep"]
    wrong = replace(one, facts={**one.facts, "optim.momentum": Fact(0.9, "nowhere")})
    with pytest.raises(KeyError, match=r"optim\.momentum"):
        compare_configs(VARIANTS["deta_r50.official_12ep"](), wrong)


def test_every_fact_names_its_source():
    for name, one in PUBLISHED.items():
        assert all(fact.source for fact in one.facts.values()), name
        assert all(remark.source for remark in one.remarks), name


def test_sections_that_facts_cite_exist():
    specification = SHARED / "design" / "DETA.md"
    if not specification.is_file():
        pytest.skip(f"{specification} is absent")
    text = specification.read_text(encoding="utf-8")
    numbered = set(re.findall(r"^#+ (\d+(?:\.\d+)?)", text, re.MULTILINE))
    # Section 15 is a numbered list.
    bugs = text.partition("\n## 15")[2].partition("\n## 16")[0]
    numbered |= {f"15.{item}" for item in re.findall(r"^(\d+)\. ", bugs, re.MULTILINE)}
    sources = {fact.source for one in PUBLISHED.values() for fact in one.facts.values()}
    sources |= {remark.source for one in PUBLISHED.values() for remark in one.remarks}
    cited = {
        section
        for source in sources
        if source.startswith("DETA.md")
        for section in re.findall(
            r"\d+(?:\.\d+)?", re.split("[;:(]", source)[0].split("official")[0]
        )
    }
    assert cited
    assert cited <= numbered


def test_pages_and_the_results_table_are_up_to_date():
    """Else: python jobs/recipe_pages.py"""
    for path, text in recipe_pages.pages(ROOT).items():
        assert path.read_text(encoding="utf-8") == text, f"{path.name} is out of date"


def test_pages_are_not_written_from_an_unexplained_difference(monkeypatch, tmp_path: Path):
    name = "deta_r50.official_12ep"
    one = PUBLISHED[name]
    changed = {**PUBLISHED, name: replace(one, facts={**one.facts, "seed": Fact(7, "somewhere")})}
    monkeypatch.setattr(recipe_pages, "PUBLISHED", changed)
    with pytest.raises(ValueError, match=r"deta_r50\.official_12ep: seed"):
        recipe_pages.pages(tmp_path)


def test_results_without_a_place_for_the_table_are_refused(tmp_path: Path):
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "RESULTS.md").write_text("nothing here", encoding="utf-8")
    with pytest.raises(ValueError, match=r"RESULTS\.md: must contain the lines"):
        recipe_pages.pages(tmp_path)


def test_compare_prints_the_table_and_stops():
    command = [sys.executable, "jobs/deta_r50.py", "--variant", "detrex_bs8", "--compare"]
    found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert found.stdout.startswith(published_module.PUBLISHED["deta_r50.detrex_bs8"].system)
    assert re.search(r"schedule\.epochs +ours 12, published 12\.17", found.stdout)
    assert "NOT EXPLAINED" not in found.stdout
