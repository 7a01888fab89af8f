"""Host, Origin and token: which requests are allowed."""

from __future__ import annotations

import pytest
from starlette.applications import Starlette

from deta.platform.serving.config import ServingConfig, token_hash
from deta.platform.system.child_server import is_loopback
from deta.platform.system.origin_guard import OriginGuard, Refusal

TOKEN = "0123456789abcdef0123456789abcdef"


@pytest.mark.parametrize(
    ("host", "expected"),
    [("127.0.0.1", True), ("localhost", True), ("::1", True), ("127.8.0.9", True),
     ("0.0.0.0", False), ("::", False), ("192.168.1.4", False), ("localhost.evil", False),
     ("", False)],
)  # fmt: skip
def test_loopback_is_determined_by_the_address(host: str, expected: bool):
    assert is_loopback(host) is expected


def status_of(path: str, config: ServingConfig, **headers: str) -> int:
    """Return the status of the refusal; 0 if the request is allowed."""
    guard = OriginGuard(Starlette(), config.hosts, config.accepts_token)
    try:
        guard.check(path, headers)
    except Refusal as refusal:
        return refusal.status_code
    return 0


def test_every_path_that_reveals_something_requires_the_token():
    config = ServingConfig(token_sha256=token_hash(TOKEN))
    for path in ("/v1/detect", "/v1/model", "/metrics", "/anything"):
        assert status_of(path, config) == 401
        assert status_of(path, config, authorization=f"Bearer {TOKEN[:-1]}") == 401
        assert status_of(path, config, authorization=f"Basic {TOKEN}") == 401
        assert status_of(path, config, authorization=f"Bearer {TOKEN}") == 0
    for path in ("/", "/health", "/ready"):
        assert status_of(path, config) == 0


def test_foreign_origins_and_hosts_are_refused():
    config = ServingConfig(hosts=("127.0.0.1", "localhost", "[::1]"))
    for host in ("127.0.0.1:8000", "localhost", "LOCALHOST:8000", "[::1]:8000", "[::1]"):
        assert status_of("/v1/detect", config, host=host) == 0
        assert status_of("/v1/detect", config, host=host, origin=f"http://{host}") == 0
        assert status_of("/v1/detect", config, host=host, origin="http://evil.example") == 403
        assert status_of("/v1/detect", config, host=host, origin="null") == 403
    for host in ("evil.example", "127.0.0.1.evil.example:8000", "", "[::2]"):
        assert status_of("/", config, host=host) == 403
