"""Small evaluations to compare."""

from __future__ import annotations

from typing import Any

import pytest

from deta.platform.comparison.compare import Comparison, compare_sides
from deta.platform.comparison.sources import Side
from deta.platform.evaluation.evaluation_folder import images_fingerprint

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
    return compare_sides(
        side("first", truth, a, config=config, curve=curve),
        side("second", truth, b, config=config | {"optim.lr": 0.01}, curve=curve),
        resamples=60,
    )
