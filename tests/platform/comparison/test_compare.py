"""Two evaluations of the same images compared, and the page of it in a real browser."""

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

from deta.platform.comparison.compare import Comparison, compare, configuration_difference
from deta.platform.comparison.report import verdict, write_comparison
from deta.platform.comparison.sources import Side, open_side
from deta.platform.evaluation.coco_metrics import evaluate_detections
from deta.platform.evaluation.evaluation_folder import Origin, images_fingerprint, write_evaluation
from tests.platform.evaluation.detection_cases import random_case

ROOT = Path(__file__).resolve().parents[3]
HOSTILE = '<script>alert("1")</script>'


def detection(image_id: int, x: float, score: float, category_id: int = 1) -> dict[str, Any]:
    box = [x, 10.0, 40.0, 40.0]
    return {"image_id": image_id, "category_id": category_id, "bbox": box, "score": score}


def boxes(num_images: int) -> dict[str, Any]:
    """Two boxes on each image, side by side, one of each class."""
    return {
        "images": [
            {"id": i, "width": 160, "height": 60, "file_name": f"{i}.png"}
            for i in range(num_images)
        ],
        "annotations": [
            {
                "id": 2 * i + c,
                "image_id": i,
                "category_id": c,
                "bbox": [100.0 * (c - 1), 10.0, 40.0, 40.0],
                "area": 1600.0,
                "iscrowd": 0,
            }
            for i in range(num_images)
            for c in (1, 2)
        ],
        "categories": [{"id": 1, "name": HOSTILE}, {"id": 2, "name": "box"}],
    }


def side(name: str, truth: dict[str, Any], results: list[dict[str, Any]], **more: Any) -> Side:
    return Side(name, f"{name}.json", truth, results, images_fingerprint(truth), **more)


@pytest.fixture(scope="module")
def compared() -> Comparison:
    """A misses the second box of images 0 to 2; B is wrong once on image 3; 4 is alike."""
    truth = boxes(5)
    both = [detection(i, 0, 0.9) for i in range(5)]
    a = both + [detection(i, 100, 0.8, 2) for i in (3, 4)]
    b = both + [detection(i, 100, 0.8, 2) for i in range(5)] + [detection(3, 50, 0.85)]
    config = {"optim.lr": 0.001, "seed": 1, "data.sizes": [1, 2]}
    curve = ((5.0, 3.0), (10.0, 12.5))
    return compare(
        side("first", truth, a, config=config, curve=curve),
        side("second", truth, b, config=config | {"optim.lr": 0.01}, curve=curve),
        resamples=60,
    )


@pytest.fixture(scope="module")
def page(compared: Comparison, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("comparison")
    for i in range(5):
        pixels = np.full((60, 160, 3), 40 * i + 30, np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.png")
    assert write_comparison(folder / "page.html", compared, folder) == 4
    return folder / "page.html"


def test_images_gained_and_lost_are_counted(compared: Comparison) -> None:
    assert [change.image_id for change in compared.gained] == [0, 1, 2]
    assert [change.image_id for change in compared.lost] == [3]
    assert compared.num_same == 1
    found = compared.found
    assert (found.both, found.only_a, found.only_b, found.neither) == (7, 0, 3, 0)
    first = compared.gained[0]
    assert (first.errors, first.gained, first.lost) == ((1, 0), 1, 0)
    assert [(b.verdict, b.is_change) for b in first.boxes[0]] == [
        ("right", False),
        ("missed", True),
    ]
    assert [(b.verdict, b.is_change) for b in first.boxes[1]] == [("right", False), ("right", True)]
    assert {b.verdict for b in compared.lost[0].boxes[1]} == {"right", "wrong"}


def test_a_side_compared_with_itself_is_equal() -> None:
    truth, results = random_case(2, num_images=8)
    both = compare(side("x", truth, results), side("x", truth, results), resamples=30)

    assert both.gained == both.lost == ()
    assert both.names == ("x (A)", "x (B)")
    assert verdict(both)[0] == "The two are equal: no image makes a difference."


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"images": [{"id": i} for i in (0, 1, 9)]}, r"A has 3 images and B 3, 2 of them the same "
         r"\(only in A: 2\) \(only in B: 9\)"),
        ({"categories": [{"id": 1, "name": HOSTILE}, {"id": 2, "name": "can"}]},
         r"1 categories differ \(such as: 2 \(box / can\)\)"),
        ({"annotations": boxes(3)["annotations"][:-1]}, r"the boxes of 1 images differ "
         r"\(such as: 2\)"),
    ],
)  # fmt: skip
def test_other_images_or_boxes_are_refused_by_name(change: dict[str, Any], words: str) -> None:
    truth = boxes(3)
    with pytest.raises(ValueError, match=words):
        compare(side("a", truth, []), side("b", truth | change, []))


