"""Paths of a configuration are checked before a run starts."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from deta.platform.run.config import RunConfig, override
from deta.platform.run.run_paths import require_paths, require_run_paths, require_storage

ROOT = Path(__file__).resolve().parents[3]


def given(folder: Path) -> dict[str, str]:
    """Return the keys of a data set that exists."""
    keys = ("train_images", "train_annotations", "val_images", "val_annotations")
    for key in keys:
        (folder / key).mkdir()
    return {f"data.{key}": str(folder / key) for key in keys}


@pytest.mark.parametrize(
    "key",
    ["data.train_images", "data.train_annotations", "data.val_images", "data.val_annotations",
     "init_checkpoint", "init_backbone"],
)  # fmt: skip
def test_a_path_that_is_not_there_is_named_by_its_key(tmp_path: Path, key: str):
    keys = given(tmp_path)
    require_run_paths(override(RunConfig(), keys))
    config = override(RunConfig(), keys | {key: str(tmp_path / "gone")})
    with pytest.raises(ValueError, match=f"{key}={tmp_path}/gone: no such file or folder"):
        require_run_paths(config)


def test_a_resumed_run_may_have_lost_its_data(tmp_path: Path):
    keys = given(tmp_path)
    (tmp_path / "train_images").rmdir()
    require_run_paths(override(RunConfig(), keys), is_resumed=True)


def test_data_must_be_given():
    with pytest.raises(ValueError, match=r"data\.train_images is not set"):
        require_run_paths(RunConfig())


def test_addresses_are_not_looked_up():
    require_paths({"data": "s3://bucket/shards", "": "models:/deta@champion", "none": None})


def test_a_storage_that_cannot_be_written_is_refused(tmp_path: Path):
    require_storage(str(tmp_path / "new" / "folder"))
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="file is not a folder"):
        require_storage(str(tmp_path / "file" / "runs"))
    with pytest.raises(ValueError, match="/proc/1 cannot be written"):
        require_storage("/proc/1/runs")  # for nobody, root included


def test_an_unknown_home_is_named():
    code = (
        "from deta.platform.run.run_paths import require_storage\n"
        "try: require_storage('~nobody-of-this-name/runs')\n"
        "except ValueError as error: print(error)"
    )
    shown = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert "set HOME" in shown.stdout, shown.stderr
