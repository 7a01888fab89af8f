"""An evaluation folder is read back as it was written, or refused with a reason."""

from __future__ import annotations

import gzip
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from deta.model.postprocess import Detections
from deta.platform.evaluation.coco_metrics import evaluate_detections, to_coco_results
from deta.platform.evaluation.evaluation_folder import (
    DETECTIONS,
    FACTS,
    GROUND_TRUTH,
    Origin,
    images_fingerprint,
    read_evaluation,
    write_evaluation,
)
from deta.platform.system.safe_read import file_sha256

ORIGIN = Origin(
    description="a <model>", weights_sha256="ab" * 32, config={"optim.lr": 1e-4}, epoch=3.0, step=9
)


def example(seed: int = 0) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Return three images with boxes as a model returns them, the last without a detection."""
    generator = torch.Generator().manual_seed(seed)
    corners = 300 * torch.rand(2, 7, 2, 2, generator=generator)
    boxes_px = torch.cat([corners.amin(2), corners.amax(2)], -1)  # 2 images, 7 boxes
    scores = torch.rand(2, 7, generator=generator)
    labels = torch.arange(7) % 2
    results = [
        entry
        for image, (own, score) in enumerate(zip(boxes_px, scores, strict=True))
        for entry in to_coco_results(Detections(score, labels, own), 10 + image, [3, 7])
    ]
    annotations = [
        {"id": n, "image_id": 10 + n % 2, "category_id": entry["category_id"],
         "bbox": entry["bbox"], "area": 4000.5 * n, "iscrowd": int(n % 3 == 0)}
        for n, entry in enumerate(results[:5], start=1)
    ]  # fmt: skip
    images = [
        {"id": 10 + n, "file_name": f"ü{n}.jpg", "width": 300, "height": 300} for n in range(3)
    ]
    categories = [{"id": 7, "name": "dog"}, {"id": 3, "name": "<cat>"}]
    return {"images": images, "annotations": annotations, "categories": categories}, results


def test_what_is_read_is_what_was_written(tmp_path: Path) -> None:
    ground_truth, results = example()
    metrics = evaluate_detections(ground_truth, results)

    write_evaluation(tmp_path / "e", ground_truth, results, metrics, ORIGIN)
    read = read_evaluation(tmp_path / "e")

    assert read.ground_truth == ground_truth
    assert read.results == results  # to the last bit: AP from the folder is AP
    assert read.metrics == metrics
    assert read.origin == ORIGIN
    assert read.images_fingerprint == images_fingerprint(ground_truth)


def test_the_engine_is_recorded_and_an_older_file_is_of_hotcoco(tmp_path: Path) -> None:
    ground_truth, results = example()
    metrics = evaluate_detections(ground_truth, results, "pycocotools")
    write_evaluation(
        tmp_path, ground_truth, results, metrics, replace(ORIGIN, engine="pycocotools")
    )
    assert read_evaluation(tmp_path).origin.engine == "pycocotools"

    facts = json.loads((tmp_path / FACTS).read_text())
    assert facts.pop("engine") == "pycocotools"
    (tmp_path / FACTS).write_text(json.dumps(facts))

    assert read_evaluation(tmp_path).origin.engine == "hotcoco"


def test_no_detections_at_all(tmp_path: Path) -> None:
    ground_truth, _ = example()
    write_evaluation(tmp_path, ground_truth, [], evaluate_detections(ground_truth, []), ORIGIN)
    assert read_evaluation(tmp_path).results == []


def test_the_fingerprint_covers_all_that_ap_depends_on() -> None:
    ground_truth, _ = example()
    own = images_fingerprint(ground_truth)
    turned = {kind: entries[::-1] for kind, entries in ground_truth.items()}
    numbered = ground_truth | {
        "annotations": [entry | {"id": 99 - entry["id"]} for entry in ground_truth["annotations"]]
    }
    fewer = ground_truth | {"images": ground_truth["images"][:2]}
    moved = ground_truth | {
        "annotations": [
            entry | {"bbox": [entry["bbox"][0] + 1, *entry["bbox"][1:]]}
            for entry in ground_truth["annotations"]
        ]
    }
    assert images_fingerprint(turned) == images_fingerprint(numbered) == own
    assert len({own, images_fingerprint(fewer), images_fingerprint(moved)}) == 3


def test_an_incomplete_folder_is_refused(tmp_path: Path) -> None:
    ground_truth, results = example()
    metrics = evaluate_detections(ground_truth, results)
    with pytest.raises(ValueError, match=r"not a complete evaluation.*--out"):
        read_evaluation(tmp_path)
    write_evaluation(tmp_path, ground_truth, results, metrics, ORIGIN)
    facts = json.loads((tmp_path / FACTS).read_text())

    for name in (DETECTIONS, GROUND_TRUTH):
        content = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(content[:-1])
        with pytest.raises(ValueError, match=f"{name} is not the file that"):
            read_evaluation(tmp_path)
        (tmp_path / name).unlink()
        with pytest.raises(ValueError, match=f"{name} is missing"):
            read_evaluation(tmp_path)
        (tmp_path / name).write_bytes(content)
    read_evaluation(tmp_path)
    for changed, message in (
        (facts | {"format": 2}, "format 2"),
        (facts | {"ap": facts["ap"] | {"AP": 1.5}}, "twelve numbers"),
        ({key: facts[key] for key in facts if key != "epoch"}, "lacks .*epoch"),
        ([], "is not what"),
    ):
        (tmp_path / FACTS).write_text(json.dumps(changed))
        with pytest.raises(ValueError, match=message):
            read_evaluation(tmp_path)


def test_a_detection_of_an_unknown_image_is_refused(tmp_path: Path) -> None:
    ground_truth, results = example()
    metrics = evaluate_detections(ground_truth, results)
    with pytest.raises(ValueError, match=r"1 images that the ground truth does not have \(99\)"):
        write_evaluation(tmp_path, ground_truth, [results[0] | {"image_id": 99}], metrics, ORIGIN)


def test_stored_detections_of_an_unknown_category_are_refused_or_left_out(tmp_path: Path) -> None:
    """As in a folder that another program wrote."""
    ground_truth, results = example()
    metrics = evaluate_detections(ground_truth, results)
    write_evaluation(tmp_path, ground_truth, results, metrics, ORIGIN)
    fewer = {**ground_truth, "categories": ground_truth["categories"][1:]}
    gone = ground_truth["categories"][0]["id"]
    fewer["annotations"] = [a for a in fewer["annotations"] if a["category_id"] != gone]
    (tmp_path / GROUND_TRUTH).write_bytes(gzip.compress(json.dumps(fewer).encode()))
    facts = json.loads((tmp_path / FACTS).read_text())
    facts["sha256"][GROUND_TRUTH] = file_sha256(tmp_path / GROUND_TRUTH)
    (tmp_path / FACTS).write_text(json.dumps(facts))
    count = sum(result["category_id"] == gone for result in results)
    assert count > 0

    with pytest.raises(ValueError, match=rf"{count} of {len(results)} detections are of 1 categ"):
        read_evaluation(tmp_path)
    said: list[str] = []
    assert len(read_evaluation(tmp_path, said.append).results) == len(results) - count
    assert f"Left out: {count} of {len(results)}" in said[0]
