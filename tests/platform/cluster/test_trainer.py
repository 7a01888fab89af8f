"""A trainer leaves out what a run does not use, and nothing else."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("ray")

from deta.platform.cluster.trainer import Trainer, make_trainer
from deta.platform.run.config import ClusterConfig


def callbacks(trainer: Trainer) -> set[str]:
    return {type(one).__name__ for one in trainer._create_default_callbacks()}


def test_only_a_cluster_of_others_needs_its_placement_groups_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    cluster = ClusterConfig(num_workers=2, gpu=False, cpus_per_worker=1)
    found = {}
    for address in ("", "10.0.0.5:6379"):
        monkeypatch.setenv("RAY_ADDRESS", address)
        found[address] = callbacks(make_trainer(cluster, {}, tmp_path, max_failures=-1))
    assert found["10.0.0.5:6379"] - found[""] == {"PlacementGroupCleanerCallback"}
    assert "BackendSetupCallback" in found[""]
    assert "DatasetsCallback" not in found["10.0.0.5:6379"]


@pytest.mark.parametrize(("least", "expected"), [(None, 4), (4, 4), (1, (1, 4))])
def test_a_run_with_a_minimum_is_elastic(tmp_path: Path, least: int | None, expected: object):
    cluster = ClusterConfig(num_workers=4, min_workers=least, gpu=False, cpus_per_worker=0.5)
    scaling = make_trainer(cluster, {}, tmp_path, max_failures=0).scaling_config
    assert scaling.num_workers == expected
    assert scaling.resources_per_worker == {"CPU": 0.5}


def test_a_worker_knows_its_cpus(tmp_path: Path):
    cluster = ClusterConfig(num_workers=1, gpu=False, cpus_per_worker=3)
    settings = make_trainer(cluster, {"run": 1}, tmp_path, max_failures=0).train_loop_config
    assert settings == {"run": 1, "cpus": 3}
