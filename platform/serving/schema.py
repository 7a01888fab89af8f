"""The answers of a detection service as types: what its OpenAPI description says, and tests check.

The answers themselves are made as plain dictionaries, for validating a hundred boxes at each answer
would cost time and find nothing.
"""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from deta.platform.serving.upload import FIELD, FORM_TYPE

_BINARY = {"schema": {"type": "string", "format": "binary"}}
DETECT_BODY: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "content": {
            "image/jpeg": _BINARY,
            "image/png": _BINARY,
            "application/octet-stream": _BINARY,
            FORM_TYPE: {
                "schema": {
                    "type": "object",
                    "properties": {FIELD: {"type": "string", "format": "binary"}},
                    "required": [FIELD],
                }
            },
        },
    }
}


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", protected_namespaces=())


class Model(_Strict):
    name: str
    version: str | None = Field(description="In the registry")
    weights_sha256: str


class Picture(_Strict):
    width: int = Field(description="In pixels; boxes refer to it")
    height: int


class Detection(_Strict):
    category_id: int
    category: str
    score: float = Field(ge=0, le=1)
    box: tuple[float, float, float, float] = Field(
        description="Left, top, right, bottom in pixels; may reach beyond the picture"
    )


class Seconds(_Strict):
    read: float
    decode: float
    wait: float = Field(description="For the model")
    model: float = Field(description="That the model took for the whole batch")
    total: float


class Detected(_Strict):
    model: Model
    image: Picture
    detections: list[Detection] = Field(description="Best first")
    batch_size: int = Field(description="Pictures that the model saw at once; changes nothing")
    seconds: Seconds


class Category(_Strict):
    id: int
    name: str


class Served(_Strict):
    model: Model
    categories: list[Category]
    max_bytes: int
    max_pixels: int
    problem: str | None = Field(description="Why a newer model is not it")


class Problem(_Strict):
    error: str = Field(description="One word, for programs")
    detail: str = Field(description="For people")
