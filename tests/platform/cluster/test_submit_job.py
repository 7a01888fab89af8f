"""Jobs on a real Ray cluster of one node: what is sent, where to, and how they end."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("ray")

from deta.platform.cluster import submit_job as submit
from deta.platform.cluster.submit_job import cluster_address

pytestmark = pytest.mark.cluster

ROOT = Path(__file__).resolve().parents[3]
DETA = [sys.executable, "-m", "deta.jobs.cli"]
SECRET = "never-to-be-shown"

PROBE = """\
import json, os, sys
import deta.platform.data.sample_order, deta.jobs.cli
print("REPORT " + json.dumps({
    "arguments": sys.argv[1:],
    "folder": os.getcwd(),
    "python": sys.executable,
    "files": sorted(os.path.join(base, name)[2:]
                    for base, _, names in os.walk(".", followlinks=True) for name in names),
    "code": [deta.platform.data.sample_order.__file__, deta.jobs.cli.__file__],
    "edited": deta.platform.data.sample_order.EDITED,
    "variables": {name: value for name, value in os.environ.items()
                  if name.startswith(("DETA_", "MLFLOW_", "RAY_JOB_STOP", "EXTRA"))},
}))
sys.exit(7)
"""

WAIT = """\
import signal, sys, time
def end(number, frame):
    time.sleep(4)  # longer than Ray's own 3 s
    print("state written")
    sys.exit(0)
signal.signal(signal.SIGTERM, end)
print("waiting")
time.sleep(120)
"""


@pytest.fixture(scope="session")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project like this one: links, a git repository, and files that must not be sent."""
    root = tmp_path_factory.mktemp("project")
    (root / "deta").mkdir()
    shutil.copy(ROOT / "deta" / "__init__.py", root / "deta")
    for room in ("platform", "jobs"):
        shutil.copytree(ROOT / room, root / room, ignore=shutil.ignore_patterns("__pycache__"))
        (root / "deta" / room).symlink_to(f"../{room}")
    (root / "pyproject.toml").touch()
    (root / ".gitignore").write_text("/data/\nplatform/cached/\n*.bin\n", encoding="utf-8")
    (root / "jobs" / "probe.py").write_text(PROBE, encoding="utf-8")
    (root / "jobs" / "wait.py").write_text(WAIT, encoding="utf-8")
    git = ["git", "-c", "user.name=x", "-c", "user.email=x@example.org", "-C", str(root)]
    for command in (["init", "-q"], ["add", "."], ["commit", "-qm", "x"]):
        subprocess.run([*git, *command], check=True)
    (root / ".git" / "info" / "exclude").write_text("/notes\n", encoding="utf-8")
    for name in (
        ".env", "data/a.jpg", "notes/a.txt", "mlflow.db", "runs/a/state.pt", "platform/cached/a",
        "weights.bin", "deta_platform.egg-info/PKG-INFO", ".venv/x", "jobs/__pycache__/x.pyc",
    ):  # fmt: skip
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(SECRET, encoding="utf-8")
    with (root / "platform" / "data" / "sample_order.py").open("a", encoding="utf-8") as file:
        file.write('\nEDITED = "after the commit"\n')
    return root


def deta_submit(
    *arguments: str, cwd: Path, env: dict[str, str]
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*DETA, "submit", *arguments],
        cwd=cwd, env=env, capture_output=True, text=True, timeout=240,
    )  # fmt: skip


@pytest.fixture(scope="session")
def ended(project: Path, ray_cluster) -> subprocess.CompletedProcess[str]:
    env = ray_cluster.env | {
        "PYTHONPATH": str(ROOT),
        "MLFLOW_TRACKING_URI": "sqlite:///mine.db",
        "MLFLOW_TRACKING_PASSWORD": SECRET,
        "EXTRA": "passed on",
    }
    return deta_submit(
        "--env", "EXTRA", "jobs/probe.py",
        "--help", "two words", "$HOME;'", "--train-images", "data", "key=[1,2]", "--no-wait",
        cwd=project, env=env,
    )  # fmt: skip


