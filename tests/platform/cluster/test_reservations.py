"""Reservations of ended attempts block nobody, on a real Ray cluster."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from deta.platform.data.synthetic_shapes import write_shapes
from deta.platform.run.journal import read_events
from tests.conftest import RayCluster

pytestmark = pytest.mark.cluster

ROOT = Path(__file__).resolve().parents[3]
# What Ray's own controller does for an elastic worker group before it is killed.
REQUEST_AND_DIE = """
import os, sys
from pathlib import Path
import ray
from ray.data._internal.cluster_autoscaler.default_autoscaling_coordinator import (
    get_or_create_autoscaling_coordinator,
)
from ray.train import ScalingConfig
from ray.train.torch import TorchTrainer
from deta.platform.cluster.reservations import save_reservation

ray.init(log_to_driver=False)
# Not CPUs, which earlier tests may have reserved.
trainer = TorchTrainer(lambda: None, scaling_config=ScalingConfig(num_workers=(1, 2)))
save_reservation(Path(sys.argv[1]), trainer)
ray.get(get_or_create_autoscaling_coordinator().request_resources.remote(
    requester_id=f"train-{trainer.train_run_context.run_id}",
    resources=[{"node:__internal_head__": 1}], expire_after_s=180,
))
os._exit(1)
"""
CHECK = """
import json, sys
from pathlib import Path
import ray
from deta.platform.cluster.reservations import release_reservations

ray.init(log_to_driver=False)
coordinator = ray.get_actor("AutoscalingCoordinator", namespace="AutoscalingCoordinator")

def is_free(name):
    ray.get(coordinator.request_resources.remote(
        requester_id=name, resources=[{"node:__internal_head__": 1}], expire_after_s=180))
    reserved = ray.get(coordinator.get_reserved_resources.remote(name))
    ray.get(coordinator.cancel_request.remote(name))
    return bool(reserved)

before = is_free("before")
release_reservations(Path(sys.argv[1]))
print(json.dumps([before, is_free("after")]))
"""
HELD = """
import json, sys
import ray

ray.init(log_to_driver=False)
coordinator = ray.get_actor("AutoscalingCoordinator", namespace="AutoscalingCoordinator")
print(json.dumps(ray.get([
    coordinator.get_reserved_resources.remote(name) for name in sys.argv[2:]
])))
"""


def test_the_next_attempt_finds_room_where_a_killed_one_had_reserved_it(
    ray_cluster: RayCluster, tmp_path: Path
):
    killed = _python(ray_cluster, REQUEST_AND_DIE, tmp_path)
    assert killed.returncode == 1, killed.stderr
    assert len(saved_names(tmp_path)) == 1

    checked = _python(ray_cluster, CHECK, tmp_path)

    assert checked.returncode == 0, checked.stderr
    assert json.loads(checked.stdout.splitlines()[-1]) == [False, True]
    assert saved_names(tmp_path) == []


def test_a_run_that_is_stopped_leaves_nothing_reserved(ray_cluster: RayCluster, tmp_path: Path):
    drawn = write_shapes(tmp_path / "shapes", num_train=16, num_val=6, size_px=64)
    command = [
        str(ROOT / "jobs" / "deta_r50.py"), "--variant", "demo", "--name", "stopped",
        "--train-images", str(drawn.train_images),
        "--train-annotations", str(drawn.train_annotations),
        "--val-images", str(drawn.val_images), "--val-annotations", str(drawn.val_annotations),
        f"storage={tmp_path}", "schedule.epochs=1000", "num_pictures=0", "total_batch_size=4",
        "micro_batch_size=2", "data.loader_workers=0", "log_every_steps=1",
    ]  # fmt: skip
    with (
        (tmp_path / "run.log").open("wb") as log,
        subprocess.Popen(command, env=ray_cluster.env, stdout=log, stderr=log) as run,
    ):
        try:
            # It takes about 20 s, or three minutes if an earlier test left a reservation.
            deadline_s = time.monotonic() + 400
            held: list[dict[str, dict[str, float]]] = []
            while not (held and held[0]) and time.monotonic() < deadline_s and run.poll() is None:
                time.sleep(0.5)
                if "progress" in kinds(tmp_path / "stopped"):
                    names = saved_names(tmp_path / "stopped")
                    held = json.loads(_python(ray_cluster, HELD, tmp_path, *names).stdout)
        finally:
            run.send_signal(signal.SIGTERM)
            run.wait(120)
    assert run.returncode == 143, (tmp_path / "run.log").read_text(errors="replace")[-3000:]
    assert len(names) == 1
    assert [sum(node["CPU"] for node in nodes.values()) for nodes in held] == [2]

    left = _python(ray_cluster, HELD, tmp_path, *names)

    assert left.returncode == 0, left.stderr
    assert json.loads(left.stdout) == [{}]
    assert saved_names(tmp_path / "stopped") == []


def kinds(folder: Path) -> set[str]:
    return {event["kind"] for event, _ in read_events(folder)} if folder.is_dir() else set()


def saved_names(folder: Path) -> list[str]:
    return json.loads((folder / "reservations.json").read_text(encoding="utf-8"))["requesters"]


def _python(
    cluster: RayCluster, program: str, folder: Path, *names: str
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", program, str(folder), *names], cwd=ROOT, env=cluster.env,
        capture_output=True, text=True, timeout=240, check=False,
    )  # fmt: skip


GROUP_AND_LOSE = """
import ray
from ray.util.placement_group import placement_group
from deta.platform.cluster.reservations import remove_placement_groups

ray.init(num_cpus=2, log_to_driver=False, include_dashboard=False)

@ray.remote(num_cpus=0)
class Controller:
    def group(self):
        group = placement_group([{"CPU": 1}] * 2, lifetime="detached")
        return ray.get(group.ready()) and True

controller = Controller.remote()
assert ray.get(controller.group.remote())
ray.kill(controller)
follower = placement_group([{"CPU": 1}] * 2)
is_free_before = follower.wait(3)
remove_placement_groups()
remove_placement_groups()  # what is gone is passed over, also this one that waits
again = placement_group([{"CPU": 1}] * 2)
print(is_free_before, again.wait(60))
"""


def test_what_a_lost_controller_held_is_free_for_the_next_group(tmp_path: Path):
    """Also if Ray's cleaner had not started yet."""
    env = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
    done = subprocess.run(
        [sys.executable, "-c", GROUP_AND_LOSE], cwd=ROOT, env=env, capture_output=True, text=True,
        timeout=240,
    )  # fmt: skip
    assert done.stdout.split() == ["False", "True"], done.stderr[-2000:]
