"""The files of a version: complete, hashed, and readable like a checkpoint."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from deta.platform.checkpoint.format import MANIFEST, read_checkpoint
from deta.platform.inference.export_check import OutputDifference
from deta.platform.registry.lineage import Lineage
from deta.platform.registry.promotion_gate import Latency
from deta.platform.registry.version_folder import (
    EXPORT_REPORT,
    FIGURES,
    VersionMetrics,
    export_parity,
    read_documents,
    read_export_report,
    write_version_files,
)
from deta.platform.system.safe_read import file_sha256

CHECKPOINT = Path(__file__).parents[1] / "golden" / "registered-version-1" / "artifacts" / "model"
LINEAGE = Lineage(
    run_id="r", run_name="n", code_commit="c" * 40, code_is_dirty=False, config_sha256="1" * 64,
    data_fingerprint="2" * 64, val_fingerprint="3" * 64, python="3.11", system="Linux",
    packages=("torch==2.10",), step=1, epoch=1.0,
)  # fmt: skip
METRICS = VersionMetrics(
    ap={"AP": 0.5}, metrics={"AP": 50.0}, num_bytes=9, evaluation_sha256="4" * 64,
    images_fingerprint="5" * 64, latency=Latency(3.5, "a processor"),
)  # fmt: skip


def test_a_version_is_a_checkpoint_with_documents(tmp_path: Path) -> None:
    checkpoint = read_checkpoint(CHECKPOINT)

    manifest = write_version_files(tmp_path / "model", checkpoint, LINEAGE, METRICS)

    assert manifest == file_sha256(tmp_path / "model" / MANIFEST)
    assert read_checkpoint(tmp_path / "model").categories == checkpoint.categories
    lineage, metrics = read_documents(tmp_path / "model")
    assert lineage == json.loads(json.dumps(asdict(LINEAGE)))
    assert metrics == METRICS
    classes = json.loads((tmp_path / "model" / "classes.json").read_text())
    assert [one["index"] for one in classes] == list(range(len(checkpoint.categories)))


def test_the_documents_of_an_older_version_are_read() -> None:
    lineage, metrics = read_documents(CHECKPOINT)

    assert lineage["run_id"]
    assert metrics.latency is not None


def test_a_folder_without_measurements_is_refused(tmp_path: Path) -> None:
    (tmp_path / FIGURES).write_text("{}")

    with pytest.raises(ValueError, match="is not the folder of a registered version"):
        read_documents(tmp_path)


def report(folder: Path, difference: OutputDifference | None) -> dict[str, Any]:
    (folder / "model.onnx").write_bytes(b"a program")
    about = {
        "sha256": file_sha256(folder / "model.onnx"),
        "difference": None if difference is None else asdict(difference),
    }
    content = {"weights": {"sha256": "w" * 64}, "files": {"model.onnx": about}}
    (folder / EXPORT_REPORT).write_text(json.dumps(content))
    return read_export_report(folder, "w" * 64)


@pytest.mark.parametrize(
    ("difference", "fault"),
    [
        (OutputDifference(2, 40, scores=1e-6), ""),
        (OutputDifference(2, 40, scores=0.1), "model.onnx: scores 1.0e-01"),
        (OutputDifference(), "0 detections in 0 images"),
        (None, "exported with --unverified"),
    ],
)
def test_parity_is_a_small_difference_that_was_measured(
    tmp_path: Path, difference: OutputDifference | None, fault: str
) -> None:
    found, wrong = export_parity(report(tmp_path, difference), "w" * 64)

    assert (found == "") == (wrong != "")
    assert fault in wrong


def test_parity_needs_a_check_of_these_weights(tmp_path: Path) -> None:
    export = report(tmp_path, OutputDifference(1, 9))

    assert "no exported file was checked" in export_parity(None, "w" * 64)[1]
    assert "other weights" in export_parity(export, "v" * 64)[1]
    with pytest.raises(ValueError, match="was exported from other weights"):
        read_export_report(tmp_path, "v" * 64)
    (tmp_path / "model.onnx").write_bytes(b"another program")
    with pytest.raises(ValueError, match="is not the file that was checked"):
        read_export_report(tmp_path, "w" * 64)