@pytest.fixture(scope="session")
def report(ended: subprocess.CompletedProcess[str]) -> dict:
    lines = [line for line in ended.stdout.splitlines() if line.startswith("REPORT ")]
    assert len(lines) == 1, ended.stdout + ended.stderr
    return json.loads(lines[0].removeprefix("REPORT "))


def test_the_exit_code_of_the_script_is_ours(ended: subprocess.CompletedProcess[str]):
    assert ended.returncode == 7, ended.stdout + ended.stderr


def test_arguments_arrive_as_they_were_but_for_paths_of_data(report: dict, project: Path):
    data = str(project / "data")
    assert report["arguments"] == [
        "--help", "two words", "$HOME;'", "--train-images", data, "key=[1,2]", "--no-wait",
    ]  # fmt: skip


def test_the_edited_copy_is_what_runs(report: dict, project: Path):
    copy = Path(report["folder"])
    assert not copy.is_relative_to(project)
    assert all(Path(file).is_relative_to(copy / "deta") for file in report["code"])
    assert report["edited"] == "after the commit"


def test_nothing_private_or_ignored_is_sent(report: dict, project: Path):
    expected = {".gitignore", "pyproject.toml", "deta/__init__.py"}
    for part in ("platform", "jobs"):
        names = [
            path.relative_to(project).as_posix()
            for path in (project / part).rglob("*")
            if path.is_file() and not {"__pycache__", "cached"} & set(path.parts)
        ]
        expected |= {*names, *(f"deta/{name}" for name in names)}
    # The Python of the job has written its own __pycache__ into the copy.
    assert {name for name in report["files"] if "__pycache__" not in name} == expected


def test_the_job_gets_commit_and_mlflow_but_the_password_is_not_printed(
    report: dict, ended: subprocess.CompletedProcess[str], project: Path
):
    variables = report["variables"]
    commit = subprocess.run(
        ["git", "-C", str(project), "rev-parse", "HEAD"], capture_output=True, text=True, check=True
    ).stdout.strip()
    assert variables["DETA_COMMIT"] == f"{commit}-dirty"
    assert variables["RAY_JOB_STOP_WAIT_TIME_S"] == "30"
    assert variables["MLFLOW_TRACKING_URI"] == f"sqlite:///{project}/mine.db"
    assert variables["MLFLOW_TRACKING_PASSWORD"] == SECRET
    assert variables["EXTRA"] == "passed on"
    assert SECRET not in ended.stderr
    assert "MLFLOW_TRACKING_PASSWORD" in ended.stderr


def test_a_cluster_on_this_machine_runs_our_python(report: dict):
    assert report["python"] == sys.executable


