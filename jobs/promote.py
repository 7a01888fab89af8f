#!/usr/bin/env python
"""Promote a registered version to champion (models:/NAME@champion) if it is better.

  python jobs/promote.py 3 --dry-run                show the decision, criterion by criterion python
  jobs/promote.py 3                          decide; the champion changes if all criteria pass
  python jobs/promote.py 3 min_gain=0.005 --floor rivet=0.4 python jobs/promote.py 3 --force
  --reason "the old one misses the new rivets altogether" python jobs/promote.py history
  every decision: who, when, why, metrics python jobs/promote.py rollback --reason "false alarms at
  night" python jobs/promote.py repair                     set the alias to what the history records

A challenger passes if its files are the registered and evaluated ones, its lineage is
complete, it was evaluated on the champion's images, the bootstrap interval of the
difference in AP over these images lies above min_gain, no class drops too far, latency and size are
within limits, and the exported form agrees with the model. The first champion has no one to
beat, so only absolute criteria apply. --show prints the policy: every line is a key that
you can change, and every decision records the policy.

Any number of promotions may run at once: each is compared with the champion at the time it
is recorded. Decisions are stored in MLflow, as the registered model NAME-history.

The exit code is 0 if the version is (or would be) champion, 3 if the gate refuses it, 2 for an
invalid command line, 1 if something fails or the history was tampered with.
"""

from __future__ import annotations

import argparse
import logging
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from deta.jobs.command_line import described_parser, echo, run_tool
from deta.jobs.register import DEFAULT_NAME

if TYPE_CHECKING:
    from deta.platform.registry.mlflow_registry import Registry
    from deta.platform.registry.promotion_gate import Policy

HISTORY, ROLLBACK, REPAIR = "history", "rollback", "repair"
REFUSED = 3  # exit code


def main() -> NoReturn:
    parser = described_parser(__doc__)
    parser.add_argument(
        "what", nargs="?", metavar="WHAT",
        help=f"number or models:/NAME/NUMBER of a version; or {HISTORY}, {ROLLBACK}, {REPAIR}",
    )  # fmt: skip
    parser.add_argument("policy", nargs="*", metavar="key=value", help="change the policy")
    parser.add_argument("--name", default=DEFAULT_NAME, help=f"default: {DEFAULT_NAME}")
    parser.add_argument("--dry-run", action="store_true", help="print the decision, change nothing")
    parser.add_argument("--reason", default="", metavar="TEXT", help="recorded in the history")
    parser.add_argument("--force", action="store_true", help="override the gate")
    parser.add_argument(
        "--to", type=int, metavar="NUMBER", help="version for a rollback; default: the previous one"
    )
    parser.add_argument("--by", metavar="WHO", help="default: the user and this machine")
    parser.add_argument(
        "--floor", action="append", default=[], metavar="CLASS=AP", help="least AP of a class, 0..1"
    )
    parser.add_argument(
        "--evaluation", action="append", default=[], type=Path, metavar="FOLDER",
        help="evaluation of either version, instead of the registered one",
    )  # fmt: skip
    parser.add_argument(
        "--measure", choices=("cpu", "cuda"), metavar="DEVICE",
        help="measure the latency of both here, on cpu or cuda",
    )  # fmt: skip
    parser.add_argument(
        "--json", action="store_true", help="print the history as JSON, one line per entry"
    )
    parser.add_argument("--show", action="store_true", help="print the policy and stop")
    arguments = parser.parse_intermixed_args()
    run_tool(lambda: _prepare(arguments), lambda policy: _run(policy, arguments))


