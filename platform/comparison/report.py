"""Write the page of a comparison: which model is better, by how much, where, and why."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from deta.platform.analysis.figures import error_costs, precision_recall
from deta.platform.analysis.report import MEANING, curve_table
from deta.platform.comparison.compare import Comparison
from deta.platform.comparison.figures import (
    MAX_CLASSES,
    class_rows,
    metric_rows,
    training_curves,
)
from deta.platform.comparison.images import images_section, slides_of
from deta.platform.evaluation.paired_bootstrap import (
    FEWEST_CLASS_IMAGES,
    FEWEST_IMAGES,
    CategoryDifference,
)
from deta.platform.pages.content import Cell, Figure, Number, Paragraph, Part, Section, table
from deta.platform.pages.figures import ForestRow, forest
from deta.platform.pages.number_format import duration, num_of, p_value, signed
from deta.platform.pages.page import write_page
from deta.platform.system.short_list import short_list

DRAWN_IOUS = (0.5, 0.7, 0.9)


def write_comparison(path: Path, comparison: Comparison, image_folder: Path | None) -> int:
    """Write the page atomically. Returns the number of images on it.

    Args:
        image_folder: holds the images that the ground truth names; None for a page without them.
    """
    slides = slides_of(comparison, image_folder)
    sections = [
        _result(comparison),
        _classes(comparison),
        _errors(comparison),
        images_section(comparison, slides),
        _curves(comparison),
        _configuration(comparison),
        _cost(comparison),
        _how(comparison),
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    write_page(
        path,
        title=f"{comparison.names[0]} (A) and {comparison.names[1]} (B)",
        summary=[
            *(Paragraph(text, style="verdict") for text in verdict_sentences(comparison)),
            Paragraph(_facts(comparison), style="facts"),
        ],
        sections=[section for section in sections if section.parts],
        footer=f"{num_of(comparison.difference.resamples, 'half-sample')} in "
        f"{comparison.difference.seconds:.1f} s.",
    )
    return len(slides)


def verdict_sentences(comparison: Comparison) -> list[str]:
    """Return the result in a sentence or two, for the page and for a terminal."""
    found = comparison.difference
    if math.isnan(found.difference):
        return ["There is no box to find."]
    b = comparison.names[1]
    interval = f"{_points(found.low)} to {_points(found.high)}"
    confidence = f"{100 * found.confidence:g} % interval"
    size = f"{abs(100 * found.difference):.1f} AP"
    if _points(found.corrected) != _points(found.difference):
        interval += f"; corrected for few images {_points(found.corrected)}"
    if found.no_interval:
        return [f"{b} has {_points(found.difference)} AP. {found.no_interval}."]
    if found.low > 0:
        first = f"{b} is better by {size} ({confidence} {interval})."
    elif found.high < 0:
        first = f"{b} is worse by {size} ({confidence} {interval})."
    elif found.low == found.high == 0:
        first = "The two are equal on every image."
    else:
        first = (
            f"These images do not distinguish the two: {b} has "
            f"{_points(found.difference)} AP ({confidence} {interval})."
        )
    level = 1 - found.confidence
    parts = []
    for word, sign in (("better", 1), ("worse", -1)):
        names = [
            comparison.class_names[key]
            for key, one in found.per_category.items()
            if one.p_adjusted < level and sign * one.difference > 0
        ]
        parts += [f"{word} at {_enumeration(names)}"] if names else []
    after = "after correction for the number of classes"
    if not parts:
        return [first, f"No single class differs significantly {after}."]
    return [first, f"{after.capitalize()}, {b} is {' and '.join(parts)}."]


def _facts(comparison: Comparison) -> str:
    found, boxes = comparison.difference, comparison.found
    total = sum(vars(boxes).values())
    return (
        f"AP {100 * found.ap_a:.1f} (A) and {100 * found.ap_b:.1f} (B), "
        f"{num_of(found.num_images, 'image')}, {total} {'box' if total == 1 else 'boxes'}: "
        f"{boxes.both} found by both, {boxes.only_a} by A alone, {boxes.only_b} by B alone, "
        f"{boxes.neither} by neither. {len(comparison.gained)} images have fewer errors in B, "
        f"{len(comparison.lost)} more."
    )


def _result(comparison: Comparison) -> Section:
    found = comparison.difference
    rows = [("AP", (found.ap_a, found.ap_b, found.difference, found.low, found.high))]
    rows += [(n, (m.value_a, m.value_b, m.difference, m.low, m.high)) for n, m in found.others]
    numbers = table(
        f"B minus A, with {100 * found.confidence:g} % intervals"
        + ("" if math.isnan(found.p_value) else f"; {p_value(found.p_value)} for AP"),
        ["Metric", *_difference_columns(found.confidence)],
        [[name, *_cells(*values)] for name, values in rows],
    )
    note = (
        "Paired: both models get the same half-samples of the images, so images that are hard for "
        "both do not widen the interval. The interval covers other images of this kind, not other "
        "trainings of these models."
    )
    figure = _forest("B minus A", metric_rows(comparison), note)
    return Section("result", "Difference", [*figure, numbers])


def _classes(comparison: Comparison) -> Section:
    found, names = comparison.difference, comparison.class_names
    ordered = sorted(
        found.per_category.items(),
        key=lambda item: (math.isnan(item[1].difference), -item[1].difference),
    )
    rows: list[list[Cell]] = [
        [
            names[key] + (" (too few images)" if is_rare(one) else ""),
            *_cells(one.ap_a, one.ap_b, one.difference, one.low, one.high),
            None if math.isnan(one.p_adjusted) else one.p_adjusted,
            one.num_images,
            one.num_boxes,
        ]
        for key, one in ordered
    ]
    numbers = table(
        "Every class, the most gained first",
        ["Class", *_difference_columns(found.confidence), Number("p", "corrected", 3),
         Number("Images"), Number("Boxes")],
        rows,
    )  # fmt: skip
    shown = class_rows(comparison)
    title = "B minus A, by class"
    if len(shown) == MAX_CLASSES:
        title += f": the {MAX_CLASSES} that differ most"
    note = (
        "A filled mark differs from zero after the correction of Benjamini and Hochberg: at most "
        "one in twenty of these classes is expected to be there by chance. Intervals are for one "
        "class at a time."
    )
    figure = _forest(title, shown, note)
    return Section("classes", "Classes", [*figure, numbers])


def is_rare(one: CategoryDifference) -> bool:
    """Return whether a class is in too few images for an interval."""
    return math.isnan(one.low) and not math.isnan(one.difference)


def _errors(comparison: Comparison) -> Section:
    one, other = (explanation.errors.cost for explanation in comparison.explanations)
    numbers = table(
        "How much AP50 would rise if only those errors were repaired (TIDE)",
        ["Type", Number("A", "points", 1), Number("B", "points", 1),
         Number("B minus A", "points"), "Meaning"],
        [[kind, 100 * one[kind], 100 * other[kind], _points(other[kind] - one[kind]), MEANING[kind]]
         for kind in one],
    )  # fmt: skip
    plot = error_costs(dict(zip(comparison.names, comparison.explanations, strict=True)))
    note = "Shorter is better. One repair can enable another, so costs do not add up."
    figure = Figure("Cost of each error type", [plot], note)
    return Section("errors", "Error types", [figure, numbers])


def _curves(comparison: Comparison) -> Section:
    sides = dict(zip(comparison.names, comparison.explanations, strict=True))
    curves = {
        name: {f"IoU {iou:g}": one.curves[iou] for iou in DRAWN_IOUS if iou in one.curves}
        for name, one in sides.items()
    }
    at_50 = {f"{name}, IoU 0.5": one.curves[0.5] for name, one in sides.items() if one.curves}
    plot = precision_recall(curves)
    parts = [Figure("Precision over recall", [plot], "Means over classes.", curve_table(at_50))]
    if training := training_curves(comparison):
        numbers = table(
            "AP at each evaluation",
            ["Side", Number("Epoch"), Number("AP", "", 1)],
            [[name, f"{epoch:g}", ap]
             for name, side in zip(comparison.names, comparison.sides, strict=True)
             for epoch, ap in side.curve],
        )  # fmt: skip
        note = "As evaluated during the training."
        parts.append(Figure("AP over the training", [training], note, numbers))
    return Section("curves", "Curves", parts)


def _configuration(comparison: Comparison) -> Section:
    a, b = (side.config for side in comparison.sides)
    rows, num_keys = comparison.configuration, len(a.keys() | b.keys())
    part: Part = table(f"{len(rows)} of {num_keys} keys differ", ["Key", "A", "B"], rows)
    if not a or not b:
        part = Paragraph("The configuration of one side is not known.")
    elif not rows:
        part = Paragraph(f"All {num_keys} keys are the same.")
    return Section("configuration", "Configuration", [part])


def _cost(comparison: Comparison) -> Section:
    costs = [side.cost for side in comparison.sides]
    rows: list[list[Cell]] = []
    for title, name, decimals in (
        ("GPU-hours", "gpu_hours", 2),
        ("CPU core hours", "cpu_hours", 2),
        ("training images/s", "images_per_s", 1),
    ):
        values = [getattr(cost, name, None) for cost in costs]
        rows.append([title, *(None if v is None else f"{v:.{decimals}f}" for v in values)])
    times = [cost.wall_s if cost else None for cost in costs]
    rows = [
        ["hardware", *(side.hardware or None for side in comparison.sides)],
        ["time", *(None if time_s is None else duration(time_s) for time_s in times)],
        *(row for row in rows if row[1:] != [None, None]),
    ]
    caption = (
        "From the runs' journals: from the start of the training to its last event, evaluations "
        "included"
    )
    part = table(caption, ["What", Number("A"), Number("B")], rows)
    return Section("cost", "Cost of the training", [part] if any(costs) else [])


def _how(comparison: Comparison) -> Section:
    found, sides = comparison.difference, comparison.sides
    rows: list[list[Cell]] = [
        ["name", *comparison.names],
        ["given as", *(side.source for side in sides)],
        ["model", *(side.description or None for side in sides)],
        ["weights", *(side.weights_sha256[:16] or None for side in sides)],
        ["MLflow run", *(side.run_id or None for side in sides)],
        ["images and boxes", *(side.fingerprint[:16] for side in sides)],
    ]
    text = Paragraph(
        f"{num_of(found.resamples, 'half-sample')} of the "
        f"{num_of(found.num_images, 'image')}, without replacement, the same for both, seed "
        f"{found.seed}. They show how much the COCO AP varies, and by how much AP of few images is "
        "too high; the interval is for the difference without that. A class in few images borrows "
        f"from the variance of the others; one in fewer than {FEWEST_CLASS_IMAGES} images has no "
        f"interval, and fewer than {FEWEST_IMAGES} images in all have none."
    )
    aside = Paragraph(
        "This page contains all of its data and its drawing code (plotly.js, MIT license); it "
        "fetches nothing.",
        style="aside",
    )
    compared = table("What was compared", ["What", "A", "B"], rows)
    return Section("how", "How it was measured", [compared, text, aside])


def _forest(title: str, rows: Sequence[ForestRow], note: str) -> list[Figure]:
    return [Figure(title, [forest(rows, "points of AP", zero=True)], note)] if rows else []


def _difference_columns(confidence: float) -> list[Number]:
    return [
        Number("A", "0 to 100", 1),
        Number("B", "0 to 100", 1),
        Number("B minus A"),
        Number("Interval", f"{100 * confidence:g} %"),
    ]


def _cells(a: float, b: float, difference: float, low: float, high: float) -> list[Cell]:
    if math.isnan(difference):
        return [None, None, None, None]
    interval = None if math.isnan(low) else f"{_points(low)} … {_points(high)}"
    return [100 * a, 100 * b, _points(difference), interval]


def _points(share: float) -> str:
    """Return a difference in points of AP, with its sign."""
    text = signed(100 * share, 1)
    return text if text.startswith("\u2212") or float(text) == 0 else f"+{text}"


def _enumeration(names: Sequence[str], most: int = 6) -> str:
    if len(names) > most:
        return short_list(names, most)
    return ", ".join(names[:-1]) + " and " + names[-1] if len(names) > 1 else names[0]
