"""Calls MLflow's model registry, and retries while MLflow is busy or restarts."""

from __future__ import annotations

import functools
import os
import random
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")  # `RetryingClient.call` retries
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
os.environ["MLFLOW_ALLOW_PICKLE_DESERIALIZATION"] = "false"  # no pickles are stored

from mlflow import MlflowClient
from mlflow.entities.model_registry import ModelVersion, RegisteredModel
from mlflow.exceptions import MlflowException

from deta.platform.system.places import bypass_proxies
from deta.platform.system.redaction import redact

T = TypeVar("T")

TIMEOUT_S = 20  # of one request
PATIENCE_S = 60.0  # retries last this long: a busy database, or a server that restarts
MAX_BACKOFF_S = 2.0
MISSING, TAKEN = "RESOURCE_DOES_NOT_EXIST", "RESOURCE_ALREADY_EXISTS"
# A retry does not change these errors of MLflow.
REFUSALS = {
    "INVALID_PARAMETER_VALUE", "PERMISSION_DENIED", "UNAUTHENTICATED", "ENDPOINT_NOT_FOUND",
    "INVALID_STATE", "NOT_IMPLEMENTED", "FEATURE_DISABLED",
}  # fmt: skip


class RetryingClient:
    """An `MlflowClient` whose calls are retried, with the look-ups of registered models."""

    def __init__(self, uri: str) -> None:
        """
        Raises:
            ValueError: the database file does not exist; MLflow would create an empty one.
        """
        path = Path(uri.removeprefix("sqlite:///"))
        if uri.startswith("sqlite:///") and not path.exists():
            raise ValueError(
                f"{path}: there is no MLflow database; set MLFLOW_TRACKING_URI to the one that "
                "has the runs"
            )
        bypass_proxies()
        self.uri = uri
        self.mlflow = MlflowClient(tracking_uri=uri, registry_uri=uri)

    def call(
        self,
        function: Callable[..., T],
        *args: Any,
        timeout_s: int = TIMEOUT_S,
        patience_s: float = PATIENCE_S,
        **kwargs: Any,
    ) -> T:
        """Call MLflow, with retries and backoff. Only for calls that may be repeated.

        Raises:
            MlflowException: something is `MISSING` or `TAKEN`.
            RuntimeError: MLflow refuses, is unreachable, or fails until `patience_s` is over.
        """
        began_s, pause_s = time.monotonic(), 0.05
        while True:
            os.environ["MLFLOW_HTTP_REQUEST_TIMEOUT"] = str(timeout_s)
            try:
                return function(*args, **kwargs)
            except Exception as error:
                self.raise_if_final(error)
                if time.monotonic() - began_s > patience_s:
                    raise RuntimeError(
                        f"MLflow at {redact(self.uri)} fails again and again: "
                        + redact(str(error)).partition("\n")[0]
                    ) from error
            time.sleep(pause_s * random.uniform(0.5, 1.5))
            pause_s = min(MAX_BACKOFF_S, 2 * pause_s)

    def find(self, function: Callable[..., T], *args: Any) -> T | None:
        """Call MLflow as `call` does; return None if what the call is about does not exist."""
        try:
            return self.call(function, *args)
        except MlflowException as error:
            if error.error_code != MISSING:
                raise
            return None

    def raise_if_final(self, error: Exception) -> None:
        """Raise an error that a retry does not change; return for all others."""
        if isinstance(error, (TypeError, AttributeError, FileNotFoundError)):
            raise error
        if not isinstance(error, MlflowException):
            return
        if error.error_code in (MISSING, TAKEN):
            raise error
        if error.error_code in REFUSALS or re.search("failed with error code 4", str(error)):
            raise RuntimeError(
                f"MLflow at {redact(self.uri)} refuses: " + redact(str(error)).partition("\n")[0]
            ) from error

    def model(self, name: str) -> RegisteredModel:
        """
        Raises:
            ValueError: there is no such registered model.
        """
        found = self.find(self.mlflow.get_registered_model, name)
        if found is None:
            raise ValueError(
                f"there is no registered model {name!r} in MLflow at {redact(self.uri)}; "
                "jobs/register.py makes one"
            )
        return found

    def ensure_model(self, name: str, description: str) -> None:
        """Create a registered model unless it exists."""
        if self.find(self.mlflow.get_registered_model, name) is None:
            try:
                self.call(self.mlflow.create_registered_model, name, description=description)
            except MlflowException as error:
                if error.error_code != TAKEN:  # another process has just created it
                    raise

    def aliases(self, name: str) -> dict[str, int]:
        """Return the version number of each alias of a registered model."""
        return aliases_of(self.model(name))

    def model_versions(self, name: str) -> list[ModelVersion]:
        """Return all versions of a registered model, oldest first; none if there is no model."""
        quoted = name.replace("'", "''")
        search = functools.partial(self.mlflow.search_model_versions, f"name='{quoted}'")
        return sorted(self.all_of(search, max_results=10_000), key=lambda one: int(one.version))

    def all_of(self, search: Callable[..., Any], **how: Any) -> list[Any]:
        """Return the results of all pages of a search."""
        found: list[Any] = []
        token: str | None = None
        while True:
            page = self.call(search, page_token=token, **how)
            found += page
            if not (token := page.token):
                return found


def aliases_of(model: RegisteredModel) -> dict[str, int]:
    return {alias: int(number) for alias, number in model.aliases.items()}
