"""Promotes a version to champion if the gate accepts it, and rolls back, with compare-and-set.

Any number of processes may promote at any time. A decision compares the challenger with the
champion of the decision log. It counts only if the log has not grown when the decision arrives;
otherwise the decision is made again, against the new champion (decision_log.py). So each of several
concurrent promotions is compared with the champion before it, and none is lost. The gate decides
which is better, not the order of arrival.
"""

from __future__ import annotations

import contextlib
import getpass
import logging
import os
import random
import socket
import time
import uuid
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import Any

from deta.platform.registry.decision_log import (
    ACCEPT,
    CHAMPION,
    FORCE,
    MAX_TEXT_CHARACTERS,
    REFUSE,
    ROLLBACK,
    DecisionLog,
    Entry,
)
from deta.platform.registry.decision_store import UnknownOutcomeError
from deta.platform.registry.mlflow_registry import Registry, Version
from deta.platform.registry.promotion_gate import Decision
from deta.platform.system.redaction import redact

logger = logging.getLogger(__name__)

DECISION_TAG = "deta.decision"
MAX_TRIES = 1000  # far more than concurrent promotions
# Compares a challenger with the champion, if there is one.
Gate = Callable[[Version, Version | None], Decision]
Draft = tuple[str, int | None, Decision | None]  # action, champion before, comparison
DONE = {
    ACCEPT: "accepted as champion",
    FORCE: "FORCED to be champion",
    REFUSE: "refused",
    ROLLBACK: "champion again (rollback)",
}


@dataclass(frozen=True)
class PromotionResult:
    """The decision of a promotion, and the champion after it."""

    action: str
    decision: Decision | None  # None: forced, and no comparison was possible
    champion: int | None  # after the decision; in a dry run, before it
    entry: Entry | None  # None for a dry run
    # 1, plus one for each time that another process was faster; 0: the decision had been recorded
    # before, by a command that was killed before it moved the alias.
    tries: int


def current_user() -> str:
    """Return the user of MLflow, or else of this machine, and the host."""
    user = os.environ.get("MLFLOW_TRACKING_USERNAME")
    if not user:
        try:
            user = getpass.getuser()
        except (KeyError, OSError):  # a container whose user has no name
            user = str(os.getuid())
    return f"{user}@{socket.gethostname()}"


def promote(
    registry: Registry,
    name: str,
    number: int,
    gate: Gate,
    *,
    by: str,
    reason: str = "",
    force: bool = False,
    dry_run: bool = False,
) -> PromotionResult:
    """Make a version champion if the gate accepts it.

    Args:
        reason: required with `force`.
        force: override the gate. The files of the version must still be those that were registered.
        dry_run: decide, but change nothing.

    Raises:
        ValueError: there is no such version, it is champion already, a reason is missing, its files
            are not those that were registered (forced only), or the log was tampered with.
        RuntimeError: MLflow is unreachable.
    """
    if force and not reason.strip():
        raise ValueError("a forced promotion needs a reason: --reason '…'")
    version = registry.version(name, number)
    decisions: dict[int | None, Decision | None] = {}  # by champion

    def decide_on(log: DecisionLog) -> Draft:
        before = _champion(registry, name, log)
        if before == number:
            raise ValueError(f"{version} is the champion already")
        if before not in decisions:
            sha256 = log.champion_sha256
            decisions[before] = _compare(registry, gate, version, before, sha256, force)
        decision = decisions[before]
        accepted = decision is not None and decision.accepted
        return ACCEPT if accepted else FORCE if force else REFUSE, before, decision

    if not dry_run and (begun := _finish(registry, name, number)):
        return PromotionResult(begun.action, None, number, begun, 0)
    if dry_run:
        log = registry.decisions.read(name)
        log.require_intact()
        action, before, decision = decide_on(log)
        return PromotionResult(action, decision, before, None, 1)
    entry, tries = _commit(registry, version, decide_on, by, redact(reason))
    decision = decisions.get(entry.champion_before)
    return PromotionResult(entry.action, decision, entry.champion_after, entry, tries)


def _finish(registry: Registry, name: str, number: int) -> Entry | None:
    """Move the alias to a version whose promotion was recorded and then killed.

    Returns:
        The recorded entry; None if nothing was left to do.
    """
    log = registry.decisions.read(name)
    if log.champion != number or registry.aliases(name).get(CHAMPION) == number:
        return None
    registry.decisions.sync_alias(name)
    made = (entry for _, entry in reversed(log.entries) if entry.action != REFUSE)
    return next((entry for entry in made if entry.champion_after == number), None)


