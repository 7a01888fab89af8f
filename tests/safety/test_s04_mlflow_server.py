"""S4: MLflow's server answers to its own host names only and off loopback requires a password.

The requests are those of a browser under control of a hostile page.
"""

from __future__ import annotations

import base64
import socket
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("mlflow")

from deta.platform.tracking.mlflow_server import Server, start_mlflow_server

SEARCH = "/api/2.0/mlflow/experiments/search"
PAGES = ("/", "/ajax-api/2.0/mlflow/experiments/search?max_results=1", f"{SEARCH}?max_results=1")
STRANGERS = ("evil.example", "10.evil.example.com", "192.168.evil.example", "172.16.evil.example",
             "localhost.evil.example", "127.0.0.1.evil.example", "localhost")  # fmt: skip


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def fetch(
    port: int, path: str, *, host: str, body: bytes | None = None, **headers: str
) -> tuple[int, dict[str, str]]:
    request = urllib.request.Request(f"http://127.0.0.1:{port}{path}", data=body)
    request.add_header("Host", host)
    for name, value in headers.items():
        request.add_header(name.replace("_", "-"), value)
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with direct.open(request, timeout=60) as answer:
            return answer.status, {k.lower(): v for k, v in answer.headers.items()}
    except urllib.error.HTTPError as error:
        return error.code, {k.lower(): v for k, v in error.headers.items()}


def server_at(folder: Path, host: str, allowed: tuple[str, ...], port: int) -> Server:
    return start_mlflow_server(
        f"sqlite:///{folder / 'mlflow.db'}", folder, host=host, port=port, allowed_hosts=allowed,
        within_s=500,
    )  # fmt: skip


@pytest.fixture(scope="module")
def on_loopback(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Server, int]]:
    port = free_port()
    server = server_at(tmp_path_factory.mktemp("home"), "127.0.0.1", (), port)
    yield server, port
    server.stop()


@pytest.fixture(scope="module")
def off_loopback(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Server, int]]:
    pytest.importorskip("flask_wtf")
    port = free_port()
    # Listens on every address of this machine, under one host name, with a password.
    server = server_at(
        tmp_path_factory.mktemp("off_loopback"), "0.0.0.0", (f"deta.test:{port}",), port
    )
    yield server, port
    server.stop()


@pytest.mark.parametrize("stranger", STRANGERS)
@pytest.mark.parametrize("path", PAGES)
def test_a_name_that_is_not_its_own_is_refused(
    on_loopback: tuple[Server, int], stranger: str, path: str
):
    _, port = on_loopback
    assert fetch(port, path, host=f"{stranger}:{port + 1}")[0] == 403
    if stranger != "localhost":
        assert fetch(port, path, host=f"{stranger}:{port}")[0] == 403
    assert fetch(port, path, host=f"127.0.0.1:{port}")[0] == 200


def test_a_page_of_another_origin_can_change_nothing(on_loopback: tuple[Server, int]):
    _, port = on_loopback
    create = "/api/2.0/mlflow/experiments/create"
    own = f"127.0.0.1:{port}"
    for origin in ("http://evil.example", "null", f"http://10.evil.example.com:{port}"):
        status, headers = fetch(
            port, create, host=own, body=b'{"name": "planted"}', Origin=origin,
            Content_Type="application/json",
        )  # fmt: skip
        assert status == 403, origin
        assert "access-control-allow-origin" not in headers
    status, _ = fetch(
        port, create, host=own, body=b'{"name": "mine"}', Content_Type="application/json"
    )
    assert status == 200
    assert fetch(port, "/", host=own)[1]["x-frame-options"] == "DENY"


def test_off_loopback_the_password_is_required(off_loopback: tuple[Server, int]):
    server, port = off_loopback
    own = f"deta.test:{port}"
    assert server.password_file is not None
    password = server.password_file.read_text().strip()
    for path in PAGES:
        assert fetch(port, path, host=own)[0] == 401, path
    for wrong in ("admin:password1234", "admin:", f"other:{password}"):
        basic = base64.b64encode(wrong.encode()).decode()
        assert fetch(port, PAGES[2], host=own, Authorization=f"Basic {basic}")[0] == 401
    basic = base64.b64encode(f"admin:{password}".encode()).decode()
    assert fetch(port, PAGES[2], host=own, Authorization=f"Basic {basic}")[0] == 200
    for stranger in (f"10.evil.example.com:{port}", f"127.0.0.1:{port}", "deta.test"):
        assert fetch(port, PAGES[2], host=stranger, Authorization=f"Basic {basic}")[0] == 403


def test_the_password_is_in_a_private_file_and_in_no_command_line(
    off_loopback: tuple[Server, int],
):
    server, _ = off_loopback
    assert server.password_file is not None
    password = server.password_file.read_bytes().strip()
    assert len(password) >= 24
    assert server.password_file.stat().st_mode & 0o077 == 0
    assert server.password_file.parent.stat().st_mode & 0o077 == 0
    for process in Path("/proc").glob("[0-9]*"):
        try:
            assert password not in (process / "cmdline").read_bytes()
        except OSError:  # it ended meanwhile
            continue
    folder = server.password_file.parent.parent
    for path in folder.rglob("*"):
        if path.is_file() and path != server.password_file:
            assert password not in path.read_bytes(), path


@pytest.mark.parametrize("pattern", ["*", "*.example:5000", "10.*:5000", "host", "a:b:5000"])
def test_a_pattern_is_no_host_name(tmp_path: Path, pattern: str):
    with pytest.raises(ValueError, match="exact NAME:PORT"):
        server_at(tmp_path, "0.0.0.0", (pattern,), free_port())
    with pytest.raises(ValueError, match="--allow-host"):
        server_at(tmp_path, "0.0.0.0", (), free_port())
