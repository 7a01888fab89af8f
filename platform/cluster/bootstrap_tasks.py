"""Runs the paired bootstrap as Ray tasks: a map over chunks of resamples on a cluster.

Each resample is a function of the seed and its number. So the interval is the same for any number
of tasks, and also without Ray.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import numpy as np

from deta.platform.cluster.connection import join_cluster  # before Ray: it sets its variables

# isort: split
import ray

from deta.platform.evaluation.paired_bootstrap import Chunk, MapLike


@contextmanager
def ray_tasks(echo: Callable[[str], None] | None = None) -> Iterator[MapLike]:
    """Yield a map for `paired_difference`, on the cluster of RAY_ADDRESS or one started here.

        with ray_tasks() as ray_map:
            found = paired_difference(truth, results_a, results_b, map=ray_map)

    Args:
        echo: receives a line about the cluster.

    Raises:
        OpenClusterError: the cluster that would be started requires no token.
    """
    was_there = ray.is_initialized()
    line = join_cluster()
    if echo is not None:
        echo(line)
    try:
        yield _ray_map
    finally:
        if not was_there:
            ray.shutdown()


def _ray_map(
    function: Callable[[Chunk], np.ndarray], chunks: Iterable[Chunk]
) -> Iterable[np.ndarray]:
    """Do what `map` does. The function, which has both match tables, is sent to each node once."""
    stored = ray.put(function)
    task = ray.remote(num_cpus=1, max_retries=3)(_call)
    return ray.get([task.remote(stored, chunk) for chunk in chunks])


def _call(function: Callable[[Chunk], np.ndarray], chunk: Chunk) -> np.ndarray:
    return function(chunk)
