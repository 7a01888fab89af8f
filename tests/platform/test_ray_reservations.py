"""What a killed attempt had reserved does not keep the next one waiting, on a real Ray cluster."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import RayCluster

pytestmark = pytest.mark.cluster

ROOT = Path(__file__).resolve().parents[2]
# What Ray's own controller does for a group that may grow and shrink, then is killed.
ASK_AND_DIE = """
import os, sys
from pathlib import Path
import ray
from ray.data._internal.cluster_autoscaler.default_autoscaling_coordinator import (
    get_or_create_autoscaling_coordinator,
)
from ray.train import ScalingConfig
from ray.train.torch import TorchTrainer
from deta.platform.ray_reservations import note_reservation

ray.init(log_to_driver=False)
trainer = TorchTrainer(lambda: None, scaling_config=ScalingConfig(num_workers=(1, 2)))
note_reservation(Path(sys.argv[1]), trainer)
ray.get(get_or_create_autoscaling_coordinator().request_resources.remote(
    requester_id=f"train-{trainer.train_run_context.run_id}",
    resources=[{"CPU": 1}] * 2, expire_after_s=180,
))
os._exit(1)
"""
LOOK = """
import json, sys
from pathlib import Path
import ray
from deta.platform.ray_reservations import give_back_reservations

ray.init(log_to_driver=False)
coordinator = ray.get_actor("AutoscalingCoordinator", namespace="AutoscalingCoordinator")

def free_cpus(name):
    ray.get(coordinator.request_resources.remote(
        requester_id=name, resources=[{"CPU": 1}] * 2, expire_after_s=180))
    reserved = ray.get(coordinator.get_reserved_resources.remote(name))
    ray.get(coordinator.cancel_request.remote(name))
    return sum(node.get("CPU", 0) for node in reserved.values())

before = free_cpus("before")
give_back_reservations(Path(sys.argv[1]))
print(json.dumps([before, free_cpus("after")]))
"""


def test_the_next_attempt_finds_room_where_a_killed_one_had_reserved_it(
    ray_cluster: RayCluster, tmp_path: Path
):
    killed = _python(ray_cluster, ASK_AND_DIE, tmp_path)
    assert killed.returncode == 1, killed.stderr
    noted = json.loads((tmp_path / "reservations.json").read_text())["requesters"]
    assert len(noted) == 1

    looked = _python(ray_cluster, LOOK, tmp_path)

    assert looked.returncode == 0, looked.stderr
    assert json.loads(looked.stdout.splitlines()[-1]) == [0, 2]
    assert json.loads((tmp_path / "reservations.json").read_text())["requesters"] == []


def _python(cluster: RayCluster, program: str, folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", program, str(folder)], cwd=ROOT, env=cluster.env,
        capture_output=True, text=True, timeout=240, check=False,
    )  # fmt: skip
