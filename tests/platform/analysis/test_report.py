"""The page of an evaluation is complete, safe and bounded, whatever the names of classes are."""

from __future__ import annotations

import html
import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from deta.platform.analysis.analysis import explain, write_explanation
from deta.platform.analysis.report import write_evaluation_report
from deta.platform.analysis.tide_errors import KINDS
from deta.platform.evaluation.coco_metrics import evaluate_detections
from deta.platform.evaluation.evaluation_folder import Origin

EVIL = '<script>alert("1")</script>'
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
MAX_BYTES = 7_500_000  # plotly itself has 4.8 million


def case(num_classes: int, num_images: int) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Return boxes, and the results of a poor model: half of the classes wrong, all boxes off."""
    rng = np.random.default_rng(0)
    annotations, results = [], []
    for image in range(num_images):
        for _ in range(5):
            box = [*rng.uniform(0, 200, 2), *rng.uniform(10, 80, 2)]
            category = int(rng.integers(num_classes))
            annotations.append({"id": len(annotations) + 1, "image_id": image, "bbox": box,
                                "category_id": category, "area": box[2] * box[3]})  # fmt: skip
            named = category if rng.random() < 0.5 else int(rng.integers(num_classes))
            results.append({"image_id": image, "category_id": named, "score": float(rng.random()),
                            "bbox": (np.array(box) + rng.uniform(-9, 9, 4)).tolist()})  # fmt: skip
    categories = [{"id": k, "name": f"{EVIL} & {k}"} for k in range(num_classes)]
    images = [{"id": image, "file_name": f"{EVIL}{image}.jpg"} for image in range(num_images)]
    return {"images": images, "annotations": annotations, "categories": categories}, results


def noise_image(image_id: Any) -> Image.Image | None:
    """Return noise, which no JPEG makes small; every fifth image is unreadable."""
    if image_id % 5 == 0:
        return None
    pixels = np.random.default_rng(image_id).integers(0, 255, (300, 300, 3), np.uint8)
    return Image.fromarray(pixels)


@pytest.mark.parametrize("num_classes", [1, 3, 365])
def test_the_page_is_safe_and_bounded(num_classes: int, tmp_path: Path) -> None:
    ground_truth, results = case(num_classes, 40)
    explanation = explain(ground_truth, results)
    metrics = evaluate_detections(ground_truth, results)
    origin = Origin(description=EVIL, annotations=EVIL, step=3, config={"a": 1})

    write_evaluation_report(
        tmp_path / "r.html", explanation, metrics, origin, ground_truth, noise_image
    )

    text = (tmp_path / "r.html").read_text(encoding="utf-8")
    assert len(text.encode()) < MAX_BYTES
    assert "alert(" in text
    assert "<script>alert" not in text
    assert text.count("<script") == 3  # plotly, ours, and the numbers
    assert "default-src 'none'" in html.unescape(text[:1000])
    elements = re.sub(r"<script.*?</script>", "", text, flags=re.DOTALL)  # plotly names its makers
    assert not re.search(r'(src|href)="https?:', elements)
    assert text.count('class="shot"') >= 9
    assert ("None are listed" in text) == (explanation.best_f1 < 0.6) == (num_classes > 1)
    assert all(kind in text for kind in (*KINDS, "missed"))
    numbers = json.loads(re.search(r'id="figures">(.*?)</script>', text)[1])  # type: ignore[index]
    assert set(numbers) == {
        "Cost-of-each-error-type-1", "Precision-over-recall-mean-of-the-classes-1",
        "Precision-over-recall-of-each-class-IoU-0-5-1", "Confusion-matrix-1",
        "Share-of-correct-detections-over-their-score-1",
    }  # fmt: skip


@pytest.mark.parametrize("what", ["results", "annotations"])
def test_a_page_of_nothing(what: str, tmp_path: Path) -> None:
    ground_truth, results = case(2, 3)
    if what == "results":
        results = []
    else:
        ground_truth["annotations"] = []
    explanation = explain(ground_truth, results)
    metrics = evaluate_detections(ground_truth, results)

    write_evaluation_report(tmp_path / "r.html", explanation, metrics, Origin(), ground_truth, None)
    write_explanation(tmp_path / "e.json", explanation)

    assert 'class="shot"' not in (tmp_path / "r.html").read_text(encoding="utf-8")
    numbers = json.loads((tmp_path / "e.json").read_text(), parse_constant=pytest.fail)
    assert len(numbers["classes"]) == 2


@pytest.mark.parametrize(("width", "scheme"), [(1400, "light"), (390, "dark")])
def test_a_browser_draws_everything_and_requests_nothing(
    width: int, scheme: Any, tmp_path: Path
) -> None:
    api = pytest.importorskip("playwright.sync_api")
    if CHROMIUM is None:
        pytest.skip("no chromium")
    ground_truth, results = case(9, 40)
    explanation = explain(ground_truth, results)
    metrics = evaluate_detections(ground_truth, results)
    path = tmp_path / "r.html"
    write_evaluation_report(path, explanation, metrics, Origin(), ground_truth, noise_image)
    trouble: list[str] = []
    with api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        view = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
        view.on("console", lambda message: trouble.append(message.text))
        view.on("pageerror", lambda error: trouble.append(str(error)))
        view.on("dialog", lambda dialog: (trouble.append("dialog"), dialog.dismiss()))
        view.on("request", lambda sent: trouble.append(sent.url) if sent.url[:4] == "http" else 0)
        view.goto(path.as_uri(), timeout=120_000)

        drawn = view.evaluate(
            "[...document.querySelectorAll('.plot')].map((p) => p.children.length)"
        )
        assert drawn == [1] * 5
        assert view.evaluate("document.documentElement.scrollWidth") == width
        hidden = "[...document.querySelectorAll('.shot')].filter((i) => i.clientWidth < 60).length"
        assert view.evaluate(hidden) == 0
        browser.close()
    assert trouble == []
