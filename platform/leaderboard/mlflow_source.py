"""Read the leaderboard's data from MLflow: runs page by page, and the registry's champions.

MLflow has no query for changes. A run can start in the past (its journal is uploaded later), and
its tags and metrics can change after its end. So a leaderboard often reads what is likely new, and
sometimes everything.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections import defaultdict
from collections.abc import Iterator

from mlflow.entities import Run, ViewType

from deta.platform.leaderboard.rows import (
    LeaderboardRow,
    Promotion,
    RegisteredModels,
    make_row,
)
from deta.platform.registry.decision_log import CHAMPION, HISTORY_SUFFIX
from deta.platform.registry.decision_store import DecisionStore
from deta.platform.registry.mlflow_client import RetryingClient
from deta.platform.registry.mlflow_registry import AP_TAG
from deta.platform.system.redaction import redact

# The first page is small, so that it arrives at once. Pages hold complete runs in memory, with all
# their parameters and metrics.
FIRST_PAGE, NEXT_PAGES = 50, 200
TIMEOUT_S = "60"  # of one page
ORDER = ["metrics.`best/AP` DESC", "attributes.start_time DESC"]
KIND_TAG = "deta.kind"  # of the parent run of a sweep or study, which is no training


class MlflowSource:
    """The runs and registered models of one MLflow. Every call may raise any MLflow error."""

    def __init__(self, uri: str) -> None:
        self.uri = uri
        self._registry = RetryingClient(uri)
        self._client = self._registry.mlflow
        self._experiments: dict[str, str] = {}

    def pages(self, since_s: float | None = None) -> Iterator[list[LeaderboardRow]]:
        """Yield runs in pages, highest AP first.

        Args:
            since_s: seconds since 1970: only runs that are running, and those that began or ended
                since. None: all.
        """
        found = self._registry.all_of(self._client.search_experiments)
        self._experiments = {one.experiment_id: one.name for one in found}
        conditions = [""]
        if since_s is not None:
            since = f">= {int(since_s * 1000)}"
            conditions = ["attributes.status = 'RUNNING'", f"attributes.start_time {since}",
                          f"attributes.end_time {since}"]  # fmt: skip
        for condition in conditions:
            yield from self._search(condition)

    def models(self) -> RegisteredModels:
        """Return the registered versions by run, and the history of champions."""
        found = self._registry.all_of(self._client.search_registered_models)
        models = {one.name: one for one in found}
        versions: dict[str, list[str]] = defaultdict(list)
        aps: dict[str, float] = {}
        champions: set[str] = set()
        promotions: list[Promotion] = []
        for name in sorted(models):
            if name.endswith(HISTORY_SUFFIX) and name.removesuffix(HISTORY_SUFFIX) in models:
                continue
            runs: dict[int, str] = {}
            aliases = {alias: int(number) for alias, number in models[name].aliases.items()}
            for version in self._registry.model_versions(name):
                number = int(version.version)
                runs[number] = version.run_id or ""
                own = sorted(alias for alias, target in aliases.items() if target == number)
                text = " ".join([name, str(number), *(f"@{alias}" for alias in own)])
                versions[runs[number]].append(redact(text))
                with contextlib.suppress(KeyError, ValueError):  # versions of other programs
                    aps[runs[number]] = float(version.tags[AP_TAG])
            champion = aliases.get(CHAMPION)
            champions.add(runs.get(champion or 0, ""))
            if f"{name}{HISTORY_SUFFIX}" in models:
                promotions += [
                    Promotion(
                        model=name, version=entry.version, time=entry.time, action=entry.action,
                        by=redact(entry.by), reason=redact(entry.reason),
                        champion_after=entry.champion_after, run_id=runs.get(entry.version, ""),
                    )
                    for _, entry in DecisionStore(self._registry).read(name).entries
                ]  # fmt: skip
            elif champion is not None:
                promotions.append(
                    Promotion(
                        model=name, version=champion, time="", action="alias",
                        champion_after=champion, run_id=runs.get(champion, ""),
                    )
                )  # fmt: skip
        return RegisteredModels(
            {run: ", ".join(texts) for run, texts in versions.items() if run},
            frozenset(champions),
            tuple(sorted(promotions, key=lambda one: one.time, reverse=True)),
            aps,
        )

    def _search(self, condition: str) -> Iterator[list[LeaderboardRow]]:
        if not self._experiments:
            return
        token: str | None = None
        size = FIRST_PAGE
        while True:
            os.environ["MLFLOW_HTTP_REQUEST_TIMEOUT"] = TIMEOUT_S  # MLflow reads it at each call
            page = self._client.search_runs(
                list(self._experiments),
                condition,
                run_view_type=ViewType.ACTIVE_ONLY,
                max_results=size,
                order_by=ORDER,
                page_token=token,
            )
            yield [
                make_row(run, self._experiments[run.info.experiment_id], _validation_set(run))
                for run in page
                if KIND_TAG not in run.data.tags
            ]
            token, size = page.token, NEXT_PAGES
            if not token:
                return


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
