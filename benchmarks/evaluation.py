"""Measure the cost of error analysis and comparison at the size of COCO val2017.

  python benchmarks/evaluation.py                        5,000 images, 1,000 resamples
  python benchmarks/evaluation.py --images 500 --resamples 100

One run measures COCO's metrics and the error analysis (jobs/evaluate.py and each evaluation of a
training do both), the files written to disk, and the paired bootstrap of jobs/compare.py. Ground
truth and detections are synthetic. The share of the analysis in an evaluation depends on the speed
of the model, so it is printed for several speeds.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from measuring import processor

from deta.platform.analysis.analysis import EXPLANATION, explain, write_explanation
from deta.platform.evaluation.coco_metrics import evaluate_detections
from deta.platform.evaluation.evaluation_folder import Origin, write_evaluation
from deta.platform.evaluation.paired_bootstrap import ap_interval, paired_difference

BOXES_PER_IMAGE, NUM_CLASSES, DETECTIONS_PER_IMAGE = 7.4, 80, 100  # as in COCO and its metrics
IMAGES_PER_S = (10, 50, 200)

T = TypeVar("T")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images", type=int, default=5000)
    parser.add_argument("--resamples", type=int, default=1000)
    arguments = parser.parse_args()
    truth = synthetic_truth(arguments.images)
    a, b = (synthetic_results(truth, seed, noise) for seed, noise in ((1, 0.08), (2, 0.06)))
    print(f"{processor()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}")
    print(f"{len(truth['images'])} images, {len(truth['annotations'])} boxes, "
          f"{NUM_CLASSES} classes, {len(a)} detections\n")  # fmt: skip
    print("| | seconds |\n|---|---|")
    metrics = timed("COCO metrics", lambda: evaluate_detections(truth, a))
    explanation = timed("error analysis", lambda: explain(truth, a))
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "evaluation"
        origin = Origin(description="synthetic", data_fingerprint="0" * 64)
        timed(
            "evaluation, written to disk",
            lambda: write_evaluation(folder, truth, a, metrics, origin),
        )
        timed(
            "error analysis, written to disk",
            lambda: write_explanation(folder / EXPLANATION, explanation),
        )
    print("\nshare of the error analysis in the time of an evaluation:")
    for rate in IMAGES_PER_S:
        inference_s = arguments.images / rate
        share = explanation.seconds / (explanation.seconds + inference_s)
        print(f"  {100 * share:.0f} % at {rate} images/s")
    print()

    print("| | seconds |\n|---|---|")
    timed(f"interval of one AP, {arguments.resamples} resamples",
          lambda: ap_interval(truth, a, resamples=arguments.resamples))  # fmt: skip
    what = f"{arguments.resamples} paired resamples"
    found = timed(what, lambda: paired_difference(truth, a, b, resamples=arguments.resamples))
    print(f"\nAP {100 * found.ap_a:.1f} and {100 * found.ap_b:.1f}; difference "
          f"{100 * found.difference:+.2f}, interval {100 * found.low:+.2f} to "
          f"{100 * found.high:+.2f}\n")  # fmt: skip


def timed(what: str, call: Callable[[], T]) -> T:
    began_s = time.perf_counter()
    result = call()
    print(f"| {what} | {time.perf_counter() - began_s:.1f} |", flush=True)
    return result


def synthetic_truth(num_images: int) -> dict[str, Any]:
    rng = np.random.default_rng(0)
    annotations = []
    for image_id in range(1, num_images + 1):
        for _ in range(rng.poisson(BOXES_PER_IMAGE)):
            w, h = np.exp(rng.uniform(2.5, 5.5, 2))
            annotations.append({
                "id": len(annotations) + 1, "image_id": image_id,
                "category_id": int(1 + NUM_CLASSES * rng.random() ** 2),  # some are more frequent
                "bbox": [*rng.uniform(0, (400, 300)).tolist(), float(w), float(h)],
                "area": float(w * h), "iscrowd": int(rng.random() < 0.01),
            })  # fmt: skip
    return {
        "images": [{"id": i, "width": 640, "height": 480} for i in range(1, num_images + 1)],
        "annotations": annotations,
        "categories": [{"id": i, "name": f"class {i}"} for i in range(1, NUM_CLASSES + 1)],
    }


def synthetic_results(truth: dict[str, Any], seed: int, noise: float) -> list[dict[str, Any]]:
    """Make detections: most true boxes, shifted by `noise` of their size, and random boxes."""
    rng = np.random.default_rng(seed)
    results = []
    true: dict[int, list[dict[str, Any]]] = {image["id"]: [] for image in truth["images"]}
    for annotation in truth["annotations"]:
        true[annotation["image_id"]].append(annotation)
    for image_id, boxes in true.items():
        for box in boxes:
            if rng.random() < 0.85:
                _, _, w, h = box["bbox"]
                moved = np.array(box["bbox"]) + rng.normal(size=4) * noise * np.array([w, h, w, h])
                wrong = rng.random() < 0.1
                results.append({
                    "image_id": image_id,
                    "category_id": int(rng.integers(1, NUM_CLASSES + 1)) if wrong
                    else box["category_id"],
                    "bbox": moved.tolist(), "score": float(rng.beta(4, 2)),
                })  # fmt: skip
        for _ in range(max(0, DETECTIONS_PER_IMAGE - len(boxes))):
            results.append({
                "image_id": image_id, "category_id": int(rng.integers(1, NUM_CLASSES + 1)),
                "bbox": [*rng.uniform(0, 400, 2).tolist(), *rng.uniform(5, 200, 2).tolist()],
                "score": float(rng.beta(1, 8)),
            })  # fmt: skip
    return results


if __name__ == "__main__":
    main()
