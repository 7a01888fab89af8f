"""A total batch other than the recipe's: what it prints, and its effect on the learning rate."""

from __future__ import annotations

import pytest
from torch import nn

from deta.jobs.deta_r50 import detrex_bs8, official_12ep
from deta.jobs.total_batch import batch_notes, with_base_batch
from deta.platform.launch.console import batch_line
from deta.platform.learning.optimizer import make_optimizer
from deta.platform.learning.schedule import OptimConfig
from deta.platform.run.config import RunConfig, flatten, from_json, override, to_json


def changed(recipe: RunConfig, **changes: str) -> tuple[RunConfig, dict[str, str]]:
    """As the command line does it."""
    completed = with_base_batch(recipe, {k.replace("__", "."): v for k, v in changes.items()})
    return override(recipe, completed), completed


@pytest.mark.parametrize(
    ("rule", "batch", "rate"),
    [("none", 64, 2e-4), ("linear", 64, 8e-4), ("sqrt", 64, 4e-4), ("linear", 8, 1e-4)],
)
def test_the_rate_follows_the_total_batch_by_the_rule(rule: str, batch: int, rate: float):
    config, _ = changed(official_12ep(), total_batch_size=str(batch), optim__lr_rule=rule)
    assert config.optim.lr_for(config.total_batch_size) == pytest.approx(rate)
    assert config.optim.lr == 2e-4  # so that nothing can be scaled twice


def test_rule_and_base_batch_stand_in_the_configuration():
    config, _ = changed(detrex_bs8(), total_batch_size="32", optim__lr_rule="linear")
    flat = flatten(config)
    assert (flat["optim.lr_rule"], flat["optim.lr_base_batch"]) == ("linear", 8)
    assert from_json(RunConfig, to_json(config)) == config


def test_a_rule_given_again_scales_only_once():
    first, _ = changed(official_12ep(), total_batch_size="64", optim__lr_rule="sqrt")
    again = override(first, {"optim.lr_rule": "sqrt", "total_batch_size": "64"})
    assert again.optim.lr_for(64) == first.optim.lr_for(64) == pytest.approx(4e-4)


def test_a_run_without_a_rule_keeps_the_keys_of_older_runs():
    config, changes = changed(official_12ep(), total_batch_size="8")
    assert changes == {"total_batch_size": "8"}
    assert config.optim == official_12ep().optim


def test_every_group_starts_from_the_scaled_rate():
    config = OptimConfig(lr=2e-4, lr_rule="linear", lr_base_batch=16)
    model = nn.ModuleDict({"backbone": nn.Linear(2, 2), "head": nn.Linear(2, 2)})
    optimizer = make_optimizer(model, config, config.lr_for(32))
    assert sorted(group["base_lr"] for group in optimizer.param_groups) == pytest.approx(
        [4e-5, 4e-4]
    )


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"lr_rule": "linear"}, r"needs optim\.lr_base_batch"),
        ({"lr_rule": "cubic"}, "lr_rule"),
        ({"lr_base_batch": 0}, "lr_base_batch"),
    ],
)
def test_a_rule_without_its_base_or_that_is_none_is_refused(wrong: dict, message: str):
    with pytest.raises(ValueError, match=message):
        OptimConfig(**wrong)


def test_another_batch_without_a_rule_prints_what_differs_from_the_recipe():
    config, changes = changed(official_12ep(), total_batch_size="64")
    text = "\n".join(batch_notes(official_12ep(), config, changes))
    assert "total batch 64 instead of 16" in text
    assert "the learning rate stays 0.0002" in text
    assert "sqrt 0.0004, linear 0.0008" in text


def test_an_explicit_rule_takes_one_line_and_the_recipes_own_batch_none():
    config, changes = changed(official_12ep(), total_batch_size="64", optim__lr_rule="none")
    (line,) = batch_notes(official_12ep(), config, changes)
    assert "optim.lr_rule=none" in line
    config, changes = changed(official_12ep(), total_batch_size="16", cluster__num_workers="2")
    assert batch_notes(official_12ep(), config, changes) == []


@pytest.mark.parametrize(
    ("workers", "total", "micro", "line"),
    [
        (2, 16, 2, "total batch 16 = 2 workers x 2 images x 4 accumulation steps"),
        (8, 16, 2, "total batch 16 = 8 workers x 2 images"),
        (1, 1, 4, "total batch 1 = 1 worker x 1 image"),
        (2, 10, 2, "total batch 10 = 5 micro-batches of 2 images, 2 or 3 for each of 2 workers"),
        (1, 5, 2, "total batch 5 = 3 micro-batches of 1 or 2 images, 3 for each of 1 worker"),
        (4, 8, 3, "total batch 8 = 4 workers x 2 images"),
    ],
)
def test_how_a_total_batch_is_shared_out_is_one_line(workers, total, micro, line):
    changes = {
        "cluster.num_workers": workers, "total_batch_size": total, "micro_batch_size": micro
    }  # fmt: skip
    assert batch_line(override(official_12ep(), changes)) == line
