"""How Ray's controller starts a group of workers: their number, and their process group of torch.

The controller is a process of its own, which imports this file. So it imports nothing slow: Ray's
own `TorchConfig` imports torch in the driver and in the controller, which use nothing of it, two
seconds of a core each at every start. Here only workers import it.
"""

from __future__ import annotations

import os
import socket
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import ray
import ray.train
from ray.train.backend import Backend, BackendConfig
from ray.train.v2._internal.execution.scaling_policy import FixedScalingPolicy

TIMEOUT = timedelta(minutes=30)  # of a collective; watchdogs end a group that hangs much earlier


class FixedSize(FixedScalingPolicy):
    """Starts the workers of a cluster that has no autoscaler, so nobody is told what they need.

    Ray would start the actor that tells it, which takes two seconds of a core.
    """

    def _send_resource_request(self) -> None:
        pass

    def _maybe_send_resource_request(self) -> None:
        pass

    def _cancel_resource_request(self) -> None:
        pass


@dataclass
class ProcessGroupConfig(BackendConfig):
    """How workers communicate; a `backend_config` of Ray Train.

    Args:
        backend: of torch.distributed: nccl on GPUs, gloo on CPUs.
    """

    backend: str

    @property
    def backend_cls(self) -> type[Backend]:
        return _ProcessGroup

    def to_dict(self) -> dict[str, Any]:
        return {"backend": self.backend}


class _ProcessGroup(Backend):
    share_cuda_visible_devices = True  # NCCL reaches a GPU of its node only if it sees it

    def on_start(self, worker_group: Any, backend_config: ProcessGroupConfig) -> None:  # type: ignore[override]
        address, port = worker_group.execute_single(0, _free_address)
        ray.get(
            [
                worker_group.execute_single_async(
                    rank, _join, backend_config.backend, rank, len(worker_group), address, port
                )
                for rank in range(len(worker_group))
            ]
        )

    def on_shutdown(self, worker_group: Any, backend_config: ProcessGroupConfig) -> None:  # type: ignore[override]
        worker_group.execute_async(_leave)


def _free_address() -> tuple[str, int]:
    """Return an address of this worker that its peers can connect to, and a free port."""
    host = ray.util.get_node_ip_address()
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.bind(("", 0))
        return host, probe.getsockname()[1]


def _join(backend: str, rank: int, world_size: int, address: str, port: int) -> None:
    """Join the group, with the variables that programs of torch expect in the environment."""
    import torch.distributed as dist

    context = ray.train.get_context()
    os.environ |= {
        "MASTER_ADDR": address,
        "MASTER_PORT": str(port),
        "RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "LOCAL_RANK": str(context.get_local_rank()),
        "LOCAL_WORLD_SIZE": str(context.get_local_world_size()),
    }
    if "TORCH_NCCL_BLOCKING_WAIT" not in os.environ:  # a collective that times out ends its worker
        os.environ.setdefault("TORCH_NCCL_ASYNC_ERROR_HANDLING", "1")
    dist.init_process_group(
        backend, init_method="env://", rank=rank, world_size=world_size, timeout=TIMEOUT
    )


def _leave() -> None:
    import torch.distributed as dist

    if dist.is_initialized():
        dist.destroy_process_group()
