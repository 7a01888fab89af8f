"""An evaluation as a folder: what was evaluated, what was found, and how good it was.

| file | |
|---|---|
| evaluation.json | the twelve numbers, AP of each class, and where they are from (`Origin`) |
| detections.parquet | all detections, in the order of the results (platform/evaluation/detections_parquet.py) |
| ground_truth.json.gz | COCO dict of just the images that were evaluated |
| explanation.json, report.html | why the model is good or bad (platform/analysis/analysis.py), if made |

Whoever compares two models or decides between them reads this folder, never a run: it holds all
that AP depends on. Two evaluations can be compared if, and only if, `images_fingerprint` is the
same. evaluation.json is written last and names the other files' hashes, so a folder that was cut
off while it was written, or put together from two, is refused.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from deta.platform.evaluation.coco_metrics import CocoMetrics
from deta.platform.evaluation.detections_parquet import results_of_table, table_of_results
from deta.platform.system.atomic_write import replacing, write_atomic
from deta.platform.system.safe_read import file_sha256, gunzip, read_json

REPORT = "report.html"


FORMAT = 1
MAX_UNPACKED = 2 << 30  # bytes of ground truth: COCO val2017 has 9 MB of boxes
EVALUATIONS = "evaluations"  # in a run's folder, those that it keeps
FACTS, DETECTIONS, GROUND_TRUTH = "evaluation.json", "detections.parquet", "ground_truth.json.gz"


@dataclass(frozen=True, kw_only=True)
class Origin:
    """What the numbers are of. Empty or None where it is not known."""

    description: str = ""  # of the model, a line for people
    data_fingerprint: str = ""  # `CocoDataset.fingerprint`
    annotations: str = ""  # path of the file, as it was given
    image_folder: str = ""  # path; the ground truth's `file_name` are relative to it
    weights_sha256: str = ""  # of the file that the model's weights are from
    config: Mapping[str, Any] = field(default_factory=dict)  # flat, dotted keys
    epoch: float | None = None
    step: int | None = None
    seconds: Mapping[str, float] = field(default_factory=dict)  # what took how long


@dataclass(frozen=True)
class Evaluation:
    """An evaluation folder, read."""

    folder: Path
    ground_truth: dict[str, Any]  # COCO: images, annotations, categories
    results: list[dict[str, Any]]  # COCO results, in the order in which equal scores count
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
    """Write the folder; it is readable from when it is complete. Other files in it stay.

    Boxes and scores are stored as float32, as models give them; what `to_coco_results` made of
    them is read back without a difference. Detections of categories that are not listed are left
    out, as they never count.

    Args:
        ground_truth: a COCO dict of the evaluated images, ids whole numbers.

    Raises:
        ValueError: a detection of an image that is not listed.
        OSError: the disk is full or read-only.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / FACTS).unlink(missing_ok=True)  # what is written now does not belong to it
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


def read_evaluation(folder: Path) -> Evaluation:
    """The folder that `write_evaluation` wrote.

    Raises:
        ValueError: it is no evaluation folder, is of a newer format, incomplete or damaged; says
            which file, and what to do.
    """
    facts = read_facts(folder)
    for name, expected in facts["sha256"].items():
        if not (folder / name).is_file():
            raise ValueError(f"{folder}: {name} is missing; evaluate again")
        if file_sha256(folder / name) != expected:
            raise ValueError(f"{folder}: {name} is not the one of {FACTS}; evaluate again")
    try:
        ground_truth = json.loads(gunzip((folder / GROUND_TRUTH).read_bytes(), MAX_UNPACKED))
        results = results_of_table(pq.read_table(folder / DETECTIONS))
    except (OSError, ValueError, EOFError, KeyError) as error:
        raise ValueError(f"{folder}: cannot be read, {error}; evaluate again") from error
    return Evaluation(
        folder,
        ground_truth,
        results,
        CocoMetrics(
            **facts["ap"],
            ap_per_category={int(i): float(ap) for i, ap in facts["ap_per_category"].items()},
        ),
        facts["images_fingerprint"],
        Origin(**{part.name: facts[part.name] for part in fields(Origin)}),
    )


def read_facts(folder: Path) -> dict[str, Any]:
    """evaluation.json alone: enough to list evaluations, and to see which can be compared.

    Raises:
        ValueError: as for `read_evaluation`, except that the other files are not looked at.
    """
    path = folder / FACTS
    try:
        facts = read_json(path)
    except FileNotFoundError as error:
        raise ValueError(
            f"{folder}: is no complete evaluation, for it has no {FACTS}; jobs/evaluate.py "
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
    if missing := wanted - facts.keys():
        raise ValueError(f"{path}: lacks {sorted(missing)}; evaluate again")
    names = set(CocoMetrics.__dataclass_fields__) - {"ap_per_category"}
    if facts["ap"].keys() != names or not all(map(_is_share, facts["ap"].values())):
        raise ValueError(f"{path}: 'ap' is not the twelve numbers of COCO; evaluate again")
    return facts


def best_evaluation(run: Path) -> Path | None:
    """Of those that a run's folder keeps, the newest of the highest AP."""
    found = {}
    for folder in sorted((run / EVALUATIONS).glob("*/")):
        try:
            found[folder] = read_facts(folder)["ap"]["AP"]
        except ValueError:  # cut off while it was written
            continue
    return max(found, key=lambda folder: (found[folder], folder.name), default=None)


def images_fingerprint(ground_truth: Mapping[str, Any]) -> str:
    """SHA-256, in hex, of all that AP depends on but the detections.

    Covers the ids of the images, ids and names of the categories, and of each annotation image,
    category, box, area and `iscrowd`; neither the order of the lists, nor annotation ids, nor the
    names of files.
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
    """In 0..1, or -1 for what is not defined."""
    return isinstance(value, (int, float)) and math.isfinite(value) and -1 <= value <= 1
