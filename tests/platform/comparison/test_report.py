"""The page of a comparison reads without JavaScript, and steps through images with it."""

from __future__ import annotations

import html
import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from deta.platform.comparison.compare import Comparison
from deta.platform.comparison.report import write_comparison
from tests.platform.comparison.cases import HOSTILE, compared
from tests.platform.evaluation.detection_cases import random_case

__all__ = ["compared"]  # the fixture
ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture(scope="module")
def page(compared: Comparison, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("comparison")
    for i in range(5):
        pixels = np.full((60, 160, 3), 40 * i + 30, np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.png")
    assert write_comparison(folder / "page.html", compared, folder) == 4
    return folder / "page.html"


def test_the_page_reads_without_javascript(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert text.count('class="slide"') == 4
    assert HOSTILE not in text
    assert "fewer errors in B" in text
    for word in ("Difference", "Error types", "Images gained and lost", "optim.lr", "0.01"):
        assert word in text
    assert re.search(r"script-src ('sha256-[\w+/=]+' ?){3};", html.unescape(text[:2000]))


def test_without_images_the_page_says_so(compared: Comparison, tmp_path: Path) -> None:
    assert write_comparison(tmp_path / "page.html", compared, None) == 0
    assert "No image files were found" in (tmp_path / "page.html").read_text("utf-8")
    long = replace(compared, names=("a" * 300, "b" * 300))
    write_comparison(tmp_path / "long.html", long, tmp_path)


@pytest.mark.parametrize("framed", [False, True], ids=["alone", "in a sandbox"])
def test_keys_and_buttons_step_through_the_images(
    browser: Any, page: Path, tmp_path: Path, framed: bool
) -> None:
    """MLflow shows pages in a frame that may run scripts and nothing else."""
    view = browser.new_page(viewport={"width": 390, "height": 800})
    trouble: list[str] = []
    view.on("console", lambda message: trouble.append(message.text))
    view.on("pageerror", lambda error: trouble.append(str(error)))
    if framed:
        outer = tmp_path / "outer.html"
        content = page.read_text(encoding="utf-8").replace("&", "&amp;").replace('"', "&quot;")
        outer.write_text(f'<iframe sandbox="allow-scripts" srcdoc="{content}" height=700></iframe>')
        view.goto(outer.as_uri())
        inner = view.frames[1]
    else:
        view.goto(page.as_uri())
        inner = view.main_frame
    inner.wait_for_selector(".stepping .slide.current", timeout=60_000)

    def at() -> str:
        titles = inner.locator(".slide.current h3").all_inner_texts()
        assert len(titles) == 1
        return str(titles[0])

    assert at() == "0.png"
    inner.locator("text=Next").click()
    assert at() == "1.png"
    for key, expected in (("j", "2.png"), ("ArrowRight", "3.png"), ("ArrowRight", "0.png"),
                          ("k", "3.png"), ("ArrowLeft", "2.png")):  # fmt: skip
        inner.locator("body").press(key)
        assert at() == expected
    inner.locator("button:has-text('Lost (1)')").click()
    assert at() == "3.png"
    assert inner.locator(".count").inner_text() == "1 of 1"
    wide = inner.evaluate("document.documentElement.scrollWidth - innerWidth")
    assert wide <= 0
    assert trouble == []
    view.close()


def test_the_command_compares_files(tmp_path: Path) -> None:
    truth, results = random_case(1, num_images=8)
    for name, content in (("truth", truth), ("a", results), ("b", results[::2])):
        (tmp_path / f"{name}.json").write_text(json.dumps(content))

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, str(ROOT / "jobs" / "compare.py"), "a.json", *arguments],
            cwd=tmp_path, capture_output=True, text=True,
        )  # fmt: skip

    found = run("b.json", "--annotations", "truth.json", "--resamples", "30")
    assert found.returncode == 0, found.stderr
    assert "page: comparison-a-b.html" in found.stdout
    assert (tmp_path / "comparison-a-b.html").stat().st_size > 1_000_000
    refused = run("b.json")
    assert refused.returncode == 2
    assert refused.stderr.startswith("error: a.json: a file of detections needs its boxes")