def _prepare(arguments: argparse.Namespace) -> Policy:
    from deta.platform.registry.model_address import is_model_address, parse_address
    from deta.platform.registry.promotion_gate import Policy
    from deta.platform.run.config import override

    if arguments.show and arguments.what and "=" in arguments.what:
        arguments.policy.insert(0, arguments.what)
        arguments.what = None
    if arguments.what is None and not arguments.show:
        raise ValueError("name a version, or history, rollback or repair; --help has examples")
    if is_model_address(arguments.what or ""):
        address = parse_address(arguments.what)
        if address.version is None:
            raise ValueError(f"{address}: give the number of a version, not an alias")
        arguments.name, arguments.what = address.name, str(address.version)
    changes = {}
    for text in arguments.policy:
        key, equals, value = text.partition("=")
        if not equals:
            raise ValueError(f"{text!r} is not of the form key=value")
        changes[key] = value
    floors = []
    for text in arguments.floor:
        name, _, value = text.rpartition("=")
        try:
            floors.append((name, float(value)))
        except ValueError:
            name = ""
        if not name:
            raise ValueError(f"--floor {text}: is not of the form CLASS=AP, such as rivet=0.4")
    policy = override(Policy(), changes)
    return replace(policy, class_floors=(*policy.class_floors, *floors))


def _run(policy: Policy, arguments: argparse.Namespace) -> int:
    from dataclasses import asdict

    from deta.platform.registry.model_address import registry_uri

    if arguments.show:
        for key, value in asdict(policy).items():
            echo(f"{key}={value}")
        return 0
    from deta.platform.registry.mlflow_registry import Registry

    logging.getLogger("mlflow").setLevel(logging.CRITICAL)  # it logs every retry
    registry = Registry(registry_uri())
    if arguments.what == HISTORY:
        return _history(registry, arguments)
    if arguments.what == ROLLBACK:
        return _rollback(registry, arguments)
    if arguments.what == REPAIR:
        registry.decisions.read(arguments.name).require_intact()
        log = registry.decisions.sync_alias(arguments.name)
        echo(f"champion: {log.champion}, by the history of {len(log.entries)} decisions")
        return 0
    if not str(arguments.what).isdigit():
        raise ValueError(
            f"{arguments.what!r} is neither the number of a version nor {HISTORY}, {ROLLBACK} or "
            f"{REPAIR}"
        )
    return _promote(registry, policy, arguments)


def _promote(registry: Registry, policy: Policy, arguments: argparse.Namespace) -> int:
    from deta.platform.evaluation.evaluation_folder import read_facts
    from deta.platform.registry.decision_log import REFUSE
    from deta.platform.registry.gate_inputs import GateJudge
    from deta.platform.registry.promote import current_user, promote

    given = {read_facts(folder)["weights_sha256"]: folder for folder in arguments.evaluation}
    outcome = promote(
        registry,
        arguments.name,
        int(arguments.what),
        GateJudge(registry, policy, given, arguments.measure, echo=echo),
        by=arguments.by or current_user(),
        reason=arguments.reason,
        force=arguments.force,
        dry_run=arguments.dry_run,
    )
    if outcome.decision is not None:
        echo(outcome.decision.table())
        echo("")
        echo(outcome.decision.verdict())
    else:
        echo("nothing could be compared")
    champion = "none" if outcome.champion is None else f"version {outcome.champion}"
    if arguments.dry_run:
        echo(f"nothing was changed; it would be: {outcome.action}; the champion is {champion}")
    else:
        echo(f"{outcome.action}; the champion is {champion}")
    return REFUSED if outcome.action == REFUSE else 0


def _rollback(registry: Registry, arguments: argparse.Namespace) -> int:
    from deta.platform.registry.promote import current_user, rollback

    entry = rollback(
        registry,
        arguments.name,
        arguments.to,
        by=arguments.by or current_user(),
        reason=arguments.reason,
    )
    echo(f"the champion was version {entry.champion_before} and is version {entry.champion_after}")
    return 0


def _history(registry: Registry, arguments: argparse.Namespace) -> int:
    log = registry.decisions.read(arguments.name)
    for number, entry in log.entries:
        if arguments.json:
            echo(entry.to_line())
        else:
            echo(f"#{number} {entry.text}\n")
    if not arguments.json:
        alias = registry.aliases(arguments.name).get("champion")
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
