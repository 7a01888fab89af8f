"""Random detections for tests of matching and AP, and pycocotools as the reference."""

import contextlib
import io
from collections.abc import Sequence
from typing import Any

import numpy as np
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval


def random_case(
    seed: int, num_images: int = 12, num_categories: int = 4, *, rounded: bool = False
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Return boxes of all sizes, some of them crowds, with detections near, far and repeated.

    Ids have gaps and are unordered. The last category has no box, and the last image is empty.
    """
    rng = np.random.default_rng(seed)
    image_ids = (rng.permutation(num_images) * 7 + 3).tolist()
    annotations: list[dict[str, Any]] = []
    results: list[dict[str, Any]] = []

    def detect(image_id: int, category_id: int, box: list[float]) -> None:
        score = float(rng.random())
        results.append(
            {
                "image_id": image_id,
                "category_id": category_id,
                "bbox": box,
                "score": round(score, 1) if rounded else score,
            }
        )

    for image_id in image_ids[:-1]:
        for _ in range(rng.integers(0, 9)):
            category_id = int(rng.integers(1, num_categories))
            w, h = (float(v) for v in np.exp(rng.uniform(2, 5.5, 2)))
            box = [float(rng.uniform(0, 300)), float(rng.uniform(0, 300)), w, h]
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": image_id,
                    "category_id": category_id,
                    "bbox": box,
                    "area": w * h * float(rng.uniform(0.5, 1.0)),
                    "iscrowd": int(rng.random() < 0.15),
                }
            )
            for _ in range(rng.integers(0, 4)):
                scale = np.array([w, h, w, h]) * rng.choice([0.01, 0.05, 0.2])
                detect(image_id, category_id, (np.array(box) + rng.normal(size=4) * scale).tolist())
            if rng.random() < 0.3:
                detect(image_id, category_id, box)  # the same box twice: equal IoU
                detect(image_id, category_id, box)
        for _ in range(rng.integers(0, 3)):
            box = [*rng.uniform(0, 300, 2).tolist(), *rng.uniform(5, 120, 2).tolist()]
            detect(image_id, int(rng.integers(1, num_categories + 1)), box)
    truth = {
        "images": [{"id": i, "width": 640, "height": 640} for i in image_ids],
        "annotations": annotations,
        "categories": [{"id": i, "name": str(i)} for i in range(num_categories, 0, -1)],
    }
    return truth, results


def reference(truth: dict[str, Any], results: list[dict[str, Any]]) -> COCOeval:
    """Return pycocotools' evaluation, accumulated."""
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO()
        coco.dataset = {"info": {}} | truth
        coco.createIndex()
        evaluation = COCOeval(coco, coco.loadRes(results), "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
    return evaluation


def repeated(
    truth: dict[str, Any], results: list[dict[str, Any]], weights: Sequence[int]
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Return the data set with each image, in ascending order of ids, as often as its weight."""
    images, annotations, copies = [], [], []
    for place, image_id in enumerate(sorted(image["id"] for image in truth["images"])):
        for copy in range(weights[place]):
            new = {"image_id": 1000 * place + copy}
            images.append({"id": new["image_id"], "width": 640, "height": 640})
            annotations += [a | new for a in truth["annotations"] if a["image_id"] == image_id]
            copies += [r | new for r in results if r["image_id"] == image_id]
    annotations = [entry | {"id": i} for i, entry in enumerate(annotations, start=1)]
    return truth | {"images": images, "annotations": annotations}, copies
