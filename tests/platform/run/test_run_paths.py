"""Paths of a configuration are checked before a run starts."""

from __future__ import annotations

from pathlib import Path

import pytest

from deta.platform.run.config import RunConfig, override
from deta.platform.run.run_paths import require_paths, require_run_paths


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
