"""The engines of AP: programs that match detections with ground truth by the rules of COCO.

hotcoco is the default: it is fast. pycocotools is the reference. Both give the same numbers, and
the tests compare them.
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


def evaluated(columns: CocoColumns, engine: Engine) -> Any:
    """Return an evaluation by either engine, -1 where a category has no box to find.

    Returns:
        An object with `stats`, the twelve numbers in COCO's order, and with the tables of `eval`:
        `precision` by IoU threshold, recall threshold, category, area range and limit on the
        detections per image; `recall` by the same without the recall threshold.
    """
    return {"hotcoco": hotcoco_evaluation, "pycocotools": pycocotools_evaluation}[engine](columns)


def hotcoco_evaluation(columns: CocoColumns) -> hotcoco.COCOeval:
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
    evaluation.summary_lines()  # computes `stats`; `summarize` would print
    return evaluation


def pycocotools_evaluation(columns: CocoColumns) -> Any:
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    def coco(boxes: Columns, **values: np.ndarray) -> COCO:
        """Return a set of boxes. `COCO.loadRes` would do for detections, but fails on none."""
        named = {
            "image_id": boxes.images, "category_id": boxes.categories, "bbox": boxes.boxes, **values
        }  # fmt: skip
        rows = zip(*(column.tolist() for column in named.values()), strict=True)
        data = COCO()
        data.dataset = {
            "images": [{"id": rank} for rank in _ranks(columns.image_ids)],
            "categories": [{"id": rank} for rank in _ranks(columns.category_ids)],
            "annotations": [
                {"id": number, **dict(zip(named, row, strict=True))}
                for number, row in enumerate(rows, start=1)
            ],
        }
        data.createIndex()
        return data

    areas = columns.found.boxes[:, 2] * columns.found.boxes[:, 3]
    with contextlib.redirect_stdout(io.StringIO()):  # it prints its progress
        expected = coco(columns.true, area=columns.areas, iscrowd=columns.crowd.astype(np.int64))
        detected = coco(columns.found, area=areas, score=columns.scores)
        evaluation = COCOeval(expected, detected, "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return evaluation


def _ranks(ids: list[Any]) -> range:
    return range(1, len(ids) + 1)