def test_only_keys_that_differ_are_shown() -> None:
    a = {"lr": 0.1, "sizes": [1, 2], "seed": None}
    assert configuration_difference(a, {"lr": 0.1, "sizes": (1, 3), "new": True}) == (
        ("new", "-", "True"),
        ("seed", "none", "-"),
        ("sizes", "1, 2", "1, 3"),
    )
    assert configuration_difference(a, {}) == ()


def test_a_run_brings_its_best_evaluation_curve_and_cost(tmp_path: Path) -> None:
    truth = boxes(3)
    run = tmp_path / "tuned"
    for step, found in ((10, 3), (20, 1)):
        results = [detection(i, 0, 0.9) for i in range(found)]
        metrics = evaluate_detections(truth, results)
        folder = run / "evaluations" / f"step-{step:08d}"
        write_evaluation(folder, truth, results, metrics, Origin(description=f"step {step}"))
    config = {"optim": {"lr": 0.1}, "cluster": {"num_workers": 2, "gpu": True}}
    (run / "run.json").write_text(json.dumps({"config": config}))
    events = [
        {"kind": "begin", "time_s": 1000.0, "step": 0},
        {"kind": "evaluation", "time_s": 1500.0, "step": 10,
         "metrics": {"val/AP": 40.0, "val/epoch": 1.0}},
        {"kind": "begin", "time_s": 9000.0, "step": 10},  # begun again after a night
        {"kind": "end", "time_s": 9100.0, "step": 20, "metrics": {}},
    ]  # fmt: skip
    (run / "journal.jsonl").write_text("".join(json.dumps(event) + "\n\n" for event in events))

    found = open_side(str(run))

    assert (found.name, found.description) == ("tuned", "step 10")
    assert found.curve == ((1.0, 40.0),)
    assert found.config == {"optim.lr": 0.1, "cluster.num_workers": 2, "cluster.gpu": True}
    assert found.cost is not None
    assert found.cost.wall_s == 600
    assert found.cost.gpu_hours == pytest.approx(1200 / 3600)
    inner = open_side(str(run / "evaluations" / "step-00000020"))
    assert inner.name == "tuned, step-00000020"
    assert inner.curve == found.curve


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("nothing", "is no folder, file, models:/NAME@ALIAS, or id of an MLflow run"),
        ("empty", "holds neither a run .* nor an evaluation"),
        ("run", "this run has no evaluation in it; make one with jobs/evaluate.py"),
        ("found.json", "needs its boxes: --annotations FILE"),
    ],
)
def test_what_cannot_be_compared_is_refused(tmp_path: Path, name: str, words: str) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "run.json").write_text('{"config": {}}')
    (tmp_path / "found.json").write_text("[]")
    with pytest.raises(ValueError, match=words):
        open_side(str(tmp_path / name))


def test_the_page_reads_without_javascript(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert text.count('class="slide"') == 4
    assert HOSTILE not in text
    assert "fewer errors in B" in text
    for word in ("Difference", "Kinds of errors", "Images gained and lost", "optim.lr", "0.01"):
        assert word in text
    assert re.search(r"script-src ('sha256-[\w+/=]+' ?){3};", html.unescape(text[:2000]))


def test_without_pictures_the_page_says_so(compared: Comparison, tmp_path: Path) -> None:
    assert write_comparison(tmp_path / "page.html", compared, None) == 0
    assert "No pictures were found to show" in (tmp_path / "page.html").read_text("utf-8")
    long = replace(compared, names=("a" * 300, "b" * 300))
    write_comparison(tmp_path / "long.html", long, tmp_path)


@pytest.mark.parametrize("framed", [False, True], ids=["alone", "in a sandbox"])
def test_keys_and_buttons_step_through_the_pictures(
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
