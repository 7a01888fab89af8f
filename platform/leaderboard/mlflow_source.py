"""Read the leaderboard's data from MLflow: runs page by page, and the registry's champions.

MLflow has no query for changes. A run can start in the past (its journal is uploaded later), and
its tags and metrics can change after its end. So a leaderboard often reads what is likely new
(`recent`), and sometimes everything (`pages`).
"""

from __future__ import annotations

import json
import logging
import os
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")  # the board itself retries
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ["MLFLOW_ALLOW_PICKLE_DESERIALIZATION"] = "false"  # no pickles are stored

from mlflow import MlflowClient
from mlflow.entities import Run, ViewType
from mlflow.exceptions import MlflowException

from deta.platform.leaderboard.rows import LeaderboardRow, Promotion, make_row
from deta.platform.registry.decision_log import (
    CHAMPION,
    ENTRY_TAG,
    HISTORY_SUFFIX,
    DecisionRow,
    read_log,
)
from deta.platform.system.redaction import redact

logger = logging.getLogger(__name__)

# The first page is small, so that it arrives at once. Pages hold complete runs in memory, with all
# their parameters and metrics.
FIRST_PAGE, NEXT_PAGES = 50, 200
TIMEOUT_S = "60"  # of one page
ORDER = ["metrics.`best/AP` DESC", "attributes.start_time DESC"]
KIND_TAG = "deta.kind"  # of the parent run of a sweep or study, which is no training


@dataclass(frozen=True)
class RegisteredModels:
    """The versions and champions that the registry records for runs."""

    versions: dict[str, list[str]] = field(default_factory=dict)  # by run id
    champions: frozenset[str] = frozenset()  # ids of their runs
    promotions: tuple[Promotion, ...] = ()  # the newest first


