#!/usr/bin/env python
"""AP of a model on a data set in COCO format.

  python jobs/evaluate.py ~/deta-runs/deta-r50-12ep \\
      --images val2017 --annotations annotations/instances_val2017.json

WEIGHTS is a run's folder, which means its best checkpoint, or one checkpoint in it; a file that
jobs/convert.py wrote; a file of published weights (official, detrex or Hugging Face; .safetensors,
.pth, .pt or .bin); or the address of a file, https://…#sha256=…, which is downloaded and kept; or a
version of the registry, models:/deta@champion or models:/deta/3 (jobs/register.py). A checkpoint
knows its model, classes and image size; the data set must have the same classes. A
converted file knows the same; the data set may have some of its classes. A published file knows
the sizes of its tensors; --variant says the rest. With COCO's number of rows its classes are
COCO's. Classes of a file are found by name, never by id; one that it does not have is refused.

--out keeps the evaluation as a folder: numbers, all detections (Parquet), ground truth, and
report.html, which says what goes wrong: kinds of errors, confusions, worst images, annotations that
are likely wrong. jobs/compare.py compares two such folders.

One process on one device. AP does not depend on the device, up to rounding.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import signal
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

from deta.jobs.recipes import VARIANTS, find_variant
from deta.platform.run.config import RunConfig, flatten

# Before anything slow is imported: --help does not need it.
if TYPE_CHECKING:
    from deta.platform.data.coco_dataset import Category, CocoDataset
    from deta.platform.evaluation.evaluate_model import Evaluation
    from deta.platform.inference.predictor import Predictor

Inputs = TypeVar("Inputs")

# What changes the numbers or the speed of predictions. Other keys are refused, not ignored.
PREDICTION_KEYS = (
    "model.",
    "postprocess.",
    "data.evaluation_size.",
    "data.max_pixels",
    "precision",
)
EVALUATION_KEYS = (
    *PREDICTION_KEYS, "data.lenient", "data.loader_workers", "micro_batch_size", "num_pictures",
)  # fmt: skip


@dataclass(frozen=True)
class _Inputs:
    predictor: Predictor
    dataset: CocoDataset


def main() -> NoReturn:
    parser = tool_parser(
        __doc__ or "",
        "Keys of the configuration that matter here: postprocess.*, data.evaluation_size.*, "
        "data.lenient,\ndata.loader_workers, data.max_pixels, precision, micro_batch_size, "
        "num_pictures and model.*",
    )
    parser.add_argument(
        "--images",
        metavar="FOLDER",
        required=True,
        help="pictures; or shards, a folder or address (jobs/pack.py)",
    )
    parser.add_argument(
        "--annotations", metavar="FILE", default="", help="COCO format; shards hold theirs"
    )
    parser.add_argument("--results", metavar="FILE", type=Path, help="write detections, COCO JSON")
    parser.add_argument(
        "--pictures", metavar="FILE", type=Path, help="write a sheet of true and found boxes (.png)"
    )
    parser.add_argument(
        "--out", metavar="FOLDER", type=Path, help="keep the evaluation, with report.html"
    )
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="change the configuration"
    )
    arguments = parser.parse_intermixed_args()
    run_tool(lambda: _prepare(arguments), lambda inputs: _evaluate(inputs, arguments))


def _prepare(arguments: argparse.Namespace) -> _Inputs:
    from PIL import Image

    from deta.platform.shards.open_dataset import open_dataset

    changes = read_changes(arguments.overrides, EVALUATION_KEYS)
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

        dataset = open_images(override(_variant(arguments), changes))
        predictor = open_predictor(arguments, changes, dataset.categories)
    if arguments.pictures is not None and predictor.config.num_pictures == 0:
        raise ValueError("num_pictures=0 leaves --pictures nothing to show; leave one of them out")
    return _Inputs(predictor, dataset)


def _evaluate(inputs: _Inputs, arguments: argparse.Namespace) -> int:
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

    # disable=None: no bar where nobody watches
    with tqdm(total=len(dataset), unit=" images", file=sys.stderr, disable=None) as bar:

        def on_batch(num_images: int) -> None:
            nonlocal last_s
            last_s = time.perf_counter()
            bar.update(num_images)

        try:
            evaluation = predictor.evaluate(dataset, on_batch=on_batch)
        except ImageError as error:
            # Where a loader worker found it, its whole traceback comes before the message.
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
        write_json(arguments.results, evaluation.results)
        echo(f"{len(evaluation.results)} detections: {arguments.results}")
    if arguments.pictures is not None:
        num_pictures = predictor.config.num_pictures
        write_validation_sheet(arguments.pictures, dataset, evaluation.results, num_pictures)
        echo(f"pictures: {arguments.pictures}")
    if arguments.out is not None:
        _keep(inputs, evaluation, arguments, elapsed_s)
    return 0


def _keep(
    inputs: _Inputs, evaluation: Evaluation, arguments: argparse.Namespace, elapsed_s: float
) -> None:
    """Write the evaluation folder with its explanation, and say what that took."""
    from deta.platform.analysis.analysis import EXPLANATION, explain, write_explanation
    from deta.platform.analysis.images import images_of
    from deta.platform.analysis.report import write_report
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
        seconds={"evaluation": elapsed_s, "explanation": explanation.seconds},
    )
    write_evaluation(out, ground_truth, evaluation.results, evaluation.metrics, origin)
    write_explanation(out / EXPLANATION, explanation)
    costs = sorted(explanation.errors.cost.items(), key=lambda item: -item[1])
    echo("points of AP50 lost to errors: " + ", ".join(f"{k} {100 * v:.1f}" for k, v in costs))
    report = out / "report.html"
    write_report(report, explanation, evaluation.metrics, origin, ground_truth, images_of(dataset))
    all_s = time.perf_counter() - began_s
    share, num_suspects = all_s / (all_s + elapsed_s), len(explanation.suspects)
    echo(f"{num_suspects} annotations to look at, and what went wrong: {report}")
    echo(
        f"explained in {explanation.seconds:.1f} s, {all_s:.1f} s with report and files: "
        f"{100 * share:.0f} % of the whole"
    )


# What this tool shares with predict.py.


def tool_parser(doc: str, epilog: str) -> argparse.ArgumentParser:
    """A parser for a tool that takes weights."""
    variants = "\n  ".join(VARIANTS)
    parser = argparse.ArgumentParser(
        description=doc.strip(),
        epilog=f"{epilog}\n\nvariants:\n  {variants}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "weights", metavar="WEIGHTS", help="run, checkpoint, file, https://… or models:/…"
    )
    parser.add_argument(
        "--variant",
        metavar="NAME",
        help=f"the model in a published file, default {next(iter(VARIANTS))}",
    )
    parser.add_argument(
        "--device", choices=("auto", "cpu", "cuda"), default="auto", help="default: cuda if any"
    )
    return parser


def read_changes(texts: Sequence[str], allowed: tuple[str, ...]) -> dict[str, str]:
    """key=value, several, to a dictionary.

    Args:
        allowed: how keys that have an effect begin.

    Raises:
        ValueError: not of that form, or a key of the configuration that changes nothing here.
    """
    known = flatten(RunConfig())
    changes: dict[str, str] = {}
    for text in texts:
        key, equals, value = text.partition("=")
        if not equals:
            raise ValueError(f"{text!r} is not of the form key=value")
        if key in known and not key.startswith(allowed):
            raise ValueError(f"{key} changes nothing here; leave it out")
        changes[key] = value
    return changes


def open_predictor(
    arguments: argparse.Namespace,
    changes: Mapping[str, str],
    categories: tuple[Category, ...] | None = None,
) -> Predictor:
    """The model that a command line names.

    Args:
        categories: of a published file; a checkpoint has its own.

    Raises:
        ValueError: the weights, the changes or the device cannot be used.
    """
    import torch

    from deta.platform.checkpoint.local import find_checkpoint
    from deta.platform.inference.predictor import Predictor
    from deta.platform.weights.converted_file import is_converted

    weights = local_weights(arguments.weights)
    device = arguments.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    elif device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: torch finds no CUDA device; leave it out to use the CPU")
    if weights.is_file() and not is_converted(weights):
        return Predictor.from_published(weights, _variant(arguments), categories, device, changes)
    if arguments.variant is not None:
        raise ValueError(
            "--variant says what a published file holds; a checkpoint or a file of jobs/convert.py "
            "knows it, so leave it out"
        )
    if weights.is_file():
        return Predictor.from_published(weights, RunConfig(), categories, device, changes)
    checkpoint = find_checkpoint(weights)
    return Predictor.from_checkpoint(checkpoint, device, changes)


def local_weights(weights: str | Path) -> Path:
    """The path that WEIGHTS means; an address, or a version of the registry, is downloaded first.

    Raises:
        ValueError: the file could not be had, or is not the one that was pinned or registered.
    """
    from deta.platform.system.download import fetch

    if str(weights).startswith("models:/"):
        from deta.platform.registry.model_uri import resolve_model

        model = resolve_model(weights)
        echo(f"registered: {model}")
        return model.path
    return fetch(str(weights), echo=echo)


def _variant(arguments: argparse.Namespace) -> RunConfig:
    return find_variant(arguments.variant or next(iter(VARIANTS)))


def run_tool(prepare: Callable[[], Inputs], work: Callable[[Inputs], int]) -> NoReturn:
    """Prepare, work and exit.

    The exit code is 2 for input that was refused while preparing, 1 for a failure, else what `work`
    returns; 130 and 143 for a tool that was stopped.
    """
    signal.signal(signal.SIGTERM, _exit_on_signal)
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    try:
        try:
            inputs = prepare()
        except ValueError as error:
            print(f"error: {error}", file=sys.stderr)
            sys.exit(2)
        sys.exit(work(inputs))
    except (ValueError, RuntimeError, OSError) as error:
        print(f"\nfailed: {error}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        print("\nstopped", file=sys.stderr)
        sys.exit(130)


def write_json(path: Path, content: Any) -> None:
    """Complete or not at all; makes the folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.unfinished")
    unfinished.write_text(json.dumps(content), encoding="utf-8")
    unfinished.replace(path)


def echo(line: str) -> None:
    print(line, flush=True)


def _exit_on_signal(number: int, _frame: object) -> NoReturn:
    sys.exit(128 + number)


if __name__ == "__main__":
    main()
