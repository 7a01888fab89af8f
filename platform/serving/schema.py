"""The types of requests and responses, for the OpenAPI description and for tests.

The responses themselves are plain dictionaries: validating a hundred boxes per response would cost
time and find nothing.
"""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from deta.platform.data.coco_dataset import Category
from deta.platform.serving.upload import FIELD, FORM_TYPE, RAW_TYPES

_BINARY = {"type": "string", "format": "binary"}
_FORM = {"type": "object", "properties": {FIELD: _BINARY}, "required": [FIELD]}
DETECT_BODY: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "content": {FORM_TYPE: {"schema": _FORM}}
        | {kind: {"schema": _BINARY} for kind in RAW_TYPES if kind},
    }
}


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid")


class DetectParameters(_Strict):
    """The query of a request; another parameter, perhaps a misspelt one, is refused."""

    min_score: float = Field(0.05, ge=0, le=1, description="Leave out lower scores")
    max_detections: int = Field(
        100, ge=1, le=1000, description="Return at most this many, best first"
    )
    upright: bool = Field(
        False,
        description="Rotate the image by its EXIF orientation; boxes refer to the rotated image. "
        "Otherwise they refer to the image as in training: stored, or upright with data.exif=apply",
    )


class Model(_Strict):
    name: str
    version: str | None = Field(description="Number in the registry")
    weights_sha256: str


class ImageSize(_Strict):
    width: int = Field(description="In pixels; boxes refer to this size")
    height: int


class Detection(_Strict):
    category_id: int
    category: str
    score: float = Field(ge=0, le=1)
    box: tuple[float, float, float, float] = Field(
        description="Left, top, right, bottom in pixels, within the image"
    )


class Seconds(_Strict):
    read: float
    decode: float
    wait: float = Field(description="In the queue")
    model: float = Field(description="Inference time of the whole batch")
    total: float


class Detected(_Strict):
    model: Model
    image: ImageSize
    detections: list[Detection] = Field(description="Best first")
    batch_size: int = Field(description="Images in the batch; does not affect the detections")
    seconds: Seconds


class Served(_Strict):
    model: Model
    categories: list[Category]
    max_bytes: int
    max_pixels: int
    problem: str | None = Field(description="Why a newer model could not be loaded")


class Problem(_Strict):
    error: str = Field(description="One word, for programs")
    detail: str = Field(description="For people")