class MlflowSource:
    """The runs and registered models of one MLflow. Every call may raise any MLflow error."""

    def __init__(self, uri: str) -> None:
        self.uri = uri
        self._client = MlflowClient(tracking_uri=uri, registry_uri=uri)
        self._experiments: dict[str, str] = {}

    def pages(self) -> Iterator[list[LeaderboardRow]]:
        """Yield all runs in pages, highest AP first."""
        self._look_up_experiments()
        yield from self._search("")

    def recent(self, since_s: float) -> Iterator[list[LeaderboardRow]]:
        """Yield runs that are running, and those that began or ended since.

        Args:
            since_s: seconds since 1970.
        """
        self._look_up_experiments()
        since_ms = int(since_s * 1000)
        for condition in (
            "attributes.status = 'RUNNING'",
            f"attributes.start_time >= {since_ms}",
            f"attributes.end_time >= {since_ms}",
        ):
            yield from self._search(condition)

    def get_run(self, run_id: str) -> LeaderboardRow | None:
        """Return the row of a run as it is now; None if the run was deleted."""
        os.environ["MLFLOW_HTTP_REQUEST_TIMEOUT"] = TIMEOUT_S
        try:
            run = self._client.get_run(run_id)
        except MlflowException as error:
            if error.error_code == "RESOURCE_DOES_NOT_EXIST":
                return None
            raise
        return self._row(run) if run.info.lifecycle_stage == "active" else None

    def models(self) -> RegisteredModels:
        """Return the registered versions by run, and the history of champions."""
        os.environ["MLFLOW_HTTP_REQUEST_TIMEOUT"] = TIMEOUT_S
        models = _all(lambda token: self._client.search_registered_models(page_token=token))
        aliases = {
            one.name: {alias: int(number) for alias, number in one.aliases.items()}
            for one in models
        }
        versions: dict[str, list[str]] = defaultdict(list)
        champions: set[str] = set()
        runs: dict[tuple[str, int], str] = {}
        for name in sorted(aliases):
            if name.endswith(HISTORY_SUFFIX) and name.removesuffix(HISTORY_SUFFIX) in aliases:
                continue
            for version in self._versions(name):
                number, run_id = int(version.version), version.run_id or ""
                runs[name, number] = run_id
                own = sorted(alias for alias, target in aliases[name].items() if target == number)
                text = " ".join([name, str(number), *(f"@{alias}" for alias in own)])
                versions[run_id].append(redact(text))
                if CHAMPION in own:
                    champions.add(run_id)
        promotions: list[Promotion] = []
        for name, model_aliases in aliases.items():
            if f"{name}{HISTORY_SUFFIX}" in aliases:
                promotions += self._history(name, runs)
            else:
                promotions += [
                    Promotion(
                        model=name,
                        version=number,
                        time="",
                        action="alias",
                        champion_after=number,
                        run_id=runs.get((name, number), ""),
                    )
                    for alias, number in model_aliases.items()
                    if alias == CHAMPION
                ]
        versions.pop("", None)
        newest = sorted(promotions, key=lambda one: one.time, reverse=True)
        return RegisteredModels(dict(versions), frozenset(champions - {""}), tuple(newest))

    def _history(self, name: str, runs: dict[tuple[str, int], str]) -> list[Promotion]:
        rows = [
            DecisionRow(int(one.version), one.tags.get(ENTRY_TAG, ""), one.description or "")
            for one in self._versions(name + HISTORY_SUFFIX)
        ]
        return [
            Promotion(
                model=name,
                version=entry.version,
                time=entry.time,
                action=entry.action,
                by=redact(entry.by),
                reason=redact(entry.reason),
                champion_after=entry.champion_after,
                run_id=runs.get((name, entry.version), ""),
            )
            for _, entry in read_log(rows).entries
        ]

    def _versions(self, name: str) -> list[Any]:
        """Return the versions of a registered model, oldest first."""
        quoted = name.replace("'", "''")
        found = _all(
            lambda token: self._client.search_model_versions(
                f"name='{quoted}'", max_results=1000, page_token=token
            )
        )
        return sorted(found, key=lambda one: int(one.version))

    def _look_up_experiments(self) -> None:
        os.environ["MLFLOW_HTTP_REQUEST_TIMEOUT"] = TIMEOUT_S  # MLflow reads it at each call
        found = _all(lambda token: self._client.search_experiments(page_token=token))
        self._experiments = {one.experiment_id: one.name for one in found}

    def _search(self, condition: str) -> Iterator[list[LeaderboardRow]]:
        if not self._experiments:
            return
        token: str | None = None
        size = FIRST_PAGE
        while True:
            page = self._client.search_runs(
                list(self._experiments),
                condition,
                run_view_type=ViewType.ACTIVE_ONLY,
                max_results=size,
                order_by=ORDER,
                page_token=token,
            )
            yield [self._row(run) for run in page if KIND_TAG not in run.data.tags]
            token, size = page.token, NEXT_PAGES
            if not token:
                return

    def _row(self, run: Run) -> LeaderboardRow:
        info = run.info
        return make_row(
            run_id=info.run_id,
            experiment_id=info.experiment_id,
            experiment=self._experiments.get(info.experiment_id, ""),
            name=info.run_name or info.run_id,
            status=info.status,
            start_ms=info.start_time,
            end_ms=info.end_time,
            metrics=run.data.metrics,
            params=run.data.params,
            tags=run.data.tags,
            data=_validation_set(run),
        )


def _validation_set(run: Run) -> tuple[str, str, int]:
    """Return name, fingerprint and number of images of a run's validation set."""
    for given in run.inputs.dataset_inputs if run.inputs else []:
        if any(tag.value == "validation" for tag in given.tags):
            try:
                profile = json.loads(given.dataset.profile or "{}")
                num_images = int(profile.get("images", 0))
                fingerprint = str(profile.get("fingerprint", ""))
            except (ValueError, TypeError, AttributeError):
                num_images, fingerprint = 0, ""
            return given.dataset.name, fingerprint, num_images
    return "", "", 0


def _all(read_page: Callable[[str | None], Any]) -> list[Any]:
    """Return the items of all pages; for queries with few results."""
    found: list[Any] = []
    token: str | None = None
    while True:
        page = read_page(token)
        found += page
        token = page.token
        if not token:
            return found
