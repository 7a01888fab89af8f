#!/usr/bin/env python
"""Compare two models image by image: which is better, by how much, where, and why.

  python jobs/compare.py ~/deta-runs/first ~/deta-runs/second
  python jobs/compare.py models:/deta@champion ~/deta-runs/second/evaluations/step-00000840
  python jobs/compare.py a.json b.json --annotations instances_val2017.json --images val2017

A and B are each a run's folder (its best evaluation); the folder of an evaluation
(jobs/evaluate.py --out); a registered version, models:/NAME@ALIAS or models:/NAME/3; the id of
an MLflow run; or a file of detections, Parquet or COCO results JSON, with --annotations. Both must
cover the same images and boxes.

The job writes one self-contained HTML page, and logs it to the MLflow run of B as
comparisons/A-B.html. The difference in AP has a paired bootstrap interval over images.
"""

from __future__ import annotations

import argparse
import re
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from deta.jobs.command_line import described_parser, echo, run_tool

if TYPE_CHECKING:
    from deta.platform.comparison.sources import Side


@dataclass(frozen=True)
class _CompareInputs:
    a: Side
    b: Side
    image_folder: Path | None
    out: Path


def main() -> NoReturn:
    parser = described_parser(__doc__)
    parser.add_argument("a", metavar="A", help="run, evaluation, models:/…, MLflow run id or file")
    parser.add_argument("b", metavar="B", help="the same; differences are B minus A")
    parser.add_argument(
        "--annotations", metavar="FILE", type=Path, help="COCO format, for files of detections"
    )
    parser.add_argument(
        "--images", metavar="FOLDER", type=Path, help="images; default: where B was evaluated"
    )
    parser.add_argument(
        "--run-a", metavar="RUN", type=Path, help="run of A, for its curve and cost"
    )
    parser.add_argument("--run-b", metavar="RUN", type=Path, help="run of B")
    parser.add_argument(
        "--out", metavar="FILE", type=Path, help="the page; default: comparison-A-B.html here"
    )
    parser.add_argument("--resamples", metavar="N", type=int, default=1000, help="default 1000")
    parser.add_argument(
        "--seed", metavar="N", type=int, default=0, help="random seed of the resamples"
    )
    parser.add_argument(
        "--confidence", metavar="SHARE", type=float, default=0.95, help="default 0.95"
    )
    parser.add_argument(
        "--mlflow",
        metavar="URI",
        default="",
        help="address of MLflow; default: that of B's run",
    )
    parser.add_argument(
        "--mlflow-run", metavar="ID", default="", help="log the page to this run; default: B's"
    )
    parser.add_argument("--no-mlflow", action="store_true", help="do not log the page")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="deta-compare-") as work:
        run_tool(
            lambda: _prepare(arguments, Path(work)), lambda inputs: _compare(inputs, arguments)
        )


def _prepare(arguments: argparse.Namespace, work: Path) -> _CompareInputs:
    from deta.platform.comparison.sources import open_side, refuse_other_images

    if arguments.resamples < 1 or not 0 < arguments.confidence < 1:
        raise ValueError("--resamples is at least 1, --confidence between 0 and 1")
    if arguments.images is not None and not arguments.images.is_dir():
        raise ValueError(f"--images {arguments.images}: there is no such folder")
    sides = []
    for letter, source, run in (
        ("a", arguments.a, arguments.run_a),
        ("b", arguments.b, arguments.run_b),
    ):
        place = work / letter
        place.mkdir()
        sides.append(
            open_side(
                source,
                annotations=arguments.annotations,
                run=run,
                mlflow_uri=arguments.mlflow,
                work=place,
            )
        )
    refuse_other_images(*sides)
    folders = [Path(side.image_folder) for side in reversed(sides) if side.image_folder]
    found = arguments.images or next((folder for folder in folders if folder.is_dir()), None)
    default = Path(f"comparison-{_file_name(sides[0].name)}-{_file_name(sides[1].name)}.html")
    return _CompareInputs(sides[0], sides[1], found, arguments.out or default)


def _compare(inputs: _CompareInputs, arguments: argparse.Namespace) -> int:
    from deta.platform.comparison.compare import compare_sides
    from deta.platform.comparison.report import verdict_sentences, write_comparison

    comparison = compare_sides(
        inputs.a,
        inputs.b,
        resamples=arguments.resamples,
        seed=arguments.seed,
        confidence=arguments.confidence,
    )
    for sentence in verdict_sentences(comparison):
        echo(sentence)
    num_images = write_comparison(inputs.out, comparison, inputs.image_folder)
    echo(
        f"{comparison.difference.resamples} resamples in {comparison.difference.seconds:.1f} s, "
        f"{num_images} images"
    )
    echo(f"page: {inputs.out}")
    run_id = arguments.mlflow_run or inputs.b.run_id
    if run_id and not arguments.no_mlflow:
        from deta.platform.registry.model_address import registry_uri
        from deta.platform.tracking.upload_plan import uri_of

        try:
            from deta.platform.tracking.mlflow_store import MlflowStore
        except ModuleNotFoundError as error:
            raise RuntimeError(
                f"{inputs.out} is not logged, since MLflow is missing ({error}): pip install "
                "'deta-platform[train]', or add --no-mlflow"
            ) from error
        try:
            folder = inputs.b.run_folder
            uri = arguments.mlflow or (uri_of(folder) if folder else registry_uri())
            MlflowStore(uri).send_file(run_id, inputs.out, "comparisons")
        except Exception as error:  # the page is written; MLflow raises many kinds of errors
            echo(f"not logged to MLflow: {error}; give its address with --mlflow, or --no-mlflow")
            return 1
        echo(f"logged to MLflow: run {run_id}, comparisons/{inputs.out.name}")
    return 0


def _file_name(name: str) -> str:
    return re.sub(r"[^\w.-]+", "-", name, flags=re.ASCII).strip("-.") or "model"


if __name__ == "__main__":
    main()
