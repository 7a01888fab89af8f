"""Read one side of a comparison: detections, ground truth, and facts about the model.

| given | detections | configuration, curve and cost |
|---|---|---|
| a run's folder | its best evaluation | its run.json and journal |
| an evaluation's folder | its own | of the evaluation; of the run that contains it |
| models:/NAME@ALIAS, models:/NAME/3 | registered with the version | of the evaluation |
| an MLflow run's id | its artifact `evaluation` | of the evaluation |
| a Parquet file or COCO results JSON | the file, with an annotation file | none |
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from deta.platform.data.other_formats import kind_of_document
from deta.platform.evaluation.evaluation_folder import (
    EVALUATIONS,
    FACTS,
    best_evaluation,
    images_fingerprint,
    read_evaluation,
)
from deta.platform.evaluation.result_list import listed_results
from deta.platform.pages.number_format import num_of
from deta.platform.run.journal import read_events
from deta.platform.run.run_file import RUN_FILE, RUN_ID, read_run_file
from deta.platform.study.trial_record import TrialCost
from deta.platform.system.short_list import short_list

MAX_NAMED = 5
Say = Callable[[str], object] | None


@dataclass(frozen=True)
class Side:
    """One evaluation to compare. Fields are empty or None if not known."""

    name: str
    source: str  # as the user gave it
    ground_truth: dict[str, Any]  # COCO
    results: Sequence[Mapping[str, Any]]  # COCO results
    fingerprint: str  # of images and boxes, `images_fingerprint`
    description: str = ""
    image_folder: str = ""
    weights_sha256: str = ""
    config: Mapping[str, Any] = field(default_factory=dict)  # flat, dotted keys
    curve: tuple[tuple[float, float], ...] = ()  # (epoch, AP in 0..100)
    cost: TrialCost | None = None
    hardware: str = ""
    run_id: str = ""  # of MLflow
    run_folder: Path | None = None


def open_side(
    source: str,
    *,
    annotations: Path | None = None,
    run: Path | None = None,
    mlflow_uri: str = "",
    work: Path | None = None,
    say: Say = None,
) -> Side:
    """Read one side of a comparison.

    Args:
        source: see the table above.
        annotations: COCO format; for files of detections only.
        run: folder of the run that an evaluation or a file comes from, for curve and cost.
        mlflow_uri: of the registry and of runs; empty for the default one.
        work: an empty folder for downloads; needed for models:/… and MLflow's runs.
        say: leave out detections of unknown images and categories, and call this with a line about
            them; without it they are an error.

    Raises:
        ValueError: there is no such source, or it has no evaluation.
    """
    path = Path(source).expanduser()
    if source.startswith("models:/") or (RUN_ID.fullmatch(source) and not path.exists()):
        assert work is not None
        side = _of_mlflow(source, mlflow_uri, work, say)
    elif path.is_file():
        side = _of_file(path, annotations, say)
    elif (path / FACTS).is_file():
        side = _of_evaluation(path, say)
        owner = path.resolve().parent.parent
        if path.resolve().parent.name == EVALUATIONS and (owner / RUN_FILE).is_file():
            side, run = replace(side, name=f"{owner.name}, {side.name}"), run or owner
    elif (path / RUN_FILE).is_file():
        side, run = (
            replace(_of_evaluation(_best_evaluation(path), say), name=path.resolve().name),
            path,
        )
    elif path.is_dir():
        raise ValueError(
            f"{path}: holds neither a run (run.json) nor an evaluation (evaluation.json); "
            "jobs/evaluate.py MODEL … --out FOLDER writes one"
        )
    else:
        raise ValueError(
            f"{source}: is no folder, file, models:/NAME@ALIAS, or id of an MLflow run"
        )
    return side if run is None else _with_run(side, run)


def refuse_other_images(a: Side, b: Side) -> None:
    """Check that two evaluations are of the same images and boxes.

    Raises:
        ValueError: they are not; the message names what differs.
    """
    if a.fingerprint == b.fingerprint:
        return
    found = _differences(a.ground_truth, b.ground_truth) or ["the order or form of the entries"]
    raise ValueError(
        f"{a.name} and {b.name} were not evaluated on the same images and boxes, so their AP "
        f"cannot be compared: {'; '.join(found)}. Evaluate both on one data set (jobs/evaluate.py)"
    )


def _differences(a: Mapping[str, Any], b: Mapping[str, Any]) -> list[str]:
    def examples(words: str, ids: set[Any]) -> str:
        return f" ({words}: {short_list(sorted(ids, key=str), MAX_NAMED)})" if ids else ""

    found = []
    ids_a, ids_b = ({image["id"] for image in truth["images"]} for truth in (a, b))
    if ids_a != ids_b:
        found.append(
            f"A has {len(ids_a)} images and B {len(ids_b)}, {len(ids_a & ids_b)} of them the same"
            f"{examples('only in A', ids_a - ids_b)}{examples('only in B', ids_b - ids_a)}"
        )
    names_a, names_b = ({c["id"]: c["name"] for c in truth["categories"]} for truth in (a, b))
    if other := {i for i in names_a | names_b if names_a.get(i) != names_b.get(i)}:
        pairs = {f"{i} ({names_a.get(i)} / {names_b.get(i)})" for i in other}
        found.append(f"{len(other)} categories differ{examples('such as', pairs)}")
    boxes_a, boxes_b = (
        Counter(
            (e["image_id"], e["category_id"], *e["bbox"], e.get("area"), bool(e.get("iscrowd")))
            for e in truth["annotations"]
        )
        for truth in (a, b)
    )
    changed = {row[0] for row in (boxes_a - boxes_b) + (boxes_b - boxes_a)} & ids_a & ids_b
    if changed:
        found.append(f"the boxes of {len(changed)} images differ{examples('such as', changed)}")
    return found


def _of_evaluation(folder: Path, say: Say) -> Side:
    found = read_evaluation(folder, say)
    origin = found.origin
    return Side(
        name=folder.resolve().name,
        source=str(folder),
        ground_truth=found.ground_truth,
        results=found.results,
        fingerprint=found.images_fingerprint,
        description=origin.description,
        image_folder=origin.image_folder,
        weights_sha256=origin.weights_sha256,
        config=origin.config,
    )


def _best_evaluation(run: Path) -> Path:
    best = best_evaluation(run)
    if best is None:
        raise ValueError(
            f"{run}: this run has no evaluation in it; make one with jobs/evaluate.py {run} "
            "--images … --annotations … --out FOLDER, and compare that folder (--run-a, --run-b "
            "name the run, for its curve and cost)"
        )
    return best


def _of_file(path: Path, annotations: Path | None, say: Say) -> Side:
    if annotations is None:
        raise ValueError(f"{path}: a file of detections needs its boxes: --annotations FILE")
    try:
        truth = json.loads(annotations.read_text(encoding="utf-8"))
        if path.suffix == ".parquet":
            import pyarrow.parquet as pq

            from deta.platform.evaluation.detections_parquet import results_of_table

            results = results_of_table(pq.read_table(path))
        else:
            results = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"{path}, {annotations}: cannot be read, {error}") from error
    if not isinstance(truth, dict) or not {"images", "annotations", "categories"} <= truth.keys():
        what = kind_of_document(truth) or "no annotation file in COCO format"
        raise ValueError(f"{annotations}: is {what}")
    if not isinstance(results, list):
        raise ValueError(f"{path}: is no list of detections in the format of COCO results")
    results = listed_results(results, truth, str(path), say)
    return Side(path.stem, str(path), truth, results, images_fingerprint(truth))


def _of_mlflow(source: str, uri: str, work: Path, say: Say) -> Side:
    try:
        from deta.platform.registry.mlflow_registry import EVALUATION_PART, Registry
        from deta.platform.registry.model_address import parse_address, registry_uri
        from deta.platform.tracking.mlflow_store import MlflowStore
    except ModuleNotFoundError as error:
        raise ValueError(
            f"{source}: needs MLflow ({error}): pip install 'deta-platform[train]'"
        ) from error
    uri = uri or registry_uri()
    if source.startswith("models:/"):
        registry = Registry(uri)
        version = registry.find(parse_address(source))
        folder = registry.download(version, work, EVALUATION_PART)
        return replace(_of_evaluation(folder, say), name=str(version), source=source)
    name, folder = MlflowStore(uri).fetch_folder(source, "evaluation", work)
    return replace(_of_evaluation(folder, say), name=name, source=source, run_id=source)


def _with_run(side: Side, run: Path) -> Side:
    """Add the configuration, learning curve and cost of the run's folder."""
    config = _flat(read_run_file(run)["config"])
    try:
        run_id = json.loads((run / "mlflow.json").read_text(encoding="utf-8")).get("run_id") or ""
    except (OSError, ValueError, AttributeError):
        run_id = ""
    curve: dict[float, float] = {}  # epoch to AP
    speeds: list[float] = []  # images/s
    spans: list[tuple[float, float]] = []  # of each attempt: first and last event
    for event, _ in read_events(run):
        kind, time_s, values = event["kind"], float(event["time_s"]), event.get("metrics") or {}
        if kind in ("begin", "starting"):
            spans.append((time_s, time_s))
        elif kind in ("progress", "evaluation", "checkpoint", "end"):
            spans = [*spans[:-1], (spans[-1][0] if spans else time_s, time_s)]
        if kind == "evaluation" and "val/AP" in values:
            curve[float(values.get("val/epoch", event["step"]))] = float(values["val/AP"])
        elif kind == "progress" and "train/images_per_s" in values:
            speeds.append(float(values["train/images_per_s"]))
    hours = sum(end_s - begin_s for begin_s, end_s in spans) / 3600
    steady = sorted(speeds[1:] or speeds)
    workers, on_gpu = int(config.get("cluster.num_workers", 1)), bool(config.get("cluster.gpu"))
    cpus = workers * float(config.get("cluster.cpus_per_worker", 1))
    return replace(
        side,
        config=config,
        curve=tuple(sorted(curve.items())),
        cost=TrialCost(
            wall_s=3600 * hours or None,
            gpu_hours=workers * hours if hours and on_gpu else None,
            cpu_hours=cpus * hours or None,
            images_per_s=steady[len(steady) // 2] if steady else None,
        ),
        hardware=num_of(workers, f"{'GPU' if on_gpu else 'CPU'} worker"),
        run_id=side.run_id or run_id,
        run_folder=run,
        image_folder=side.image_folder or str(config.get("data.val_images") or ""),
    )


def _flat(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat
