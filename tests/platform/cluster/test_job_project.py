"""Which files and environment variables are sent with a job."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

pytest.importorskip("ray")

from deta.platform.cluster.job_project import (
    NEVER_SENT,
    excludes,
    job_environment,
    project_root,
)
from deta.platform.cluster.submit_job import submit_job


def test_the_project_is_the_nearest_folder_that_looks_like_one(tmp_path: Path):
    script = tmp_path / "outer" / "inner" / "jobs" / "x.py"
    script.parent.mkdir(parents=True)
    script.touch()
    (tmp_path / "outer" / ".git").mkdir()
    assert project_root(script) == tmp_path / "outer"
    (tmp_path / "outer" / "inner" / "pyproject.toml").touch()
    assert project_root(script) == tmp_path / "outer" / "inner"
    with pytest.raises(ValueError, match="would not be sent"):
        submit_job(script, [], working_dir=tmp_path / "elsewhere")


def test_a_token_inside_the_project_is_not_sent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "my_token"))
    assert "/my_token" in excludes(tmp_path)
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", "/elsewhere/my_token")
    assert excludes(tmp_path) == list(NEVER_SENT)


@pytest.mark.parametrize(
    "uri", ["http://mlflow:5000", "sqlite:////shared/mlflow.db", "/shared/runs"]
)
def test_a_complete_mlflow_address_is_passed_on_as_it_is(uri: str, tmp_path: Path):
    found = job_environment(tmp_path, {"MLFLOW_TRACKING_URI": uri, "MLFLOW_RUN_ID": "not ours"})
    assert found["MLFLOW_TRACKING_URI"] == uri
    assert "MLFLOW_RUN_ID" not in found


def test_an_ignored_folder_of_the_root_excludes_no_folder_of_its_name(tmp_path: Path):
    """A root folder `data` must not keep the room platform/data from a job."""
    for name in ("job.py", "data/a.jpg", "platform/data/a.py", "platform/cached/a.bin"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    subprocess.run(["git", "init", "-q", str(tmp_path)], check=True)
    exclude = tmp_path / ".git" / "info" / "exclude"  # which Ray itself does not read
    exclude.write_text("/data\n/platform/cached\n", encoding="utf-8")
    # The second also at its place behind the link in deta/.
    assert excludes(tmp_path)[len(NEVER_SENT) :] == ["/data", "**/platform/cached"]
