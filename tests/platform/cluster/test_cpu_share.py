"""Workers with a GPU take the CPUs that their node has for it, so that they start."""

from __future__ import annotations

from typing import Any

import pytest

from deta.platform.cluster.cpu_share import fit_cpus, num_places
from deta.platform.run.config import ClusterConfig


def node(alive: bool = True, **resources: float) -> dict[str, Any]:
    return {"Alive": alive, "Resources": resources}


@pytest.mark.parametrize(
    ("num_workers", "nodes", "expected"),
    [
        (8, [node(CPU=16, GPU=8)], 2),
        (8, [node(CPU=30, GPU=8)], 3),  # whole CPUs
        (8, [node(CPU=4, GPU=8)], 0.5),
        (8, [node(CPU=64, GPU=8)], 4),
        (1, [node(CPU=16, GPU=8)], 4),  # the other GPUs need none
        (8, [node(CPU=64, GPU=4), node(CPU=8, GPU=4)], 2),
        (8, [node(CPU=16, GPU=8), node(alive=False, CPU=64, GPU=8)], 2),
        (8, [node(CPU=16, GPU=8), node(CPU=64)], 2),  # a node without a GPU is no place
        (2, [node(CPU=1)], 4),  # refused later
        (2, [], 4),
    ],
)
def test_a_worker_gets_at_most_the_cpus_of_its_gpu(num_workers, nodes, expected):
    cluster = ClusterConfig(num_workers=num_workers, cpus_per_worker=4)

    fitted = fit_cpus(cluster, nodes)

    assert fitted.cpus_per_worker == expected
    living = [one["Resources"] for one in nodes if one["Alive"]]
    if any(one.get("GPU") for one in living):
        assert sum(num_places(one, fitted) for one in living) >= num_workers


def test_workers_without_a_gpu_keep_what_they_ask_for():
    cluster = ClusterConfig(num_workers=8, gpu=False, cpus_per_worker=4)
    assert fit_cpus(cluster, [node(CPU=16, GPU=8)]) == cluster
