"""The source of a service's model, and the change to another model without downtime.

Versions and folders are immutable. A promotion can point an alias to another version, so an alias
is polled every few seconds. The new version is loaded and warmed up beside the old one, and only
then replaces it. If that fails, the old one stays in use, and loading is retried with backoff.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, TypeVar

import torch

from deta.platform.inference.predictor import Predictor
from deta.platform.registry.mlflow_registry import Registry
from deta.platform.registry.model_address import is_model_address, parse_address, registry_uri
from deta.platform.registry.model_uri import resolve_model
from deta.platform.serving.config import ServingConfig
from deta.platform.serving.metrics import Measurements
from deta.platform.serving.model import ModelName, ServedModel
from deta.platform.system.redaction import redact

log = logging.getLogger(__name__)

MAX_BACKOFF_S = 300.0  # between two attempts to load a version
T = TypeVar("T")


class ModelSource(Protocol):
    """A reference to a model, which may point to different models at different times."""

    @property
    def moves(self) -> bool:
        """Return whether it can point to another model later."""

    def current(self) -> str:
        """Return the key of the current model, which is equal as long as the model is; fast.

        Raises:
            ValueError: there is no such model.
            RuntimeError: the registry is unreachable.
        """

    def open(self, current: str) -> ServedModel:
        """Load the model of a key that `current` returned; slow.

        Raises:
            ValueError: it cannot be loaded.
            RuntimeError: the registry is unreachable.
        """


@dataclass(frozen=True)
class FolderSource:
    """The folder of a checkpoint, or of a run, whose best checkpoint is used."""

    path: Path
    device: str  # "auto": a GPU if the loading process has one

    moves = False

    def current(self) -> str:
        return str(resolve_model(self.path).path)

    def open(self, current: str) -> ServedModel:
        return _open(current, None, self.device)


@dataclass(frozen=True)
class RegistrySource:
    """A registered model: models:/NAME@ALIAS or models:/NAME/NUMBER."""

    address: str
    tracking_uri: str
    device: str

    @property
    def moves(self) -> bool:
        return parse_address(self.address).alias is not None

    def current(self) -> str:
        """Return the address of the version and its content hash: numbers can be reused."""
        version = Registry(self.tracking_uri).find(parse_address(self.address))
        return f"models:/{version.name}/{version.number}#{version.manifest}"

    def open(self, current: str) -> ServedModel:
        return _open(current.partition("#")[0], self.tracking_uri, self.device)


def model_source(model: str, tracking_uri: str | None, device: str) -> ModelSource:
    """Return the source of a model, after a check that it exists.

    Args:
        model: an address in the registry, or the folder of a checkpoint or a run.
        tracking_uri: of MLflow; default `registry_uri()`.

    Raises:
        ValueError: it is neither, or does not exist.
        RuntimeError: MLflow is unreachable.
    """
    source: ModelSource
    if is_model_address(model):
        parse_address(model)
        source = RegistrySource(model, tracking_uri or registry_uri(), device)
    else:
        source = FolderSource(Path(model).expanduser().resolve(), device)
    source.current()
    return source


def _open(model: str, tracking_uri: str | None, device: str) -> ServedModel:
    folder = resolve_model(model, tracking_uri)
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    predictor = Predictor.from_checkpoint(folder.path, device)
    version = "" if folder.version is None else str(folder.version)
    return ServedModel(predictor, ModelName(folder.name, version, folder.sha256))


class ModelSlot:
    """The current model. For the event loop only; slow work is done in threads."""

    def __init__(
        self, source: ModelSource, config: ServingConfig, measurements: Measurements
    ) -> None:
        self.source, self.config, self.measurements = source, config, measurements
        self.model: ServedModel | None = None
        self.problem = ""  # why there is no model, or not the newest
        self._key = ""  # of `model`

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
                self.measurements.change_failed()
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
        model, warm_s = await in_thread(lambda: self._open(key))
        old, self.model, self._key = self.model, model, key
        self.measurements.model(model.name)
        log.warning(
            "%s is ready (warmed up in %.1f s)%s",
            model.name,
            warm_s,
            f", replaces {old.name}" if old else "",
        )
        return True

    def _open(self, key: str) -> tuple[ServedModel, float]:
        model = self.source.open(key)
        return model, model.warm_up(self.config.max_batch)


async def in_thread(work: Callable[[], T]) -> T:
    """Run slow work in a daemon thread and return its result.

    Unlike asyncio's own threads, it does not delay the end of the process: a request to an
    unreachable server takes minutes.
    """
    loop = asyncio.get_running_loop()
    answer: asyncio.Future[T] = loop.create_future()

    def set_result(result: T | None, error: BaseException | None) -> None:
        if answer.done():  # the caller was cancelled
            return
        if error is not None:
            answer.set_exception(error)
        else:
            answer.set_result(result)  # type: ignore[arg-type]

    def run() -> None:
        result, failure = None, None
        try:
            result = work()
        except BaseException as error:
            failure = error
        with contextlib.suppress(RuntimeError):  # the loop is closed
            loop.call_soon_threadsafe(set_result, result, failure)

    threading.Thread(target=run, name="model-loader", daemon=True).start()
    return await answer
