"""Promotes a version to champion if the gate accepts it, and rolls back, with compare-and-set.

Any number of processes may promote at any time. A decision compares the challenger with the
champion of the decision log. It counts only if the log has not grown when the decision arrives;
otherwise the decision is made again, against the new champion (decision_log.py). So each of several
concurrent promotions is compared with the champion before it, and none is lost. The gate decides
which is better, not the order of arrival.
"""

from __future__ import annotations

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


@dataclass(frozen=True)
class PromotionResult:
    """The decision of a promotion, and the champion after it."""

    action: str
    decision: Decision | None  # None: forced, and no comparison was possible
    champion: int | None  # after the decision; in a dry run, before it
    entry: Entry | None  # None for a dry run
    tries: int  # 1, plus one for each time that another process was faster


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

    def decide_on(log: DecisionLog) -> _Draft:
        before = _champion(registry, name, log)
        if before == number:
            raise ValueError(f"{version} is the champion already")
        if before not in decisions:
            sha256 = log.champion_sha256
            decisions[before] = _compare(registry, gate, version, before, sha256, force)
        decision = decisions[before]
        accepted = decision is not None and decision.accepted
        action = ACCEPT if accepted else FORCE if force else REFUSE
        after = before if action == REFUSE else number
        return _Draft(action, version, before, after, decision)

    log = registry.decisions.read(name)
    log.require_intact()
    if dry_run:
        draft = decide_on(log)
        return PromotionResult(draft.action, draft.decision, draft.before, None, 1)
    entry, tries = _commit(registry, name, decide_on, by=by, reason=reason)
    _tag_with(registry, version, entry)
    return PromotionResult(
        entry.action, decisions.get(entry.champion_before), entry.champion_after, entry, tries
    )


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
    target = _earlier(name, log) if to is None else to
    version = registry.version(name, target)
    if target == current:
        raise ValueError(f"{version} is the champion already")

    def decide_on(log: DecisionLog) -> _Draft:
        before = _champion(registry, name, log)
        if before != current:
            raise ValueError(
                f"version {before} became champion while version {current} was being rolled back; "
                "check it, and roll back again if needed"
            )
        return _Draft(ROLLBACK, version, before, target, None)

    entry, _ = _commit(registry, name, decide_on, by=by, reason=reason)
    _tag_with(registry, version, entry)
    return entry


@dataclass(frozen=True)
class _Draft:
    """A decision that is not in the log yet."""

    action: str
    version: Version
    before: int | None
    after: int | None
    decision: Decision | None


def _commit(
    registry: Registry,
    name: str,
    decide_on: Callable[[DecisionLog], _Draft],
    *,
    by: str,
    reason: str,
) -> tuple[Entry, int]:
    """Decide on the current log and append the decision; retry while other processes are faster.

    Returns:
        The entry that counts, and the number of tries.
    """
    id_ = uuid.uuid4().hex
    for tries in range(1, MAX_TRIES):
        log = registry.decisions.read(name)
        log.require_intact()
        entry = log.find(id_)  # it is there if only the response was lost
        if entry is None:
            entry = _entry(id_, log, decide_on(log), by, reason)
            try:
                position = registry.decisions.append(
                    name, entry.version, entry.to_line(), entry.text
                )
            except UnknownOutcomeError:
                _pause(tries)
                continue
            if registry.decisions.read(name).find(id_) is None:
                registry.decisions.remove(name, position)
                _pause(tries)
                continue
        registry.decisions.sync_alias(name)
        return entry, tries
    raise RuntimeError(f"the decision on {name} came too late {MAX_TRIES} times; try again later")


def _entry(id_: str, log: DecisionLog, draft: _Draft, by: str, reason: str) -> Entry:
    when = datetime.now(UTC).isoformat(timespec="seconds")
    details: dict[str, Any] = {}
    if draft.decision is not None:
        details = {
            "policy": asdict(draft.decision.policy),
            "criteria": [asdict(one) for one in draft.decision.criteria],
            "figures": draft.decision.measurements(),
        }
    return Entry(
        id=id_,
        previous=log.head,
        action=draft.action,
        version=draft.version.number,
        sha256=draft.version.sha256,
        champion_before=draft.before,
        champion_after=draft.after,
        by=by,
        time=when,
        reason=redact(reason),
        text=_text(draft, when, by, redact(reason)),
        **details,
    )


def _text(draft: _Draft, when: str, by: str, reason: str) -> str:
    """Return the text of the entry's page, in Markdown."""
    done = {
        ACCEPT: "accepted as champion",
        FORCE: "FORCED to be champion",
        REFUSE: "refused",
        ROLLBACK: "champion again (rollback)",
    }[draft.action]
    before = "none" if draft.before is None else f"version {draft.before}"
    lines = [f"**Version {draft.version.number} {done}**, {when}, by {by}."]
    lines.append(f"Champion before: {before}; after: version {draft.after}.")
    if draft.after is None:
        lines[-1] = "There is no champion."
    if reason:
        lines.append(f"Reason: {reason}")
    if draft.decision is not None:
        lines += ["```", draft.decision.table(), "```"]
    text = "\n\n".join(lines[:3]) + "\n" + "\n".join(lines[3:])
    return text[:MAX_TEXT_CHARACTERS].strip()


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


def _tag_with(registry: Registry, version: Version, entry: Entry) -> None:
    """Show the decision on the version's page. The decision is valid without it."""
    try:
        tag = f"{entry.action}, {entry.time}, by {entry.by}"
        registry.tag_version(version, {DECISION_TAG: tag})
    except RuntimeError as error:
        logger.warning("%s: the decision is not shown on its page (%s)", version, error)


def _champion(registry: Registry, name: str, log: DecisionLog) -> int | None:
    """Return the champion of the log; if the log is empty, the version with the alias."""
    return log.champion if log.entries else registry.aliases(name).get(CHAMPION)


def _earlier(name: str, log: DecisionLog) -> int:
    champions = log.champions()
    if len(champions) < 2:
        raise ValueError(f"{name} has had no other champion; name a version with --to")
    return champions[-2]


def _pause(tries: int) -> None:
    time.sleep(random.uniform(0.0, min(2.0, 0.02 * 2 ** min(tries, 7))))
