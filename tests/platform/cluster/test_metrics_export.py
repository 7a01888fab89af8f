"""Metrics reach Ray's classes with their labels, and an export never ends a run."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("ray")

from deta.platform.cluster import metrics_export
from deta.platform.cluster.metrics_export import RayExport, RunExport
from deta.platform.training.run_metrics import IMAGES, OF_RUN, STEP


class Recorded:
    """Stands for Ray's Counter, Gauge and Histogram."""

    made: list[Recorded]

    def __init__(self, name: str, *arguments: Any) -> None:
        self.name, self.keys = name, arguments[-1]
        self.calls: list[tuple[str, float, dict[str, str]]] = []
        self.made.append(self)

    def inc(self, value: float, tags: dict[str, str]) -> None:
        self.calls.append(("inc", value, tags))

    def set(self, value: float, tags: dict[str, str]) -> None:
        self.calls.append(("set", value, tags))

    def observe(self, value: float, tags: dict[str, str]) -> None:
        self.calls.append(("observe", value, tags))


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[Recorded]:
    found: list[Recorded] = []
    for name in ("Counter", "Gauge", "Histogram"):
        recorded = type(name, (Recorded,), {"made": found})
        monkeypatch.setattr(metrics_export, name, recorded)
    return found


def test_each_kind_of_metric_is_made_once_with_its_labels(made: list[Recorded]):
    export = RayExport("mine")
    export(IMAGES, 2, "3")
    export(IMAGES, 4, "3")
    export(OF_RUN["ap"], 51.0, "AP50")
    export(STEP, 0.5, "3")
    export(OF_RUN["steps_done"], 7)
    assert [one.name for one in made] == [
        metric.name for metric in (IMAGES, OF_RUN["ap"], STEP, OF_RUN["steps_done"])
    ]
    assert [one.keys for one in made] == [
        ("run", "rank"), ("run", "kind"), ("run", "rank"), ("run",),
    ]  # fmt: skip
    of_rank = {"run": "mine", "rank": "3"}
    assert made[0].calls == [("inc", 2, of_rank), ("inc", 4, of_rank)]
    assert made[1].calls == [("set", 51.0, {"run": "mine", "kind": "AP50"})]
    assert made[2].calls == [("observe", 0.5, of_rank)]
    assert made[3].calls == [("set", 7, {"run": "mine"})]


def test_an_export_that_fails_is_retried(
    tmp_path: Path, made: list[Recorded], monkeypatch: pytest.MonkeyPatch
):
    polls = []

    def poll() -> None:
        polls.append(time.monotonic())
        raise RuntimeError("not now")

    monkeypatch.setattr(metrics_export, "POLL_EVERY_S", 0.01)
    with RunExport(tmp_path, "mine") as export:
        monkeypatch.setattr(export._meter, "poll", poll)
        deadline_s = time.monotonic() + 20
        while len(polls) < 3:
            assert time.monotonic() < deadline_s
            time.sleep(0.01)
