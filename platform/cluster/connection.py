"""Joins a Ray cluster, or starts one on this machine."""

from __future__ import annotations

import logging
import os
import re

from deta.platform.cluster.auth_token import (
    OPEN_CLUSTER,
    OpenClusterError,
    configure_own_cluster,
    ensure_private_token,
    is_open,
    starts_own_cluster,
)

# Ray reads these when it is imported. A cluster that others have started has its own settings.
if starts_own_cluster():
    configure_own_cluster()
    # Nothing restarts the head node of a local cluster; the supervisor starts another cluster.
    os.environ.setdefault("RAY_gcs_rpc_server_reconnect_timeout_s", "15")
    # Nothing preempts it either. The watcher is one more process at each start of workers, which
    # takes a second of their time on few cores.
    os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")
for _name, _value in {
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
    "RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S": "30",
    "RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S": "2",
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",
}.items():
    os.environ.setdefault(_name, _value)

import ray
import ray.train

from deta.platform.system.child_server import free_port

_ADDRESS = re.compile(r"[\w.-]+:\d+")  # of a head node, not `auto` or ray://…

# Batches differ in size. Segments that grow leave fewer gaps in a GPU's memory than fixed ones.
if "PYTORCH_CUDA_ALLOC_CONF" not in os.environ:
    os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
PASSED_ON = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
START_ATTEMPTS = 4  # of 30 s, which is fixed in Ray
logger = logging.getLogger(__name__)


class ClusterTooSmallError(RuntimeError):
    """The cluster can never provide the resources that the run needs."""


def join_cluster() -> str:
    """Join the cluster, or start one on this machine that ends with this process.

    Returns:
        A line about the cluster, for the user.

    Raises:
        OpenClusterError: the cluster that would be started requires no token.
    """
    is_own = starts_own_cluster()
    address = "local" if is_own else os.environ["RAY_ADDRESS"]
    if is_own and not ray.is_initialized():
        ensure_private_token()
    # Without the address in their environment, Ray's own actors look for the cluster on their
    # machine and fail if there are two; what a stopped trial had reserved is then never released.
    known: dict[str, str] = {}  # a cluster of this process has its environment already
    if not is_own:
        known = {name: os.environ[name] for name in PASSED_ON if name in os.environ}
        known |= {"RAY_ADDRESS": address} if _ADDRESS.fullmatch(address) else {}
    # `deta submit` and `ray job submit` look for a cluster at Ray's default port. A cluster that
    # ends with its run leaves the port to others.
    own_port = free_port("127.0.0.1", 20_000 + os.getpid() % 12_000)
    for attempt in range(1, START_ATTEMPTS + 1):
        try:
            # Workers write to the journal; their other output is in Ray's logs.
            context = ray.init(
                address,
                ignore_reinit_error=True,
                log_to_driver=False,
                logging_level=logging.ERROR,
                dashboard_port=own_port if is_own else None,
                runtime_env={"env_vars": known} if known else None,
            )
            break
        except Exception as error:  # Ray has no class for it
            if not is_own or "timed out during startup" not in str(error):
                raise
            if attempt == START_ATTEMPTS:
                raise RuntimeError(
                    f"Ray could not start on this machine within {START_ATTEMPTS} times 30 s: it "
                    "is too busy (see `uptime`). End other work, or start the cluster once with "
                    "`ray start --head` and set RAY_ADDRESS=auto"
                ) from error
            logger.warning("Ray did not start within 30 s, as the machine is busy; trying again")
    is_unprotected = bool(context.dashboard_url) and is_open(context.dashboard_url or "")
    if is_own and is_unprotected:
        ray.shutdown()
        raise OpenClusterError(f"the cluster that was started here is open: {OPEN_CLUSTER}")
    resources = ray.cluster_resources()
    return (
        f"Ray cluster {'on this machine' if is_own else 'at ' + address}: "
        f"{len(ray.nodes())} node(s), {resources.get('CPU', 0):.0f} CPUs, "
        f"{resources.get('GPU', 0):.0f} GPUs" + (f"; {OPEN_CLUSTER}" if is_unprotected else "")
    )
