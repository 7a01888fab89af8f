"""Model versions in MLflow: registers, finds and downloads them."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path

from mlflow.entities.model_registry import ModelVersion
from mlflow.exceptions import MlflowException
from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository

from deta.platform.registry.decision_log import CHAMPION, MAX_TEXT_CHARACTERS
from deta.platform.registry.decision_store import DecisionStore
from deta.platform.registry.mlflow_client import RetryingClient
from deta.platform.registry.model_address import ModelAddress
from deta.platform.system.redaction import redact

SHA256_TAG, MANIFEST_TAG = "deta.sha256", "deta.manifest_sha256"
AP_TAG = "deta.AP"  # 0..100
REGISTRATION_TAG = "deta.registration"
MODEL_PART, EVALUATION_PART = "artifacts/model", "evaluation"
FILE_TIMEOUT_S = 300
FILE_PATIENCE_S = 10.0  # less than for other calls, since files may be gone for good
NUM_SHOWN = 10  # versions and aliases named in one message


@dataclass(frozen=True)
class Version:
    """One version of a registered model."""

    name: str
    number: int
    sha256: str  # of the file of the weights
    manifest: str  # SHA-256 of the manifest, which has the hash of every file
    run_id: str
    created_s: float  # since 1970
    tags: dict[str, str]

    def __str__(self) -> str:
        return f"{self.name} version {self.number}"


@dataclass(frozen=True)
class UploadedFiles:
    """Files in MLflow that may become a version."""

    model_id: str
    run_id: str
    location: str


class Registry:
    """The model registry of an MLflow server or database."""

    def __init__(self, uri: str) -> None:
        """
        Raises:
            ValueError: the database file does not exist.
        """
        self.uri = uri
        self._client = RetryingClient(uri)
        self.decisions = DecisionStore(self._client)

    def find(self, address: ModelAddress) -> Version:
        """
        Raises:
            ValueError: there is no such model, alias or version.
        """
        number = address.version
        if address.alias == CHAMPION:
            number = self.decisions.champion(address.name)
        elif address.alias is not None:
            number = self.aliases(address.name).get(address.alias)
        if number is None:
            raise ValueError(f"{address}: no version has this alias; {self._available(address)}")
        return self.version(address.name, number)

    def version(self, name: str, number: int) -> Version:
        """
        Raises:
            ValueError: there is no such version, or jobs/register.py did not make it.
        """
        address = ModelAddress(name, number)
        found = self._client.find(self._client.mlflow.get_model_version, name, str(number))
        if found is None:
            raise ValueError(f"{address}: does not exist; {self._available(address)}")
        return _to_version(found)

    def versions(self, name: str) -> list[Version]:
        """Return all versions that jobs/register.py made, oldest first."""
        found = self._client.model_versions(name)
        return [_to_version(one) for one in found if SHA256_TAG in one.tags]

    def aliases(self, name: str) -> dict[str, int]:
        return self._client.aliases(name)

    def download(self, version: Version, folder: Path, part: str = MODEL_PART) -> Path:
        """Copy a part of a version's files into a folder, and return where they are.

        Raises:
            ValueError: MLflow has no such files.
        """
        client = self._client
        locate = client.mlflow.get_model_version_download_uri
        uri = client.call(locate, version.name, str(version.number))
        files = get_artifact_repository(uri, tracking_uri=self.uri, registry_uri=self.uri)
        try:
            copied = Path(
                client.call(
                    files.download_artifacts, part, str(folder),
                    timeout_s=FILE_TIMEOUT_S, patience_s=FILE_PATIENCE_S,
                )
            )  # fmt: skip
        except (MlflowException, OSError, RuntimeError) as error:
            fault = f"{version}: its files {part} cannot be downloaded ({error})"
            raise ValueError(fault) from error
        if not copied.is_dir() or not any(copied.iterdir()):
            raise ValueError(f"{version}: has no {part} in MLflow")
        return copied

    def require_run(self, run_id: str) -> None:
        """
        Raises:
            ValueError: MLflow has no such run, or it was deleted.
        """
        run = self._client.find(self._client.mlflow.get_run, run_id)
        if run is None:
            raise ValueError(
                f"the run {run_id} is not in MLflow at {redact(self.uri)}; jobs/sync.py sends it"
            )
        if run.info.lifecycle_stage != "active":
            raise ValueError(f"the run {run_id} was deleted in MLflow; restore it there")

    def upload(self, name: str, run_id: str, parts: dict[str, Path]) -> UploadedFiles:
        """Upload the files of a model, before it becomes a version.

        Args:
            run_id: the run that trained it.
            parts: folders by the path that their files get; the empty path is MLflow's own model.
        """
        client = self._client
        run = client.call(client.mlflow.get_run, run_id)
        logged = client.call(
            client.mlflow.create_logged_model, run.info.experiment_id,
            name=name, source_run_id=run_id, model_type="detector",
        )  # fmt: skip
        send = functools.partial(client.call, timeout_s=FILE_TIMEOUT_S)
        for path, folder in parts.items():
            send(client.mlflow.log_model_artifacts, logged.model_id, str(folder), path or None)
        client.call(client.mlflow.finalize_logged_model, logged.model_id, "READY")
        return UploadedFiles(logged.model_id, run_id, logged.artifact_location)

    def add_version(
        self, name: str, files: UploadedFiles, tags: dict[str, str], description: str, key: str
    ) -> Version:
        """Make uploaded files the next version of a model.

        Args:
            key: identifies this registration. A retry after a lost response with the same key makes
                no second version.
        """
        client = self._client
        client.ensure_model(name, "Object detectors, registered by jobs/register.py.")
        tags = tags | {REGISTRATION_TAG: key}

        def add() -> ModelVersion:
            for one in client.model_versions(name):
                if one.tags.get(REGISTRATION_TAG) == key:
                    return one
            return client.mlflow.create_model_version(
                name, files.location, run_id=files.run_id, model_id=files.model_id,
                tags=tags, description=description[:MAX_TEXT_CHARACTERS],
            )  # fmt: skip

        return _to_version(client.call(add))

    def tag_version(self, version: Version, tags: dict[str, str]) -> None:
        set_tag = self._client.mlflow.set_model_version_tag
        for key, value in tags.items():
            self._client.call(set_tag, version.name, str(version.number), key, value)

    def _available(self, address: ModelAddress) -> str:
        """Return the versions and aliases that there are, for a message."""
        try:
            numbers = [str(one.number) for one in self.versions(address.name)]
            aliases = [f"@{alias}" for alias in self.aliases(address.name)]
        except ValueError:
            numbers, aliases = [], []
        if not numbers:
            return "jobs/register.py makes versions, jobs/promote.py champions"
        return f"there are {', '.join(numbers[-NUM_SHOWN:] + aliases)}"


def _to_version(found: ModelVersion) -> Version:
    tags = dict(found.tags)
    if not (tags.get(SHA256_TAG) and tags.get(MANIFEST_TAG)):
        raise ValueError(
            f"{found.name} version {found.version}: was not registered by jobs/register.py, since "
            f"it has no tag {SHA256_TAG}; register the model with that job"
        )
    created_s = found.creation_timestamp / 1000
    return Version(
        found.name, int(found.version), tags[SHA256_TAG], tags[MANIFEST_TAG],
        found.run_id or "", created_s, tags,
    )  # fmt: skip
