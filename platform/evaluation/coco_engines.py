"""The engines of AP: programs that match detections with ground truth by the rules of COCO.

hotcoco is the default: it is fast. pycocotools is the reference. Both give the same numbers, and
the tests compare them. Both return an object whose `eval` has the tables `precision` and `recall`.
"""

# M entries of a list

from __future__ import annotations

import contextlib
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from deta.platform.evaluation.coco_columns import CocoColumns, Columns, read_columns
from deta.platform.run.config import Engine

if TYPE_CHECKING:
    import hotcoco


@dataclass(frozen=True, kw_only=True)
class Matched(CocoColumns):
    """Ground truth and detections, matched by hotcoco."""

    evaluation: hotcoco.COCOeval  # accumulated; knows detection m as id m + 1


def match_detections(
    ground_truth: Mapping[str, Any], results: Sequence[Mapping[str, Any]]
) -> Matched:
    """Match detections with ground truth, and return which detection matched which box.

    Raises:
        ValueError: as for `evaluate_detections`.
    """
    columns = read_columns(ground_truth, results)
    return Matched(**vars(columns), evaluation=hotcoco_evaluation(columns))


def accumulated_tables(columns: CocoColumns, engine: Engine) -> Mapping[str, np.ndarray]:
    """Return the tables of COCO from either engine, -1 where a category has no box to find.

    Returns:
        `precision` by IoU threshold, recall threshold, category, area range and limit on the
        detections per image; `recall` by the same without the recall threshold.
    """
    run = {"hotcoco": hotcoco_evaluation, "pycocotools": pycocotools_evaluation}[engine]
    tables = run(columns).eval
    assert tables is not None
    return tables


def hotcoco_evaluation(columns: CocoColumns) -> hotcoco.COCOeval:
    """Return an accumulated evaluation by hotcoco."""
    import hotcoco

    true, found = columns.true, columns.found
    expected = hotcoco.COCO.from_arrays(
        [{"id": rank} for rank in _ranks(columns.image_ids)],
        [{"id": rank, "name": str(rank)} for rank in _ranks(columns.category_ids)],
        true.images,
        true.categories,
        true.boxes,
        area=columns.areas,
        iscrowd=columns.crowd,
    )
    # M 7, in the order of columns that load_res reads
    rows = np.column_stack([found.images, found.boxes, columns.scores, found.categories])
    evaluation = hotcoco.COCOeval(expected, expected.load_res(rows.astype(np.float64)), "bbox")
    evaluation.evaluate()
    evaluation.accumulate()
    return evaluation


def pycocotools_evaluation(columns: CocoColumns) -> Any:
    """Return an accumulated evaluation by pycocotools."""
    from pycocotools.cocoeval import COCOeval

    areas = columns.found.boxes[:, 2] * columns.found.boxes[:, 3]
    with contextlib.redirect_stdout(io.StringIO()):  # it prints its progress
        expected = _pycocotools_set(
            columns, columns.true, area=columns.areas, iscrowd=columns.crowd.astype(np.int64)
        )
        detected = _pycocotools_set(columns, columns.found, area=areas, score=columns.scores)
        evaluation = COCOeval(expected, detected, "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
    return evaluation


def _pycocotools_set(columns: CocoColumns, boxes: Columns, **values: np.ndarray) -> Any:
    """Return boxes as a `pycocotools.coco.COCO`, with further values for each of them.

    `COCO.loadRes` does this for detections, but fails if there are none.
    """
    from pycocotools.coco import COCO

    data = COCO()
    data.dataset = {
        "images": [{"id": rank} for rank in _ranks(columns.image_ids)],
        "categories": [{"id": rank} for rank in _ranks(columns.category_ids)],
        "annotations": [
            {"id": number, "image_id": image, "category_id": category, "bbox": box, **named}
            for number, image, category, box, named in zip(
                range(1, len(boxes.images) + 1),
                boxes.images.tolist(),
                boxes.categories.tolist(),
                boxes.boxes.tolist(),
                _rows(values, len(boxes.images)),
                strict=True,
            )
        ],
    }
    data.createIndex()
    return data


def _rows(values: Mapping[str, np.ndarray], num_rows: int) -> list[dict[str, Any]]:
    columns = {name: column.tolist() for name, column in values.items()}
    return [{name: column[i] for name, column in columns.items()} for i in range(num_rows)]


def _ranks(ids: list[Any]) -> range:
    return range(1, len(ids) + 1)
