"""The model registry, in MLflow: versions, their files, the champion, and the log of decisions.

Nothing in MLflow compares and sets at once, save one thing: of those who add a version to a
registered model, each gets a number of its own, and whoever sees a number sees all below it. So the
log of decisions on the model NAME is a registered model NAME-history, one version for each
decision (platform/registry/decision_log.py), and it alone says who is champion. The alias `champion` follows
it, for MLflow's own loaders and pages.
"""

from __future__ import annotations

import logging
import os
import random
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")  # `_call` tries again
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
os.environ["MLFLOW_ALLOW_PICKLE_DESERIALIZATION"] = "false"  # nothing here is stored as one

from mlflow import MlflowClient
from mlflow.entities.model_registry import ModelVersion, RegisteredModel
from mlflow.exceptions import MlflowException
from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository

from deta.platform.registry.decision_log import CHAMPION, MAX_TEXT_CHARACTERS, Log, Row, read_log
from deta.platform.run.run_file import tracking_uri
from deta.platform.system.redaction import redact

DEFAULT_STORAGE = "~/deta-runs"  # beside whose runs the registry is, unless a variable says where


SCHEME = "models:/"


T = TypeVar("T")

logger = logging.getLogger(__name__)

HISTORY_SUFFIX = "-history"
SHA256_TAG, MANIFEST_TAG, ENTRY_TAG = "deta.sha256", "deta.manifest_sha256", "deta.entry"
HEAD_TAG = "deta.history_head"
MODEL_PART, EVALUATION_PART = "artifacts/model", "evaluation"
TIMEOUT_S, FILE_TIMEOUT_S = 20, 300
PATIENCE_S = 60.0  # with a database that is busy, or a server that restarts
NUM_LOOKS, LOOK_AGAIN_S = 10, 0.2  # at a log that does not fit together
FILE_PATIENCE_S = 10.0  # with files, which may be gone for good
MISSING, TAKEN = "RESOURCE_DOES_NOT_EXIST", "RESOURCE_ALREADY_EXISTS"
# What MLflow means by these does not change by asking again.
REFUSALS = {
    "INVALID_PARAMETER_VALUE", "PERMISSION_DENIED", "UNAUTHENTICATED", "ENDPOINT_NOT_FOUND",
    "INVALID_STATE", "NOT_IMPLEMENTED", "FEATURE_DISABLED",
}  # fmt: skip


class UnknownOutcomeError(RuntimeError):
    """MLflow gave no answer, so it may have done what it was asked for, or not."""


@dataclass(frozen=True)
class Version:
    """One version of a registered model."""

    name: str
    number: int
    sha256: str  # of the weights' file
    manifest: str  # SHA-256 of the manifest, which has the hash of every file
    run_id: str
    created_s: float  # since 1970
    tags: dict[str, str]

    def __str__(self) -> str:
        return f"{self.name} version {self.number}"


@dataclass(frozen=True)
class StoredFiles:
    """Files in MLflow that may become a version."""

    model_id: str
    run_id: str
    location: str