def test_ctrl_c_leaves_the_job_running_and_a_stop_lets_it_end(project: Path, ray_cluster):
    env = ray_cluster.env | {"PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        [*DETA, "submit", "jobs/wait.py"],
        cwd=project, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdout is not None
    while (line := process.stdout.readline()) != "waiting\n":
        assert line, process.communicate()[1]
    process.send_signal(signal.SIGINT)
    _, notes = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Traceback" not in notes

    # The commands that it prints work.
    stop = next(line for line in notes.splitlines() if line.strip().startswith("stop:"))
    command = stop.partition(":")[2].strip() + " --no-wait"
    subprocess.run(command, shell=True, env=env, check=True, capture_output=True, timeout=240)
    follow = next(line for line in notes.splitlines() if line.strip().startswith("follow:"))
    command = follow.partition(":")[2].strip()
    followed = subprocess.run(
        command, shell=True, env=env, capture_output=True, text=True, timeout=240
    )
    assert "state written" in followed.stdout


def test_a_stopped_job_ends_with_143_and_no_wait_prints_its_id_alone(project: Path, ray_cluster):
    env = ray_cluster.env | {"PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        [*DETA, "submit", "--stop-on-interrupt", "jobs/wait.py"],
        cwd=project, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    # Meanwhile another job, without waiting for it.
    quick = deta_submit("--no-wait", "jobs/probe.py", cwd=project, env=env)
    assert quick.returncode == 0, quick.stderr
    assert quick.stdout.startswith("raysubmit_")
    assert len(quick.stdout.split()) == 1

    assert process.stdout is not None
    while (line := process.stdout.readline()) != "waiting\n":
        assert line, process.communicate()[1]
    process.send_signal(signal.SIGINT)
    _, notes = process.communicate(timeout=240)
    assert process.returncode == 143, notes


@pytest.mark.parametrize(
    "wrong",
    [{"RAY_AUTH_TOKEN": "0" * 64}, {"RAY_AUTH_MODE": "disabled"}],
    ids=["wrong token", "no token"],
)
def test_a_wrong_token_is_reported_with_a_remedy(project: Path, ray_cluster, wrong: dict[str, str]):
    env = ray_cluster.env | {"PYTHONPATH": str(ROOT)} | wrong
    refused = deta_submit("jobs/probe.py", cwd=project, env=env)

    assert refused.returncode == 1
    assert ray_cluster.dashboard in refused.stderr
    assert "RAY_AUTH_MODE=token" in refused.stderr
    assert "RAY_AUTH_TOKEN_PATH" in refused.stderr
    assert "Traceback" not in refused.stderr
    assert "0" * 64 not in refused.stderr


def test_a_cluster_that_is_still_starting_is_waited_for(monkeypatch: pytest.MonkeyPatch):
    answers = iter([RuntimeError("No available agent to submit job"), "raysubmit_x"])

    def submit_job() -> str:
        answer = next(answers)
        if isinstance(answer, str):
            return answer
        raise answer

    assert submit._hand_over(submit_job, "http://a:1") == "raysubmit_x"
    monkeypatch.setattr(submit, "READY_WITHIN_S", 0.0)
    answers = iter([RuntimeError("No available agent to submit job")])
    with pytest.raises(submit.ClusterError, match="accepted no job"):
        submit._hand_over(submit_job, "http://a:1")


def test_rays_own_command_works_with_a_working_dir(ray_cluster):
    command = [str(Path(sys.executable).parent / "ray"), "job", "submit", "--working-dir", "."]
    shown = subprocess.run(
        [*command, "--", "python", "jobs/deta_r50.py", "--help"],
        cwd=ROOT, env=ray_cluster.env, capture_output=True, text=True, timeout=240,
    )  # fmt: skip
    assert shown.returncode == 0, shown.stdout[-2000:] + shown.stderr[-2000:]
    assert "official_12ep" in shown.stdout


@pytest.mark.parametrize(
    ("given", "environment", "expected"),
    [
        ("http://a:1/", {"RAY_API_SERVER_ADDRESS": "http://b:2"}, "http://a:1"),
        ("a:1", {}, "http://a:1"),
        (None, {"RAY_API_SERVER_ADDRESS": "http://b:2", "RAY_ADDRESS": "c:3"}, "http://b:2"),
        (None, {"RAY_ADDRESS": "https://c:3"}, "https://c:3"),
        (None, {"RAY_ADDRESS": "auto"}, "http://127.0.0.1:8265"),
        (None, {}, "http://127.0.0.1:8265"),
    ],
)
def test_the_most_specific_address_counts(
    given: str | None, environment: dict[str, str], expected: str
):
    assert cluster_address(given, environment) == expected


@pytest.mark.parametrize("address", ["10.0.0.5:6379", "ray://10.0.0.5:10001"])
def test_an_address_that_accepts_no_jobs_is_refused_instead_of_guessed(address: str):
    with pytest.raises(ValueError, match="RAY_API_SERVER_ADDRESS"):
        cluster_address(None, {"RAY_ADDRESS": address})
