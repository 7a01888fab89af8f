"""Which cluster a process uses, and how its own is configured; tests/safety has the rest."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from deta.platform.cluster.auth_token import (
    OpenClusterError,
    configure_own_cluster,
    ensure_private_token,
    is_open,
    starts_own_cluster,
)


@pytest.mark.parametrize(
    ("address", "is_own"),
    [(None, True), ("", True), ("local", True), ("auto", False), ("10.0.0.5:6379", False)],
)
def test_an_address_names_the_cluster_of_others(
    monkeypatch: pytest.MonkeyPatch, address: str | None, is_own: bool
):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    if address is not None:
        monkeypatch.setenv("RAY_ADDRESS", address)
    assert starts_own_cluster() is is_own


def test_an_own_cluster_requires_a_token_and_settings_of_the_user_stay(
    monkeypatch: pytest.MonkeyPatch,
):
    names = ("RAY_AUTH_MODE", "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "GLOO_SOCKET_IFNAME")
    for name in names:
        monkeypatch.setenv(name, "")  # so that it is restored
        monkeypatch.delenv(name)
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "eth7")
    configure_own_cluster()
    assert os.environ["RAY_AUTH_MODE"] == "token"
    assert os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] == "0"
    assert os.environ["GLOO_SOCKET_IFNAME"] == "eth7"
    monkeypatch.delenv("GLOO_SOCKET_IFNAME")
    configure_own_cluster()
    assert os.environ.get("GLOO_SOCKET_IFNAME") == ("lo" if sys.platform == "linux" else None)
    monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)


def test_a_dashboard_that_does_not_answer_is_not_open():
    assert not is_open("127.0.0.1:9")
    assert not is_open("http://127.0.0.1:9")


def test_a_home_without_room_for_a_token_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("HOME", str(tmp_path / "file"))
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.delenv("RAY_AUTH_TOKEN", raising=False)
    monkeypatch.delenv("RAY_AUTH_TOKEN_PATH", raising=False)
    with pytest.raises(OpenClusterError, match=r"file/\.ray: .*set HOME .* RAY_AUTH_TOKEN_PATH"):
        ensure_private_token()


def test_a_run_without_a_home_is_refused_before_anything_starts(tmp_path: Path):
    (tmp_path / "file").touch()
    changed = {"HOME": str(tmp_path / "file")}
    env = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")} | changed
    done = subprocess.run(
        [sys.executable, "jobs/deta_r50.py", "--variant", "demo", "--name", "homeless",
         f"storage={tmp_path / 'runs'}"],
        env=env, cwd=Path(__file__).parents[3], capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 2, done.stderr
    assert "set HOME to a folder that can be written" in done.stderr
    assert not (tmp_path / "runs").exists()
