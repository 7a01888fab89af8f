"""A worker writes why it failed, and whether a retry would fail again."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

pytest.importorskip("ray")

from deta.platform.cluster import train_worker


@pytest.mark.parametrize(
    ("error", "world_size", "repeats"),
    [
        (ValueError("no such column"), 1, True),
        (ValueError("of a group that Ray has ended"), 2, False),
        (RuntimeError("connection closed"), 1, False),
    ],
)
def test_a_failure_is_permanent_if_it_is_of_the_input(tmp_path: Path, error, world_size, repeats):
    train_worker._write_failure(tmp_path, 3, world_size, error)
    (path,) = (tmp_path / train_worker.FAILURES).iterdir()
    assert path.name == "rank-3.json"
    failure = json.loads(path.read_text())
    assert failure["comes_again"] is repeats
    assert failure["message"] == str(error)
