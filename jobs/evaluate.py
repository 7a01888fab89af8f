#!/usr/bin/env python
"""Measure the AP of a model on a data set in COCO format.

  python jobs/evaluate.py ~/deta-runs/deta-r50-12ep \\
      --images val2017 --annotations annotations/instances_val2017.json

WEIGHTS is a run's folder (its best checkpoint) or one checkpoint in it; a file that
jobs/convert.py wrote; a file of published weights (official, detrex or Hugging Face; .safetensors,
.pth, .pt or .bin); or the address of a file, https://…#sha256=…, which is downloaded and cached; or
a registered version, models:/deta@champion or models:/deta/3 (jobs/register.py). A checkpoint
holds its model, classes and image size; the data set must have the same classes. A
converted file holds the same; the data set may have some of its classes. A published file has
only its tensors; --variant gives the rest. With COCO's number of rows its classes are
COCO's. Classes are matched by name, never by id; a class that the file lacks is an error.

It prints the interval of AP over images. AP of few images is too high on average; where that
matters, the AP without it is beside. With fewer than 20 images there is no interval.

--out writes the evaluation as a folder: metrics, all detections (Parquet), ground truth, and
report.html, which shows what goes wrong: error types, confusions, worst images, annotations that
are likely wrong. jobs/compare.py compares two such folders.

It runs in one process on one device. AP does not depend on the device, up to rounding.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn

from deta.jobs.command_line import OUTPUT, echo, run_tool
from deta.jobs.model_options import (
    PREDICTION_KEYS,
    ModelOptions,
    holds_tensors,
    local_weights,
    named_variant,
    open_predictor,
    read_model_options,
    require_weights,
)
from deta.platform.run.config import RunConfig, flatten, override
from deta.platform.run.run_paths import require_paths
from deta.platform.system.atomic_write import write_json

# Before anything slow is imported: --help does not need it.
if TYPE_CHECKING:
    from deta.platform.data.coco_dataset import CocoDataset
    from deta.platform.evaluation.evaluate_model import EvaluationResult
    from deta.platform.evaluation.evaluation_folder import Origin
    from deta.platform.evaluation.paired_bootstrap import ApInterval
    from deta.platform.inference.predictor import Predictor

EVALUATION_KEYS = (
    *PREDICTION_KEYS, "data.lenient", "data.loader_workers", "evaluation.engine",
    "micro_batch_size", "num_pictures",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class EvaluateOptions(ModelOptions):
    images: str  # a folder; or shards, a folder or address (jobs/pack.py)
    annotations: str = ""  # a file, COCO format; shards hold theirs
    results: Path | None = None  # write detections into this file, COCO JSON
    pictures: Path | None = None  # write a sheet of true and found boxes (.png)
    out: Annotated[Path | None, OUTPUT] = (
        None  # write the evaluation into this folder, with report.html
    )


def main() -> NoReturn:
    options, changes = read_model_options(EvaluateOptions, __doc__, EVALUATION_KEYS)
    run_tool(lambda: _prepare(options, changes), lambda opened: _evaluate(*opened, options))


def _prepare(options: EvaluateOptions, changes: dict[str, str]) -> tuple[Predictor, CocoDataset]:
    require_weights(options.weights)
    require_paths({"--images": options.images, "--annotations": options.annotations})
    from PIL import Image

    from deta.platform.shards.open_dataset import open_dataset

    if options.out is not None and options.out.is_file():
        raise ValueError(f"{options.out}: is a file; name a folder to write")
    for path in filter(None, (options.results, options.pictures)):
        if path.is_dir():
            raise ValueError(f"{path}: is a folder; name the file to write")
    if options.pictures is not None:
        suffixes = Image.registered_extensions()
        if suffixes.get(options.pictures.suffix.lower()) not in Image.SAVE:
            raise ValueError(f"{options.pictures}: end the name in .png or .jpg")

    def open_images(config: RunConfig) -> CocoDataset:
        return open_dataset(
            options.images,
            options.annotations,
            lenient=config.data.lenient,
            max_pixels=config.data.max_pixels,
            rules=config.data.pixel_rules,
            progress=True,
        )

    weights = local_weights(options.weights)
    options = replace(options, weights=str(weights))
    if not holds_tensors(weights):
        predictor = open_predictor(options, changes)
        dataset = open_images(predictor.config)
        predictor.check_categories(dataset.categories, options.annotations or options.images)
    else:
        dataset = open_images(override(named_variant(options), changes))
        predictor = open_predictor(options, changes, dataset.categories)
    if options.pictures is not None and predictor.config.num_pictures == 0:
        raise ValueError("num_pictures=0 leaves --pictures without images; leave one of them out")
    return predictor, dataset


def _evaluate(predictor: Predictor, dataset: CocoDataset, options: EvaluateOptions) -> int:
    from deta.platform.data.image_decoding import ImageError
    from deta.platform.evaluation.evaluation_folder import Origin
    from deta.platform.evaluation.paired_bootstrap import ap_interval
    from deta.platform.pages.draw_boxes import write_validation_sheet
    from deta.platform.pages.number_format import duration
    from deta.platform.system.progress import progress_bar

    echo(f"model: {predictor.description}")
    echo(
        f"data: {len(dataset)} images, {len(dataset.categories)} classes, "
        f"data {dataset.fingerprint[:12]}"
    )
    began_s = last_s = time.perf_counter()

    with progress_bar("images", len(dataset)) as advance:

        def on_batch(num_images: int) -> None:
            nonlocal last_s
            last_s = time.perf_counter()
            advance(num_images)

        try:
            evaluation = predictor.evaluate(dataset, on_batch=on_batch)
        except ImageError as error:
            # If a loader worker raised it, its traceback comes before the message.
            raise RuntimeError(str(error).rpartition("ImageError: ")[2].strip()) from error
    assert evaluation is not None  # there is one process only
    elapsed_s = last_s - began_s

    echo(
        f"{evaluation.metrics.table(dataset.categories)}\n\n{len(dataset)} images in "
        f"{duration(elapsed_s)}, {len(dataset) / elapsed_s:.1f} images/s on {predictor.device.type}"
    )
    interval = ap_interval(dataset.ground_truth, evaluation.results)
    if not math.isnan(interval.ap):
        echo(f"AP {100 * interval.ap:.1f}, {interval.text()}")
    if options.results is not None:
        options.results.parent.mkdir(parents=True, exist_ok=True)
        write_json(options.results, evaluation.results)
        echo(f"{len(evaluation.results)} detections: {options.results}")
    if options.pictures is not None:
        num_pictures = predictor.config.num_pictures
        write_validation_sheet(options.pictures, dataset, evaluation.results, num_pictures)
        echo(f"images with boxes: {options.pictures}")
    if options.out is not None:
        origin = Origin(
            description=predictor.description,
            data_fingerprint=dataset.fingerprint,
            annotations=options.annotations,
            image_folder=options.images,
            weights_sha256=predictor.weights_sha256,
            config=flatten(predictor.config),
            engine=predictor.config.evaluation.engine,
            seconds={"evaluation": elapsed_s},
        )
        _write_folder(options.out, dataset, evaluation, origin, interval)
    return 0


def _write_folder(
    out: Path,
    dataset: CocoDataset,
    evaluation: EvaluationResult,
    origin: Origin,
    interval: ApInterval,
) -> None:
    """Write the evaluation folder with its report, and print how long that took."""
    from deta.platform.analysis.analysis import EXPLANATION, explain, write_explanation
    from deta.platform.analysis.images import image_opener
    from deta.platform.analysis.label_errors import is_too_weak
    from deta.platform.analysis.report import write_evaluation_report
    from deta.platform.evaluation.evaluation_folder import write_evaluation

    began_s = time.perf_counter()
    truth, report = dataset.ground_truth, out / "report.html"
    explanation = explain(truth, evaluation.results)
    origin = replace(origin, seconds={**origin.seconds, "explanation": explanation.seconds})
    write_evaluation(out, truth, evaluation.results, evaluation.metrics, origin)
    write_explanation(out / EXPLANATION, explanation, interval=interval)
    opener = image_opener(dataset)
    write_evaluation_report(
        report, explanation, evaluation.metrics, origin, truth, opener, interval
    )
    costs = sorted(explanation.errors.cost.items(), key=lambda item: -item[1])
    echo("points of AP50 lost to errors: " + ", ".join(f"{k} {100 * v:.1f}" for k, v in costs))
    all_s, num_errors = time.perf_counter() - began_s, len(explanation.label_errors)
    to_check = f"{num_errors} annotations to check"
    if is_too_weak(explanation.best_f1):
        to_check = "too weak a model to tell which annotations are wrong"
    echo(f"{to_check}, and what went wrong: {report}, in {all_s:.1f} s")


if __name__ == "__main__":
    main()
