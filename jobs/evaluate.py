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

--out writes the evaluation as a folder: metrics, all detections (Parquet), ground truth, and
report.html, which shows what goes wrong: error types, confusions, worst images, annotations that
are likely wrong. jobs/compare.py compares two such folders.

It runs in one process on one device. AP does not depend on the device, up to rounding.
"""

from __future__ import annotations

import argparse
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from deta.jobs.command_line import echo, run_tool
from deta.jobs.model_options import (
    PREDICTION_KEYS,
    known_changes,
    local_weights,
    model_parser,
    named_variant,
    open_predictor,
)
from deta.platform.run.config import RunConfig, flatten
from deta.platform.system.atomic_write import write_json

# Before anything slow is imported: --help does not need it.
if TYPE_CHECKING:
    from deta.platform.data.coco_dataset import CocoDataset
    from deta.platform.evaluation.evaluate_model import EvaluationResult
    from deta.platform.inference.predictor import Predictor

EVALUATION_KEYS = (
    *PREDICTION_KEYS, "data.lenient", "data.loader_workers", "evaluation.engine",
    "micro_batch_size", "num_pictures",
)  # fmt: skip


@dataclass(frozen=True)
class _EvaluateInputs:
    predictor: Predictor
    dataset: CocoDataset


def main() -> NoReturn:
    parser = model_parser(
        __doc__,
        "Keys of the configuration that matter here: postprocess.*, data.evaluation_size.*, "
        "data.lenient,\ndata.loader_workers, data.max_pixels, evaluation.engine (hotcoco or "
        "pycocotools), precision,\nmicro_batch_size, num_pictures and model.*",
    )
    parser.add_argument(
        "--images",
        metavar="FOLDER",
        required=True,
        help="images; or shards, a folder or address (jobs/pack.py)",
    )
    parser.add_argument(
        "--annotations", metavar="FILE", default="", help="COCO format; shards hold theirs"
    )
    parser.add_argument("--results", metavar="FILE", type=Path, help="write detections, COCO JSON")
    parser.add_argument(
        "--pictures", metavar="FILE", type=Path, help="write a sheet of true and found boxes (.png)"
    )
    parser.add_argument(
        "--out", metavar="FOLDER", type=Path, help="write the evaluation, with report.html"
    )
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="change the configuration"
    )
    arguments = parser.parse_intermixed_args()
    run_tool(lambda: _prepare(arguments), lambda inputs: _evaluate(inputs, arguments))


def _prepare(arguments: argparse.Namespace) -> _EvaluateInputs:
    from PIL import Image

    from deta.platform.shards.open_dataset import open_dataset

    changes = known_changes(arguments.overrides, EVALUATION_KEYS)
    if arguments.out is not None and arguments.out.exists() and not arguments.out.is_dir():
        raise ValueError(f"{arguments.out}: is a file; name a folder to write")
    for path in (arguments.results, arguments.pictures):
        if path is not None and path.is_dir():
            raise ValueError(f"{path}: is a folder; name the file to write")
    if arguments.pictures is not None:
        suffixes = Image.registered_extensions()
        if suffixes.get(arguments.pictures.suffix.lower()) not in Image.SAVE:
            raise ValueError(f"{arguments.pictures}: end the name in .png or .jpg")

    def open_images(config: RunConfig) -> CocoDataset:
        return open_dataset(
            arguments.images,
            arguments.annotations,
            lenient=config.data.lenient,
            max_pixels=config.data.max_pixels,
            progress=True,
        )

    arguments.weights = local_weights(arguments.weights)
    if not arguments.weights.is_file():
        predictor = open_predictor(arguments, changes)
        dataset = open_images(predictor.config)
        predictor.check_categories(dataset.categories, arguments.annotations or arguments.images)
    else:
        from deta.platform.run.config import override

        dataset = open_images(override(named_variant(arguments), changes))
        predictor = open_predictor(arguments, changes, dataset.categories)
    if arguments.pictures is not None and predictor.config.num_pictures == 0:
        raise ValueError("num_pictures=0 leaves --pictures without images; leave one of them out")
    return _EvaluateInputs(predictor, dataset)


def _evaluate(inputs: _EvaluateInputs, arguments: argparse.Namespace) -> int:
    from tqdm import tqdm

    from deta.platform.data.draw_boxes import write_validation_sheet
    from deta.platform.data.image_decoding import ImageError
    from deta.platform.launch.console import duration

    predictor, dataset = inputs.predictor, inputs.dataset
    echo(f"model: {predictor.description}")
    echo(
        f"data: {len(dataset)} images, {len(dataset.categories)} classes, "
        f"data {dataset.fingerprint[:12]}"
    )
    began_s = last_s = time.perf_counter()

    # disable=None: no progress bar without a terminal
    with tqdm(total=len(dataset), unit=" images", file=sys.stderr, disable=None) as bar:

        def on_batch(num_images: int) -> None:
            nonlocal last_s
            last_s = time.perf_counter()
            bar.update(num_images)

        try:
            evaluation = predictor.evaluate(dataset, on_batch=on_batch)
        except ImageError as error:
            # If a loader worker raised it, its traceback comes before the message.
            raise RuntimeError(str(error).rpartition("ImageError: ")[2].strip()) from error
    assert evaluation is not None  # there is one process only
    elapsed_s = last_s - began_s

    echo(evaluation.metrics.table(dataset.categories))
    echo("")
    echo(
        f"{len(dataset)} images in {duration(elapsed_s)}, {len(dataset) / elapsed_s:.1f} images/s "
        f"on {predictor.device.type}"
    )
    if arguments.results is not None:
        arguments.results.parent.mkdir(parents=True, exist_ok=True)
        write_json(arguments.results, evaluation.results)
        echo(f"{len(evaluation.results)} detections: {arguments.results}")
    if arguments.pictures is not None:
        num_pictures = predictor.config.num_pictures
        write_validation_sheet(arguments.pictures, dataset, evaluation.results, num_pictures)
        echo(f"images with boxes: {arguments.pictures}")
    if arguments.out is not None:
        _write_folder(inputs, evaluation, arguments, elapsed_s)
    return 0


def _write_folder(
    inputs: _EvaluateInputs,
    evaluation: EvaluationResult,
    arguments: argparse.Namespace,
    elapsed_s: float,
) -> None:
    """Write the evaluation folder with its report, and print how long that took."""
    from deta.platform.analysis.analysis import EXPLANATION, explain, write_explanation
    from deta.platform.analysis.images import image_opener
    from deta.platform.analysis.report import write_evaluation_report
    from deta.platform.evaluation.evaluation_folder import Origin, write_evaluation

    predictor, dataset = inputs.predictor, inputs.dataset
    began_s = time.perf_counter()
    ground_truth, out = dataset.ground_truth, arguments.out
    explanation = explain(ground_truth, evaluation.results)
    origin = Origin(
        description=predictor.description,
        data_fingerprint=dataset.fingerprint,
        annotations=arguments.annotations,
        image_folder=str(arguments.images),
        weights_sha256=predictor.weights_sha256,
        config=flatten(predictor.config),
        engine=predictor.config.evaluation.engine,
        seconds={"evaluation": elapsed_s, "explanation": explanation.seconds},
    )
    write_evaluation(out, ground_truth, evaluation.results, evaluation.metrics, origin)
    write_explanation(out / EXPLANATION, explanation)
    costs = sorted(explanation.errors.cost.items(), key=lambda item: -item[1])
    echo("points of AP50 lost to errors: " + ", ".join(f"{k} {100 * v:.1f}" for k, v in costs))
    report = out / "report.html"
    open_image = image_opener(dataset)
    write_evaluation_report(
        report, explanation, evaluation.metrics, origin, ground_truth, open_image
    )
    all_s = time.perf_counter() - began_s
    share, num_errors = all_s / (all_s + elapsed_s), len(explanation.label_errors)
    echo(f"{num_errors} annotations to check, and what went wrong: {report}")
    echo(
        f"explained in {explanation.seconds:.1f} s, {all_s:.1f} s with report and files: "
        f"{100 * share:.0f} % of the whole"
    )


if __name__ == "__main__":
    main()
