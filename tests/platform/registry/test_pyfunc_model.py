"""MLflow's own loader predicts with versions that were registered by this and by older code."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
GOLDEN = ROOT / "tests" / "platform" / "golden"
# Run outside of pytest, so that nothing but the stored file imports the project.
LOAD_AND_PREDICT = """
import json, sys
from pathlib import Path
import mlflow.pyfunc, pandas

folder, image = sys.argv[1:]
model = mlflow.pyfunc.load_model(folder)
table = pandas.DataFrame({"image": [Path(image).read_bytes()]})
(found,) = model.predict(table, params={"score_threshold": 0.3}).to_dict("records")
print(json.dumps(found))
"""


def test_a_version_registered_before_the_rooms_predicts_the_same_boxes() -> None:
    """The golden version was registered when predict.py and images.py lay in platform/."""
    stored = (GOLDEN / "registered-version-1" / "registered_model.py").read_text(encoding="utf-8")
    assert "from deta.platform.predict import Predictor" in stored
    assert "from deta.platform.images import decode_bytes" in stored
    expected = json.loads((GOLDEN / "expected.json").read_text(encoding="utf-8"))

    run = subprocess.run(
        [sys.executable, "-c", LOAD_AND_PREDICT]
        + [str(GOLDEN / "registered-version-1"), str(GOLDEN / "image.png")],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    found = json.loads(run.stdout.splitlines()[-1])

    assert len(expected["names"]) > 0
    assert (found["labels"], found["names"]) == (expected["labels"], expected["names"])
    # Float32 sums in another order, as on another processor, move a box by about 1e-5 pixels.
    for box, other in zip(found["boxes"], expected["boxes"], strict=True):
        assert box == pytest.approx(other, abs=1e-4)
    assert found["scores"] == pytest.approx(expected["scores"], abs=1e-5)


def test_the_stored_file_imports_only_names_that_stay_where_they_are() -> None:
    """MLflow keeps a copy of this file with each version: what it imports can never move."""
    tree = ast.parse((ROOT / "platform/registry/pyfunc_model.py").read_text(encoding="utf-8"))
    imported = {
        (node.module, alias.name)
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("deta.")
        for alias in node.names
    }
    assert imported == {
        ("deta.platform.inference.predictor", "Predictor"),
        ("deta.platform.data.image_decoding", "decode_bytes"),
    }
