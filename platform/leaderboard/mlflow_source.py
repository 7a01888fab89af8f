"""What the leaderboard asks of MLflow: runs page by page, and the registry's champions.

MLflow has no "what has changed since": a run's start may be in its past (a journal that is sent
later), and its tags and numbers may change after its end. So a leaderboard asks often for what is
likely new (`recent`), and now and then for everything (`pages`).
"""

from __future__ import annotations

import json
import logging
import os
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")  # the board asks again by itself
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ["MLFLOW_ALLOW_PICKLE_DESERIALIZATION"] = "false"  # nothing here is stored as one

from mlflow import MlflowClient
from mlflow.entities import Run, ViewType
from mlflow.exceptions import MlflowException

from deta.platform.leaderboard.rows import Promotion, Row, row_of
from deta.platform.registry import decision_log as decision_log
from deta.platform.system.redaction import redact

logger = logging.getLogger(__name__)

# As in platform/registry/mlflow_registry.py, which needs torch: 400 MB and seconds that a leaderboard has no use
# for. Only the registry itself checks the history for what was changed in it.
CHAMPION, HISTORY_SUFFIX, ENTRY_TAG = "champion", "-history", "deta.entry"
# The first page is small, so that something is there at once; pages hold whole runs in memory,
# with all their parameters and numbers.
FIRST_PAGE, NEXT_PAGES = 50, 200
TIMEOUT_S = "60"  # of one page
ORDER = ["metrics.`best/AP` DESC", "attributes.start_time DESC"]
KIND_TAG = "deta.kind"  # of a sweep's or study's own run, which is no training


@dataclass(frozen=True)
class Models:
    """What the registry says of runs."""

    versions: dict[str, list[str]] = field(default_factory=dict)  # by run id
    champions: frozenset[str] = frozenset()  # ids of their runs
    promotions: tuple[Promotion, ...] = ()  # the newest first


class Source:
    """MLflow, as the leaderboard reads it. Every call may raise whatever MLflow raises."""

    def __init__(self, uri: str) -> None:
        self.uri = uri
        self._client = MlflowClient(tracking_uri=uri, registry_uri=uri)
        self._experiments: dict[str, str] = {}

    def pages(self) -> Iterator[list[Row]]:
        """All runs, the best first, in pages as they come."""
        self._look_up_experiments()
        yield from self._search("")

    def recent(self, since_s: float) -> Iterator[list[Row]]:
        """Runs that are running, and those that began or ended since.

        Args:
            since_s: seconds since 1970.
        """
        self._look_up_experiments()
        since_ms = int(since_s * 1000)
        for what in (
            "attributes.status = 'RUNNING'",
            f"attributes.start_time >= {since_ms}",
            f"attributes.end_time >= {since_ms}",
        ):
            yield from self._search(what)

    def one(self, run_id: str) -> Row | None:
        """A run as it is now; none if it is gone."""
        os.environ["MLFLOW_HTTP_REQUEST_TIMEOUT"] = TIMEOUT_S
        try:
            run = self._client.get_run(run_id)
        except MlflowException as error:
            if error.error_code == "RESOURCE_DOES_NOT_EXIST":
                return None
            raise
        return self._row(run) if run.info.lifecycle_stage == "active" else None

    def models(self) -> Models:
        """Registered versions by the run they came of, and who was champion when."""
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
                own = sorted(alias for alias, of in aliases[name].items() if of == number)
                text = " ".join([name, str(number), *(f"@{alias}" for alias in own)])
                versions[run_id].append(redact(text))
                if CHAMPION in own:
                    champions.add(run_id)
        promotions: list[Promotion] = []
        for name, of_model in aliases.items():
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
                    for alias, number in of_model.items()
                    if alias == CHAMPION
                ]
        versions.pop("", None)
        newest = sorted(promotions, key=lambda one: one.time, reverse=True)
        return Models(dict(versions), frozenset(champions - {""}), tuple(newest))

    def _history(self, name: str, runs: dict[tuple[str, int], str]) -> list[Promotion]:
        rows = [
            decision_log.Row(int(one.version), one.tags.get(ENTRY_TAG, ""), one.description or "")
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
            for _, entry in decision_log.read_log(rows).entries
        ]

    def _versions(self, name: str) -> list[Any]:
        """Of a registered model, oldest first."""
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

    def _search(self, what: str) -> Iterator[list[Row]]:
        if not self._experiments:
            return
        token: str | None = None
        size = FIRST_PAGE
        while True:
            page = self._client.search_runs(
                list(self._experiments),
                what,
                run_view_type=ViewType.ACTIVE_ONLY,
                max_results=size,
                order_by=ORDER,
                page_token=token,
            )
            yield [self._row(run) for run in page if KIND_TAG not in run.data.tags]
            token, size = page.token, NEXT_PAGES
            if not token:
                return

    def _row(self, run: Run) -> Row:
        info = run.info
        return row_of(
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


def today() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")


def _validation_set(run: Run) -> tuple[str, str, int]:
    """Name, fingerprint and number of images of the data that a run was evaluated on."""
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


def _all(ask: Any) -> list[Any]:
    """All pages of something that there is little of."""
    found: list[Any] = []
    token: str | None = None
    while True:
        page = ask(token)
        found += page
        token = page.token
        if not token:
            return found
