"""Relate a total batch other than the recipe's to the learning rate."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from deta.platform.learning.optimizer import LR_RULES
from deta.platform.run.config import RunConfig

KEY, RULE_KEY, BASE_KEY = "total_batch_size", "optim.lr_rule", "optim.lr_base_batch"


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
    """Describe what differs from the recipe because the total batch does.

    Empty if the total batch is the recipe's. An explicit rule takes one line.
    """
    ours, theirs = config.total_batch_size, recipe.total_batch_size
    optim = config.optim
    if ours == theirs:
        return []
    rate = optim.lr_for(ours)
    if RULE_KEY in changes:
        return [
            f"total batch {ours}, the recipe has {theirs}; by optim.lr_rule={optim.lr_rule} the "
            f"learning rate is {rate:.3g}, the recipe's {recipe.optim.lr:.3g}"
        ]
    others = ", ".join(
        f"{rule} {replace(optim, lr_rule=rule, lr_base_batch=theirs).lr_for(ours):.3g}"
        for rule in LR_RULES
        if rule != "none"
    )
    ratio = theirs / ours
    return [
        f"This is no longer the recipe: total batch {ours} instead of {theirs}.",
        f"  {ratio:.3g} times as many updates an epoch, each from {ours / theirs:.3g} times as "
        "many images, so do not expect the AP of the recipe",
        f"  the learning rate stays {rate:.3g}, and clipping and weight decay act "
        f"{ratio:.3g} times as often",
        f"  optim.lr_rule=… scales the rate with the batch ({others}); optim.lr_rule=none confirms "
        "that it stays",
    ]
