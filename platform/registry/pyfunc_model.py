"""The loader of registered versions for MLflow's own tools: JPEG or PNG in, boxes out.

    model = mlflow.pyfunc.load_model("models:/deta@champion")
    model.predict(pandas.DataFrame({"image": [Path("street.jpg").read_bytes()]}))

MLflow stores a copy of this file with the model and runs it when the model is loaded (models from
code), so nothing is pickled. The rest of the project must be installed there, and the names that
this file imports from it must stay where they are.
"""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pandas as pd
from mlflow.models import ModelSignature, set_model
from mlflow.pyfunc import PythonModel, PythonModelContext, save_model
from mlflow.types import ColSpec, DataType, ParamSchema, ParamSpec, Schema
from mlflow.types.schema import Array
from PIL import Image

INPUT = "image"
SIGNATURE = ModelSignature(
    inputs=Schema([ColSpec(DataType.binary, INPUT)]),
    outputs=Schema(
        [
            ColSpec(Array(Array(DataType.double)), "boxes"),  # xyxy, pixels of the image
            ColSpec(Array(DataType.double), "scores"),
            ColSpec(Array(DataType.long), "labels"),  # class index
            ColSpec(Array(DataType.string), "names"),
        ]
    ),
    params=ParamSchema([ParamSpec("score_threshold", DataType.double, 0.0)]),
)
REQUIREMENTS = ("torch", "torchvision", "timm", "safetensors", "pillow", "scipy", "numpy", "mlflow")


class RegisteredDetector(PythonModel):
    """The predictor of this project behind MLflow's interface."""

    def load_context(self, context: PythonModelContext) -> None:
        import torch

        from deta.platform.inference.predictor import Predictor

        device = "cuda" if torch.cuda.is_available() else "cpu"
        self.predictor = Predictor.from_checkpoint(Path(context.artifacts["model"]), device)

    def predict(
        self,
        context: PythonModelContext,
        model_input: pd.DataFrame,
        params: dict[str, Any] | None = None,
    ) -> pd.DataFrame:
        """Return the detections of each image, best first.

        Args:
            model_input: one row per image, with the bytes of a JPEG or PNG file in `image`.
            params: `score_threshold`, 0..1.

        Returns:
            One row per image: `boxes` (N 4, xyxy in its pixels), `scores`, `labels`, `names` (N).
        """
        from deta.platform.data.image_decoding import decode_bytes

        threshold = float((params or {}).get("score_threshold", 0.0))
        data = self.predictor.config.data
        images = [
            decode_bytes(content, Path(f"image {number}"), data.max_pixels, data.pixel_rules)
            for number, content in enumerate(model_input[INPUT], 1)
        ]
        rows = []
        for found in self.predictor.predict(images):
            kept = found.scores >= threshold
            labels = found.labels[kept].tolist()
            rows.append(
                {
                    "boxes": found.boxes_px[kept].tolist(),
                    "scores": found.scores[kept].tolist(),
                    "labels": labels,
                    "names": [self.predictor.names[label] for label in labels],
                }
            )
        return pd.DataFrame(rows, columns=["boxes", "scores", "labels", "names"])


def write_mlflow_model(folder: Path, version_files: Path, packages: tuple[str, ...]) -> None:
    """Write a model in MLflow's format: its own files, this file, and those of a version.

    Args:
        folder: must not exist yet.
        version_files: see `write_version_files`; the folder must be called `model`.
        packages: name==version, of the environment that trained the model.
    """
    assert version_files.name == "model"  # MLflow stores it as artifacts/model
    by_name = {one.partition("==")[0].lower(): one for one in packages}
    image = io.BytesIO()
    Image.new("RGB", (64, 48), (127, 127, 127)).save(image, "JPEG")
    save_model(
        folder,
        python_model=str(Path(__file__).resolve()),
        artifacts={"model": str(version_files)},
        signature=SIGNATURE,
        input_example=pd.DataFrame({INPUT: [image.getvalue()]}),
        pip_requirements=[by_name.get(name, name) for name in REQUIREMENTS],
    )


set_model(RegisteredDetector())
