"""Write the analysis of an evaluation as one page."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from deta.platform.analysis.analysis import Explanation
from deta.platform.analysis.figures import (
    MAX_CONFUSED,
    class_precision_recall,
    confusion_matrix,
    error_costs,
    mean_precision_recall,
    reliability,
)
from deta.platform.analysis.images import OpenImage, label_errors_section, worst_images_section
from deta.platform.analysis.tide_errors import KINDS
from deta.platform.evaluation.coco_metrics import CocoMetrics, percent_text
from deta.platform.evaluation.evaluation_folder import Origin
from deta.platform.pages.content import (
    Column,
    Figure,
    Paragraph,
    Part,
    Section,
    Table,
)
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
) -> None:
    """Write the page atomically. It has up to 7 MB, of which plotly takes 4.8.

    Args:
        open_image: returns an image by its id; None makes a page without images.

    Raises:
        RuntimeError: plotly is not installed.
        OSError: the page cannot be written.
    """
    names = {image["id"]: str(image.get("file_name", "")) for image in ground_truth["images"]}
    step = "" if origin.step is None else f", step {origin.step}"
    write_page(
        path,
        title=f"Evaluation of {origin.description or 'a model'}{step}",
        summary=_summary(explanation, metrics, len(names)),
        sections=[
            _errors(explanation),
            _classes(explanation),
            _curves(explanation),
            _confusions(explanation),
            _calibration(explanation),
            worst_images_section(explanation, names, open_image),
            label_errors_section(explanation, names, open_image),
            _how(explanation, origin),
        ],
        footer=f"Explained in {explanation.seconds:.1f} s.",
    )


def _summary(explanation: Explanation, metrics: CocoMetrics, num_images: int) -> list[Paragraph]:
    if metrics.AP < 0:
        return [Paragraph("There is no box to find.", style="verdict")]
    cost = explanation.errors.cost
    dearest = max(cost, key=lambda kind: cost[kind])
    what = "No error could be repaired."
    if cost[dearest] > 0:
        what = f"Most AP is lost to {NOUNS[dearest]}: {100 * cost[dearest]:.1f} points of AP50."
    numbers = ", ".join(f"{n} {v:.1f}" for n, v in metrics.percent().items() if n[:2] == "AP")
    return [
        Paragraph(f"AP {100 * metrics.AP:.1f}. {what}", style="verdict"),
        Paragraph(
            f"{num_images} images, {(~explanation.matched.crowd).sum()} boxes, "
            f"{len(explanation.classes)} classes, {len(explanation.matched.scores)} detections. "
            f"{numbers}.",
            style="facts",
        ),
    ]


def _errors(explanation: Explanation) -> Section:
    errors = explanation.errors
    counts = dict(zip((*KINDS, "missed"), errors.counts.sum(0).tolist(), strict=True))
    sure = explanation.matched.scores >= explanation.operating_score
    rows = []
    for place, (kind, cost) in enumerate(errors.cost.items()):
        at = "" if kind == "missed" else str(int((errors.kind[sure] == place).sum()))
        rows.append([kind, f"{100 * cost:.1f}", str(counts[kind]), at, MEANING[kind]])
    table = Table(
        caption="Error types, and how much AP50 would rise if only those were repaired",
        columns=[
            Column(title="Type"),
            Column(title="Cost", unit="AP50 points", is_number=True),
            Column(title="Number", unit="any score", is_number=True),
            Column(
                title="Number", unit=f"score ≥ {explanation.operating_score:.2f}", is_number=True
            ),
            Column(title="Meaning"),
        ],
        rows=rows,
    )
    note = (
        f"AP50 is {100 * max(0.0, errors.ap50):.1f}. Without false detections it would rise by "
        f"{100 * errors.false_positives_cost:.1f}, without missed boxes by "
        f"{100 * errors.false_negatives_cost:.1f}. Costs do not add up: errors hide each other."
    )
    figure = Figure(
        name="error-costs",
        title="Cost of each error type",
        description="Bars: how much AP50 would rise if errors of a type were repaired",
        wide=error_costs(explanation),
        note=note,
    )
    return Section(name="errors", title="Error types", parts=[figure, table])


def _classes(explanation: Explanation) -> Section:
    columns = [
        Column(title="Class"),
        Column(title="Boxes", is_number=True),
        *(Column(title=name, is_number=True) for name in ("AP", "AP50", "AP75", "AR")),
        *(Column(title="AP", unit=size, is_number=True) for size in ("small", "medium", "large")),
        Column(title="Precision", unit=f"≥ {explanation.operating_score:.2f}", is_number=True),
        Column(title="Recall", unit=f"≥ {explanation.operating_score:.2f}", is_number=True),
        Column(title="Confused with"),
    ]
    order = sorted(explanation.classes, key=lambda one: (one.AP < 0, one.AP))
    place = {one.category_id: k for k, one in enumerate(explanation.classes)}
    rows = [
        [
            one.name,
            str(one.num_boxes),
            *(percent_text(value) for value in (one.AP, one.AP50, one.AP75, one.AR)),
            *(percent_text(one.by_size[size]) for size in ("small", "medium", "large")),
            percent_text(one.precision),
            percent_text(one.recall),
            _confused_with(explanation, place[one.category_id]),
        ]
        for one in order
    ]
    table = Table(
        caption=(
            "The weakest class first, in percent; “-” where it is not defined. Precision "
            f"and recall at an IoU of 0.5, of detections with a score of "
            f"{explanation.operating_score:.2f} or more."
        ),
        columns=columns,
        rows=rows,
    )
    return Section(name="classes", title="Classes", parts=[table])


def _confused_with(explanation: Explanation, k: int) -> str:
    row = explanation.confusion[k, :-1].copy()
    row[k] = 0
    best = int(row.argmax()) if len(row) else 0
    if not len(row) or not row[best]:
        return ""
    return f"{explanation.classes[best].name} ({row[best]})"


def _curves(explanation: Explanation) -> Section:
    parts: list[Part] = []
    if explanation.curves:
        shown = [one for one in explanation.classes if one.precision_at_recall]
        parts = [
            Figure(
                name="mean-curves",
                title="Precision over recall, mean of the classes",
                description="A line of precision over recall for each IoU threshold",
                wide=mean_precision_recall(explanation, narrow=False),
                narrow=mean_precision_recall(explanation, narrow=True),
                note="If the lines for a high IoU fall first, boxes are inaccurate.",
                table=_curve_table(
                    {f"IoU {iou:g}": curve for iou, curve in explanation.curves.items()}
                ),
            ),
            Figure(
                name="class-curves",
                title="Precision over recall of each class, IoU 0.5",
                description="Precision of each class at each recall",
                wide=class_precision_recall(explanation.classes, narrow=False),
                narrow=class_precision_recall(explanation.classes, narrow=True),
                table=_curve_table({one.name: one.precision_at_recall for one in shown}),
            ),
        ]
    else:
        parts = [Paragraph("There is no box to find.")]
    return Section(name="curves", title="Precision and recall", parts=parts)


def _curve_table(curves: Mapping[str, tuple[float, ...]]) -> Table:
    recalls = range(0, 101, 10)
    return Table(
        caption="Precision in percent at each recall",
        columns=[
            Column(title="Recall"),
            *(Column(title=f"{recall}%", is_number=True) for recall in recalls),
        ],
        rows=[
            [name, *(percent_text(curve[recall]) for recall in recalls)]
            for name, curve in curves.items()
        ],
    )


def _confusions(explanation: Explanation) -> Section:
    matrix = explanation.confusion
    num_classes = len(matrix) - 1
    names = [one.name for one in explanation.classes]
    mixed = matrix[:-1, :-1].copy()
    np.fill_diagonal(mixed, 0)
    pairs = np.argsort(-mixed, axis=None, kind="stable")[:20]
    rows = []
    for pair in pairs.tolist():
        true, found = divmod(pair, num_classes)
        if mixed[true, found]:
            share = mixed[true, found] / max(1, matrix[true].sum())
            rows.append([names[true], names[found], str(mixed[true, found]), percent_text(share)])
    table = Table(
        caption="The most frequent confusions" if rows else "No box was found as another class",
        columns=[
            Column(title="Annotated as"),
            Column(title="Found as"),
            Column(title="Number", is_number=True),
            Column(title="Of the class", unit="%", is_number=True),
        ],
        rows=rows,
    )
    note = (
        f"Detections with a score of {explanation.operating_score:.2f} or more, matched across "
        "classes at an IoU of 0.5, the highest score first. The last column: not found; the last "
        "row: found where nothing is."
    )
    if num_classes > MAX_CONFUSED:
        note += f" Of {num_classes} classes, the {MAX_CONFUSED} that are confused most."
    figure = Figure(
        name="confusion-matrix",
        title="Confusion matrix",
        description="Of the boxes of each class, the share that is found as each class",
        wide=confusion_matrix(explanation, narrow=False),
        narrow=confusion_matrix(explanation, narrow=True),
        note=note,
    )
    return Section(name="confusions", title="Confusions", parts=[figure, table])


def _calibration(explanation: Explanation) -> Section:
    calibration = explanation.calibration
    confident = "" if calibration.confident_error < 0 else (
        f"; of those with a score of 0.3 or more {percent_text(calibration.confident_error)}"
    )  # fmt: skip
    table = Table(
        caption="Scores and the share of correct detections (IoU 0.5)",
        columns=[
            Column(title="Score", unit="bin"),
            Column(title="Mean score", unit="%", is_number=True),
            Column(title="Correct", unit="%", is_number=True),
            Column(title="Detections", is_number=True),
        ],
        rows=[
            [
                f"{place / 10:.1f} to {(place + 1) / 10:.1f}",
                *((percent_text(score), percent_text(share)) if number else ("-", "-")),
                str(number),
            ]
            for place, (score, share, number) in enumerate(calibration.bins)
        ],
    )
    figure = Figure(
        name="reliability",
        title="Share of correct detections over their score",
        description="A mark for each of ten bins of score; calibrated scores are on the diagonal",
        wide=reliability(calibration),
        note=(
            "Below the line the model is overconfident, above it underconfident. Calibration "
            f"error of all detections {percent_text(calibration.error)} points, of the worst bin "
            f"{percent_text(calibration.largest)}{confident}."
        ),
        table=table,
    )
    return Section(name="calibration", title="Calibration of scores", parts=[figure])


def _how(explanation: Explanation, origin: Origin) -> Section:
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
    table = Table(
        caption="What was evaluated",
        columns=[Column(title="What"), Column(title="Which")],
        rows=[[name, value] for name, value in facts.items() if value],
    )
    text = Paragraph(
        "Matching is COCO's: up to 100 detections of an image and class, the highest score first. "
        "Error types and their costs follow TIDE (Bolya et al. 2020), calibration Guo et al. 2017."
    )
    return Section(name="how", title="How it was measured", parts=[table, text])
