"""Where a service's model is from, and the change to another one while requests go on.

A version or a folder stays what it is. An alias moves, when somebody promotes another version: it
is looked up every few seconds, the new version is opened and warmed up beside the old one, and only
then takes its place. Where that fails, the old one goes on answering and the attempt is repeated,
ever more rarely.
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
from deta.platform.registry.mlflow_registry import registry_uri
from deta.platform.registry.model_uri import is_model_address, parse_address, resolve_model
from deta.platform.serving.config import ServingConfig
from deta.platform.serving.metrics import Measurements
from deta.platform.serving.model import ModelName, ServedModel
from deta.platform.system.redaction import redact

log = logging.getLogger(__name__)

LONGEST_PAUSE_S = 300.0  # between two attempts at a version that does not open
Answer = TypeVar("Answer")


class ModelSource(Protocol):
    """What may stand for different models at different times."""

    @property
    def moves(self) -> bool:
        """Whether it is worth asking again."""

    def current(self) -> str:
        """What it stands for now; cheap, and equal as long as it is the same model.

        Raises:
            ValueError: there is no such model.
            RuntimeError: nobody can be asked just now.
        """

    def open(self, current: str) -> ServedModel:
        """The model that `current` named; slow.

        Raises:
            ValueError: it cannot be opened.
            RuntimeError: it cannot be had just now.
        """


@dataclass(frozen=True)
class FolderSource:
    """A checkpoint or a run's folder, whose best checkpoint is looked for once."""

    path: Path
    device: str  # "auto": a GPU if the process that opens it has one

    moves = False

    def current(self) -> str:
        return str(resolve_model(self.path).path)

    def open(self, current: str) -> ServedModel:
        return _open(current, None, self.device)


@dataclass(frozen=True)
class RegistrySource:
    """models:/NAME@ALIAS or models:/NAME/NUMBER."""

    address: str
    tracking_uri: str
    device: str

    @property
    def moves(self) -> bool:
        return parse_address(self.address).alias is not None

    def current(self) -> str:
        """An address with the version's number, and what is in it: numbers can be used again."""
        from deta.platform.registry.mlflow_registry import Registry  # here: slow to import

        version = Registry(self.tracking_uri).find(parse_address(self.address))
        return f"models:/{version.name}/{version.number}#{version.manifest}"

    def open(self, current: str) -> ServedModel:
        return _open(current.partition("#")[0], self.tracking_uri, self.device)


def model_source(model: str, tracking_uri: str | None, device: str) -> ModelSource:
    """
    Args:
        model: an address in the registry, a checkpoint's folder, or a run's.
        tracking_uri: of MLflow; default `model_uri.registry_uri()`.

    Raises:
        ValueError: it is neither, or is not there.
        RuntimeError: MLflow does not answer.
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
    """The model that answers now. Belongs to the event loop; what is slow is done by a thread."""

    def __init__(
        self, source: ModelSource, config: ServingConfig, measurements: Measurements
    ) -> None:
        self.source, self.config, self.measurements = source, config, measurements
        self.model: ServedModel | None = None
        self.problem = ""  # why there is none, or why the newest is not it
        self._key = ""  # what the source stood for when `model` was opened

    async def follow(self) -> None:
        """Have a model, and the right one, from now on. Never ends by itself if the source moves.

        Whatever goes wrong is told by `problem`, the log and the measurements.
        """
        failures = 0
        while True:
            try:
                await self.look()
                failures, self.problem = 0, ""
            except Exception as error:  # of MLflow, a disk, a file: none may end the service
                failures += 1
                self.problem = redact(f"{type(error).__name__}: {error}")
                self.measurements.change_failed()
                old = f"; {self.model.name} goes on" if self.model else ""
                log.error("no other model: %s%s", self.problem, old)
            if self.model is not None and not self.source.moves and not failures:
                return
            pause_s = self.config.poll_s * 2 ** min(failures, 16)
            await asyncio.sleep(min(pause_s, max(LONGEST_PAUSE_S, self.config.poll_s)))

    async def look(self) -> bool:
        """Ask the source, and change the model if it stands for another; whether it did."""
        key = await in_thread(self.source.current)
        if self.model is not None and key == self._key:
            return False
        model, warm_s = await in_thread(lambda: self._open(key))
        old, self.model, self._key = self.model, model, key
        self.measurements.model(model.name)
        log.warning(
            "%s answers now (warmed up in %.1f s)%s",
            model.name,
            warm_s,
            f" in place of {old.name}" if old else "",
        )
        return True

    def _open(self, key: str) -> tuple[ServedModel, float]:
        model = self.source.open(key)
        return model, model.warm_up(self.config.max_batch)


async def in_thread(work: Callable[[], Answer]) -> Answer:
    """Wait for what is slow without making others wait.

    By a thread that the end of the process does not wait for, unlike asyncio's own: a server that
    does not answer is asked for minutes.
    """
    loop = asyncio.get_running_loop()
    answer: asyncio.Future[Answer] = loop.create_future()

    def give(result: Answer | None, error: BaseException | None) -> None:
        if answer.done():  # whoever waited has left
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
            loop.call_soon_threadsafe(give, result, failure)

    threading.Thread(target=run, name="model-loader", daemon=True).start()
    return await answer
