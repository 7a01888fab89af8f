"""The design of a study: cells, trials, equal samples."""

from __future__ import annotations

from itertools import pairwise

import pytest

from deta.jobs import study_batch_lr
from deta.jobs.deta_r50 import demo, detrex_bs8, detrex_bs16
from deta.platform.run.config import override
from deta.platform.study.design import (
    Design,
    Factor,
    Level,
    batch_factor,
    numbers_of,
    rate_factor,
)

BATCH, RATE = batch_factor((8, 16)), rate_factor(1e-3)


def design(**changes: object) -> Design:
    arguments = {"base": demo(), "factors": (BATCH, RATE), "seeds": (1, 2, 3)} | changes
    return Design(**arguments)  # type: ignore[arg-type]


def test_factors_are_crossed_and_named_cells_follow():
    cells = design(named_cells={"as published": {"optim.weight_decay": 0.1}}).cells()

    assert [cell.key for cell in cells] == [
        "batch=8, rate=1×",
        "batch=8, rate=2×",
        "batch=16, rate=1×",
        "batch=16, rate=2×",
        "as published",
    ]
    assert cells[1].changes == {"total_batch_size": 8, "optim.lr": 2e-3}
    assert [cell.is_named for cell in cells] == [False] * 4 + [True]


def test_trials_are_whole_blocks_with_ids_of_their_own():
    trials = design().trials()

    assert [trial.seed for trial in trials] == [1] * 4 + [2] * 4 + [3] * 4
    assert len({trial.id for trial in trials}) == 12
    assert all(trial.changes["seed"] == trial.seed for trial in trials)


def test_a_trial_keeps_its_id_when_only_where_it_runs_changes():
    moved = override(
        demo(),
        {"name": "other", "storage": "/elsewhere", "cluster.num_workers": 1, "log_every_steps": 7},
    )
    longer = override(demo(), {"schedule.epochs": 11})

    ids = [trial.id for trial in design().trials()]

    assert [trial.id for trial in design(base=moved).trials()] == ids
    assert not {trial.id for trial in design(base=longer).trials()} & set(ids)
    # More seeds, and levels in another order: the old trials are recognised.
    assert {trial.id for trial in design(seeds=(3, 4, 1, 2)).trials()} >= set(ids)
    assert {trial.id for trial in design(factors=(RATE, BATCH)).trials()} == set(ids)


def test_two_ways_to_write_one_training_are_run_once():
    rules = tuple(
        Level(rule, {"optim.lr_rule": rule, "optim.lr_base_batch": 16})
        for rule in ("none", "sqrt", "linear")
    )
    study = design(factors=(batch_factor((8, 16)), Factor("rule", rules)))

    cells = {cell.key: cell for cell in study.cells()}

    assert cells["batch=16, rule=linear"].same_as == "batch=16, rule=none"
    assert cells["batch=8, rule=linear"].same_as == ""
    assert len(study.trials()) == 4 * 3
    rates = {key: numbers_of(study.config(cell))["optim.lr"] for key, cell in cells.items()}
    lr = demo().optim.lr
    assert rates["batch=8, rule=linear"] == pytest.approx(lr / 2)
    assert rates["batch=8, rule=sqrt"] == pytest.approx(lr / 2**0.5)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"factors": (BATCH, Factor("b2", BATCH.levels))}, "both change total_batch_size"),
        ({"factors": (BATCH, Factor("batch", RATE.levels))}, "one name"),
        ({"seeds": ()}, "at least one"),
        ({"seeds": (1, 1)}, "each of them once"),
        ({"factors": ()}, "neither factors nor named cells"),
        ({"named_cells": {"long": {"schedule.epochs": 20}}}, "'long' has schedule.epochs=20"),
        ({"named_cells": {"rare": {"evaluate_every_epochs": 1}}}, "evaluated after equally many"),
        ({"named_cells": {"early": {"schedule.patience": 3}}}, "stops early"),
        ({"named_cells": {"other data": {"data.train_first": 5}}}, "belongs to the base"),
        ({"named_cells": {"seeded": {"seed": 5}}}, "belongs to the base"),
        ({"named_cells": {"typo": {"optim.lrr": 5}}}, "cell 'typo'.*optim.lr"),
        ({"named_cells": {"bad": {"optim.lr": -1.0}}}, "cell 'bad'.*positive"),
        ({"named_cells": {"batch=8, rate=1×": {}}}, "two cells are called"),
    ],
)
def test_a_design_that_would_not_be_fair_is_refused(changes: dict[str, object], words: str):
    with pytest.raises(ValueError, match=words):
        design(**changes)


def test_a_factor_needs_two_levels_with_labels_of_their_own():
    with pytest.raises(ValueError, match="needs two"):
        Factor("batch", (Level("8", {}),))
    with pytest.raises(ValueError, match="one label"):
        Factor("batch", (Level("8", {}), Level("8", {"total_batch_size": 4})))


def changed(study: Design, first: str, second: str) -> dict[str, tuple[object, object]]:
    """The keys in which two cells differ, with both values."""
    numbers = {cell.key: numbers_of(study.config(cell)) for cell in study.cells()}
    one, other = numbers[first], numbers[second]
    return {key: (one[key], other[key]) for key in one if one[key] != other[key]}


def test_the_published_pair_stands_beside_the_crossed_cells():
    study = study_batch_lr.coco_design()

    cells = {cell.key: cell for cell in study.cells()}

    assert cells[study_batch_lr.BS8].same_as == study_batch_lr.crossed(8, "1×")
    assert changed(study, study_batch_lr.BS8, study_batch_lr.BS16) == {
        "total_batch_size": (8, 16),
        "optim.weight_decay": (1e-4, 0.1),
        "optim.backbone_lr_factor": (0.1, 1.0),
        "model.backbone.frozen_parts": (("conv1", "bn1"), ("conv1", "bn1", "layer1")),
    }
    for name, recipe in ((study_batch_lr.BS8, detrex_bs8()), (study_batch_lr.BS16, detrex_bs16())):
        ours = numbers_of(study.config(cells[name])) | {"micro_batch_size": None}
        assert ours == numbers_of(recipe) | {"micro_batch_size": None}


def test_each_step_of_the_path_changes_something():
    study = study_batch_lr.coco_design()
    keys = [key for key, _ in study_batch_lr.COCO_PATH]
    steps = [set(changed(study, one, other)) for one, other in pairwise(keys)]

    assert all(steps)
    assert {"total_batch_size"} in steps
    whole = set(changed(study, keys[0], keys[-1]))
    assert set().union(*steps) == whole


def test_the_demo_study_is_two_by_two_by_three():
    study = study_batch_lr.demo_design()

    assert (len(study.cells()), len(study.trials())) == (4, 12)
    known = {cell.key for cell in study.cells()}
    assert all({q.first, q.second} <= known for q in study_batch_lr.QUESTIONS)
