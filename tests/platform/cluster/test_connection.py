"""Processes of a cluster find their own cluster, although another one is on the machine."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytestmark = pytest.mark.cluster

ROOT = Path(__file__).resolve().parents[3]
# Ray's own actors look a cluster up in this way, such as the one that frees what a killed training
# had reserved.
LOOK_UP = """
import json
import ray
from deta.platform.cluster.connection import join_cluster

join_cluster()

@ray.remote(num_cpus=0)
def look_up():
    import os
    from ray._private.services import canonicalize_bootstrap_address
    return os.environ.get("RAY_ADDRESS"), canonicalize_bootstrap_address(None)

print(json.dumps(ray.get(look_up.remote())))
"""


def test_a_process_of_the_cluster_knows_its_address(ray_cluster, tmp_path: Path):
    ran = subprocess.run(
        [sys.executable, "-c", LOOK_UP],
        env=ray_cluster.env | {"PYTHONPATH": str(ROOT)},
        cwd=tmp_path, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr
    assert json.loads(ran.stdout.splitlines()[-1]) == [ray_cluster.address] * 2


def test_the_cluster_of_a_run_leaves_the_default_port_to_others(tmp_path: Path):
    """`deta submit` without an address would find it there, and lose its job with the run."""
    code = (
        "from deta.platform.cluster.connection import join_cluster; join_cluster(); import ray; "
        "print(ray._private.worker._global_node.webui_url)"
    )
    environment = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
    ran = subprocess.run(
        [sys.executable, "-c", code],
        env=environment | {"PYTHONPATH": str(ROOT)},
        cwd=tmp_path, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr
    port = int(ran.stdout.split()[-1].rpartition(":")[2])
    assert 20_000 <= port < 32_000


COUNTS_A_GPU = """
import os
import ray
ray.init(num_cpus=1, num_gpus=1, include_dashboard=False, log_to_driver=False)
os.environ["RAY_ADDRESS"] = ray.get_runtime_context().gcs_address
from deta.platform.cluster.driver import ClusterTooSmallError, check_gpus
from deta.platform.run.config import ClusterConfig
try:
    check_gpus(ClusterConfig())
except ClusterTooSmallError as error:
    print(error)
"""


@pytest.mark.skipif(torch.cuda.is_available(), reason="PyTorch finds a GPU here")
def test_gpus_that_pytorch_cannot_use_are_refused_before_the_training(tmp_path: Path):
    environment = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
    ran = subprocess.run(
        [sys.executable, "-c", COUNTS_A_GPU],
        env=environment | {"PYTHONPATH": str(ROOT)},
        cwd=tmp_path, capture_output=True, text=True, timeout=150,
    )  # fmt: skip
    assert "PyTorch finds none" in ran.stdout, ran.stderr
