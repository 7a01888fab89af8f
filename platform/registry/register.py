"""A checkpoint becomes a version of a registered model: complete, checked, and told to MLflow."""

from __future__ import annotations

import shutil
import tempfile
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from deta.platform.analysis.analysis import EXPLANATION
from deta.platform.checkpoint.format import Checkpoint, read_checkpoint
from deta.platform.checkpoint.local import find_checkpoint
from deta.platform.evaluation.evaluation_folder import (
    DETECTIONS,
    EVALUATIONS,
    FACTS,
    GROUND_TRUTH,
    REPORT,
    StoredEvaluation,
    read_evaluation,
    read_facts,
)
from deta.platform.inference.predictor import Predictor
from deta.platform.registry.lineage import Lineage, read_lineage, run_folder
from deta.platform.registry.mlflow_registry import (
    EVALUATION_PART,
    HISTORY_SUFFIX,
    MANIFEST_TAG,
    SHA256_TAG,
    Registry,
    Version,
)
from deta.platform.registry.model_uri import WEIGHTS_FILE
from deta.platform.registry.pyfunc_model import write_mlflow_model
from deta.platform.registry.version_folder import (
    Figures,
    measure_latency,
    parity_of,
    read_export_report,
    write_version_files,
)
from deta.platform.system.redaction import redact
from deta.platform.system.safe_read import file_sha256


@dataclass(frozen=True)
class Prepared:
    """All that a version will be, checked and not yet in MLflow."""

    checkpoint: Checkpoint
    sha256: str  # of the weights
    lineage: Lineage
    evaluation: StoredEvaluation
    export: dict[str, Any] | None


def prepare(weights: Path, evaluation: Path | None, export: Path | None) -> Prepared:
    """Look at everything that a version needs, and refuse what does not fit.

    Args:
        weights: a checkpoint, or a run's folder: its best checkpoint.
        evaluation: folder of an evaluation of these weights; default: the one among the run's.
        export: folder that jobs/export.py wrote, if any.

    Raises:
        LineageError: it is not known where the model is from.
        ValueError: something is damaged, or of other weights.
    """
    checkpoint = read_checkpoint(find_checkpoint(weights))
    lineage = read_lineage(checkpoint)
    sha256 = file_sha256(checkpoint.path / WEIGHTS_FILE)
    folder = evaluation or _evaluation_of(checkpoint, sha256)
    read = read_evaluation(folder)
    if read.origin.weights_sha256 != sha256:
        raise ValueError(
            f"{folder}: is the evaluation of other weights, SHA-256 "
            f"{read.origin.weights_sha256[:12] or 'not known'}… instead of {sha256[:12]}…; "
            f"jobs/evaluate.py {checkpoint.path} --out FOLDER makes one of these"
        )
    report = read_export_report(export, sha256) if export is not None else None
    return Prepared(checkpoint, sha256, lineage, read, report)


def register(
    registry: Registry,
    name: str,
    prepared: Prepared,
    *,
    device: torch.device | str = "cpu",
    echo: Callable[[str], None] = print,
) -> Version:
    """Make it the next version of the model.

    Args:
        device: that latency is measured on.

    Raises:
        ValueError: the run is not in this MLflow, or the name cannot be used.
        RuntimeError: MLflow does not answer.
    """
    if name.endswith(HISTORY_SUFFIX) or not name or set(name) & set("/:@%'\""):
        raise ValueError(
            f"{name!r} cannot be the name of a model: leave out / : @ %, quotes, and "
            f"{HISTORY_SUFFIX!r} at its end"
        )
    registry.require_run(prepared.lineage.run_id)
    checkpoint = prepared.checkpoint
    latency = measure_latency(Predictor.from_checkpoint(checkpoint.path, device))
    echo(f"latency: {latency.milliseconds:.1f} ms on {latency.device}")
    figures = Figures(
        ap=prepared.evaluation.metrics.as_dict(),
        metrics=checkpoint.state.metrics,
        num_bytes=(checkpoint.path / WEIGHTS_FILE).stat().st_size,
        evaluation_sha256=file_sha256(prepared.evaluation.folder / FACTS),
        images_fingerprint=prepared.evaluation.images_fingerprint,
        latency=latency,
        export=prepared.export,
    )
    with tempfile.TemporaryDirectory(prefix="deta-") as folder:
        files, evaluation = Path(folder) / "model", Path(folder) / "evaluation"
        manifest = write_version_files(files, checkpoint, prepared.lineage, figures)
        write_mlflow_model(Path(folder) / "mlflow", files, prepared.lineage.packages)
        evaluation.mkdir()
        for part in (FACTS, DETECTIONS, GROUND_TRUTH, EXPLANATION, REPORT):
            if (prepared.evaluation.folder / part).is_file():
                shutil.copyfile(prepared.evaluation.folder / part, evaluation / part)
        echo("uploading …")
        stored = registry.upload(
            name,
            prepared.lineage.run_id,
            {"": Path(folder) / "mlflow", EVALUATION_PART: evaluation},
        )
    return registry.add_version(
        name,
        stored,
        tags(prepared, figures, manifest),
        description(prepared, figures),
        uuid.uuid4().hex,
    )


