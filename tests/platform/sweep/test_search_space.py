"""What a sweep tries, before any cluster is touched."""

from __future__ import annotations

from dataclasses import replace

import pytest
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

from deta.jobs.deta_r50 import demo
from deta.platform.study.trial_record import TrialCost, TrialRecord
from deta.platform.sweep.optuna_search import Proposer
from deta.platform.sweep.search_space import Asha, Grid, Optuna, Random, Sweep, describe_domain

Choice = CategoricalDistribution
SPACE = {"optim.lr": FloatDistribution(1e-4, 1e-2, log=True), "total_batch_size": Choice((4, 8))}


def test_a_grid_is_every_combination_the_last_key_fastest():
    sweep = Sweep(
        base=demo(),
        space={"optim.lr": Choice((1e-3, 2e-3)), "total_batch_size": Choice((4, 8))},
    )
    tried = [tuple(trial.changes.values()) for trial in sweep.trials()]
    assert tried == [(1e-3, 4), (1e-3, 8), (2e-3, 4), (2e-3, 8)]
    for trial in sweep.trials():
        config = sweep.trial_config(trial)
        assert (config.optim.lr, config.total_batch_size) == tuple(trial.changes.values())
        assert config.name == trial.id
        assert config.storage.endswith("/demo/trials")


def test_more_random_trials_begin_with_the_same_ones():
    few = Sweep(base=demo(), space=SPACE, search=Random(5)).trials()
    many = Sweep(base=demo(), space=dict(reversed(SPACE.items())), search=Random(5)).trials()
    more = Sweep(base=demo(), space=SPACE, search=Random(9)).trials()
    other = Sweep(base=demo(), space=SPACE, search=Random(5, seed=1)).trials()
    assert [t.id for t in few] == [t.id for t in more[:5]]
    assert len({t.id for t in more}) == 9
    assert not {t.id for t in few} & {t.id for t in other}
    assert len(many) == 5
    assert all(1e-4 <= t.changes["optim.lr"] <= 1e-2 for t in more)


@pytest.mark.parametrize(
    ("space", "message"),
    [
        ({"optim.lrr": Choice((1,))}, "did you mean optim.lr"),
        ({"optim.lr": Choice(("fast",))}, "optim.lr='fast': Input should be a valid number"),
        ({"total_batch_size": Choice((0, 4))}, "total_batch_size=0"),
        (
            {"model.num_queries": FloatDistribution(10, 20.5)},
            "model.num_queries=20.5: Input should be a valid integer",
        ),
        ({"name": Choice(("a", "b"))}, "name cannot be varied"),
        ({"data.train_first": Choice((5, 6))}, "data.train_first cannot be varied"),
        ({"total_batch_size": Choice((4, 4))}, "train exactly alike"),
        (
            {"optim.lr": FloatDistribution(1e-4, 1e-3, log=True)},
            "a grid needs CategoricalDistribution",
        ),
        ({}, "neither a space nor a design"),
    ],
)
def test_a_bad_space_is_refused_and_the_key_is_named(space, message):
    search = (
        Random(2)
        if any(isinstance(d, FloatDistribution) and not d.log for d in space.values())
        else Grid()
    )
    with pytest.raises(ValueError, match=message):
        Sweep(base=demo(), space=space, search=search)


def test_a_space_with_too_few_trials_says_so():
    space = {"total_batch_size": Choice((4, 8))}
    with pytest.raises(ValueError, match="fewer than 3 different"):
        Sweep(base=demo(), space=space, search=Random(3))


def test_objectives_must_be_known_and_make_sense():
    with pytest.raises(ValueError, match="objectives"):
        Optuna(4, ("loss",))
    with pytest.raises(ValueError, match="cpu_hours"):
        Sweep(base=demo(), space=SPACE, search=Optuna(4, ("AP", "gpu_hours")))
    with pytest.raises(ValueError, match="max_samples"):
        Asha(grace_samples=100, max_samples=50)


def test_keys_beside_the_numbers_still_tell_trials_apart():
    base = replace(demo(), total_batch_size=8)
    sweep = Sweep(base=base, space={"cluster.num_workers": Choice((1, 2))})
    assert len({trial.id for trial in sweep.trials()}) == 2


def test_the_title_of_a_trial_has_its_values():
    space = {"optim.lr": Choice((1e-3, 2e-3)), "total_batch_size": Choice((4, 8))}
    sweep = Sweep(base=demo(), space=space)
    titles = [sweep.trial_title(trial) for trial in sweep.trials()]
    assert titles[1] == "trial 02: lr=0.001, total_batch_size=8"
    assert len(set(titles)) == 4


def test_seeds_of_one_combination_share_its_cell():
    sweep = Sweep(base=demo(), space={"optim.lr": Choice((1e-3, 2e-3)), "seed": Choice((1, 2))})
    trials = sweep.trials()
    assert len({trial.cell.key for trial in trials}) == 2
    assert [trial.seed for trial in trials] == [1, 2, 1, 2]


def record(ap: float | None, hours: float = 1.0) -> TrialRecord:
    status = "finished" if ap is not None else "failed"
    metrics = {} if ap is None else {"AP": ap}
    cost = TrialCost(cpu_hours=hours)
    return TrialRecord(name="t", cell="c", seed=0, status=status, metrics=metrics, cost=cost)


def test_optuna_goes_on_from_trials_of_an_earlier_start():
    space = {
        "optim.lr": FloatDistribution(1e-4, 1e-2, log=True),
        "data.augmentation.short_edges": Choice(((104,), (104, 112))),
    }
    search = Optuna(30, ("AP", "cpu_hours"))
    first = Proposer(space, search, 0)
    told = []
    for number in range(5):
        changes, asked = first.ask()
        first.assign(str(number), asked)
        first.tell(str(number), changes, record(10.0 + number, number))
        told.append(changes)
    again = Proposer(space, search, 5)
    for number, changes in enumerate(told):
        as_read = {k: list(v) if isinstance(v, tuple) else v for k, v in changes.items()}
        again.tell(str(number), as_read, record(10.0 if number else None))
    changes, asked = again.ask()
    assert changes not in told
    assert changes["data.augmentation.short_edges"] in ((104,), (104, 112))
    again.discard(asked)
    states = [trial.state.name for trial in again._study.trials]
    assert states == ["FAIL", "COMPLETE", "COMPLETE", "COMPLETE", "COMPLETE", "FAIL"]


def test_domains_are_drawn_and_described_as_in_sweep_folders_of_earlier_versions():
    space = {
        "optim.lr": FloatDistribution(3e-4, 6e-3, log=True),
        "optim.weight_decay": FloatDistribution(0.0, 0.1),
        "model.num_queries": IntDistribution(20, 40),
        "total_batch_size": Choice((4, 8, 16)),
    }
    assert list(map(describe_domain, space.values())) == [
        "0.0003 to 0.006, by order of magnitude", "0 to 0.1", "20 to 40, whole numbers",
        "one of 4, 8, 16",
    ]  # fmt: skip
    (trial,) = Sweep(base=demo(), space=space, search=Random(1)).trials()
    assert list(trial.changes.values()) == [0.000329264, 0.0403036, 20, 8]
