"""Tokens and addresses: who may ask."""

from __future__ import annotations

from pathlib import Path

import pytest

from deta.platform.serving.config import (
    TOKEN_VARIABLE,
    Refusal,
    ServingConfig,
    read_token,
    token_hash,
)
from deta.platform.serving.origin_guard import check, host_name
from deta.platform.system.child_server import is_loopback

TOKEN = "0123456789abcdef0123456789abcdef"


def test_a_token_file_is_read_when_only_its_owner_can(tmp_path: Path):
    file = tmp_path / "token"
    file.write_text(TOKEN + "\n")
    file.chmod(0o600)
    assert read_token(file) == TOKEN
    file.chmod(0o640)
    with pytest.raises(ValueError, match="chmod 600"):
        read_token(file)


@pytest.mark.parametrize("content", ["", "short", "with a space in it 0123456789", "ü" * 40])
def test_what_is_no_token_is_refused_without_showing_it(tmp_path: Path, content: str):
    file = tmp_path / "token"
    file.write_text(content)
    file.chmod(0o600)
    with pytest.raises(ValueError, match="openssl rand") as caught:
        read_token(file)
    assert not content or content not in str(caught.value)


def test_the_variable_counts_where_there_is_no_file(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv(TOKEN_VARIABLE, raising=False)
    assert read_token(None) == ""
    monkeypatch.setenv(TOKEN_VARIABLE, TOKEN)
    assert read_token(None) == TOKEN


@pytest.mark.parametrize(
    ("host", "expected"),
    [("127.0.0.1", True), ("localhost", True), ("::1", True), ("127.8.0.9", True),
     ("0.0.0.0", False), ("::", False), ("192.168.1.4", False), ("localhost.evil", False),
     ("", False)],
)  # fmt: skip
def test_loopback_is_known_by_its_number(host: str, expected: bool):
    assert is_loopback(host) is expected


def refused(path: str, config: ServingConfig, **headers: str) -> int:
    """The status, 0 for a request that may pass."""
    try:
        check(path, headers, config)
    except Refusal as refusal:
        return refusal.status
    return 0


def test_every_path_that_tells_anything_wants_the_token():
    config = ServingConfig(token_sha256=token_hash(TOKEN))
    for path in ("/v1/detect", "/v1/model", "/metrics", "/anything"):
        assert refused(path, config) == 401
        assert refused(path, config, authorization=f"Bearer {TOKEN[:-1]}") == 401
        assert refused(path, config, authorization=f"Basic {TOKEN}") == 401
        assert refused(path, config, authorization=f"Bearer {TOKEN}") == 0
    for path in ("/", "/health", "/ready"):
        assert refused(path, config) == 0


def test_pages_of_others_and_foreign_names_are_refused():
    config = ServingConfig(hosts=("127.0.0.1", "localhost", "[::1]"))
    for host in ("127.0.0.1:8000", "localhost", "LOCALHOST:8000", "[::1]:8000", "[::1]"):
        assert refused("/v1/detect", config, host=host) == 0
        assert refused("/v1/detect", config, host=host, origin=f"http://{host}") == 0
        assert refused("/v1/detect", config, host=host, origin="http://evil.example") == 403
        assert refused("/v1/detect", config, host=host, origin="null") == 403
    for host in ("evil.example", "127.0.0.1.evil.example:8000", "", "[::2]"):
        assert refused("/", config, host=host) == 403


def test_a_port_is_no_part_of_a_name():
    assert host_name("A.b:80") == "a.b"
    assert host_name("[::1]:80") == "[::1]"
    assert host_name("[::1]") == "[::1]"
