"""Compare two models on the same images: by how much they differ, where, and why.

"Found" and "missed" count at an IoU of 0.5 and at each model's own operating score, where its F1 is
highest (analysis/analysis.py). So two models with differently calibrated scores are compared as
each would be used. AP and its interval need no threshold.
"""

# M detections   A true boxes

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from deta.platform.analysis.analysis import Explanation, explain, outcomes
from deta.platform.comparison.sources import Side, refuse_other_images
from deta.platform.evaluation.paired_bootstrap import PairedDifference, paired_difference


@dataclass(frozen=True)
class ImageChange:
    """One image, under both models."""

    image_id: Any
    file_name: str
    errors: tuple[int, int]  # wrong and missed, of A and of B
    gained: int  # true boxes that B finds and A does not
    lost: int

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

    sides: tuple[Side, Side]
    names: tuple[str, str]  # never the same
    difference: PairedDifference
    explanations: tuple[Explanation, Explanation]
    found: FoundBoxes
    gained: tuple[ImageChange, ...]  # images with fewer errors in B, most first
    lost: tuple[ImageChange, ...]
    num_same: int  # images with as many errors
    configuration: tuple[tuple[str, str, str], ...]  # (key, A, B) of what differs

    @property
    def class_names(self) -> dict[int, str]:
        """Return the names of the categories by their ids."""
        return {one.category_id: one.name for one in self.explanations[0].classes}


def compare_sides(
    a: Side,
    b: Side,
    *,
    resamples: int = 1000,
    seed: int = 0,
    confidence: float = 0.95,
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
        resamples=resamples, seed=seed, confidence=confidence,
    )  # fmt: skip
    explanations = (explain(truth, a.results), explain(truth, b.results))
    files = {image["id"]: str(image.get("file_name", "")) for image in truth["images"]}
    found, changes = _changes(explanations, files)
    changes.sort(key=lambda c: (-abs(c.change), -(c.gained + c.lost), str(c.image_id)))
    return Comparison(
        sides=(a, b),
        names=(a.name, b.name) if a.name != b.name else (f"{a.name} (A)", f"{b.name} (B)"),
        difference=difference,
        explanations=explanations,
        found=found,
        gained=tuple(c for c in changes if c.change > 0),
        lost=tuple(c for c in changes if c.change < 0),
        num_same=sum(c.change == 0 for c in changes),
        configuration=configuration_difference(a.config, b.config),
    )


def _changes(
    explanations: tuple[Explanation, Explanation], files: Mapping[Any, str]
) -> tuple[FoundBoxes, list[ImageChange]]:
    """Return how many true boxes each model finds, in all and on each image."""
    matched = explanations[0].matched  # images and true boxes are the same in both
    length, real = len(matched.image_ids), ~matched.crowd
    errors, found = [], []
    for one in explanations:
        wrong, is_found = outcomes(one.matched, one.errors, one.operating_score)
        places = np.append(
            one.matched.found.images[wrong], matched.true.images[real & ~is_found]
        )  # of all errors
        errors.append(np.bincount(places - 1, minlength=length).tolist())
        found.append(is_found)
    in_a, in_b = found
    gained, lost = (
        np.bincount(matched.true.images[which] - 1, minlength=length).tolist()
        for which in (in_b & ~in_a, in_a & ~in_b)
    )
    changes = [
        ImageChange(image_id, files[image_id], (errors[0][i], errors[1][i]), gained[i], lost[i])
        for i, image_id in enumerate(matched.image_ids)
    ]
    neither = int((real & ~in_a & ~in_b).sum())
    return FoundBoxes(int((in_a & in_b).sum()), sum(lost), sum(gained), neither), changes


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
    value = config.get(key, "-")
    if isinstance(value, (list, tuple)):
        return ", ".join(map(str, value)) or "none"
    return "none" if value is None else str(value)
