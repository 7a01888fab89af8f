"""S1 and S2 without a cluster: the token's file, and clusters that require no token."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from deta.platform.cluster.auth_token import (
    OpenClusterError,
    ensure_private_token,
    is_open,
    starts_own_cluster,
)
from deta.platform.cluster.submit_job import ClusterError, _refuse_secrets


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in [name for name in os.environ if name.startswith("RAY_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    return tmp_path


def test_a_new_token_is_random_and_for_its_owner_alone(home: Path):
    before = os.umask(0)
    try:
        ensure_private_token()
    finally:
        os.umask(before)
    path = home / ".ray" / "auth_token"
    first = path.read_text()

    assert path.stat().st_mode & 0o777 == 0o600
    assert path.parent.stat().st_mode & 0o777 == 0o700
    assert sorted(path.parent.iterdir()) == [path]
    ensure_private_token()
    assert path.read_text() == first
    path.unlink()
    ensure_private_token()
    assert path.read_text() != first


def test_a_token_that_ray_left_readable_becomes_private_with_a_warning(
    home: Path, caplog: pytest.LogCaptureFixture
):
    (home / ".ray").mkdir(mode=0o755)
    path = home / ".ray" / "auth_token"
    path.write_text("a" * 64)
    path.chmod(0o644)

    ensure_private_token()

    assert path.stat().st_mode & 0o777 == 0o600
    assert path.parent.stat().st_mode & 0o777 == 0o700
    assert "could be read by others" in caplog.text
    assert "a" * 64 not in caplog.text


@pytest.mark.parametrize("mode", [0o644, 0o640, 0o604])
def test_a_named_token_that_others_can_read_is_refused(
    home: Path, monkeypatch: pytest.MonkeyPatch, mode: int
):
    path = home / "mine"
    path.write_text("a" * 64)
    path.chmod(mode)
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(path))
    with pytest.raises(OpenClusterError, match="chmod 600"):
        ensure_private_token()
    path.chmod(0o600)
    ensure_private_token()


def test_our_own_cluster_requires_a_token(home: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    with pytest.raises(OpenClusterError, match="RAY_AUTH_MODE=disabled"):
        ensure_private_token()


@pytest.mark.parametrize(
    ("address", "is_own"), [(None, True), ("", True), ("local", True), ("auto", False), ("h:1", 0)]
)
def test_settings_of_our_own_clusters_are_set_before_ray_is_imported(
    home: Path, address: str | None, is_own: bool, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.delenv("RAY_AUTH_MODE")
    if address is not None:
        monkeypatch.setenv("RAY_ADDRESS", address)
    code = (
        "import os, sys; sys.modules['ray'] = None\n"  # so that importing it raises
        "try: import deta.platform.cluster.driver\n"
        "except ImportError: pass\n"
        "print(os.environ.get('RAY_AUTH_MODE'), "
        "os.environ.get('RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER'))"
    )
    root = Path(__file__).resolve().parents[2]
    printed = subprocess.run(
        [sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True
    )
    assert printed.stdout.split() == (["token", "0"] if is_own else ["None", "None"])
    assert starts_own_cluster() == bool(is_own)


class Dashboard(BaseHTTPRequestHandler):
    asks_for_a_token = True

    def do_GET(self) -> None:
        self.send_response(401 if self.asks_for_a_token else 200)
        self.end_headers()

    def log_message(self, *_: object) -> None: ...


class OpenDashboard(Dashboard):
    asks_for_a_token = False


@pytest.fixture(params=[Dashboard, OpenDashboard])
def dashboard(request: pytest.FixtureRequest) -> Iterator[tuple[str, bool]]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), request.param)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"127.0.0.1:{server.server_port}", not request.param.asks_for_a_token
    server.shutdown()
    server.server_close()


def test_a_dashboard_that_requires_no_token_is_detected(
    dashboard: tuple[str, bool], monkeypatch: pytest.MonkeyPatch
):
    address, has_no_token = dashboard
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")  # must be ignored
    assert is_open(address) is has_no_token
    assert is_open(f"http://{address}") is has_no_token
    assert not is_open("127.0.0.1:9")  # no server there


def test_no_password_is_sent_to_an_open_cluster_of_the_network():
    variables = {"MLFLOW_TRACKING_PASSWORD": "canary-one", "DETA_COMMIT": "0" * 40}
    with pytest.raises(ClusterError, match="MLFLOW_TRACKING_PASSWORD") as caught:
        _refuse_secrets("http://10.0.0.5:8265", variables)
    assert "canary" not in str(caught.value)
    _refuse_secrets("http://127.0.0.1:8265", variables)
    _refuse_secrets("http://10.0.0.5:8265", {"DETA_COMMIT": "0" * 40})
