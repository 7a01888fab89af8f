"""Write the page of a comparison: which model is better, by how much, where, and why."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from deta.platform.analysis.report import MEANING
from deta.platform.comparison.compare import Comparison
from deta.platform.comparison.figures import (
    MAX_CLASSES,
    class_rows,
    error_bars,
    metric_rows,
    precision_recall,
    training_curves,
)
from deta.platform.comparison.images import images_section, slides_of
from deta.platform.comparison.sources import Side
from deta.platform.pages.content import Column, Figure, Paragraph, Part, Section, Table
from deta.platform.pages.number_format import duration, num_of, p_value, signed
from deta.platform.pages.page import write_page
from deta.platform.pages.plotly_parts import ForestRow, Plot, forest
from deta.platform.system.short_list import short_list

FEW_IMAGES = 10  # an interval from fewer images is unreliable


def write_comparison(path: Path, comparison: Comparison, image_folder: Path | None) -> int:
    """Write the page atomically. Returns the number of images on it.

    Args:
        image_folder: holds the images that the ground truth names; None for a page without them.

    Raises:
        RuntimeError: plotly is not installed.
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
        sections=[section for section in sections if section is not None],
        footer=f"{num_of(comparison.difference.resamples, 'resample')} in "
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
    names = {c["id"]: str(c["name"]) for c in comparison.a.ground_truth["categories"]}
    level = 1 - found.confidence
    distinct = [
        (names[key], one) for key, one in found.per_category.items() if one.p_adjusted < level
    ]
    better = [name for name, one in distinct if one.difference > 0]
    worse = [name for name, one in distinct if one.difference < 0]
    if not distinct:
        return [
            first,
            "No single class differs significantly after correction for the number of classes.",
        ]
    parts = [
        f"{word} at {_enumeration(which)}"
        for word, which in (("better", better), ("worse", worse))
        if which
    ]
    return [first, f"After correction for the number of classes, {b} is {' and '.join(parts)}."]


def _facts(comparison: Comparison) -> str:
    found, boxes = comparison.difference, comparison.found
    total = boxes.both + boxes.only_a + boxes.only_b + boxes.neither
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
    table = Table(
        caption=f"B minus A, with {100 * found.confidence:g} % intervals"
        + ("" if math.isnan(found.p_value) else f"; {p_value(found.p_value)} for AP"),
        columns=[Column(title="Metric"), *_difference_columns(found.confidence)],
        rows=[[name, *_cells(*numbers)] for name, numbers in rows],
    )
    parts: list[Part] = []
    if shown := metric_rows(comparison):
        parts.append(
            _forest(
                "result-figure", "B minus A", shown,
                "Paired: both models get the same resamples of the images, so images that are hard "
                "for both do not widen the interval. The interval covers other images of this "
                "kind, not other trainings of these models.",
            )
        )  # fmt: skip
    return Section(name="result", title="Difference", parts=[*parts, table])


def _classes(comparison: Comparison) -> Section:
    found = comparison.difference
    names = {c["id"]: str(c["name"]) for c in comparison.a.ground_truth["categories"]}
    ordered = sorted(
        found.per_category.items(),
        key=lambda item: (math.isnan(item[1].difference), -item[1].difference),
    )
    table = Table(
        caption="Every class, the most gained first",
        columns=[
            Column(title="Class"),
            *_difference_columns(found.confidence),
            Column(title="p", unit="corrected", is_number=True),
            Column(title="Images", is_number=True),
            Column(title="Boxes", is_number=True),
        ],
        rows=[
            [
                names[key] + (" (few images)" if 0 < one.num_images < FEW_IMAGES else ""),
                *_cells(one.ap_a, one.ap_b, one.difference, one.low, one.high),
                "-" if math.isnan(one.p_adjusted) else f"{one.p_adjusted:.3f}",
                str(one.num_images),
                str(one.num_boxes),
            ]
            for key, one in ordered
        ],
    )
    parts: list[Part] = []
    if rows := class_rows(comparison):
        title = "B minus A, by class"
        if len(rows) == MAX_CLASSES:
            title += f": the {MAX_CLASSES} that differ most"
        parts.append(
            _forest(
                "classes-figure", title, rows,
                "A filled mark differs from zero after the correction of Benjamini and Hochberg: "
                "at most one in twenty of these classes is expected to be there by chance. "
                "Intervals are for one class at a time.",
            )
        )  # fmt: skip
    return Section(name="classes", title="Classes", parts=[*parts, table])


