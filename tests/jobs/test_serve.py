"""The command line of the service: what it refuses before it opens a port."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from deta.jobs import serve
from deta.platform.serving.config import TOKEN_VARIABLE
from tests.jobs.in_process import run_job
from tests.platform.serving.serving_case import tiny_checkpoint


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("job") / "run")


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Return the message with which it exits 2."""

    def refused(*arguments: object) -> str:
        assert run_job(serve, *arguments) == 2
        return capsys.readouterr().err

    return refused


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.7"])
def test_others_are_let_in_with_a_token_only(monkeypatch, refused, checkpoint: Path, host: str):
    monkeypatch.delenv(TOKEN_VARIABLE, raising=False)
    output = refused(checkpoint, "--host", host, "--without-ray")
    assert "--token-file" in output


def test_a_token_that_others_can_read_is_refused(refused, checkpoint, tmp_path: Path):
    file = tmp_path / "token"
    file.write_text("0123456789abcdef0123")
    file.chmod(0o644)
    output = refused(checkpoint, "--token-file", file)
    assert "chmod 600" in output
    assert "0123456789abcdef0123" not in output


def test_what_is_no_model_is_refused(refused, tmp_path: Path):
    assert "no such file" in refused(tmp_path / "missing")
    assert "names no version" in refused("models:/deta@a/b")


@pytest.mark.parametrize(
    "arguments",
    [("--max-batch", "0"), ("--port", "0"), ("--port", "70000"), ("--replicas", "0")],
    ids=" ".join,
)
def test_numbers_that_make_no_sense_are_refused(refused, checkpoint, arguments):
    assert "error:" in refused(checkpoint, *arguments)
