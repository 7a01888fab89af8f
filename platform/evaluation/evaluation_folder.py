"""The folder of an evaluation: its metrics, all detections, and the ground truth.

| file | |
|---|---|
| evaluation.json | the twelve numbers, AP of each class, and their origin (`Origin`) |
| detections.parquet | all detections, in the order of the results (detections_parquet.py) |
| ground_truth.json.gz | COCO dict of the images that were evaluated, and no others |
| explanation.json, report.html | what goes wrong (platform/analysis/analysis.py), if written |

Comparisons and promotions read this folder, never a run: it holds all that AP depends on. Two
evaluations can be compared if, and only if, `images_fingerprint` is the same. evaluation.json is
written last and holds the hashes of the other files, so an incomplete folder, or one put together
from two, is refused.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from deta.platform.evaluation.coco_metrics import CocoMetrics
from deta.platform.evaluation.detections_parquet import results_of_table, table_of_results
from deta.platform.evaluation.result_list import listed_results
from deta.platform.system.atomic_write import replacing, write_atomic
from deta.platform.system.safe_read import file_sha256, gunzip, read_json

REPORT = "report.html"
FORMAT = 1
MAX_UNPACKED = 2 << 30  # bytes of ground truth: COCO val2017 has 9 MB of boxes
EVALUATIONS = "evaluations"  # folder of evaluations in the folder of a run
FACTS, DETECTIONS, GROUND_TRUTH = "evaluation.json", "detections.parquet", "ground_truth.json.gz"


@dataclass(frozen=True, kw_only=True)
class Origin:
    """The model, data and settings of an evaluation. Empty or None if unknown."""

    description: str = ""  # of the model, a line for people
    data_fingerprint: str = ""  # `CocoDataset.fingerprint`
    annotations: str = ""  # path of the file, as given
    image_folder: str = ""  # path; the ground truth's `file_name` are relative to it
    weights_sha256: str = ""  # of the file that the model's weights are from
    config: Mapping[str, Any] = field(default_factory=dict)  # flat, dotted keys
    epoch: float | None = None
    step: int | None = None
    seconds: Mapping[str, float] = field(default_factory=dict)  # duration by stage
    engine: str = "hotcoco"  # the program that computed AP; older files do not name it


@dataclass(frozen=True)
class StoredEvaluation:
    """The content of an evaluation folder."""

    folder: Path
    ground_truth: dict[str, Any]  # COCO: images, annotations, categories
    results: list[dict[str, Any]]  # COCO results; of equal scores, the earlier one counts first
    metrics: CocoMetrics
    images_fingerprint: str  # equal if, and only if, two evaluations can be compared
    origin: Origin


def write_evaluation(
    folder: Path,
    ground_truth: Mapping[str, Any],
    results: Sequence[Mapping[str, Any]],
    metrics: CocoMetrics,
    origin: Origin,
) -> None:
    """Write the folder. It is readable only once it is complete. Other files in it stay.

    Boxes and scores are stored as float32, as models return them, so the results of
    `to_coco_results` are read back without a difference.

    Args:
        ground_truth: a COCO dict of the evaluated images, with integer ids.

    Raises:
        ValueError: a detection is of an image or a category that is not listed.
        OSError: the disk is full or read-only.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / FACTS).unlink(missing_ok=True)  # it does not describe the files that follow
    table = table_of_results(results, ground_truth, origin.weights_sha256)
    with replacing(folder / DETECTIONS) as unfinished:
        pq.write_table(table, unfinished, compression="zstd")
    text = json.dumps(ground_truth, separators=(",", ":")).encode()
    # mtime=0: equal ground truth, equal file. Level 1 is five times as fast as the default.
    write_atomic(folder / GROUND_TRUTH, gzip.compress(text, 1, mtime=0))
    facts = {
        "format": FORMAT,
        "ap": metrics.as_dict(),
        "ap_per_category": {str(i): ap for i, ap in metrics.ap_per_category.items()},
        "num_images": len(ground_truth["images"]),
        "num_detections": table.num_rows,
        "images_fingerprint": images_fingerprint(ground_truth),
        **asdict(origin),
        "sha256": {name: file_sha256(folder / name) for name in (DETECTIONS, GROUND_TRUTH)},
    }
    write_atomic(folder / FACTS, json.dumps(facts, indent=1).encode())


