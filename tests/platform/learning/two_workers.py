"""Runs a function in two worker processes that exchange over gloo."""

from __future__ import annotations

import multiprocessing
import queue
import socket
from collections.abc import Callable
from typing import Any

import torch.distributed as dist

from deta.platform.learning.distributed import Worker


def _in_a_group(rank: int, port: int, act: Callable[[Worker], Any], answers: Any) -> None:
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    answers.put((rank, act(Worker(rank, 2))))
    dist.barrier()
    dist.destroy_process_group()


def on_two(act: Callable[[Worker], Any]) -> list[Any]:
    """Run `act` on two workers; return their results by rank."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("fork")
    answers = context.Queue()
    workers = [
        context.Process(target=_in_a_group, args=(rank, port, act, answers)) for rank in (0, 1)
    ]
    for worker in workers:
        worker.start()
    found: dict[int, Any] = {}
    while len(found) < 2:
        try:
            rank, answer = answers.get(timeout=1)
            found[rank] = answer
        except queue.Empty:
            if any(worker.exitcode for worker in workers):
                for worker in workers:  # one waits for the other
                    worker.kill()
                raise AssertionError("a worker failed") from None
    for worker in workers:
        worker.join(60)
        assert worker.exitcode == 0
    return [found[0], found[1]]
