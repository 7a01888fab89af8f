#!/usr/bin/env python
"""Promote a registered version to champion (models:/NAME@champion) if it is better.

  python jobs/promote.py 3 --dry-run          show the decision, criterion by criterion
  python jobs/promote.py 3                    decide; the champion changes if all criteria pass
  python jobs/promote.py 3 min_gain=0.005 --floor rivet=0.4
  python jobs/promote.py 3 --force --reason "the old one misses the new rivets altogether"
  python jobs/promote.py history              every decision: who, when, why, metrics
  python jobs/promote.py rollback --reason "false alarms at night"
  python jobs/promote.py repair               set the alias to what the history records

A challenger passes if its files are the registered and evaluated ones, its lineage is
complete, it was evaluated on the champion's images, the interval of the difference in AP over
these images (20 at least) lies above min_gain, no class drops too far, latency and size are within
limits, and the exported form agrees with the model. The first champion has no one to beat, so only
absolute criteria apply, with an AP of min_first_ap at least. --show prints the policy: every line
is a key that you can change, and every decision records the policy.

Any number of promotions may run at once: each is compared with the champion at the time it
is recorded. Decisions are stored in MLflow, as the registered model NAME-history.

The exit code is 0 if the version is (or would be) champion, 3 if the gate refuses it, 2 for an
invalid command line, 1 if something fails or the history was tampered with.
"""

from __future__ import annotations

import logging
import re
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NoReturn

from tyro.conf import Positional, UseAppendAction

from deta.jobs.command_line import echo, read_command_line, run_tool
from deta.jobs.register import DEFAULT_NAME

if TYPE_CHECKING:
    from deta.platform.registry.mlflow_registry import Registry
    from deta.platform.registry.promotion_gate import Policy

HISTORY, ROLLBACK, REPAIR = "history", "rollback", "repair"
REFUSED = 3  # exit code


@dataclass(frozen=True, kw_only=True)
class PromoteOptions:
    # Number or models:/NAME/NUMBER of a version; or history, rollback, repair.
    what: Positional[str] = ""
    name: str = DEFAULT_NAME  # of the model
    dry_run: bool = False  # print the decision, change nothing
    reason: str = ""  # recorded in the history
    force: bool = False  # override the gate
    to: int | None = None  # version for a rollback; without it, the previous one
    by: str | None = None  # who promotes; without it, the user and this machine
    floor: UseAppendAction[tuple[str, ...]] = ()  # CLASS=AP: least AP of a class, 0..1
    # Folder of an evaluation of either version, instead of the registered one.
    evaluation: UseAppendAction[tuple[Path, ...]] = ()
    measure: Literal["cpu", "cuda"] | None = None  # measure the latency of both here
    json: bool = False  # print the history as JSON, one line per entry
    show: bool = False  # print the policy and stop


def main() -> NoReturn:
    from deta.platform.registry.promotion_gate import Policy

    options, changes = read_command_line(PromoteOptions, __doc__, Policy())
    run_tool(lambda: _prepare(options, changes), lambda prepared: _run(*prepared))


def _prepare(options: PromoteOptions, changes: dict[str, str]) -> tuple[Policy, PromoteOptions]:
    from deta.platform.registry.model_address import is_model_address, parse_address
    from deta.platform.registry.promotion_gate import Policy
    from deta.platform.run.config import override

    if not (options.what or options.show):
        raise ValueError("name a version, or history, rollback or repair; --help has examples")
    if is_model_address(options.what):
        address = parse_address(options.what)
        if address.version is None:
            raise ValueError(f"{address}: give the number of a version, not an alias")
        options = replace(options, name=address.name, what=str(address.version))
    floors = [_floor(text) for text in options.floor]
    policy = override(Policy(), changes)
    return replace(policy, class_floors=(*policy.class_floors, *floors)), options


def _floor(text: str) -> tuple[str, float]:
    name, _, value = text.rpartition("=")
    try:
        if name:
            return name, float(value)
    except ValueError:
        pass
    raise ValueError(f"--floor {text}: is not of the form CLASS=AP, such as rivet=0.4")


def _run(policy: Policy, options: PromoteOptions) -> int:
    from deta.platform.registry.mlflow_registry import Registry
    from deta.platform.registry.model_address import registry_uri
    from deta.platform.registry.promote import current_user, rollback

    if options.show:
        for key, value in asdict(policy).items():
            echo(f"{key}={value}")
        return 0
    logging.getLogger("mlflow").setLevel(logging.CRITICAL)  # it logs every retry
    registry = Registry(registry_uri())
    by = options.by or current_user()
    if options.what == HISTORY:
        return _history(registry, options)
    if options.what == ROLLBACK:
        entry = rollback(registry, options.name, options.to, by=by, reason=options.reason)
        before, after = entry.champion_before, entry.champion_after
        echo(f"the champion was version {before} and is version {after}")
        return 0
    if options.what == REPAIR:
        registry.decisions.read(options.name).require_intact()
        log = registry.decisions.sync_alias(options.name)
        echo(f"champion: {log.champion}, by the history of {len(log.entries)} decisions")
        return 0
    if not options.what.isdigit():
        raise ValueError(
            f"{options.what!r} is neither the number of a version nor {HISTORY}, {ROLLBACK} or "
            f"{REPAIR}"
        )
    return _promote(registry, policy, options, by)


def _promote(registry: Registry, policy: Policy, options: PromoteOptions, by: str) -> int:
    from deta.platform.evaluation.evaluation_folder import read_facts
    from deta.platform.registry.decision_log import REFUSE
    from deta.platform.registry.gate_inputs import GateJudge
    from deta.platform.registry.promote import promote

    given = {read_facts(folder)["weights_sha256"]: folder for folder in options.evaluation}
    outcome = promote(
        registry,
        options.name,
        int(options.what),
        GateJudge(registry, policy, given, options.measure, echo=echo),
        by=by,
        reason=options.reason,
        force=options.force,
        dry_run=options.dry_run,
    )
    if outcome.entry is not None and outcome.tries == 0:
        echo(
            f"an earlier command recorded this at {outcome.entry.time} and ended before MLflow's "
            "alias was moved; it is moved now"
        )
    elif outcome.decision is not None:
        echo(f"{outcome.decision.table()}\n\n{outcome.decision.verdict()}")
    else:
        echo("nothing could be compared")
    champion = "none" if outcome.champion is None else f"version {outcome.champion}"
    would = "nothing was changed; it would be: " * options.dry_run
    echo(f"{would}{outcome.action}; the champion is {champion}")
    return REFUSED if outcome.action == REFUSE else 0


def _history(registry: Registry, options: PromoteOptions) -> int:
    log = registry.decisions.read(options.name)
    for number, entry in log.entries:
        # The text is Markdown, for MLflow's pages.
        plain = re.sub(r"\*\*(.+?)\*\*|^```$\n?", r"\1", entry.text, flags=re.MULTILINE)
        echo(entry.to_line() if options.json else f"#{number} {plain}\n")
    if not options.json:
        alias = registry.aliases(options.name).get("champion")
        echo(f"{len(log.entries)} decisions; the champion is {log.champion or alias or 'none'}")
        if log.entries:
            echo(f"last: {log.head_line}")
        if log.entries and alias != log.champion:
            echo(f"but MLflow's alias is {alias}; jobs/promote.py repair corrects it")
        for problem in log.problems:
            echo(f"TAMPERED: {problem}")
    return 1 if log.problems else 0


if __name__ == "__main__":
    main()
