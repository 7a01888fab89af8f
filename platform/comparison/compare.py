"""Compare two models on the same images: by how much they differ, where, and why.

"Found" and "missed" count at an IoU of 0.5 and at each model's own operating score, where its F1 is
highest (analysis/analysis.py). So two models with differently calibrated scores are compared as
each would be used. AP and its interval need no threshold.
"""

# N detections   G boxes to find   I images

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from deta.platform.analysis.analysis import Explanation, explain
from deta.platform.comparison.sources import Side, refuse_other_images
from deta.platform.evaluation.match_table import AREA_RANGES, MatchTable, match_table
from deta.platform.evaluation.paired_bootstrap import MapLike, PairedDifference, paired_difference

Verdict = Literal["right", "wrong", "missed"]


@dataclass(frozen=True)
class ShownBox:
    """A box as it is drawn over an image."""

    box: tuple[float, float, float, float]  # xywh, pixels of the image
    category: str
    score: float | None  # None for a box that was missed
    verdict: Verdict
    is_change: bool  # the other model differs on this true box


@dataclass(frozen=True)
class ImageChange:
    """One image, under both models."""

    image_id: Any
    file_name: str
    errors: tuple[int, int]  # wrong and missed, of A and of B
    gained: int  # true boxes that B finds and A does not
    lost: int
    boxes: tuple[tuple[ShownBox, ...], tuple[ShownBox, ...]]

    @property
    def change(self) -> int:
        """Return by how many errors B has fewer; negative if it has more."""
        return self.errors[0] - self.errors[1]


@dataclass(frozen=True)
class FoundBoxes:
    """The numbers of true boxes that each model finds."""

    both: int
    only_a: int
    only_b: int
    neither: int


@dataclass(frozen=True)
class Comparison:
    """The content of the page, without images."""

    a: Side
    b: Side
    names: tuple[str, str]  # never the same
    difference: PairedDifference
    explanations: tuple[Explanation, Explanation]
    found: FoundBoxes
    gained: tuple[ImageChange, ...]  # images with fewer errors in B, most first
    lost: tuple[ImageChange, ...]
    num_same: int  # images with as many errors
    configuration: tuple[tuple[str, str, str], ...]  # (key, A, B) of what differs


def compare_sides(
    a: Side,
    b: Side,
    *,
    resamples: int = 1000,
    seed: int = 0,
    confidence: float = 0.95,
    map: MapLike = map,
) -> Comparison:
    """Compare two evaluations of the same images.

    Raises:
        ValueError: they are not of the same images and boxes; detections are broken.
    """
    refuse_other_images(a, b)
    # Each against A's ground truth: B's is the same but for order and the names of files.
    truth = a.ground_truth
    difference = paired_difference(
        truth, a.results, b.results,
        resamples=resamples, seed=seed, confidence=confidence, map=map,
    )  # fmt: skip
    explanations = (explain(truth, a.results), explain(truth, b.results))
    matches = [
        _Matches.of(match_table(truth, side.results, AREA_RANGES[:1]), side, one.operating_score)
        for side, one in zip((a, b), explanations, strict=True)
    ]
    changes = _changes(truth, matches[0], matches[1])
    counts = matches[0].table.truth_counts[0]
    in_a, in_b = (one.found[counts] for one in matches)
    names = (a.name, b.name) if a.name != b.name else (f"{a.name} (A)", f"{b.name} (B)")
    return Comparison(
        a=a,
        b=b,
        names=names,
        difference=difference,
        explanations=explanations,
        found=FoundBoxes(
            int((in_a & in_b).sum()),
            int((in_a & ~in_b).sum()),
            int((in_b & ~in_a).sum()),
            int((~in_a & ~in_b).sum()),
        ),
        gained=tuple(sorted((c for c in changes if c.change > 0), key=_by_change)),
        lost=tuple(sorted((c for c in changes if c.change < 0), key=_by_change)),
        num_same=sum(c.change == 0 for c in changes),
        configuration=configuration_difference(a.config, b.config),
    )


