"""Stores the log of promotion decisions in MLflow, where several processes may append at once.

MLflow has no compare-and-set, with one exception: of several clients that add a version to a
registered model, each gets a number of its own, and a reader who sees a number sees all numbers
below it. So the log of decisions on the model NAME is a registered model NAME-history with one
version for each decision (decision_log.py). This log alone determines the champion. The alias
`champion` follows it, for MLflow's own loaders and pages.
"""

from __future__ import annotations

import logging
import time

from deta.platform.registry.decision_log import (
    CHAMPION,
    ENTRY_TAG,
    HEAD_TAG,
    HISTORY_SUFFIX,
    DecisionLog,
    DecisionRow,
    read_log,
)
from deta.platform.registry.mlflow_client import RetryingClient, aliases_of
from deta.platform.system.redaction import redact

logger = logging.getLogger(__name__)

NUM_READS, PAUSE_S = 10, 0.2  # of a log that looks tampered with


class UnknownOutcomeError(RuntimeError):
    """MLflow did not answer, so it may or may not have carried out the request."""


class DecisionStore:
    """The logs of decisions on all models of an MLflow server or database."""

    def __init__(self, client: RetryingClient) -> None:
        self._client = client

    def read(self, name: str) -> DecisionLog:
        """Return the decisions on a model, with signs of tampering.

        MLflow reads an entry and its tags one after the other. An entry that came too late and is
        removed in between has no tags, so a log that looks tampered with is read again.

        Raises:
            ValueError: there is no such model.
        """
        for number in range(NUM_READS):
            model = self._client.model(name)  # first, so that its tag is not newer than the log
            rows = [
                DecisionRow(int(one.version), one.tags.get(ENTRY_TAG, ""), one.description or "")
                for one in self._client.model_versions(name + HISTORY_SUFFIX)
            ]
            log = read_log(rows, model.tags.get(HEAD_TAG, ""))
            if not log.problems or number == NUM_READS - 1:
                break
            time.sleep(PAUSE_S)
        return log

    def append(self, name: str, version: int, entry: str, text: str) -> int:
        """Append an entry and return its number. Only `read` then shows if it came in time.

        Args:
            version: the version of the model that the decision is about.

        Raises:
            UnknownOutcomeError: the entry may or may not be in the log.
        """
        history = name + HISTORY_SUFFIX
        self._client.ensure_model(
            history,
            f"Decisions on the model {name}, one version for each decision, in order. "
            "`jobs/promote.py history` reads and checks it. It determines the champion: delete "
            "nothing here.",
        )
        try:
            added = self._client.mlflow.create_model_version(
                history, f"models:/{name}/{version}", tags={ENTRY_TAG: entry}, description=text
            )
        except Exception as error:
            self._client.raise_if_final(error)
            raise UnknownOutcomeError(redact(str(error)).partition("\n")[0]) from error
        return int(added.version)

    def remove(self, name: str, number: int) -> None:
        """Remove an entry that came too late to count."""
        delete = self._client.mlflow.delete_model_version
        self._client.find(delete, name + HISTORY_SUFFIX, str(number))

    def sync_alias(self, name: str) -> DecisionLog:
        """Set the alias and the tag of the model according to the log, and return the log.

        A process that was killed between its entry and the alias left an older alias; each decision
        begins and ends with this. Other processes may do the same at once, from an older log. A
        process that has changed something reads again, so the last one to change something has seen
        the last entry.

        Raises:
            ValueError: the log was tampered with.
        """
        client, is_synced = self._client.mlflow, False
        while not is_synced:
            is_synced = True
            log = self.read(name)
            log.require_intact()
            model = self._client.model(name)
            if log.champion is not None and aliases_of(model).get(CHAMPION) != log.champion:
                version = str(log.champion)
                if self._client.find(client.get_model_version, name, version) is not None:
                    self._client.call(client.set_registered_model_alias, name, CHAMPION, version)
                    is_synced = False
                else:
                    logger.warning(
                        "%s version %s is champion, but it was deleted in MLflow; "
                        "`jobs/promote.py rollback --to NUMBER` makes another version champion",
                        name, log.champion,
                    )  # fmt: skip
            if log.head_line and model.tags.get(HEAD_TAG) != log.head_line:
                self._client.call(client.set_registered_model_tag, name, HEAD_TAG, log.head_line)
                is_synced = False
        return log

    def champion(self, name: str) -> int | None:
        """Return the champion: the alias if it agrees with the end of the log, else the log's."""
        model = self._client.model(name)
        alias = aliases_of(model).get(CHAMPION)
        head = model.tags.get(HEAD_TAG, "")
        if alias is not None and (not head or head.split()[-1] == str(alias)):
            return alias
        champion = self.read(name).champion
        if champion not in (None, alias):
            logger.warning(
                "%s: the alias champion is version %s, but the log of decisions has version %s, "
                "which is used; `jobs/promote.py repair` sets the alias again",
                name, alias, champion,
            )  # fmt: skip
        return alias if champion is None else champion
