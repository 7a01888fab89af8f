"""The part of Ray's controller that is ours: what it imports, and how workers find each other."""

from __future__ import annotations

import socket
import subprocess
import sys

import pytest

pytest.importorskip("ray")

from ray.train import ScalingConfig

from deta.platform.cluster.worker_group import FixedSize, ProcessGroupConfig, _free_address


def test_the_controller_and_the_driver_import_no_torch():
    modules = "deta.platform.cluster.worker_group, deta.platform.cluster.driver"
    code = f"import sys, {modules}; print({{'torch', 'scipy', 'mlflow'}} & set(sys.modules))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.stdout == "set()\n", result.stderr


def test_the_address_of_a_group_can_be_listened_at():
    address, port = _free_address()
    with socket.create_server((address, port)):
        pass


def test_a_group_of_fixed_size_asks_no_autoscaler():
    policy = FixedSize(ScalingConfig(num_workers=3))
    decision = policy.make_decision_for_non_running_worker_group()
    assert decision.num_workers == 3  # without a cluster: it has asked nobody
    policy._cancel_resource_request()


def test_the_configuration_names_its_backend():
    config = ProcessGroupConfig("gloo")
    assert config.to_dict() == {"backend": "gloo"}
    assert config.backend_cls().share_cuda_visible_devices