def _errors(comparison: Comparison) -> Section:
    one, other = (explanation.errors for explanation in comparison.explanations)
    table = Table(
        caption="How much AP50 would rise if only those errors were repaired (TIDE)",
        columns=[
            Column(title="Type"),
            Column(title="A", unit="points", is_number=True),
            Column(title="B", unit="points", is_number=True),
            Column(title="B minus A", unit="points", is_number=True),
            Column(title="Meaning"),
        ],
        rows=[
            [
                kind,
                f"{100 * one.cost[kind]:.1f}",
                f"{100 * other.cost[kind]:.1f}",
                _points(other.cost[kind] - one.cost[kind]),
                MEANING.get(kind, ""),
            ]
            for kind in one.cost
        ],
    )
    plots = [error_bars(comparison, narrow=narrow) for narrow in (False, True)]
    figure = _figure(
        "errors-figure", "Cost of each error type", plots,
        "Shorter is better. One repair can enable another, so costs do not add up.",
    )  # fmt: skip
    return Section(name="errors", title="Error types", parts=[figure, table])


def _curves(comparison: Comparison) -> Section:
    plots = [precision_recall(comparison, narrow=narrow) for narrow in (False, True)]
    names = [f"{name}, IoU 0.5" for name in ("A", "B")]
    curves = [one.curves.get(0.5, ()) for one in comparison.explanations]
    numbers = Table(
        caption="Precision at some recalls",
        columns=[Column(title="Recall"), *(Column(title=n, is_number=True) for n in names)],
        rows=[
            [f"{r} %", *(f"{100 * curve[r]:.1f} %" if len(curve) else "-" for curve in curves)]
            for r in range(0, 101, 10)
        ],
    )
    parts: list[Part] = [
        _figure("pr-figure", "Precision over recall", plots, "Means over classes.", numbers)
    ]
    training = [training_curves(comparison, narrow=narrow) for narrow in (False, True)]
    if training[0] is not None:
        table = Table(
            caption="AP at each evaluation",
            columns=[
                Column(title="Side"), Column(title="Epoch", is_number=True),
                Column(title="AP", is_number=True),
            ],
            rows=[
                [name, f"{epoch:g}", f"{ap:.1f}"]
                for name, side in zip(comparison.names, (comparison.a, comparison.b), strict=True)
                for epoch, ap in side.curve
            ],
        )  # fmt: skip
        shown = [plot or {} for plot in training]
        note = "As evaluated during the training."
        parts.append(_figure("training-figure", "AP over the training", shown, note, table))
    return Section(name="curves", title="Curves", parts=parts)


def _configuration(comparison: Comparison) -> Section:
    if not comparison.a.config or not comparison.b.config:
        text = "The configuration of one side is not known."
        return Section(name="configuration", title="Configuration", parts=[Paragraph(text)])
    num_keys = len(comparison.a.config.keys() | comparison.b.config.keys())
    rows = comparison.configuration
    if not rows:
        text = f"All {num_keys} keys are the same."
        return Section(name="configuration", title="Configuration", parts=[Paragraph(text)])
    table = Table(
        caption=f"{len(rows)} of {num_keys} keys differ",
        columns=[Column(title="Key"), Column(title="A"), Column(title="B")],
        rows=[list(row) for row in rows],
    )
    return Section(name="configuration", title="Configuration", parts=[table])


