"""Annotated scenes, and what a model of given quality detects in them."""

from __future__ import annotations

from typing import Any

import numpy as np

NAMES = ("<cat>", "dog", "a/b: c")


def scene(seed: int, num_images: int = 12, num_boxes: int = 4) -> dict[str, Any]:
    """Return boxes of three classes that do not touch each other."""
    rng = np.random.default_rng(seed)
    annotations = [
        {"id": 10 * image + n + 1, "image_id": image, "category_id": int(rng.integers(1, 4)),
         "bbox": [100.0 * n + rng.uniform(0, 20), rng.uniform(0, 50), *rng.uniform(20, 60, 2)],
         "iscrowd": 0}
        for image in range(num_images) for n in range(num_boxes)
    ]  # fmt: skip
    for one in annotations:
        one["area"] = one["bbox"][2] * one["bbox"][3]
    return {
        "images": [{"id": image, "file_name": f"{image}.jpg"} for image in range(num_images)],
        "annotations": annotations,
        "categories": [{"id": k, "name": name} for k, name in enumerate(NAMES, start=1)],
    }


def detections_of(ground_truth: dict[str, Any], seed: int, noise: float) -> list[dict[str, Any]]:
    """Return detections: boxes a little off, some classes wrong, some missed, some made up."""
    rng = np.random.default_rng(seed)
    results = []
    for one in ground_truth["annotations"]:
        if rng.random() < 0.3 * noise:
            continue
        category = one["category_id"] if rng.random() > 0.3 * noise else int(rng.integers(1, 4))
        moved = (np.array(one["bbox"]) + rng.normal(0, 1 + 8 * noise, 4)).tolist()
        results.append({"image_id": one["image_id"], "category_id": category,
                        "bbox": [*moved[:2], max(2, moved[2]), max(2, moved[3])],
                        "score": float(rng.uniform(0.6, 1))})  # fmt: skip
    for _ in range(round(40 * noise)):
        results.append({"image_id": int(rng.integers(12)), "category_id": int(rng.integers(1, 4)),
                        "bbox": [*rng.uniform(0, 400, 2), *rng.uniform(5, 60, 2)],
                        "score": float(rng.uniform(0, 0.8))})  # fmt: skip
    return results
