"""Write the analysis of an evaluation as one page."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from deta.platform.analysis.analysis import SIZES, Explanation
from deta.platform.analysis.figures import (
    MAX_CONFUSED,
    class_precision_recall,
    confusion_matrix,
    error_costs,
    precision_recall,
    reliability,
)
from deta.platform.analysis.images import OpenImage, label_errors_section, worst_images_section
from deta.platform.analysis.tide_errors import KINDS
from deta.platform.evaluation.coco_metrics import CocoMetrics, percent_text
from deta.platform.evaluation.evaluation_folder import Origin
from deta.platform.evaluation.paired_bootstrap import FEWEST_CLASS_IMAGES, ApInterval
from deta.platform.pages.content import Cell, Figure, Number, Paragraph, Part, Section, Table, table
from deta.platform.pages.page import write_page

NOUNS = {
    "classification": "wrong classes",
    "localisation": "inaccurate boxes",
    "both": "wrong classes in inaccurate boxes",
    "duplicate": "duplicates",
    "background": "detections of nothing",
    "missed": "missed boxes",
}
MEANING = {
    "classification": "another class is there (IoU 0.5 or more)",
    "localisation": "the class is there, but the box is inaccurate (IoU 0.1 to 0.5)",
    "both": "another class is there, and the box is inaccurate",
    "duplicate": "already found, with a higher score",
    "background": "nothing is there",
    "missed": "a true box without any detection near it",
}


def write_evaluation_report(
    path: Path,
    explanation: Explanation,
    metrics: CocoMetrics,
    origin: Origin,
    ground_truth: Mapping[str, Any],
    open_image: OpenImage | None,
    interval: ApInterval | None = None,
) -> None:
    """Write the page atomically. It has up to 7 MB, of which plotly takes 4.8.

    Args:
        open_image: returns an image by its id; None makes a page without images.
        interval: of AP; None makes a page without it.

    Raises:
        OSError: the page cannot be written.
    """
    names = {image["id"]: str(image.get("file_name", "")) for image in ground_truth["images"]}
    step = "" if origin.step is None else f", step {origin.step}"
    write_page(
        path,
        title=f"Evaluation of {origin.description or 'a model'}{step}",
        summary=_summary(explanation, metrics, len(names), interval),
        sections=[
            _errors(explanation),
            _classes(explanation, interval),
            _curves(explanation),
            _confusions(explanation),
            _calibration(explanation),
            worst_images_section(explanation, names, open_image),
            label_errors_section(explanation, names, open_image),
            _how(explanation, origin, interval),
        ],
        footer=f"Explained in {explanation.seconds:.1f} s.",
    )


def _summary(
    explanation: Explanation, metrics: CocoMetrics, num_images: int, interval: ApInterval | None
) -> list[Paragraph]:
    if metrics.AP < 0:
        return [Paragraph("There is no box to find.", style="verdict")]
    cost = explanation.errors.cost
    dearest = max(cost, key=lambda kind: cost[kind])
    what = "No error could be repaired."
    if cost[dearest] > 0:
        what = f"Most AP is lost to {NOUNS[dearest]}: {100 * cost[dearest]:.1f} points of AP50."
    over = "" if interval is None else f" ({interval.text()})"
    numbers = ", ".join(f"{n} {v:.1f}" for n, v in metrics.percent().items() if n[:2] == "AP")
    return [
        Paragraph(f"AP {100 * metrics.AP:.1f}{over}. {what}", style="verdict"),
        Paragraph(
            f"{num_images} images, {(~explanation.matched.crowd).sum()} boxes, "
            f"{len(explanation.classes)} classes, {len(explanation.matched.scores)} detections. "
            f"{numbers}.",
            style="facts",
        ),
    ]


def _errors(explanation: Explanation) -> Section:
    errors = explanation.errors
    sure = explanation.matched.scores >= explanation.operating_score
    rows: list[list[Cell]] = []
    for place, (kind, number) in enumerate(
        zip((*KINDS, "missed"), errors.counts.sum(0).tolist(), strict=True)
    ):
        at = "" if kind == "missed" else int((errors.kind[sure] == place).sum())
        rows.append([kind, 100 * errors.cost[kind], number, at, MEANING[kind]])
    numbers = table(
        "Error types, and how much AP50 would rise if only those were repaired",
        ["Type", Number("Cost", "AP50 points", 1), Number("Number", "any score"),
         Number("Number", f"score ≥ {explanation.operating_score:.2f}"), "Meaning"],
        rows,
    )  # fmt: skip
    note = (
        f"AP50 is {100 * max(0.0, errors.ap50):.1f}. Without false detections it would rise by "
        f"{100 * errors.false_positives_cost:.1f}, without missed boxes by "
        f"{100 * errors.false_negatives_cost:.1f}. Costs do not add up: errors hide each other."
    )
    figure = Figure("Cost of each error type", [error_costs({"": explanation})], note)
    return Section("errors", "Error types", [figure, numbers])


def _classes(explanation: Explanation, interval: ApInterval | None) -> Section:
    score = f"≥ {explanation.operating_score:.2f}"
    rows: list[list[Cell]] = [
        [
            one.name,
            one.num_boxes,
            *([] if interval is None else [_ends(*interval.per_category[one.category_id])]),
            *map(_percent, (one.AP, one.AP50, one.AP75, one.AR)),
            *(_percent(one.by_size[size]) for size in SIZES),
            _percent(one.precision),
            _percent(one.recall),
            _confused_with(explanation, k),
        ]
        for k, one in sorted(
            enumerate(explanation.classes), key=lambda item: (item[1].AP < 0, item[1].AP)
        )
    ]
    classes = table(
        "The weakest class first, in percent; “–” where it is not defined. Precision and recall at "
        f"an IoU of 0.5, of detections with a score of {explanation.operating_score:.2f} or more.",
        [
            "Class",
            Number("Boxes"),
            *(
                []
                if interval is None
                else [Number("Interval of AP", f"{100 * interval.confidence:g} %")]
            ),
            *(Number(name, "", 1) for name in ("AP", "AP50", "AP75", "AR")),
            *(Number("AP", size, 1) for size in SIZES),
            Number("Precision", score, 1),
            Number("Recall", score, 1),
            "Confused with",
        ],
        rows,
    )
    return Section("classes", "Classes", [classes])


def _confused_with(explanation: Explanation, k: int) -> str:
    row = explanation.confusion[k, :-1].copy()
    row[k] = 0
    best = int(row.argmax())
    return f"{explanation.classes[best].name} ({row[best]})" if row[best] else ""


def _curves(explanation: Explanation) -> Section:
    title = "Precision and recall"
    if not explanation.curves:
        return Section("curves", title, [Paragraph("There is no box to find.")])
    means = {f"IoU {iou:g}": curve for iou, curve in explanation.curves.items()}
    classes = {
        one.name: one.precision_at_recall for one in explanation.classes if one.precision_at_recall
    }
    parts = [
        Figure(
            "Precision over recall, mean of the classes",
            [precision_recall({"": means})],
            "If the lines for a high IoU fall first, boxes are inaccurate.",
            curve_table(means),
        ),
        Figure(
            "Precision over recall of each class, IoU 0.5",
            [class_precision_recall(explanation.classes)],
            table=curve_table(classes),
        ),
    ]
    return Section("curves", title, parts)


def curve_table(curves: Mapping[str, Sequence[float]]) -> Table:
    """Return the precision of curves at eleven recalls."""
    recalls = range(0, 101, 10)
    return table(
        "Precision in percent at each recall",
        ["Curve", *(Number(f"{recall}%", "", 1) for recall in recalls)],
        [[name, *(_percent(curve[r]) for r in recalls)] for name, curve in curves.items()],
    )


def _confusions(explanation: Explanation) -> Section:
    matrix = explanation.confusion
    num_classes = len(matrix) - 1
    names = [one.name for one in explanation.classes]
    mixed = matrix[:-1, :-1].copy()
    np.fill_diagonal(mixed, 0)
    rows: list[list[Cell]] = []
    for pair in np.argsort(-mixed, axis=None, kind="stable")[:20].tolist():
        true, found = divmod(pair, num_classes)
        if mixed[true, found]:
            share = mixed[true, found] / matrix[true].sum()
            rows.append([names[true], names[found], int(mixed[true, found]), 100 * share])
    confusions = table(
        "The most frequent confusions" if rows else "No box was found as another class",
        ["Annotated as", "Found as", Number("Number"), Number("Of the class", "%", 1)],
        rows,
    )
    note = (
        f"Detections with a score of {explanation.operating_score:.2f} or more, matched across "
        "classes at an IoU of 0.5, the highest score first. The last column: not found; the last "
        "row: found where nothing is."
    )
    if num_classes > MAX_CONFUSED:
        note += f" Of {num_classes} classes, the {MAX_CONFUSED} that are confused most."
    figure = Figure("Confusion matrix", [confusion_matrix(explanation)], note)
    return Section("confusions", "Confusions", [figure, confusions])


def _calibration(explanation: Explanation) -> Section:
    calibration = explanation.calibration
    confident = "" if calibration.confident_error < 0 else (
        f"; of those with a score of 0.3 or more {percent_text(calibration.confident_error)}"
    )  # fmt: skip
    numbers = table(
        "Scores and the share of correct detections (IoU 0.5)",
        ["Score", Number("Mean score", "%", 1), Number("Correct", "%", 1), Number("Detections")],
        [
            [f"{place / 10:.1f} to {(place + 1) / 10:.1f}",
             *((100 * score, 100 * share) if number else (None, None)), number]
            for place, (score, share, number) in enumerate(calibration.bins)
        ],
    )  # fmt: skip
    note = (
        "A mark for each bin. Below the line the model is overconfident, above it underconfident. "
        f"Calibration error of all detections {percent_text(calibration.error)} points, of the "
        f"worst bin {percent_text(calibration.largest)}{confident}."
    )
    title = "Share of correct detections over their score"
    figure = Figure(title, [reliability(calibration)], note, numbers)
    return Section("calibration", "Calibration of scores", [figure])


def _how(explanation: Explanation, origin: Origin, interval: ApInterval | None) -> Section:
    facts = {
        "model": origin.description,
        "weights": origin.weights_sha256,
        "data": origin.data_fingerprint,
        "annotations": origin.annotations,
        "images": origin.image_folder,
        "AP computed by": origin.engine,
        "epoch": "" if origin.epoch is None else f"{origin.epoch:g}",
        "step": "" if origin.step is None else str(origin.step),
        "operating score": f"{explanation.operating_score:.3f}, where F1 of all classes together "
        f"is highest ({percent_text(explanation.best_f1)})",
    }
    given = [item for item in facts.items() if item[1]]
    text = Paragraph(
        "Matching is COCO's: up to 100 detections of an image and class, the highest score first. "
        "Error types and their costs follow TIDE (Bolya et al. 2020), calibration Guo et al. 2017."
    )
    what = table("What was evaluated", ["What", "Which"], given)
    parts: list[Part] = [what, text]
    if interval is not None:
        parts.append(Paragraph(
            "Intervals are over images of this kind, by half-samples. AP of few images is too high "
            "on average, since precision is the highest from each recall on; intervals are of AP "
            "without that, so the printed AP may be near their upper end. A class in fewer than "
            f"{FEWEST_CLASS_IMAGES} images has none."
        ))  # fmt: skip
    return Section("how", "How it was measured", parts)


def _ends(corrected: float, low: float, high: float) -> Cell:
    if math.isnan(corrected):
        return None
    return "too few images" if math.isnan(low) else f"{100 * low:.0f} … {100 * high:.0f}"


def _percent(value: float) -> float | None:
    return None if value < 0 else 100 * value
