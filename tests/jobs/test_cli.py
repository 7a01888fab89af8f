"""The `deta` command without a cluster: its help, its paths, its refusals."""

from __future__ import annotations

import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from deta.jobs.cli import main, with_absolute_paths

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("arguments", [["--help"], ["submit", "--help"]])
def test_help_comes_without_ray(arguments: list[str]):
    code = (
        "import sys\nfrom deta.jobs.cli import main\n"
        "try:\n    main(sys.argv[1:])\nfinally:\n    assert not {'ray', 'torch'} & set(sys.modules)"
    )
    shown = subprocess.run(
        [sys.executable, "-c", code, *arguments], cwd=ROOT, capture_output=True, text=True
    )
    assert shown.returncode == 0, shown.stderr
    assert "submit" in shown.stdout


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("data/train", "small", "jobs"):
        (tmp_path / name).mkdir(parents=True)
    for name in ("data/train.json", "photo.jpg", "jobs/recipe.py"):
        (tmp_path / name).touch()
    return tmp_path


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        # paths of data and storage, whether they are there or not
        (["--train-images", "data/train"], ["--train-images", "{}/data/train"]),
        (["--train-images=data/train"], ["--train-images={}/data/train"]),
        (["--val-images", "small"], ["--val-images", "{}/small"]),
        (["--val-images", "missing"], ["--val-images", "{}/missing"]),
        (["data.val_annotations=../a.json"], ["data.val_annotations={parent}/a.json"]),
        (["storage=runs"], ["storage={}/runs"]),
        (["init_checkpoint=none"], ["init_checkpoint=none"]),
        (["finetune", "--init", "run"], ["finetune", "--init", "{}/run"]),
        (["--init=https://host/a.pth"], ["--init=https://host/a.pth"]),
        (["--data.val_images", "val"], ["--data.val_images", "{}/val"]),
        # other arguments, if they name something that is there
        (["photo.jpg"], ["{}/photo.jpg"]),
        (["--out=data/"], ["--out={}/data"]),
        (["data/train"], ["{}/data/train"]),
        (["data/missing"], ["data/missing"]),
        # a folder of that name is no reason to change a word
        (["--variant", "small"], ["--variant", "small"]),
        (["name=small"], ["name=small"]),
        (["jobs/recipe.py"], ["jobs/recipe.py"]),
        # absolute, remote, somebody's home, and no path at all
        (["--train-images", "/data/x", "b"], ["--train-images", "/data/x", "b"]),
        (["--train-images", "s3://bucket/x"], ["--train-images", "s3://bucket/x"]),
        (["storage=~/runs"], ["storage=~/runs"]),
        (["optim.lr=1e-4", "--resume", "--", ""], ["optim.lr=1e-4", "--resume", "--", ""]),
        (["x" * 5000, "a\0b"], ["x" * 5000, "a\0b"]),
    ],
)
def test_only_paths_become_absolute(folder: Path, given: list[str], expected: list[str]):
    expected = [text.replace("{}", str(folder)) for text in expected]
    expected = [text.replace("{parent}", str(folder.parent)) for text in expected]

    assert with_absolute_paths(given, folder) == expected


def test_a_missing_script_is_refused_by_name(capsys: pytest.CaptureFixture[str]):
    assert main(["submit", "jobs/no_such_recipe.py"]) == 2
    assert "no_such_recipe.py" in capsys.readouterr().err


def test_a_variable_that_is_not_set_is_refused_by_name(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.delenv("NOT_SET_HERE", raising=False)
    assert main(["submit", "--env", "NOT_SET_HERE", "jobs/deta_r50.py"]) == 2
    assert "NOT_SET_HERE" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("listening", "expected"),
    [(False, "ray start --head"), (True, "no answer within")],
    ids=["nobody listens", "nobody answers"],
)
def test_no_cluster_is_said_within_seconds(
    listening: bool,
    expected: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
):
    pytest.importorskip("ray")
    monkeypatch.setattr("deta.platform.cluster.submit_job.ANSWER_WITHIN_S", 0.5)
    script = tmp_path / "job.py"
    script.touch()
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        if listening:
            server.listen()
        address = f"http://127.0.0.1:{server.getsockname()[1]}"
        began_s = time.monotonic()
        code = main(["submit", "--address", address, str(script)])
    message = capsys.readouterr().err

    assert code == 1
    assert address in message
    assert expected in message
    assert time.monotonic() - began_s < 10


def test_settings_and_options_of_a_recipe_mix_in_any_order():
    recipe = Path(__file__).resolve().parents[2] / "jobs" / "deta_r50.py"
    arguments = ["optim.lr=3e-5", "--name", "mixed", "storage=/s", "--val-images", "v", "seed=7"]
    shown = subprocess.run(
        [sys.executable, str(recipe), *arguments, "--show"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout.splitlines()
    expected = {"optim.lr=3e-05", "name=mixed", "storage=/s", "data.val_images=v", "seed=7"}
    assert expected <= set(shown)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["optim.lr"], "Unrecognized options: optim.lr"),
        (["optim.learning=1"], "there is no configuration key"),
        (["total_batch_size=4"], "without an image"),
    ],
)
def test_a_recipe_refuses_a_wrong_setting_by_name(arguments: list[str], message: str):
    recipe = Path(__file__).resolve().parents[2] / "jobs" / "deta_r50.py"
    refused = subprocess.run(
        [sys.executable, str(recipe), *arguments], capture_output=True, text=True, check=False
    )
    assert refused.returncode == 2
    assert message in refused.stderr
