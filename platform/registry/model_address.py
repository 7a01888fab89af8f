"""Addresses of registered models: models:/NAME/VERSION and models:/NAME@ALIAS.

This file needs neither MLflow nor torch.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from deta.platform.run.run_file import tracking_uri

SCHEME = "models:/"
DEFAULT_STORAGE = "~/deta-runs"  # the default of `RunConfig.storage`
_ADDRESS = re.compile(r"models:/+(?P<name>[^/@:]+)(?:/(?P<version>[0-9]+)|@(?P<alias>[^/@]+))")


@dataclass(frozen=True)
class ModelAddress:
    """models:/NAME/VERSION or models:/NAME@ALIAS; either the version or the alias is None."""

    name: str
    version: int | None = None
    alias: str | None = None

    def __str__(self) -> str:
        return f"{SCHEME}{self.name}" + (f"@{self.alias}" if self.alias else f"/{self.version}")


def is_model_address(text: str | Path) -> bool:
    return str(text).startswith(SCHEME)


def parse_address(text: str) -> ModelAddress:
    """
    Raises:
        ValueError: the text is not such an address.
    """
    match = _ADDRESS.fullmatch(text)
    if match is None:
        raise ValueError(
            f"{text!r} names no version of the registry; give models:/NAME@ALIAS or "
            "models:/NAME/NUMBER, such as models:/deta@champion or models:/deta/3"
        )
    version = match["version"]
    return ModelAddress(match["name"], int(version) if version else None, match["alias"])


def registry_uri() -> str:
    """Return `MLFLOW_TRACKING_URI`, or the address of the database beside the runs."""
    return tracking_uri(Path(DEFAULT_STORAGE).expanduser())
