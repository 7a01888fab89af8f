"""A study and a sweep to report."""

from __future__ import annotations

import math
from datetime import UTC, datetime, timedelta
from typing import Any

import numpy as np

from deta.platform.study.analyse import analyse
from deta.platform.study.decomposition import decompose
from deta.platform.study.study_types import Anchor, Cell, Question
from deta.platform.study.trial_record import TrialCost, TrialRecord
from deta.platform.study_report.content import Provenance, StudyReport

HOSTILE = (
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "pipe | tick ` star * \u2028\u202e %{y} <b>",
)
SEEDS = (1, 2, 3)
NUM_EVALUATIONS = 8


def study(names: tuple[str, ...] = ("batch", "8", "16"), *, fails: bool = True) -> StudyReport:
    """Two factors with two levels, a named cell and its pair, three seeds; one trial failed."""
    factor, first, second = names
    cells = [
        Cell(f"{factor}={a}, rate={b}", {factor: a, "rate": b}, {"total_batch_size": a, "lr": b})
        for a in (first, second)
        for b in ("1×", "2×")
    ]
    cells += [
        Cell("published 8", {}, {}, same_as=cells[0].key),
        Cell("published 16", {}, {"optim.weight_decay": 0.1}),
    ]
    rng = np.random.default_rng(0)
    trials = []
    for place, cell in enumerate(cells):
        for seed in SEEDS if not cell.same_as else ():
            final = 40 + place * 0.3 + 0.2 * seed + float(rng.normal(0, 0.05))
            curve = tuple(
                (1000 * i, final * (1 - math.exp(-i / 2))) for i in range(1, NUM_EVALUATIONS)
            ) + ((1000 * NUM_EVALUATIONS, final),)
            failed = fails and place == 1 and seed == 3
            trials.append(
                TrialRecord(
                    name=f"{cell.key}, seed {seed}",
                    cell=cell.key,
                    seed=seed,
                    status="failed" if failed else "finished",
                    reason=f"not finite: {first}" if failed else "",
                    metrics={"AP": curve[2][1] if failed else final},
                    curve=curve[:3] if failed else curve,
                    parameters={"seed": seed, "total_batch_size": place, **cell.changes},
                    cost=TrialCost(wall_s=3600.0, gpu_hours=8.0 - place, images_per_s=30.0),
                    run_url="https://mlflow.example/#/runs/1",
                )
            )
    observations = [trial.observation() for trial in trials]
    question = Question(f"{second} vs {first}", cells[2].key, cells[0].key, second, first)
    anchors = (
        Anchor("paper", 50.0, 8, "the README"),
        Anchor("other", 49.4, 16, "the README", first),
    )
    path = ((cells[0].key, ""), (cells[2].key, "batch"), ("published 16", "decay"))
    ended = datetime(2026, 11, 20, 12, tzinfo=UTC)
    return StudyReport(
        title=f"Does {factor} matter?",
        trials=trials,
        analysis=analyse(cells, observations, questions=[question]),
        decomposition=decompose(cells, observations, path, published=(anchors[0], anchors[1])),
        anchors=anchors,
        method=f"Crossed: {factor}",
        provenance=Provenance(
            command=f"python jobs/study.py --name '{factor}'",
            code_commit="0123abc",
            changed={"optim.lr": (1e-4, 2e-4)},
            train_fingerprint="sha256:1",
            versions={"torch": "2.15"},
            began=ended - timedelta(hours=2),
            ended=ended,
        ),
    )


def sweep() -> StudyReport:
    """Twelve trials of their own; some stopped, one failed, one still waits."""
    rng = np.random.default_rng(1)
    trials = []
    for i in range(12):
        lr = float(10 ** rng.uniform(-5, -3))
        status: Any = {3: "failed", 4: "waiting"}.get(i, "stopped" if i % 3 == 0 else "finished")
        length = {"failed": 0, "waiting": 0, "stopped": 2}.get(status, 6)
        curve = tuple((100 * k, 10.0 * math.log(k + 1 + i)) for k in range(1, length + 1))
        trials.append(
            TrialRecord(
                name=f"trial-{i}",
                cell=f"trial-{i}",
                seed=0,
                status=status,
                reason="ASHA" if status == "stopped" else "",
                metrics={"AP": curve[-1][1]} if curve else {},
                curve=curve,
                parameters={"optim.lr": lr, "optim.lr_rule": ("none", "sqrt")[i % 2], "same": 1},
                cost=TrialCost(cpu_hours=0.1 + 3.0 * (i % 4), wall_s=60.0),
            )
        )
    return StudyReport(title="A search", trials=trials)
