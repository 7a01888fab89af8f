"""Gives each worker the CPUs that its node has for it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from deta.platform.run.config import ClusterConfig


def num_places(resources: dict[str, float], cluster: ClusterConfig) -> int:
    """Return how many workers fit on a node."""
    places = int(resources.get("CPU", 0) / cluster.cpus_per_worker + 1e-6)
    return min(places, int(resources.get("GPU", 0))) if cluster.gpu else places


def fit_cpus(cluster: ClusterConfig, nodes: Sequence[dict[str, Any]]) -> ClusterConfig:
    """Return a configuration whose workers with a GPU ask for no more CPUs than there are.

    Many machines have fewer CPUs for a GPU than a run asks for, such as two; it is only fed more
    slowly there. If the nodes have no place for all workers, each gets what the node with the
    fewest CPUs has for each of its GPUs. Workers without a GPU compute on their CPUs, so what they
    ask for stays.

    Args:
        nodes: of `ray.nodes()`.
    """
    resources = [node["Resources"] for node in nodes if node["Alive"]]
    with_gpu = [one for one in resources if one.get("GPU", 0) >= 1 and one.get("CPU", 0) > 0]
    if not cluster.gpu or not with_gpu:
        return cluster
    if sum(num_places(one, cluster) for one in resources) >= cluster.num_workers:
        return cluster
    share = min(one["CPU"] / one["GPU"] for one in with_gpu)
    share = math.floor(share) if share >= 1 else share
    return replace(cluster, cpus_per_worker=min(cluster.cpus_per_worker, share))
