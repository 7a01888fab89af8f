"""The token of a service: read from a file or a variable, refused if unsafe."""

from __future__ import annotations

from pathlib import Path

import pytest

from deta.platform.serving.config import TOKEN_VARIABLE, ServingConfig, read_token

TOKEN = "0123456789abcdef0123456789abcdef"


def test_a_token_file_that_others_can_read_is_refused(tmp_path: Path):
    file = tmp_path / "token"
    file.write_text(TOKEN + "\n")
    file.chmod(0o600)
    assert read_token(file) == TOKEN
    file.chmod(0o640)
    with pytest.raises(ValueError, match="chmod 600"):
        read_token(file)


@pytest.mark.parametrize("content", ["", "short", "with a space in it 0123456789", "ü" * 40])
def test_an_invalid_token_is_refused_and_not_shown(tmp_path: Path, content: str):
    file = tmp_path / "token"
    file.write_text(content)
    file.chmod(0o600)
    with pytest.raises(ValueError, match="openssl rand") as caught:
        read_token(file)
    assert not content or content not in str(caught.value)


def test_the_variable_is_used_without_a_file(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv(TOKEN_VARIABLE, raising=False)
    assert read_token(None) == ""
    monkeypatch.setenv(TOKEN_VARIABLE, TOKEN)
    assert read_token(None) == TOKEN


def test_limits_of_zero_are_refused():
    with pytest.raises(ValueError, match="max_batch"):
        ServingConfig(max_batch=0)
    with pytest.raises(ValueError, match="read_timeout_s"):
        ServingConfig(read_timeout_s=0)
