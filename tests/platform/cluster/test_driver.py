"""The driver maps what happens on a cluster to an outcome; here the cluster is pretended."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

pytest.importorskip("ray")

import ray

from deta.platform.cluster import connection, driver
from deta.platform.cluster.auth_token import OpenClusterError
from deta.platform.cluster.connection import ClusterTooSmallError, join_cluster
from deta.platform.cluster.driver import MAX_CONTROLLERS, check_resources, run_attempt
from deta.platform.run.config import ClusterConfig, RunConfig
from deta.platform.run.dataset_snapshot import SnapshotError

CONFIG = RunConfig(cluster=ClusterConfig(num_workers=4, cpus_per_worker=2, gpu=True))


@pytest.fixture
def attempt(monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[str, str]]:
    """Return a function that runs an attempt with some parts of the driver replaced."""

    def attempt(**parts: Callable) -> tuple[str, str]:
        parts = {
            "read_run_snapshot": lambda folder: SimpleNamespace(config=CONFIG, checkpoints=None),
            "join_cluster": lambda: "Ray cluster of a test",
            "check_resources": lambda config: None,
            "check_gpus": lambda config: None,
            "newest_checkpoint": lambda checkpoints: None,
            "fit_on_cluster": lambda run, max_failures: None,
        } | parts
        for name, part in parts.items():
            monkeypatch.setattr(driver, name, part)
        outcome = run_attempt(Path("/nowhere"))
        return outcome.kind, outcome.message

    return attempt


def raising(error: Exception) -> Callable:
    def function(*_: object, **__: object) -> None:
        raise error

    return function


def test_the_outcome_depends_on_what_failed(attempt, monkeypatch: pytest.MonkeyPatch):
    assert attempt() == ("ended", "")
    assert attempt(read_run_snapshot=raising(SnapshotError("damaged"))) == ("refused", "damaged")
    assert attempt(join_cluster=raising(OpenClusterError("open"))) == ("refused", "open")
    too_small = ClusterTooSmallError("no GPU")
    assert attempt(check_resources=raising(too_small)) == ("refused", "no GPU")
    failed = attempt(fit_on_cluster=raising(RuntimeError("a worker failed")))
    assert failed == ("lost", "RuntimeError: a worker failed")
    for address, kind in (("10.0.0.5:6379", "unreachable"), ("", "lost")):
        monkeypatch.setenv("RAY_ADDRESS", address)
        found = attempt(join_cluster=raising(ConnectionError("no answer")))
        assert found == (kind, "ConnectionError: no answer")


def test_a_lost_controller_is_replaced_while_there_is_progress(attempt, capsys):
    steps = iter([0, 1, 2, *[2] * MAX_CONTROLLERS])
    calls = []

    def newest(_: object) -> SimpleNamespace:
        return SimpleNamespace(state=SimpleNamespace(step=next(steps)))

    def lose(run: object, max_failures: int) -> None:
        calls.append(max_failures)
        raise ray.exceptions.RayActorError

    kind, _ = attempt(newest_checkpoint=newest, fit_on_cluster=lose)
    assert kind == "lost"
    assert calls == [-1] * (2 + MAX_CONTROLLERS)
    assert "Ray's controller was lost" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("available", "lacking"),
    [
        ({"CPU": 8, "GPU": 4}, None),
        ({"CPU": 7, "GPU": 4}, r"4 workers and therefore 8 CPUs \(it has 7\)"),
        ({"CPU": 8}, r"4 GPUs \(it has 0\)"),
    ],
)
def test_a_cluster_that_is_too_small_is_refused(monkeypatch, available, lacking):
    monkeypatch.setattr(driver.ray, "cluster_resources", lambda: available)
    if lacking is None:
        check_resources(CONFIG)
        return
    with pytest.raises(ClusterTooSmallError, match=lacking):
        check_resources(CONFIG)


@pytest.mark.parametrize(
    ("address", "is_open", "expected"),
    [
        ("", False, "Ray cluster on this machine: 1 node(s), 2 CPUs, 0 GPUs"),
        ("", True, None),
        ("10.0.0.5:6379", True, "NO TOKEN"),
    ],
)
def test_an_own_cluster_must_require_a_token_and_others_are_reported(
    monkeypatch: pytest.MonkeyPatch, address: str, is_open: bool, expected: str | None
):
    monkeypatch.setenv("RAY_ADDRESS", address)
    stopped = []
    fake = SimpleNamespace(
        is_initialized=lambda: False,
        init=lambda address, **options: SimpleNamespace(dashboard_url="127.0.0.1:1"),
        shutdown=lambda: stopped.append(True),
        nodes=lambda: [{}],
        cluster_resources=lambda: {"CPU": 2.0},
    )
    monkeypatch.setattr(connection, "ray", fake)
    monkeypatch.setattr(connection, "ensure_private_token", lambda: None)
    monkeypatch.setattr(connection, "is_open", lambda dashboard: is_open)
    if expected is None:
        with pytest.raises(OpenClusterError):
            join_cluster()
        assert stopped
        return
    assert expected in join_cluster()
    assert not stopped