class Registry:
    """MLflow's registry as this project uses it. Calls are tried again while MLflow is busy."""

    def __init__(self, uri: str) -> None:
        """
        Raises:
            ValueError: there is no database at that place, and this is not who makes one.
        """
        path = Path(uri.removeprefix("sqlite:///"))
        if uri.startswith("sqlite:///") and not path.exists():
            raise ValueError(
                f"{path}: there is no MLflow database; set MLFLOW_TRACKING_URI to where the runs "
                "are"
            )
        self.uri = uri
        self._client = MlflowClient(tracking_uri=uri, registry_uri=uri)

    def find(self, address: ModelAddress) -> Version:
        """
        Raises:
            ValueError: there is no such model, alias or version.
        """
        number = address.version
        if address.alias == CHAMPION:
            number = self._champion(address)
        elif address.alias is not None:
            number = _aliases(self._model(address.name)).get(address.alias)
        if number is None:
            raise ValueError(
                f"{address}: no version has this alias; {self._what_there_is(address)}"
            )
        return self.version(address.name, number)

    def version(self, name: str, number: int) -> Version:
        """
        Raises:
            ValueError: there is no such version, or jobs/register.py did not make it.
        """
        try:
            found = self._call(self._client.get_model_version, name, str(number))
        except MlflowException as error:
            if error.error_code != MISSING:
                raise
            address = ModelAddress(name, number)
            raise ValueError(f"{address}: is not there; {self._what_there_is(address)}") from error
        return _version(found)

    def versions(self, name: str) -> list[Version]:
        """All that jobs/register.py made, oldest first."""
        found = self._search(name)
        return [_version(one) for one in found if SHA256_TAG in one.tags]

    def aliases(self, name: str) -> dict[str, int]:
        return _aliases(self._model(name))

    def download(self, version: Version, folder: Path, part: str = MODEL_PART) -> Path:
        """Copy a part of a version's files into a folder; where they are then.

        Raises:
            ValueError: MLflow has no such files.
        """
        uri = self._call(
            self._client.get_model_version_download_uri, version.name, str(version.number)
        )
        files = get_artifact_repository(uri, tracking_uri=self.uri, registry_uri=self.uri)
        try:
            arrived = self._call(
                files.download_artifacts,
                part,
                str(folder),
                timeout_s=FILE_TIMEOUT_S,
                patience_s=FILE_PATIENCE_S,
            )
        except (MlflowException, OSError, RuntimeError) as error:
            raise ValueError(f"{version}: its files {part} cannot be had ({error})") from error
        if not Path(arrived).is_dir() or not any(Path(arrived).iterdir()):
            raise ValueError(f"{version}: has no {part} in MLflow")
        return Path(arrived)

    def require_run(self, run_id: str) -> None:
        """
        Raises:
            ValueError: MLflow has no such run, or somebody deleted it.
        """
        try:
            run = self._call(self._client.get_run, run_id)
        except MlflowException as error:
            if error.error_code != MISSING:
                raise
            raise ValueError(
                f"the run {run_id} is not in MLflow at {redact(self.uri)}; jobs/sync.py sends it"
            ) from error
        if run.info.lifecycle_stage != "active":
            raise ValueError(f"the run {run_id} was deleted in MLflow; restore it there")

    def upload(self, name: str, run_id: str, parts: dict[str, Path]) -> StoredFiles:
        """Put the files of a model into MLflow, before it is a version.

        Args:
            run_id: of the run that trained it.
            parts: folders, by where their content goes; the empty text is MLflow's own model.
        """
        run = self._call(self._client.get_run, run_id)
        logged = self._call(
            self._client.create_logged_model,
            run.info.experiment_id,
            name=name,
            source_run_id=run_id,
            model_type="detector",
        )
        for place, folder in parts.items():
            self._call(
                self._client.log_model_artifacts,
                logged.model_id,
                str(folder),
                place or None,
                timeout_s=FILE_TIMEOUT_S,
            )
        self._call(self._client.finalize_logged_model, logged.model_id, "READY")
        return StoredFiles(logged.model_id, run_id, logged.artifact_location)

    def add_version(
        self, name: str, files: StoredFiles, tags: dict[str, str], description: str, key: str
    ) -> Version:
        """Make files that were uploaded the next version of a model.

        Args:
            key: of this one registration: repeated after a lost answer, it makes no second one.
        """
        self._require_model(name, "Object detectors, registered by jobs/register.py.")
        tags = tags | {"deta.registration": key}

        def add() -> ModelVersion:
            for one in self._search(name):
                if one.tags.get("deta.registration") == key:
                    return one
            return self._client.create_model_version(
                name,
                files.location,
                run_id=files.run_id,
                tags=tags,
                description=description[:MAX_TEXT_CHARACTERS],
                model_id=files.model_id,
            )

        return _version(self._call(add))

    def tag_version(self, version: Version, tags: dict[str, str]) -> None:
        for key, value in tags.items():
            self._call(
                self._client.set_model_version_tag, version.name, str(version.number), key, value
            )

    def log(self, name: str) -> Log:
        """The decisions on a model, and whether somebody tampered with them.

        MLflow reads an entry and its tags one after the other. An entry that came too late and is
        taken out in between has none, so what seems tampered with is looked at again.

        Raises:
            ValueError: there is no such model.
        """
        log = self._read_log(name)
        for _ in range(NUM_LOOKS - 1):
            if not log.problems:
                break
            time.sleep(LOOK_AGAIN_S)
            log = self._read_log(name)
        return log

    def append(self, name: str, version: int, entry: str, text: str) -> int:
        """Add an entry to the log; its number. Only the log then says whether it came in time.

        Args:
            version: of the model, that the decision is on.

        Raises:
            UnknownOutcomeError: it may be in the log, or not.
        """
        history = name + HISTORY_SUFFIX
        self._require_model(
            history,
            f"What was decided on the model {name}, one version for each decision, in order. "
            f"`jobs/promote.py history` reads and checks it. It says who is champion: delete "
            "nothing here.",
        )
        try:
            added = self._client.create_model_version(
                history,
                f"models:/{name}/{version}",
                tags={ENTRY_TAG: entry},
                description=text,
            )
        except Exception as error:
            self._raise_if_refused(error)
            raise UnknownOutcomeError(redact(str(error)).partition("\n")[0]) from error
        return int(added.version)

    def drop(self, name: str, number: int) -> None:
        """Take an entry out of sight that came too late to count."""
        try:
            self._call(self._client.delete_model_version, name + HISTORY_SUFFIX, str(number))
        except MlflowException as error:
            if error.error_code != MISSING:
                raise

    def settle(self, name: str) -> Log:
        """Make alias and tag say what the log says; the log.

        Others may do the same at the same time, from an older log. Whoever changes something looks
        again, so the last to change something has seen the last entry.
        """
        while True:
            log = self.log(name)
            model = self._model(name)
            is_settled = True
            if log.champion is not None and _aliases(model).get(CHAMPION) != log.champion:
                is_settled = not self._set_champion(name, log.champion)
            if log.head_line and model.tags.get(HEAD_TAG) != log.head_line:
                self._call(self._client.set_registered_model_tag, name, HEAD_TAG, log.head_line)
                is_settled = False
            if is_settled:
                return log

    def _read_log(self, name: str) -> Log:
        model = self._model(name)  # first: what it says of the log is then not newer than the log
        rows = [
            Row(int(one.version), one.tags.get(ENTRY_TAG, ""), one.description or "")
            for one in self._search(name + HISTORY_SUFFIX)
        ]
        return read_log(rows, model.tags.get(HEAD_TAG, ""))

    def _set_champion(self, name: str, number: int) -> bool:
        """False if that version is gone."""
        try:
            self._call(self._client.set_registered_model_alias, name, CHAMPION, str(number))
        except MlflowException as error:
            if error.error_code != MISSING:
                raise
            logger.warning(
                "%s version %s is champion, but somebody deleted it in MLflow; "
                "`jobs/promote.py rollback --to NUMBER` makes another one champion", name, number
            )  # fmt: skip
            return False
        return True

    def _champion(self, address: ModelAddress) -> int | None:
        """By the alias, where it agrees with the end of the log; else by the log."""
        model = self._model(address.name)
        alias = _aliases(model).get(CHAMPION)
        head = model.tags.get(HEAD_TAG, "")
        if alias is not None and (not head or head.split()[-1] == str(alias)):
            return alias
        champion = self.log(address.name).champion
        if champion is not None and alias != champion:
            logger.warning(
                "%s: the alias says version %s, but the history of decisions says %s, which is "
                "taken; `jobs/promote.py repair` sets the alias again",
                address, alias, champion,
            )  # fmt: skip
        return champion if champion is not None else alias

    def _what_there_is(self, address: ModelAddress) -> str:
        try:
            numbers = [str(one.number) for one in self.versions(address.name)]
            aliases = [f"@{alias}" for alias in self.aliases(address.name)]
        except ValueError:
            numbers, aliases = [], []
        if not numbers:
            return "jobs/register.py makes versions, jobs/promote.py champions"
        return f"there are {', '.join(numbers[-10:] + aliases)}"

    def _model(self, name: str) -> RegisteredModel:
        try:
            return self._call(self._client.get_registered_model, name)
        except MlflowException as error:
            if error.error_code != MISSING:
                raise
            raise ValueError(
                f"there is no registered model {name!r} in MLflow at {redact(self.uri)}; "
                "jobs/register.py makes one"
            ) from error

    def _require_model(self, name: str, description: str) -> None:
        try:
            self._call(self._client.get_registered_model, name)
            return
        except MlflowException as error:
            if error.error_code != MISSING:
                raise
        try:
            self._call(self._client.create_registered_model, name, description=description)
        except MlflowException as error:
            if error.error_code != TAKEN:  # by another process, just now
                raise

    def _search(self, name: str) -> list[ModelVersion]:
        """All versions of a registered model, oldest first; none where there is no such model."""
        quoted = name.replace("'", "''")
        found: list[ModelVersion] = []
        token: str | None = None
        while True:
            page = self._call(
                self._client.search_model_versions,
                f"name='{quoted}'",
                max_results=10_000,
                page_token=token,
            )
            found += page
            token = page.token
            if not token:
                return sorted(found, key=lambda one: int(one.version))

    def _call(
        self,
        function: Callable[..., T],
        *args: Any,
        timeout_s: int = TIMEOUT_S,
        patience_s: float = PATIENCE_S,
        **kwargs: Any,
    ) -> T:
        """Call MLflow, again where that may help; for what may be done twice.

        Raises:
            MlflowException: something is `MISSING` or `TAKEN`.
            RuntimeError: it refuses, does not answer, or fails again and again.
        """
        began_s, pause_s = time.monotonic(), 0.05
        while True:
            os.environ["MLFLOW_HTTP_REQUEST_TIMEOUT"] = str(timeout_s)
            try:
                return function(*args, **kwargs)
            except Exception as error:
                self._raise_if_refused(error)
                if time.monotonic() - began_s > patience_s:
                    raise RuntimeError(
                        f"MLflow at {redact(self.uri)} does not do it: "
                        + redact(str(error)).partition("\n")[0]
                    ) from error
            time.sleep(pause_s * random.uniform(0.5, 1.5))
            pause_s = min(2.0, 2 * pause_s)

    def _raise_if_refused(self, error: Exception) -> None:
        """Raise what does not change by asking again."""
        if isinstance(error, (TypeError, AttributeError, FileNotFoundError)):
            raise error
        if not isinstance(error, MlflowException):
            return
        if error.error_code in (MISSING, TAKEN):
            raise error
        if error.error_code in REFUSALS or re.search("failed with error code 4", str(error)):
            raise RuntimeError(
                f"MLflow at {redact(self.uri)} refuses: "
                + redact(str(error)).partition("\n")[0]
            ) from error


def _version(found: ModelVersion) -> Version:
    tags = dict(found.tags)
    if not (tags.get(SHA256_TAG) and tags.get(MANIFEST_TAG)):
        raise ValueError(
            f"{found.name} version {found.version}: was not registered by jobs/register.py, for it "
            f"has no tag {SHA256_TAG}; register the model with that"
        )
    return Version(
        found.name,
        int(found.version),
        tags[SHA256_TAG],
        tags[MANIFEST_TAG],
        found.run_id or "",
        found.creation_timestamp / 1000,
        tags,
    )


def _aliases(model: RegisteredModel) -> dict[str, int]:
    return {alias: int(number) for alias, number in model.aliases.items()}


@dataclass(frozen=True)
class ModelAddress:
    """models:/NAME/VERSION or models:/NAME@ALIAS; one of the two is none."""

    name: str
    version: int | None = None
    alias: str | None = None

    def __str__(self) -> str:
        return f"{SCHEME}{self.name}" + (f"@{self.alias}" if self.alias else f"/{self.version}")


def registry_uri() -> str:
    """Where the registry is: `MLFLOW_TRACKING_URI`, else the database beside the runs."""
    return tracking_uri(Path(DEFAULT_STORAGE).expanduser())
