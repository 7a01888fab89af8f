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
comparisons/A-B.html. The difference in AP has an interval over images,
from half-samples that are the same for both; with fewer than 20 images it has none.
"""

from __future__ import annotations

import re
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn

from tyro.conf import Positional

from deta.jobs.command_line import OUTPUT, echo, read_options, run_tool
from deta.platform.run.run_file import RUN_ID
from deta.platform.run.run_paths import require_paths

if TYPE_CHECKING:
    from deta.platform.comparison.sources import Side


@dataclass(frozen=True, kw_only=True)
class CompareOptions:
    a: Positional[str]  # run, evaluation, models:/…, MLflow run id or file
    b: Positional[str]  # the same; differences are B minus A
    annotations: Path | None = None  # COCO format, for files of detections
    images: Path | None = None  # a folder; without it, where B was evaluated
    run_a: Path | None = None  # run of A, for its curve and cost
    run_b: Path | None = None  # run of B
    out: Annotated[Path | None, OUTPUT] = None  # the page; without it, comparison-A-B.html here
    resamples: int = 1000  # half-samples of the images
    seed: int = 0  # random seed of these
    confidence: float = 0.95  # of the interval
    mlflow: str = ""  # address of MLflow; without it, that of B's run
    mlflow_run: str = ""  # log the page to the run of this id; without it, B's
    no_mlflow: bool = False  # do not log the page
    # Leave out detections of images and categories that the annotations do not have.
    lenient: bool = False


def main() -> NoReturn:
    options = read_options(CompareOptions, __doc__)
    with tempfile.TemporaryDirectory(prefix="deta-compare-") as work:
        run_tool(lambda: _prepare(options, Path(work)), lambda sides: _compare(*sides, options))


def _prepare(options: CompareOptions, work: Path) -> tuple[Side, Side]:
    for source in (options.a, options.b):
        if not RUN_ID.fullmatch(source):
            require_paths({"": source})
    require_paths({"--annotations": options.annotations, "--images": options.images})
    from deta.platform.comparison.sources import open_side, refuse_other_images

    if options.resamples < 2 or not 0 < options.confidence < 1:
        raise ValueError("--resamples is at least 2, --confidence between 0 and 1")
    if options.images is not None and not options.images.is_dir():
        raise ValueError(f"--images {options.images}: there is no such folder")

    def opened(source: str, run: Path | None, place: Path) -> Side:
        place.mkdir()
        return open_side(
            source,
            annotations=options.annotations,
            run=run,
            mlflow_uri=options.mlflow,
            work=place,
            say=echo if options.lenient else None,
        )

    a, b = (
        opened(options.a, options.run_a, work / "a"),
        opened(options.b, options.run_b, work / "b"),
    )
    refuse_other_images(a, b)
    return a, b


def _compare(a: Side, b: Side, options: CompareOptions) -> int:
    from deta.platform.comparison.compare import compare_sides
    from deta.platform.comparison.report import verdict_sentences, write_comparison

    comparison = compare_sides(
        a, b, resamples=options.resamples, seed=options.seed, confidence=options.confidence
    )
    for sentence in verdict_sentences(comparison):
        echo(sentence)
    folders = (Path(side.image_folder) for side in (b, a) if side.image_folder)
    images = options.images or next((folder for folder in folders if folder.is_dir()), None)
    out = options.out or Path(f"comparison-{_file_name(a.name)}-{_file_name(b.name)}.html")
    num_images = write_comparison(out, comparison, images)
    echo(
        f"{comparison.difference.resamples} half-samples in {comparison.difference.seconds:.1f} s, "
        f"{num_images} images"
    )
    echo(f"page: {out}")
    run_id = options.mlflow_run or b.run_id
    if not run_id or options.no_mlflow:
        return 0
    from deta.platform.registry.model_address import registry_uri
    from deta.platform.tracking.upload_plan import uri_of

    try:
        from deta.platform.tracking.mlflow_store import MlflowStore
    except ModuleNotFoundError as error:
        raise RuntimeError(
            f"{out} is not logged, since MLflow is missing ({error}): pip install "
            "'deta-platform[train]', or add --no-mlflow"
        ) from error
    try:
        uri = options.mlflow or (uri_of(b.run_folder) if b.run_folder else registry_uri())
        MlflowStore(uri).send_file(run_id, out, "comparisons")
    except Exception as error:  # the page is written; MLflow raises many kinds of errors
        echo(f"not logged to MLflow: {error}; give its address with --mlflow, or --no-mlflow")
        return 1
    echo(f"logged to MLflow: run {run_id}, comparisons/{out.name}")
    return 0


def _file_name(name: str) -> str:
    return re.sub(r"[^\w.-]+", "-", name, flags=re.ASCII).strip("-.") or "model"


if __name__ == "__main__":
    main()
