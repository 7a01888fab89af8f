"""A registry, its promotion gate and a server: promotions and a rollback under load."""

from __future__ import annotations

import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

from deta.platform.registry.promote import rollback
from deta.platform.serving.config import ServingConfig
from deta.platform.serving.model_source import model_source
from tests.platform.registry.test_mlflow_registry import BASE, BETTER, World, world
from tests.platform.serving.serving_case import (
    WITHIN_S,
    encoded,
    random_image,
    running,
    wait_until,
)

__all__ = ["world"]  # the fixture


def test_the_champion_is_served_and_no_request_fails_during_a_change(world: World):
    first = world.register("served", 11, BASE)
    better = world.register("served", 12, BETTER)
    world.promote("served", first)
    source = model_source("models:/served@champion", world.uri, "cpu")
    fixed = model_source(f"models:/served/{first}", world.uri, "cpu")
    assert source.moves
    assert not fixed.moves
    assert source.current() == fixed.current()

    content = encoded(random_image(3, 96, 64))
    statuses: Counter[int] = Counter()
    versions: list[str] = []
    done = threading.Event()
    config = ServingConfig(poll_s=0.2, answer_timeout_s=WITHIN_S)
    with running(source, config) as here, ThreadPoolExecutor(2) as clients:

        def send_requests() -> None:
            while not done.is_set():
                status, answer = here.detect(content)
                statuses[status] += 1
                versions.append(answer.get("model", {}).get("version", ""))

        def until(version: int) -> None:
            wait_until(lambda: versions[-1:] == [str(version)])

        try:
            futures = [clients.submit(send_requests) for _ in range(2)]
            until(first)
            world.promote("served", better)
            until(better)
            rollback(world.registry, "served", None, by="ann@desk", reason="to see it live")
            until(first)
        finally:
            done.set()
        for one in futures:
            one.result()
    assert set(statuses) == {200}
    assert set(versions) == {str(first), str(better)}
