"""What a total batch other than the recipe's means for its learning rate."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from deta.platform.learning.optimizer import LR_RULES
from deta.platform.run.config import RunConfig

KEY, RULE_KEY, BASE_KEY = "total_batch_size", "optim.lr_rule", "optim.lr_base_batch"


def with_base_batch(recipe: RunConfig, changes: Mapping[str, str]) -> dict[str, str]:
    """The changes, and beside a rule for the learning rate the total batch that it starts from.

    That is the recipe's. It is written into the configuration, so that MLflow shows it and a run
    that goes on knows it.
    """
    completed = dict(changes)
    if completed.get(RULE_KEY, "none") != "none":
        completed.setdefault(BASE_KEY, str(recipe.optim.lr_base_batch or recipe.total_batch_size))
    return completed


def batch_notes(recipe: RunConfig, config: RunConfig, changes: Mapping[str, str]) -> list[str]:
    """Lines for a person: what differs from the recipe because the total batch does.

    Nothing where the total batch is the recipe's. An explicit rule is told of in one line.
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
        f"This is not the recipe any more: total batch {ours} instead of {theirs}.",
        f"  {ratio:.3g} times as many updates an epoch, each from {ours / theirs:.3g} times as "
        "many images, so the AP of the recipe cannot be expected",
        f"  the learning rate stays {rate:.3g}, and clipping and weight decay act "
        f"{ratio:.3g} times as often",
        f"  optim.lr_rule=… lets the rate follow the batch ({others}); optim.lr_rule=none says "
        "that it is meant to stay",
    ]
