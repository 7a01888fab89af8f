"""Relate a total batch other than the recipe's to the learning rate."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from deta.platform.learning.schedule import LR_RULES
from deta.platform.run.config import RunConfig

RULE_KEY, BASE_KEY = "optim.lr_rule", "optim.lr_base_batch"


def with_base_batch(recipe: RunConfig, changes: Mapping[str, str]) -> dict[str, str]:
    """Add the total batch from which a learning-rate rule starts.

    It is the recipe's. The configuration holds it, so that MLflow shows it and a resumed run
    knows it.
    """
    completed = dict(changes)
    if completed.get(RULE_KEY, "none") != "none":
        completed.setdefault(BASE_KEY, str(recipe.optim.lr_base_batch or recipe.total_batch_size))
    return completed


def batch_notes(recipe: RunConfig, config: RunConfig, changes: Mapping[str, str]) -> list[str]:
    """Describe what differs because the total batch is not the recipe's; empty if it is."""
    ours, theirs, optim = config.total_batch_size, recipe.total_batch_size, config.optim
    if ours == theirs:
        return []
    rate = f"{optim.lr_for(ours):.3g}"
    if RULE_KEY in changes:
        return [
            f"total batch {ours}, the recipe has {theirs}; by optim.lr_rule={optim.lr_rule} the "
            f"learning rate is {rate}, the recipe's {recipe.optim.lr:.3g}"
        ]
    others = ", ".join(
        f"{rule} {replace(optim, lr_rule=rule, lr_base_batch=theirs).lr_for(ours):.3g}"
        for rule in LR_RULES
        if rule != "none"
    )
    return [
        f"This is no longer the recipe: total batch {ours} instead of {theirs}, so "
        f"{theirs / ours:.3g} times as many updates an epoch; do not expect the AP of the recipe",
        f"  the learning rate stays {rate}; optim.lr_rule=… scales it with the batch ({others}), "
        "optim.lr_rule=none confirms that it stays",
    ]