def rollback(registry: Registry, name: str, to: int | None, *, by: str, reason: str) -> Entry:
    """Make an earlier version champion again.

    Args:
        to: number of the version; default: the champion before the current one.

    Raises:
        ValueError: there is no earlier champion, a reason is missing, or another process changed
            the champion meanwhile.
    """
    if not reason.strip():
        raise ValueError("a rollback needs a reason: --reason '…'")
    log = registry.decisions.read(name)
    log.require_intact()
    current = _champion(registry, name, log)
    if to is None and len(log.champions()) < 2:
        raise ValueError(f"{name} has had no other champion; name a version with --to")
    version = registry.version(name, log.champions()[-2] if to is None else to)

    def decide_on(log: DecisionLog) -> Draft:
        before = _champion(registry, name, log)
        if before != current:
            raise ValueError(
                f"version {before} became champion while version {current} was being rolled back; "
                "check it, and roll back again if needed"
            )
        if before == version.number:
            raise ValueError(f"{version} is the champion already")
        return ROLLBACK, before, None

    return _commit(registry, version, decide_on, by, redact(reason))[0]


def _commit(
    registry: Registry,
    version: Version,
    decide_on: Callable[[DecisionLog], Draft],
    by: str,
    reason: str,
) -> tuple[Entry, int]:
    """Decide on the current log and append the decision; retry while other processes are faster.

    Returns:
        The entry that counts, and the number of tries.
    """
    id_, name, decisions = uuid.uuid4().hex, version.name, registry.decisions
    log = decisions.sync_alias(name)  # the alias may lag behind the log: see there
    for tries in range(1, MAX_TRIES):
        entry = log.find(id_)  # it is there if only the response was lost
        if entry is not None:
            break
        entry = _entry(id_, log, version, decide_on(log), by, reason)
        position: int | None = None
        with contextlib.suppress(UnknownOutcomeError):
            position = decisions.append(name, entry.version, entry.to_line(), entry.text)
        log = decisions.read(name)
        log.require_intact()
        if log.find(id_) is not None:
            break
        if position is not None:
            decisions.remove(name, position)
        time.sleep(random.uniform(0.0, min(2.0, 0.02 * 2 ** min(tries, 7))))
        log = decisions.read(name)
        log.require_intact()
    else:
        raise RuntimeError(
            f"the decision on {name} came too late {MAX_TRIES} times; try again later"
        )
    decisions.sync_alias(name)
    try:  # show the decision on the version's page; it is valid without
        registry.tag_version(version, {DECISION_TAG: f"{entry.action}, {entry.time}, by {by}"})
    except RuntimeError as error:
        logger.warning("%s: the decision is not shown on its page (%s)", version, error)
    return entry, tries


def _entry(
    id_: str, log: DecisionLog, version: Version, draft: Draft, by: str, reason: str
) -> Entry:
    action, before, decision = draft
    after = before if action == REFUSE else version.number
    when = datetime.now(UTC).isoformat(timespec="seconds")
    text = f"**Version {version.number} {DONE[action]}**, {when}, by {by}.\n\n"
    text += f"Champion before: {'none' if before is None else f'version {before}'}; "
    text += f"after: version {after}." if after is not None else "after: none."
    text += f"\n\nReason: {reason}" if reason else ""
    details: dict[str, Any] = {}
    if decision is not None:
        text += f"\n```\n{decision.table()}\n```"
        details = {
            "policy": asdict(decision.policy),
            "criteria": [asdict(one) for one in decision.criteria],
            "figures": decision.measurements(),
        }
    return Entry(
        id=id_,
        previous=log.head,
        action=action,
        version=version.number,
        sha256=version.sha256,
        champion_before=before,
        champion_after=after,
        by=by,
        time=when,
        reason=reason,
        text=text[:MAX_TEXT_CHARACTERS].strip(),
        **details,
    )


def _compare(
    registry: Registry,
    gate: Gate,
    version: Version,
    before: int | None,
    sha256: str,
    force: bool,
) -> Decision | None:
    """Return the decision of the gate; None if forced and no comparison is possible.

    Args:
        before: number of the champion.
        sha256: hash of its weights, from the log.
    """
    try:
        champion = registry.version(version.name, before) if before is not None else None
        if champion is not None and sha256 not in ("", champion.sha256):
            raise ValueError(f"{champion} does not have the weights with which it became champion")
        decision = gate(version, champion)
    except ValueError as error:
        if force:
            return None
        if before is None:
            raise
        raise ValueError(
            f"the champion, version {before}, cannot be compared: {error}. Make another version "
            "champion (rollback --to NUMBER), or --force this one"
        ) from error
    if force and decision.challenger.fault:
        raise ValueError(
            f"{version} cannot be forced, since it cannot be loaded: {decision.challenger.fault}"
        )
    return decision


def _champion(registry: Registry, name: str, log: DecisionLog) -> int | None:
    """Return the champion of the log; if the log is empty, the version with the alias."""
    return log.champion if log.entries else registry.aliases(name).get(CHAMPION)
