"""Which files and environment variables are sent with a job."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

pytest.importorskip("ray")

from deta.platform.cluster import job_project
from deta.platform.cluster.job_project import Project, job_environment, project_root


def test_the_project_is_the_nearest_folder_that_looks_like_one(tmp_path: Path):
    script = tmp_path / "outer" / "inner" / "jobs" / "x.py"
    script.parent.mkdir(parents=True)
    script.touch()
    (tmp_path / "outer" / ".git").mkdir()
    assert project_root(script) == tmp_path / "outer"
    (tmp_path / "outer" / "inner" / "pyproject.toml").touch()
    assert project_root(script) == tmp_path / "outer" / "inner"
    with pytest.raises(ValueError, match="would not be sent"):
        Project.holding(script, tmp_path / "elsewhere")


def test_a_project_too_big_to_send_is_refused_by_its_largest_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(job_project, "MAX_UPLOAD_BYTES", 10_000)
    (tmp_path / "images").mkdir()
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "a.jpg").write_bytes(bytes(20_000))
    project = tmp_path / "project"
    project.mkdir()
    (project / "job.py").touch()
    (project / "linked").symlink_to(tmp_path / "elsewhere")  # Ray would follow it
    with pytest.raises(ValueError, match=r"linked.*\.gitignore"):
        Project.holding(project / "job.py")
    (project / ".rayignore").write_text("linked\n", encoding="utf-8")
    assert Project.holding(project / "job.py").num_files == 2


def test_a_token_inside_the_project_is_not_sent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    for name in ("job.py", "my_token"):
        (tmp_path / name).touch()
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "my_token"))
    assert Project.holding(tmp_path / "job.py").num_files == 1


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
    (tmp_path / "deta").mkdir()
    (tmp_path / "deta" / "platform").symlink_to("../platform")
    (tmp_path / ".gitignore").write_text("", encoding="utf-8")
    subprocess.run(["git", "init", "-q", str(tmp_path)], check=True)
    exclude = tmp_path / ".git" / "info" / "exclude"  # which Ray itself does not read
    exclude.write_text("/data\n/platform/cached\n", encoding="utf-8")
    project = Project.holding(tmp_path / "job.py")
    # job.py, .gitignore, and a.py at its place and through the link
    assert project.num_files == 4
