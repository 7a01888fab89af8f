"""Releases the resources that ended attempts of a run still reserve on a cluster.

Ray Train requests the resources of its workers from Ray's autoscaling coordinator. A controller
that was killed cannot cancel its request. For three minutes Ray would count the resources as taken,
and report to every elastic worker group, of this run or another, that there is no room (ray 2.60,
`train/v2/_internal/execution/scaling_policy`). Neither the name of the request nor its duration can
be set, so the names are saved in the run's folder. A driver that is asked to end releases its own
reservations; for one that was killed, the next attempt does.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import ray
from ray.util.placement_group import (
    PlacementGroup,
    placement_group_table,
    remove_placement_group,
)

from deta.platform.system.atomic_write import write_json

RESERVATIONS_FILE = "reservations.json"
COORDINATOR = "AutoscalingCoordinator"  # the name of the actor, and of its namespace
ANSWER_WITHIN_S = 5.0


def save_reservation(folder: Path, trainer: Any) -> None:
    """Save the name under which this TorchTrainer will request resources."""
    names = _saved(folder) + [f"train-{trainer.train_run_context.run_id}"]
    try:
        write_json(folder / RESERVATIONS_FILE, {"requesters": names})
    except OSError:  # a full disk: at worst the next attempt waits three minutes
        print("the name of the reservation could not be saved", flush=True)


def release_reservations(folder: Path) -> None:
    """Cancel the requests of ended attempts of this run."""
    names = _saved(folder)
    if not names:
        return
    try:
        coordinator = ray.get_actor(COORDINATOR, namespace=COORDINATOR)
    except ValueError:  # another cluster by now, without requests of this run
        return
    try:
        ray.get([coordinator.cancel_request.remote(name) for name in names],
                timeout=ANSWER_WITHIN_S)  # fmt: skip
        write_json(folder / RESERVATIONS_FILE, {"requesters": []})
    except Exception as error:  # they expire on their own
        print(f"reservations of earlier attempts could not be released: {error}", flush=True)


def remove_placement_groups() -> None:
    """Free what a lost controller had reserved on a cluster of this process.

    Such a cluster has no actor of Ray's that does so (`trainer.py`), and the next group would wait.
    """
    for id_, group in placement_group_table().items():
        if group["state"] != "REMOVED":
            remove_placement_group(PlacementGroup(ray.PlacementGroupID.from_hex(id_)))


def _saved(folder: Path) -> list[str]:
    try:
        names = json.loads((folder / RESERVATIONS_FILE).read_text(encoding="utf-8"))["requesters"]
        return [str(name) for name in names]
    except (OSError, ValueError, KeyError, TypeError):
        return []
