"""The MLflow server answers to exact names, and its password is its owner's alone."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from deta.platform.system.child_server import free_port
from deta.platform.tracking.mlflow_server import ensure_password_file, host_names


@pytest.mark.parametrize("name", ["*", "gpu1:*", "10.*:5000", "gpu1", "gpu1:5000,evil:1", "a b:1"])
def test_only_exact_names_are_allowed(name: str):
    with pytest.raises(ValueError, match="exact"):
        host_names("0.0.0.0", free_port("0.0.0.0", 0), [name])


def test_every_address_of_a_machine_needs_a_name():
    with pytest.raises(ValueError, match="allow-host"):
        host_names("0.0.0.0", free_port("0.0.0.0", 0), [])
    port = free_port("127.0.0.1", 0)
    assert host_names("127.0.0.1", port, [])[0] == f"127.0.0.1:{port}"


def test_the_password_is_made_once_and_its_owners_alone(tmp_path: Path):
    path = ensure_password_file(tmp_path)
    word = path.read_text()
    assert len(word) >= 24
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    assert ensure_password_file(tmp_path).read_text() == word
    path.chmod(0o644)
    with pytest.raises(ValueError, match="others can read it"):
        ensure_password_file(tmp_path)
    path.unlink()
    (path.parent / "users.db").touch()
    with pytest.raises(ValueError, match="is missing"):
        ensure_password_file(tmp_path)
    assert os.listdir(path.parent) == ["users.db"]