def read_evaluation(folder: Path, say: Callable[[str], object] | None = None) -> StoredEvaluation:
    """Read the folder that `write_evaluation` wrote.

    Args:
        say: leave out detections of unknown images and categories, and call this with a line about
            them; without it they are an error.

    Raises:
        ValueError: it is no evaluation folder, has a newer format, or is incomplete or damaged;
            names the file and what to do.
    """
    facts = read_facts(folder)
    for name, expected in facts["sha256"].items():
        if not (folder / name).is_file():
            raise ValueError(f"{folder}: {name} is missing; evaluate again")
        if file_sha256(folder / name) != expected:
            raise ValueError(f"{folder}: {name} is not the file that {FACTS} names; evaluate again")
    try:
        ground_truth = json.loads(gunzip((folder / GROUND_TRUTH).read_bytes(), MAX_UNPACKED))
        results = results_of_table(pq.read_table(folder / DETECTIONS))
    except (OSError, ValueError, EOFError, KeyError) as error:
        raise ValueError(f"{folder}: cannot be read, {error}; evaluate again") from error
    results = listed_results(results, ground_truth, str(folder), say)
    by_category = {int(i): float(ap) for i, ap in facts["ap_per_category"].items()}
    metrics = CocoMetrics(**facts["ap"], ap_per_category=by_category)
    origin = Origin(**{part.name: facts[part.name] for part in fields(Origin)})
    fingerprint = facts["images_fingerprint"]
    return StoredEvaluation(folder, ground_truth, results, metrics, fingerprint, origin)


def read_facts(folder: Path) -> dict[str, Any]:
    """Read evaluation.json alone: enough to list evaluations and to see which can be compared.

    Raises:
        ValueError: as for `read_evaluation`, but the other files are not checked.
    """
    path = folder / FACTS
    try:
        facts = read_json(path)
    except FileNotFoundError as error:
        raise ValueError(
            f"{folder}: is not a complete evaluation, since it has no {FACTS}; jobs/evaluate.py "
            "--out FOLDER writes one"
        ) from error
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: cannot be read, {error}; evaluate again") from error
    if not isinstance(facts, dict) or "format" not in facts:
        raise ValueError(f"{path}: is not what jobs/evaluate.py --out writes")
    if facts["format"] != FORMAT:
        raise ValueError(
            f"{path}: has format {facts['format']!r}, and this version reads {FORMAT}; use the "
            "version of this project that wrote it, or evaluate again"
        )
    wanted = {"ap", "ap_per_category", "num_images", "images_fingerprint", "sha256"}
    wanted |= {part.name for part in fields(Origin)}
    facts.setdefault("engine", "hotcoco")
    if missing := wanted - facts.keys():
        raise ValueError(f"{path}: lacks {sorted(missing)}; evaluate again")
    names = set(CocoMetrics.__dataclass_fields__) - {"ap_per_category"}
    if facts["ap"].keys() != names or not all(map(_is_share, facts["ap"].values())):
        raise ValueError(f"{path}: 'ap' is not the twelve numbers of COCO; evaluate again")
    return facts


def best_evaluation(run: Path) -> Path | None:
    """Return the evaluation of the highest AP in a run's folder; of equal ones, the newest."""
    found = {}
    for folder in sorted((run / EVALUATIONS).glob("*/")):
        try:
            found[folder] = read_facts(folder)["ap"]["AP"]
        except ValueError:  # incomplete
            continue
    return max(found, key=lambda folder: (found[folder], folder.name), default=None)


def images_fingerprint(ground_truth: Mapping[str, Any]) -> str:
    """Return the SHA-256, in hex, of all that AP depends on besides the detections.

    It covers the ids of images, the ids and names of categories, and the image, category, box,
    area and `iscrowd` of each annotation. It does not cover the order of the lists, annotation
    ids, or file names.
    """
    rows = [
        [
            entry["image_id"],
            entry["category_id"],
            [float(number) for number in entry["bbox"]],
            None if entry.get("area") is None else float(entry["area"]),
            int(bool(entry.get("iscrowd", 0))),
        ]
        for entry in ground_truth["annotations"]
    ]
    content = [
        sorted(image["id"] for image in ground_truth["images"]),
        sorted([category["id"], category["name"]] for category in ground_truth["categories"]),
        sorted(json.dumps(row) for row in rows),
    ]
    return hashlib.sha256(b"deta evaluation 1\n" + json.dumps(content).encode()).hexdigest()


def _is_share(value: object) -> bool:
    """Return whether the value is in 0..1, or is -1: undefined."""
    return isinstance(value, (int, float)) and math.isfinite(value) and -1 <= value <= 1