def _cost(comparison: Comparison) -> Section | None:
    sides = (comparison.a, comparison.b)
    if all(side.cost is None for side in sides):
        return None
    rows = [["hardware", *(side.hardware or "-" for side in sides)]]
    for title, texts in (
        ("time", [_time(side) for side in sides]),
        ("GPU-hours", [_number(side, "gpu_hours", 2) for side in sides]),
        ("CPU core hours", [_number(side, "cpu_hours", 2) for side in sides]),
        ("training images/s", [_number(side, "images_per_s", 1) for side in sides]),
        ("energy of the GPUs, kWh", [_number(side, "energy_kwh", 3) for side in sides]),
    ):
        if any(text != "-" for text in texts):
            rows.append([title, *texts])
    table = Table(
        caption="From the runs' journals: from the start of the training to its last event, "
        "evaluations included",
        columns=[
            Column(title="What"), Column(title="A", is_number=True),
            Column(title="B", is_number=True),
        ],
        rows=rows,
    )  # fmt: skip
    return Section(name="cost", title="Cost of the training", parts=[table])


def _time(side: Side) -> str:
    known = side.cost is not None and side.cost.wall_s is not None
    return duration(side.cost.wall_s or 0.0) if known and side.cost else "-"


def _number(side: Side, name: str, decimals: int) -> str:
    value = getattr(side.cost, name, None)
    return "-" if value is None else f"{value:.{decimals}f}"


def _how(comparison: Comparison) -> Section:
    found, sides = comparison.difference, (comparison.a, comparison.b)
    rows = [
        ["name", *comparison.names],
        ["given as", *(side.source for side in sides)],
        ["model", *(side.description or "-" for side in sides)],
        ["weights", *(side.weights_sha256[:16] or "-" for side in sides)],
        ["MLflow run", *(side.run_id or "-" for side in sides)],
        ["images and boxes", *(side.fingerprint[:16] for side in sides)],
    ]
    table = Table(
        caption="What was compared",
        columns=[Column(title="What"), Column(title="A"), Column(title="B")],
        rows=rows,
    )
    text = Paragraph(
        f"{num_of(found.resamples, 'resample')} of the {num_of(found.num_images, 'image')} with "
        f"replacement, the same for both, seed {found.seed}. AP of a resample is the COCO AP of "
        "the data set in which each image counts as often as it was drawn; a class without a drawn "
        "image is left out of both. The interval is between quantiles. For a class in fewer than "
        f"{FEW_IMAGES} images, interval and p are unreliable."
    )
    aside = Paragraph(
        "This page contains all of its data and its drawing code (plotly.js, MIT license); it "
        "fetches nothing.",
        style="aside",
    )
    return Section(name="how", title="How it was measured", parts=[table, text, aside])


def _forest(name: str, title: str, rows: Sequence[ForestRow], note: str) -> Figure:
    plots = [forest(rows, "points of AP", zero=True, narrow=n) for n in (False, True)]
    return _figure(name, title, plots, note)


def _figure(
    name: str, title: str, plots: Sequence[Plot], note: str, table: Table | None = None
) -> Figure:
    return Figure(
        name=name,
        title=title,
        description=f"{title}. The numbers are in the table.",
        wide=plots[0],
        narrow=plots[1],
        note=note,
        table=table,
    )


def _difference_columns(confidence: float) -> list[Column]:
    return [
        Column(title="A", unit="0 to 100", is_number=True),
        Column(title="B", unit="0 to 100", is_number=True),
        Column(title="B minus A", is_number=True),
        Column(title="Interval", unit=f"{100 * confidence:g} %", is_number=True),
    ]


def _cells(a: float, b: float, difference: float, low: float, high: float) -> list[str]:
    if math.isnan(difference):
        return ["-", "-", "-", "-"]
    interval = "-" if math.isnan(low) else f"{_points(low)} … {_points(high)}"
    return [f"{100 * a:.1f}", f"{100 * b:.1f}", _points(difference), interval]


def _points(share: float) -> str:
    """Return a difference in points of AP, with its sign."""
    text = signed(100 * share, 1)
    return text if text.startswith("\u2212") or float(text) == 0 else f"+{text}"


def _enumeration(names: Sequence[str], most: int = 6) -> str:
    if len(names) > most:
        return short_list(names, most)
    return ", ".join(names[:-1]) + " and " + names[-1] if len(names) > 1 else names[0]
