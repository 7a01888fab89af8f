"""Workers with a GPU take the CPUs that their node has for it, so that they start."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from deta.platform.cluster.cpu_share import fit_cpus, num_places
from deta.platform.run.config import ClusterConfig

ROOT = Path(__file__).parents[3]


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


EIGHT_GPUS = """
import os
import ray
ray.init(num_cpus=16, num_gpus=8, include_dashboard=False, log_to_driver=False)
from deta.platform.cluster.cpu_share import fit_cpus
from deta.platform.cluster.driver import ClusterTooSmallError, check_resources
from deta.platform.run.config import ClusterConfig
fitted = fit_cpus(ClusterConfig(), ray.nodes())
check_resources(fitted)
group = ray.util.placement_group([{"CPU": fitted.cpus_per_worker, "GPU": 1}] * 8)
ray.get(group.ready(), timeout=60)
print("fits", fitted.num_workers, fitted.cpus_per_worker)
try:
    check_resources(ClusterConfig())
except ClusterTooSmallError as error:
    print(error)
"""


def test_a_run_with_the_default_resources_fits_on_16_cpus_with_8_gpus(tmp_path: Path):
    environment = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
    ran = subprocess.run(
        [sys.executable, "-c", EIGHT_GPUS],
        env=environment | {"PYTHONPATH": str(ROOT)},
        cwd=tmp_path, capture_output=True, text=True, timeout=150,
    )  # fmt: skip
    assert "fits 8 2" in ran.stdout, ran.stderr
    assert "32 CPUs (it has 16)" in ran.stdout  # without it
