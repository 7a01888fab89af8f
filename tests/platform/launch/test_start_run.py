"""What happens to the folder of a run before its supervisor starts."""

from __future__ import annotations

from pathlib import Path

import pytest

from deta.platform.launch.start_run import launch_prepared
from deta.platform.run.run import Run
from deta.platform.run.run_file import RunExistsError
from tests.platform.launch.tiny_splits import DATA, make_run, write_split


def test_a_preview_that_fails_frees_the_name(tmp_path: Path):
    run = make_run(write_split(tmp_path / "train", [[], []]), tmp_path / "run", DATA)

    def preview(run: Run) -> None:
        assert run.folder.is_dir()
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        launch_prepared(run, preview=preview, echo=lambda line: None)
    assert not run.folder.exists()
    run.folder.mkdir()
    with pytest.raises(RunExistsError, match="exists already"):
        launch_prepared(run, preview=preview, echo=lambda line: None)
