"""Join a Ray cluster, or start one on this machine."""

from __future__ import annotations

import logging
import os

from deta.platform.cluster.auth_token import (
    OPEN_CLUSTER,
    OpenClusterError,
    is_open,
    make_private_token,
    set_rules_of_own_cluster,
    starts_a_cluster,
)

# Ray reads these when it is imported. A cluster that was started by others has its own rules.
if starts_a_cluster():
    set_rules_of_own_cluster()
    # Nobody restarts the head of a local cluster; the supervisor starts another one.
    os.environ.setdefault("RAY_gcs_rpc_server_reconnect_timeout_s", "15")
    # Nobody drains it either. Looking out for that is a process more at each start of workers,
    # which takes a second of their time where cores are few.
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


class ClusterTooSmallError(RuntimeError):
    """The cluster can never give what the run asks for."""


def connect() -> str:
    """Join the cluster, or start one on this machine that ends with this process.

    Returns:
        A line about it, for people.

    Raises:
        OpenClusterError: the one to be started would not ask for a token.
    """
    is_own = starts_a_cluster()
    address = "local" if is_own else os.environ["RAY_ADDRESS"]
    if not ray.is_initialized():
        if is_own:
            make_private_token()
        # Workers write to the journal; what they print besides is in Ray's logs.
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
    dashboard = ray._private.worker.get_dashboard_url()
    takes_anybody = bool(dashboard) and is_open(dashboard)
    if is_own and takes_anybody:
        ray.shutdown()
        raise OpenClusterError(f"the cluster that was started here is open: {OPEN_CLUSTER}")
    resources = ray.cluster_resources()
    return (
        f"Ray cluster {'on this machine' if is_own else 'at ' + address}: "
        f"{len(ray.nodes())} node(s), {resources.get('CPU', 0):.0f} CPUs, "
        f"{resources.get('GPU', 0):.0f} GPUs" + (f"; {OPEN_CLUSTER}" if takes_anybody else "")
    )
