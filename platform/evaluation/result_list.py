"""Check that detections are of the images and categories of their ground truth.

COCO's evaluation leaves detections of unknown categories out without a word, so results of a tool
that counts classes from 0 lose some and shift the others, and look like a bad model.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from deta.platform.system.short_list import short_list

Result = TypeVar("Result", bound=Mapping[str, Any])
KEYS = ("image_id", "category_id", "bbox", "score")
LENIENT = "jobs/compare.py and jobs/register.py leave them out with --lenient"


def listed_results(
    results: Sequence[Result],
    ground_truth: Mapping[str, Any],
    source: str,
    say: Callable[[str], object] | None = None,
) -> list[Result]:
    """Return the detections, all of listed images and categories.

    Args:
        results: COCO results.
        ground_truth: a COCO dict.
        source: name of the results, for messages.
        say: leave other detections out and call this with a line about them; without it they are
            an error.

    Raises:
        ValueError: a detection lacks a key, or is of an image or category that is not listed.
    """
    for position, result in enumerate(results):
        if not isinstance(result, Mapping) or not all(key in result for key in KEYS):
            raise ValueError(
                f"{source}: its entry {position} of {len(results)} lacks one of {', '.join(KEYS)}; "
                "is it a list of detections in the format of COCO results?"
            )
    known = {
        key: {entry["id"] for entry in ground_truth[part]}
        for key, part in (("image_id", "images"), ("category_id", "categories"))
    }
    kept = list(results)
    faults = []
    for key, noun in (("image_id", "images"), ("category_id", "categories")):
        unknown = Counter(_hashable(r[key]) for r in kept if _hashable(r[key]) not in known[key])
        if unknown:
            faults.append(_fault(unknown, known[key], noun, len(results)))
            if say is not None:
                kept = [result for result in kept if _hashable(result[key]) in known[key]]
    if not faults:
        return kept
    text = f"{source}: {'; '.join(faults)}"
    if say is None or not kept:
        advice = "" if say else f"; {LENIENT}"
        raise ValueError(f"{text}. Take the annotation file of these results{advice}")
    say(f"{text}. Left out: {len(results) - len(kept)} of {len(results)} detections")
    return kept


def _hashable(value: object) -> object:
    return value if isinstance(value, int | float | str) else repr(value)


def _fault(unknown: Counter[Any], known: set[Any], noun: str, count: int) -> str:
    ids = sorted(unknown, key=lambda key: (str(type(key)), key))
    said = (
        f"{unknown.total()} of {count} detections are of {len(ids)} {noun} that the ground truth "
        f"does not have ({short_list([repr(key) for key in ids])})"
    )
    numbers = {key for key in known if not isinstance(key, str)}
    if any(isinstance(key, str) for key in ids) and numbers:
        return f"{said}: these ids are text, those of the ground truth are numbers; write numbers"
    if noun == "categories" and 0 in unknown and numbers and min(numbers) > 0:
        return (
            f"{said}: classes are counted from 0 there, instead of the ids of the ground truth, "
            f"which begin with {min(numbers)}; then all other classes are wrong too"
        )
    return said
