"""Who becomes champion: decided by the gate, and put into force by comparing and setting.

Everybody may promote at any time. A decision is made against the champion that the log of
decisions names, and counts only if the log still ends there when the decision arrives; otherwise
it is made anew, against who is champion by then (platform/registry/decision_log.py). So of any number of
promotions at once each is held against the champion before it, none is lost, and the gate's order
of better and worse decides, not who came last.
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
    Entry,
    Log,
)
from deta.platform.registry.mlflow_registry import Registry, UnknownOutcomeError, Version
from deta.platform.registry.promotion_gate import Decision
from deta.platform.system.redaction import redact

logger = logging.getLogger(__name__)

DECISION_TAG = "deta.decision"
MAX_TRIES = 1000  # far more than promoters at once
# Challenger and champion, or none, to a decision.
JudgeLike = Callable[[Version, Version | None], Decision]


@dataclass(frozen=True)
class Outcome:
    """What became of an attempt to promote."""

    action: str
    decision: Decision | None  # none: forced, and nothing could be compared
    champion: int | None  # from now on; in a dry run, from before
    entry: Entry | None  # none for a dry run
    tries: int  # 1, and one more for each time that somebody else was faster


def whoever() -> str:
    """Who decides: the user of MLflow where there is one, and the machine."""
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
    judge: JudgeLike,
    *,
    by: str,
    reason: str = "",
    force: bool = False,
    dry_run: bool = False,
) -> Outcome:
    """Make a version champion if the gate lets it through.

    Args:
        reason: why; needed to force.
        force: make it champion whatever the gate says, except that its files must be those that
            were registered.
        dry_run: only say what would be decided.

    Raises:
        ValueError: there is no such version, it is champion already, a reason is missing, its files
            are not those that were registered (forced only), or somebody tampered with the log.
        RuntimeError: MLflow does not answer.
    """
    if force and not reason.strip():
        raise ValueError("a forced promotion needs a reason: --reason '…'")
    version = registry.version(name, number)
    judged: dict[int | None, Decision | None] = {}  # by champion

    def decide_on(log: Log) -> _Draft:
        before = _champion(registry, name, log)
        if before == number:
            raise ValueError(f"{version} is the champion already")
        if before not in judged:
            judged[before] = _judge(registry, judge, version, before, log.champion_sha256, force)
        decision = judged[before]
        accepted = decision is not None and decision.accepted
        action = ACCEPT if accepted else FORCE if force else REFUSE
        after = before if action == REFUSE else number
        return _Draft(action, version, before, after, decision)

    log = registry.log(name)
    log.require_intact()
    if dry_run:
        draft = decide_on(log)
        return Outcome(draft.action, draft.decision, draft.before, None, 1)
    entry, tries = _put_into_force(registry, name, decide_on, by=by, reason=reason)
    _show_on(registry, version, entry)
    return Outcome(
        entry.action, judged.get(entry.champion_before), entry.champion_after, entry, tries
    )


def rollback(registry: Registry, name: str, to: int | None, *, by: str, reason: str) -> Entry:
    """Make an earlier version champion again.

    Args:
        to: its number; default: who was champion before the one that is.

    Raises:
        ValueError: there is no earlier one, a reason is missing, or somebody else changed the
            champion meanwhile.
    """
    if not reason.strip():
        raise ValueError("a rollback needs a reason: --reason '…'")
    log = registry.log(name)
    log.require_intact()
    seen = _champion(registry, name, log)
    target = _earlier(name, log) if to is None else to
    version = registry.version(name, target)
    if target == seen:
        raise ValueError(f"{version} is the champion")

    def decide_on(log: Log) -> _Draft:
        before = _champion(registry, name, log)
        if before != seen:
            raise ValueError(
                f"version {before} became champion while version {seen} was being rolled back; "
                "look at it, and roll back again if that is wanted"
            )
        return _Draft(ROLLBACK, version, before, target, None)

    entry, _ = _put_into_force(registry, name, decide_on, by=by, reason=reason)
    _show_on(registry, version, entry)
    return entry


@dataclass(frozen=True)
class _Draft:
    """A decision before it is in the log."""

    action: str
    version: Version
    before: int | None
    after: int | None
    decision: Decision | None


def _put_into_force(
    registry: Registry, name: str, decide_on: Callable[[Log], _Draft], *, by: str, reason: str
) -> tuple[Entry, int]:
    """Decide on the end of the log and add the decision to it, again until nobody was faster.

    Returns:
        The entry that counts, and how often it was tried.
    """
    id_ = uuid.uuid4().hex
    for tries in range(1, MAX_TRIES):
        log = registry.log(name)
        log.require_intact()
        entry = log.has(id_)  # where the answer was lost, but not the entry
        if entry is None:
            entry = _entry(id_, log, decide_on(log), by, reason)
            try:
                position = registry.append(name, entry.version, entry.to_line(), entry.text)
            except UnknownOutcomeError:
                _pause(tries)
                continue
            if registry.log(name).has(id_) is None:
                registry.drop(name, position)
                _pause(tries)
                continue
        registry.settle(name)
        return entry, tries
    raise RuntimeError(f"the decision on {name} came too late {MAX_TRIES} times; try again")


def _entry(id_: str, log: Log, draft: _Draft, by: str, reason: str) -> Entry:
    when = datetime.now(UTC).isoformat(timespec="seconds")
    details: dict[str, Any] = {}
    if draft.decision is not None:
        details = {
            "policy": asdict(draft.decision.policy),
            "criteria": [asdict(one) for one in draft.decision.criteria],
            "figures": draft.decision.figures(),
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
    """The entry's page, in Markdown."""
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


def _judge(
    registry: Registry,
    judge: JudgeLike,
    version: Version,
    before: int | None,
    sha256: str,
    force: bool,
) -> Decision | None:
    """
    Args:
        before: number of the champion.
        sha256: of its weights, as the log has it.
    """
    try:
        champion = registry.version(version.name, before) if before is not None else None
        if champion is not None and sha256 not in ("", champion.sha256):
            raise ValueError(f"{champion} has other weights by now than when it became champion")
        decision = judge(version, champion)
    except ValueError as error:
        if force:
            return None  # nothing to compare with, which is why it is forced
        if before is None:
            raise
        raise ValueError(
            f"there is no comparing with the champion, version {before}: {error}. Make another "
            "version champion (rollback --to NUMBER), or --force this one"
        ) from error
    if force and decision.challenger.fault:
        raise ValueError(
            f"{version} cannot be forced, for nobody could load it: {decision.challenger.fault}"
        )
    return decision


def _show_on(registry: Registry, version: Version, entry: Entry) -> None:
    """On the version's page; the decision is in force with or without."""
    try:
        tag = f"{entry.action}, {entry.time}, by {entry.by}"
        registry.tag_version(version, {DECISION_TAG: tag})
    except RuntimeError as error:
        logger.warning("%s: the decision could not be noted on its page (%s)", version, error)


def _champion(registry: Registry, name: str, log: Log) -> int | None:
    """Of the log; where nothing was decided yet, whom somebody gave the alias."""
    return log.champion if log.entries else registry.aliases(name).get(CHAMPION)


def _earlier(name: str, log: Log) -> int:
    champions = log.champions()
    if len(champions) < 2:
        raise ValueError(f"{name} has had no other champion to go back to; say which with --to")
    return champions[-2]


def _pause(tries: int) -> None:
    time.sleep(random.uniform(0.0, min(2.0, 0.02 * 2 ** min(tries, 7))))
