"""Registers a checkpoint as a version of a model: checks everything it needs, then uploads it."""

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
from deta.platform.pages.render import render
from deta.platform.registry.decision_log import HISTORY_SUFFIX
from deta.platform.registry.lineage import Lineage, read_lineage, run_folder
from deta.platform.registry.mlflow_registry import (
    AP_TAG,
    EVALUATION_PART,
    MANIFEST_TAG,
    SHA256_TAG,
    Registry,
    Version,
)
from deta.platform.registry.model_uri import WEIGHTS_FILE
from deta.platform.registry.pyfunc_model import write_mlflow_model
from deta.platform.registry.version_folder import (
    VersionMetrics,
    export_parity,
    measure_latency,
    read_export_report,
    write_version_files,
)
from deta.platform.system.redaction import redact
from deta.platform.system.safe_read import file_sha256


@dataclass(frozen=True)
class Registration:
    """The checked parts of a new version, before the upload."""

    checkpoint: Checkpoint
    sha256: str  # of the weights
    lineage: Lineage
    evaluation: StoredEvaluation
    export: dict[str, Any] | None


def prepare_registration(
    weights: Path,
    evaluation: Path | None,
    export: Path | None,
    say: Callable[[str], object] | None = None,
) -> Registration:
    """Read and check everything that a version needs.

    Args:
        weights: a checkpoint, or the folder of a run, for its best checkpoint.
        evaluation: folder of an evaluation of these weights; default: one in the folder of the run.
        export: folder that jobs/export.py wrote, if any.
        say: as for `read_evaluation`.

    Raises:
        LineageError: some of the model's lineage is unknown.
        ValueError: a file is damaged, or belongs to other weights.
    """
    checkpoint = read_checkpoint(find_checkpoint(weights))
    lineage = read_lineage(checkpoint)
    sha256 = file_sha256(checkpoint.path / WEIGHTS_FILE)
    folder = evaluation or _evaluation_of(checkpoint, sha256)
    read = read_evaluation(folder, say)
    if read.origin.weights_sha256 != sha256:
        raise ValueError(
            f"{folder}: is the evaluation of other weights, SHA-256 "
            f"{read.origin.weights_sha256[:12] or 'unknown'}… instead of {sha256[:12]}…; "
            f"jobs/evaluate.py {checkpoint.path} --out FOLDER makes one of these"
        )
    report = read_export_report(export, sha256) if export is not None else None
    return Registration(checkpoint, sha256, lineage, read, report)


def register(
    registry: Registry,
    name: str,
    registration: Registration,
    *,
    device: torch.device | str = "cpu",
    echo: Callable[[str], None] = print,
) -> Version:
    """Upload a registration as the next version of a model.

    Args:
        device: the device on which latency is measured.

    Raises:
        ValueError: the run is not in this MLflow, or the name cannot be used.
        RuntimeError: MLflow is unreachable.
    """
    if name.endswith(HISTORY_SUFFIX) or not name or set(name) & set("/:@%'\""):
        raise ValueError(
            f"{name!r} cannot be the name of a model: leave out / : @ %, quotes, and "
            f"{HISTORY_SUFFIX!r} at its end"
        )
    registry.require_run(registration.lineage.run_id)
    checkpoint = registration.checkpoint
    latency = measure_latency(Predictor.from_checkpoint(checkpoint.path, device))
    echo(f"latency: {latency.milliseconds:.1f} ms on {latency.device}")
    metrics = VersionMetrics(
        ap=registration.evaluation.metrics.as_dict(),
        metrics=checkpoint.state.metrics,
        num_bytes=(checkpoint.path / WEIGHTS_FILE).stat().st_size,
        evaluation_sha256=file_sha256(registration.evaluation.folder / FACTS),
        images_fingerprint=registration.evaluation.images_fingerprint,
        latency=latency,
        export=registration.export,
    )
    with tempfile.TemporaryDirectory(prefix="deta-") as folder:
        files, evaluation = Path(folder) / "model", Path(folder) / "evaluation"
        manifest = write_version_files(files, checkpoint, registration.lineage, metrics)
        write_mlflow_model(Path(folder) / "mlflow", files, registration.lineage.packages)
        evaluation.mkdir()
        for part in (FACTS, DETECTIONS, GROUND_TRUTH, EXPLANATION, REPORT):
            if (registration.evaluation.folder / part).is_file():
                shutil.copyfile(registration.evaluation.folder / part, evaluation / part)
        echo("uploading …")
        stored = registry.upload(
            name,
            registration.lineage.run_id,
            {"": Path(folder) / "mlflow", EVALUATION_PART: evaluation},
        )
    return registry.add_version(
        name,
        stored,
        version_tags(registration, metrics, manifest),
        version_description(registration, metrics),
        uuid.uuid4().hex,
    )


def version_tags(
    registration: Registration, metrics: VersionMetrics, manifest: str
) -> dict[str, str]:
    """Return the tags that the version's page shows and that searches use."""
    lineage = registration.lineage
    return {
        SHA256_TAG: registration.sha256,
        MANIFEST_TAG: manifest,
        AP_TAG: f"{100 * metrics.ap['AP']:.2f}",
        "deta.commit": lineage.code_commit + "-dirty" * lineage.code_is_dirty,
        "deta.config_sha256": lineage.config_sha256,
        "deta.data_fingerprint": lineage.data_fingerprint,
        "deta.evaluation_set": metrics.images_fingerprint,
        "deta.step": str(lineage.step),
    }


def version_description(registration: Registration, metrics: VersionMetrics) -> str:
    """Return the text of the version's page, in Markdown."""
    evaluation, latency = registration.evaluation, metrics.latency
    names = {one["id"]: one["name"] for one in evaluation.ground_truth["categories"]}
    text = render(
        "registry/version.md.j2",
        lineage=registration.lineage,
        metrics=metrics,
        sha256=registration.sha256,
        ap={
            name: f"{100 * value:.1f}" if value >= 0 else "-" for name, value in metrics.ap.items()
        },
        classes=[
            f"{names.get(key, key)} {100 * value:.1f}"
            for key, value in evaluation.metrics.ap_per_category.items()
        ],
        num_images=len(evaluation.ground_truth["images"]),
        annotations=evaluation.origin.annotations or "unknown",
        latency=f"{latency.milliseconds:.1f} ms on {latency.device}" if latency else "not measured",
        export="".join(export_parity(metrics.export, registration.sha256)),
        when=time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
    )
    return redact(text)


def _evaluation_of(checkpoint: Checkpoint, sha256: str) -> Path:
    """Return the newest evaluation of these weights in the folder of the run."""
    folder = run_folder(checkpoint.path) / EVALUATIONS
    found = []
    for facts in sorted(folder.glob(f"*/{FACTS}")):
        try:
            if read_facts(facts.parent)["weights_sha256"] == sha256:
                found.append(facts)
        except ValueError:
            continue
    if not found:
        raise ValueError(
            f"{folder}: has no evaluation of the checkpoint {checkpoint.path.name}; "
            f"jobs/evaluate.py {checkpoint.path} --images … --annotations … --out FOLDER writes "
            "one, and --evaluation FOLDER uses it"
        )
    return max(found, key=lambda facts: facts.stat().st_mtime).parent
