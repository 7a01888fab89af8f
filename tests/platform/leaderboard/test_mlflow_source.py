"""The leaderboard's data from MLflow, with a real database."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from deta.platform.leaderboard.board import Board
from deta.platform.leaderboard.mlflow_source import MlflowSource
from deta.platform.registry.decision_log import Entry
from tests.platform.leaderboard.leaderboard_case import HOSTILE, column

ROOT = Path(__file__).resolve().parents[3]


def test_reading_mlflow_needs_no_torch():
    code = (
        "import sys, deta.platform.leaderboard.mlflow_source; "
        "assert not {'torch', 'ray'} & {*sys.modules}"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_runs_versions_and_champions_come_from_mlflow(tmp_path: Path):
    from deta.platform.tracking.mlflow_store import MlflowStore

    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    client = MlflowStore(uri)._connect()
    experiment = client.create_experiment("deta", artifact_location=(tmp_path / "f").as_uri())
    ids = []
    for number, ap in enumerate((30.0, 50.0, 40.0)):
        run = client.create_run(
            experiment, run_name=HOSTILE[number], tags={"deta.recipe": f"deta_r50.v{number}"}
        )
        ids.append(run.info.run_id)
        client.log_metric(ids[-1], "best/AP", ap)
    client.create_run(experiment, run_name="sweep", tags={"deta.kind": "sweep"})
    client.create_registered_model("deta")
    sweep = {"deta.sweep": "lr-sweep", "mlflow.source.name": "driver.py"}
    trial = client.create_run(experiment, run_name="trial 01: lr=0.1", tags=sweep)
    client.create_model_version("deta", (tmp_path / "f").as_uri(), run_id=ids[2])
    client.create_model_version(
        "deta", (tmp_path / "f").as_uri(), run_id=trial.info.run_id, tags={"deta.AP": "20.5"}
    )
    client.set_registered_model_alias("deta", "champion", "1")
    board = Board(uri)
    board.refresh(MlflowSource(uri))
    assert column(board.content, "ap")[3] == 20.5  # of its version: it has none of its own
    assert column(board.content, "recipe")[3] == "sweep lr-sweep"
    client.delete_run(trial.info.run_id)
    board.refresh(MlflowSource(uri))
    assert column(board.content, "id") == [ids[1], ids[2], ids[0]]
    assert column(board.content, "name")[0] == HOSTILE[1]
    assert column(board.content, "models")[1] == "deta 1 @champion"
    assert column(board.content, "is_champion") == [False, True, False]
    assert board.content["promotions"][0]["run_id"] == ids[2]

    client.log_metric(ids[0], "best/AP", 60.0, step=2)
    board.refresh(MlflowSource(uri), is_full=False)  # all are RUNNING
    assert column(board.content, "id") == [ids[0], ids[1], ids[2]]
    client.delete_run(ids[1])

    entry = Entry(
        id="a", previous="", action="accept", version=1, sha256="0" * 64, champion_before=None,
        champion_after=1, by="anna@gpu1", time="2026-11-21T03:00:00+00:00", reason=HOSTILE[0],
        text="accepted",
    )  # fmt: skip
    client.create_registered_model("deta-history")
    client.create_model_version(
        "deta-history", "models:/deta/1", tags={"deta.entry": entry.to_line()},
        description=entry.text,
    )  # fmt: skip
    board.refresh(MlflowSource(uri))
    (promotion,) = board.content["promotions"]
    assert column(board.content, "id") == [ids[0], ids[2]]
    assert (promotion["by"], promotion["action"], promotion["run_id"]) == (
        "anna@gpu1",
        "accept",
        ids[2],
    )
    assert promotion["reason"] == HOSTILE[0]