def configuration_difference(
    a: Mapping[str, Any], b: Mapping[str, Any]
) -> tuple[tuple[str, str, str], ...]:
    """Return the keys whose values differ, with both values; "-" where there is none.

    The result is empty if a side has no configuration, since then every key would differ.
    """
    if not a or not b:
        return ()
    rows = [(key, _value(a, key), _value(b, key)) for key in sorted(a.keys() | b.keys())]
    return tuple(row for row in rows if row[1] != row[2])


def _value(config: Mapping[str, Any], key: str) -> str:
    if key not in config:
        return "-"
    value = config[key]
    if isinstance(value, (list, tuple)):
        return ", ".join(map(str, value)) or "none"
    return "none" if value is None else str(value)


@dataclass(frozen=True)
class _Matches:
    """The detections of one model from its operating score on, matched to the true boxes."""

    table: MatchTable
    results: Sequence[Mapping[str, Any]]
    chosen: np.ndarray  # places of detections, right or wrong, by descending score
    right: np.ndarray  # of these
    found: np.ndarray  # G

    @staticmethod
    def of(table: MatchTable, side: Side, score: float) -> _Matches:
        counts = (table.score >= score) & ~table.ignored[0, 0]
        chosen = np.flatnonzero(counts)
        chosen = chosen[np.argsort(-table.score[chosen], kind="stable")]
        right = table.true[0, 0][chosen]
        found = np.zeros(len(table.truth_image), bool)
        found[table.found[0][chosen[right]]] = True
        return _Matches(table, side.results, chosen, right, found)


def _changes(truth: Mapping[str, Any], a: _Matches, b: _Matches) -> list[ImageChange]:
    table = a.table  # images, categories and true boxes are the same in both
    num_images, counts = len(table.image_ids), table.truth_counts[0]
    wrong, missed = [], []
    for one in (a, b):
        images = one.table.image[one.chosen[~one.right]]
        wrong.append(np.bincount(images, minlength=num_images))
        images = table.truth_image[counts & ~one.found]
        missed.append(np.bincount(images, minlength=num_images))
    gained = np.bincount(table.truth_image[counts & b.found & ~a.found], minlength=num_images)
    lost = np.bincount(table.truth_image[counts & a.found & ~b.found], minlength=num_images)
    files = {image["id"]: str(image.get("file_name", "")) for image in truth["images"]}
    boxes = [_boxes(truth, one, other) for one, other in ((a, b), (b, a))]
    return [
        ImageChange(
            image_id,
            files[image_id],
            (int(wrong[0][i] + missed[0][i]), int(wrong[1][i] + missed[1][i])),
            int(gained[i]),
            int(lost[i]),
            (tuple(boxes[0].get(i, ())), tuple(boxes[1].get(i, ()))),
        )
        for i, image_id in enumerate(table.image_ids)
    ]


def _boxes(truth: Mapping[str, Any], one: _Matches, other: _Matches) -> dict[int, list[ShownBox]]:
    """Return the boxes to draw, by place of the image: detections, then missed boxes."""
    table = one.table
    names = {category["id"]: str(category["name"]) for category in truth["categories"]}
    category = table.category
    shown: dict[int, list[ShownBox]] = {}
    for place, right in zip(one.chosen.tolist(), one.right.tolist(), strict=True):
        is_change = right and not other.found[table.found[0, place]]
        box = one.results[table.row[place]]["bbox"]
        shown.setdefault(int(table.image[place]), []).append(
            ShownBox(
                (float(box[0]), float(box[1]), float(box[2]), float(box[3])),
                names[table.category_ids[category[place]]],
                float(table.score[place]),
                "right" if right else "wrong",
                bool(is_change),
            )
        )
    for place in np.flatnonzero(table.truth_counts[0] & ~one.found).tolist():
        box = truth["annotations"][table.truth_row[place]]["bbox"]
        shown.setdefault(int(table.truth_image[place]), []).append(
            ShownBox(
                (float(box[0]), float(box[1]), float(box[2]), float(box[3])),
                names[table.category_ids[table.truth_category[place]]],
                None,
                "missed",
                bool(other.found[place]),
            )
        )
    return shown


def _by_change(change: ImageChange) -> tuple[int, int, str]:
    return -abs(change.change), -(change.gained + change.lost), str(change.image_id)
