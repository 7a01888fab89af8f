"""Registration of runs; that in a real MLflow is tested in test_mlflow_registry.py."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from deta.platform.inference.predictor import Predictor
from deta.platform.registry.register import prepare_registration

GOLDEN = Path(__file__).parents[1] / "golden"


def test_a_run_made_before_the_rooms_predicts_and_can_be_registered():
    """The golden version was registered from the golden run, so both find the same boxes."""
    prepared = prepare_registration(GOLDEN / "run-before-rooms", None, None)
    version = GOLDEN / "registered-version-1" / "artifacts" / "model"
    figures = json.loads((version / "figures.json").read_text(encoding="utf-8"))
    expected = json.loads((GOLDEN / "expected.json").read_text(encoding="utf-8"))

    predictor = Predictor.from_checkpoint(prepared.checkpoint.path)
    (found,) = predictor.predict([Image.open(GOLDEN / "image.png").convert("RGB")])

    assert prepared.sha256 == predictor.weights_sha256
    assert prepared.lineage.code_commit == "c" * 40
    assert prepared.evaluation.metrics.as_dict() == pytest.approx(figures["ap"])
    kept = found.scores >= 0.3
    np.testing.assert_allclose(found.boxes_px[kept].numpy(), expected["boxes"], atol=1e-3)
    assert [predictor.names[label] for label in found.labels[kept].tolist()] == expected["names"]
