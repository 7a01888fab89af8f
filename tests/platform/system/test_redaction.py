"""Secrets are replaced; everything else in a text stays as it was."""

from __future__ import annotations

import pytest

from deta.platform.system.redaction import (
    REDACTED,
    holds_secret,
    is_secret_name,
    redact,
    redact_value,
)

KEY = "aB3dE5gH7jK9mN1pQ3sT5vW7yZ9bC1dF"  # no real key; looks like one


@pytest.mark.parametrize(
    ("name", "secret"),
    [
        ("hf_token", True),
        ("aws.secretAccessKey", True),
        ("MLFLOW_TRACKING_PASSWORD", True),
        ("api-key", True),
        ("tokenizer", False),
        ("num_tokens", False),
        ("keyboard", False),
        ("optim.lr", False),
    ],
)
def test_a_name_is_secret_by_its_words(name: str, secret: bool):
    assert is_secret_name(name) is secret


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("postgres://me:hunter22@db/runs", f"postgres://{REDACTED}@db/runs"),
        ("password=hunter22 next", f"password={REDACTED} next"),
        ('{"api_key": "hunter22", "lr": 1}', f'{{"api_key": "{REDACTED}", "lr": 1}}'),
        ("run --token hunter22 --lr 1", f"run --token {REDACTED} --lr 1"),
        ("--hf-token=hunter22", f"--hf-token={REDACTED}"),
        ("Authorization: Bearer abcdefgh12", f"Authorization: {REDACTED} {REDACTED}"),
        (f"the key {KEY} leaked", f"the key {REDACTED} leaked"),
        ("AKIAABCDEFGHIJKLMNOP", REDACTED),
    ],
)
def test_a_secret_is_replaced_and_the_rest_stays(text: str, expected: str):
    assert redact(text) == expected


@pytest.mark.parametrize(
    "text",
    [
        "the secret of good data",
        "/data/coco/train2017/000000000139.jpg",
        "0a1b2c3d4e5f60718293a4b5c6d7e8f90a1b2c3d4e5f60718293a4b5c6d7e8f9",
        "token=None",
        "lines\n\n  with   layout",
    ],
)
def test_ordinary_text_is_unchanged(text: str):
    assert redact(text) == text


def test_the_value_of_a_secret_variable_is_redacted_anywhere(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("MY_SERVICE_PASSWORD", "correct horse")
    monkeypatch.setenv("MY_TOKEN_FILE", "/run/secrets/token")
    assert redact("it was correct horse.") == f"it was {REDACTED}."
    assert redact("read /run/secrets/token") == "read /run/secrets/token"


def test_a_value_is_redacted_by_its_name():
    assert redact_value("hf_token", "abc") == REDACTED
    assert redact_value("hf_token", "None") == "None"
    assert redact_value("lr", "0.1") == "0.1"


@pytest.mark.parametrize(
    ("text", "expected"),
    [("s3://me:pw@bucket/runs", True), ("s3://me@bucket", False), (KEY, False),
     ("https://h/x?access_key=abc", True), ("access_key=abc", False)],
)  # fmt: skip
def test_only_certain_secrets_are_refused(text: str, expected: bool):
    assert holds_secret(text) is expected