def tags(prepared: Prepared, figures: Figures, manifest: str) -> dict[str, str]:
    """What the version's page shows beside its description, and searches go by."""
    lineage = prepared.lineage
    return {
        SHA256_TAG: prepared.sha256,
        MANIFEST_TAG: manifest,
        "deta.AP": f"{100 * figures.ap['AP']:.2f}",
        "deta.commit": lineage.code_commit + "-dirty" * lineage.code_is_dirty,
        "deta.config_sha256": lineage.config_sha256,
        "deta.data_fingerprint": lineage.data_fingerprint,
        "deta.evaluation_set": figures.images_fingerprint,
        "deta.step": str(lineage.step),
    }


def description(prepared: Prepared, figures: Figures) -> str:
    """The version's page, in Markdown."""
    lineage, evaluation = prepared.lineage, prepared.evaluation
    ap = {name: f"{100 * value:.1f}" if value >= 0 else "-" for name, value in figures.ap.items()}
    names = {one["id"]: one["name"] for one in evaluation.ground_truth["categories"]}
    classes = [
        f"{names.get(key, key)} {100 * value:.1f}"
        for key, value in evaluation.metrics.ap_per_category.items()
    ]
    code = lineage.code_commit[:12] + " and uncommitted changes" * lineage.code_is_dirty
    latency = figures.latency
    speed = f"{latency.milliseconds:.1f} ms on {latency.device}" if latency else "not measured"
    found, fault = parity_of(figures.export, prepared.sha256)
    shown = ", ".join(classes[:30]) + (f" and {len(classes) - 30} more" if classes[30:] else "")
    rows = [
        ("AP, AP50, AP75", f"**{ap['AP']}**, {ap['AP50']}, {ap['AP75']}"),
        ("AP by class", shown),
        ("evaluated on", f"{len(evaluation.ground_truth['images'])} images of "
         f"`{evaluation.origin.annotations or 'unknown'}`, "
         f"set `{figures.images_fingerprint[:12]}`"),
        ("run", f"{lineage.run_name}, step {lineage.step}, epoch {lineage.epoch:.2f}"),
        ("code", f"`{code}`"),
        ("configuration", f"`config.json`, SHA-256 `{lineage.config_sha256[:12]}`"),
        ("training data", f"`{lineage.data_fingerprint[:12]}`"),
        ("environment", f"Python {lineage.python}, {len(lineage.packages)} packages, "
         "`lineage.json`"),
        ("weights", f"{figures.num_bytes / 1e6:.1f} MB, SHA-256 `{prepared.sha256[:12]}`"),
        ("latency", speed),
        ("exported form", found or fault),
    ]  # fmt: skip
    when = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime())
    table = "\n".join(f"| {name} | {value} |" for name, value in rows)
    return redact(f"Registered {when}.\n\n| | |\n|---|---|\n{table}\n")


def _evaluation_of(checkpoint: Checkpoint, sha256: str) -> Path:
    """The newest evaluation of these weights among those that the run kept."""
    kept = run_folder(checkpoint.path) / EVALUATIONS
    found = []
    for facts in sorted(kept.glob(f"*/{FACTS}")):
        try:
            if read_facts(facts.parent)["weights_sha256"] == sha256:
                found.append(facts)
        except ValueError:
            continue
    if not found:
        raise ValueError(
            f"{kept}: holds no evaluation of the checkpoint {checkpoint.path.name}, so it is not "
            f"known how good it is; jobs/evaluate.py {checkpoint.path} --images … --annotations … "
            "--out FOLDER makes one, and --evaluation FOLDER takes it"
        )
    return max(found, key=lambda facts: facts.stat().st_mtime).parent
