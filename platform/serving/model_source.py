"""The source of a service's model, and the change to another model without downtime.

Versions and folders are immutable. A promotion can point an alias to another version, so an alias
is polled every few seconds. The new version is loaded and warmed up beside the old one, and only
then replaces it. If that fails, the old one stays in use, and loading is retried with backoff.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch

from deta.platform.inference.predictor import Predictor
from deta.platform.registry.model_address import is_model_address, parse_address, registry_uri
from deta.platform.registry.model_uri import resolve_model
from deta.platform.serving.config import ServingConfig
from deta.platform.serving.metrics import Measurements
from deta.platform.serving.model import ModelName, ServedModel
from deta.platform.system.origin_guard import Refusal
from deta.platform.system.redaction import redact

log = logging.getLogger(__name__)

MAX_BACKOFF_S = 300.0  # between two attempts to load a version
T = TypeVar("T")


@dataclass(frozen=True)
class ModelSource:
    """A reference to a model, which may point to different models at different times."""

    model: str  # an address in the registry, or the folder of a checkpoint or a run
    tracking_uri: str | None  # of MLflow; None: `registry_uri()`
    device: str  # "auto": a GPU if the loading process has one

    @property
    def moves(self) -> bool:
        """Return whether it can point to another model later: whether it has an alias."""
        return is_model_address(self.model) and parse_address(self.model).alias is not None

    def current(self) -> str:
        """Return the key of the current model, which is equal as long as the model is; fast.

        Raises:
            ValueError: there is no such model.
            RuntimeError: the registry is unreachable.
        """
        if not is_model_address(self.model):
            return str(resolve_model(self.model).path)
        from deta.platform.registry.mlflow_registry import Registry  # imports MLflow: three seconds

        version = Registry(self.tracking_uri or registry_uri()).find(parse_address(self.model))
        # With its content hash: numbers can be reused.
        return f"models:/{version.name}/{version.number}#{version.manifest}"

    def open(self, current: str) -> ServedModel:
        """Load the model of a key that `current` returned; slow.

        Raises:
            ValueError: it cannot be loaded.
            RuntimeError: the registry is unreachable.
        """
        key = current.partition("#")[0] if is_model_address(current) else current
        folder = resolve_model(key, self.tracking_uri)
        cuda = self.device == "auto" and torch.cuda.is_available()
        device = {"auto": "cuda" if cuda else "cpu"}.get(self.device, self.device)
        predictor = Predictor.from_checkpoint(folder.path, device)
        version = "" if folder.version is None else str(folder.version)
        return ServedModel(predictor, ModelName(folder.name, version, folder.sha256))


def model_source(model: str, tracking_uri: str | None, device: str) -> ModelSource:
    """Return the source of a model, after a check that it exists; see `ModelSource`.

    Raises:
        ValueError: it is neither an address nor a folder, or does not exist.
        RuntimeError: MLflow is unreachable.
    """
    if not is_model_address(model):
        model = str(Path(model).expanduser().resolve())
    source = ModelSource(model, tracking_uri, device)
    source.current()
    return source


class ModelSlot:
    """The current model. For the event loop only; slow work is done in threads."""

    def __init__(
        self, source: ModelSource, config: ServingConfig, measurements: Measurements
    ) -> None:
        self.source, self.config, self.measurements = source, config, measurements
        self.model: ServedModel | None = None
        self.problem = ""  # why there is no model, or not the newest
        self._key = ""  # of `model`

    def loaded(self) -> ServedModel:
        """Return the current model.

        Raises:
            Refusal: 503, none is loaded.
        """
        if self.model is None:
            reason = f": {self.problem}" if self.problem else ""
            raise Refusal(503, "no_model", f"no model is loaded yet{reason}", {"Retry-After": "5"})
        return self.model

    async def follow(self) -> None:
        """Load the model, then follow the source. Ends by itself only if the source is fixed.

        Errors are reported by `problem`, the log and the metrics.
        """
        failures = 0
        while True:
            try:
                await self.refresh()
                failures, self.problem = 0, ""
            except Exception as error:  # from MLflow, a disk or a file: none may end the service
                failures += 1
                self.problem = redact(f"{type(error).__name__}: {error}")
                self.measurements.record("model_changes_total", outcome="failed")
                old = f"; {self.model.name} stays in use" if self.model else ""
                log.error("loading a model failed: %s%s", self.problem, old)
            if self.model is not None and not self.source.moves and not failures:
                return
            pause_s = self.config.poll_s * 2 ** min(failures, 16)
            await asyncio.sleep(min(pause_s, max(MAX_BACKOFF_S, self.config.poll_s)))

    async def refresh(self) -> bool:
        """Load the model that the source points to, unless it is loaded; return if it was not."""
        key = await in_thread(self.source.current)
        if self.model is not None and key == self._key:
            return False

        def load() -> tuple[ServedModel, float]:
            model = self.source.open(key)
            return model, model.warm_up(self.config.max_batch)

        old = f", replaces {self.model.name}" if self.model else ""
        model, warm_s = await in_thread(load)
        self.model, self._key = model, key
        self.measurements.model(model.name)
        log.warning("%s is ready (warmed up in %.1f s)%s", model.name, warm_s, old)
        return True


async def in_thread(work: Callable[[], T]) -> T:
    """Run slow work in a daemon thread and return its result.

    Unlike the threads of asyncio and anyio, it does not delay the end of the process: a request to
    an unreachable server takes minutes.
    """
    answer: Future[T] = Future()
    answer.set_running_or_notify_cancel()  # so that nobody else sets it if the caller is cancelled

    def run() -> None:
        try:
            answer.set_result(work())
        except BaseException as error:
            answer.set_exception(error)

    threading.Thread(target=run, name="model-loader", daemon=True).start()
    return await asyncio.wrap_future(answer)
