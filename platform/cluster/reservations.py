"""What attempts at a run that have ended still have reserved on a cluster, given back.

Ray Train asks Ray's autoscaling coordinator for the resources of its workers. A controller that was
killed cannot take its request back, and for three minutes Ray would count them as taken and tell
every group of workers that may grow and shrink that there is no room, of this run or another
(ray 2.60, `train/v2/_internal/execution/scaling_policy`). Neither the name of the request nor its
length can be set, so the names are kept in the run's folder. A driver that is asked to end gives
back what it holds; for one that was killed the next attempt does.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import ray

from deta.platform.system.atomic_write import write_json

FILE_NAME = "reservations.json"
COORDINATOR = "AutoscalingCoordinator"  # the name of the actor, and of its namespace
ANSWER_WITHIN_S = 5.0


def note_reservation(folder: Path, trainer: Any) -> None:
    """Remember under which name this TorchTrainer will ask for resources."""
    names = _noted(folder) + [f"train-{trainer.train_run_context.run_id}"]
    try:
        write_json(folder / FILE_NAME, {"requesters": names})
    except OSError:  # a full disk: at worst the next attempt waits three minutes
        print("the name of the reservation could not be kept", flush=True)


def give_back_reservations(folder: Path) -> None:
    """Take back what attempts of this run that have ended asked for."""
    names = _noted(folder)
    if not names:
        return
    try:
        coordinator = ray.get_actor(COORDINATOR, namespace=COORDINATOR)
    except ValueError:  # another cluster by now, where nobody has asked for anything
        return
    try:
        ray.get([coordinator.cancel_request.remote(name) for name in names],
                timeout=ANSWER_WITHIN_S)  # fmt: skip
        write_json(folder / FILE_NAME, {"requesters": []})
    except Exception as error:  # they lapse by themselves
        print(f"reservations of earlier attempts could not be given back: {error}", flush=True)


def _noted(folder: Path) -> list[str]:
    try:
        names = json.loads((folder / FILE_NAME).read_text(encoding="utf-8"))["requesters"]
        return [str(name) for name in names]
    except (OSError, ValueError, KeyError, TypeError):
        return []
