"""What a detection service allows, and how it says no.

Every limit stands here with the reason for its default, because a service reads what strangers
send. A refusal is a `Refusal`: a status of HTTP, one word that a program can switch on and that
counts in the metrics, and a sentence for people.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

TOKEN_VARIABLE = "DETA_SERVE_TOKEN"
MIN_TOKEN = 16  # characters; `openssl rand -hex 32` gives 64
MAX_TOKEN_FILE = 4096  # bytes


@dataclass(frozen=True, kw_only=True)
class ServingConfig:
    """The limits of one process that serves a model."""

    max_bytes: int = 20_000_000  # of one picture; a camera's largest JPEG has about 15 MB
    max_pixels: int = 25_000_000  # of one picture; each decoder at work holds 3 bytes a pixel
    max_batch: int = 8  # pictures that the model sees at once, all of one size
    batch_wait_s: float = 0.005  # so long the first picture of a batch waits for others
    max_requests: int = 32  # between their first byte and their answer; more are sent away
    decoders: int = 2  # threads that decode and resize
    read_timeout_s: float = 15.0  # for a request's body to arrive
    answer_timeout_s: float = 30.0  # from the body's last byte to the answer
    stuck_s: float = 120.0  # a batch that takes longer means that the process is to be replaced
    poll_s: float = 10.0  # how often an alias is looked up
    token_sha256: str = ""  # of the token that requests must bring; none is asked for if empty
    hosts: tuple[str, ...] = ()  # names under which browsers may call; all where empty

    def __post_init__(self) -> None:
        for key in ("max_bytes", "max_pixels", "max_batch", "max_requests", "decoders"):
            if getattr(self, key) < 1:
                raise ValueError(f"{key}={getattr(self, key)} must be at least 1")
        for key in ("read_timeout_s", "answer_timeout_s", "stuck_s", "poll_s"):
            if getattr(self, key) <= 0:
                raise ValueError(f"{key}={getattr(self, key)} must be above 0")
        if self.batch_wait_s < 0:
            raise ValueError(f"batch_wait_s={self.batch_wait_s} must be at least 0")

    def accepts_token(self, token: str) -> bool:
        """Whether a request with this token, or with none (empty), may pass."""
        if not self.token_sha256:
            return True
        return hmac.compare_digest(token_hash(token), self.token_sha256)


class Refusal(Exception):
    """A request that is not answered with detections."""

    def __init__(
        self, status: int, kind: str, detail: str, headers: Mapping[str, str] | None = None
    ) -> None:
        """
        Args:
            status: of HTTP.
            kind: one word; the same for the same fault, whatever the sentence says.
            detail: what was found and what to do.
            headers: of the answer.
        """
        super().__init__(detail)
        self.status, self.kind, self.detail = status, kind, detail
        self.headers = dict(headers or {})

    def __str__(self) -> str:
        return f"{self.status} {self.kind}: {self.detail}"

    def body(self) -> dict[str, str]:
        """What is sent, as JSON."""
        return {"error": self.kind, "detail": self.detail}


def token_hash(token: str) -> str:
    """SHA-256 of a token. Only this is handed on: to other processes, and so to Ray's records."""
    return hashlib.sha256(token.encode("utf-8", "surrogateescape")).hexdigest()


def read_token(file: Path | None) -> str:
    """The token from a file, else from the variable DETA_SERVE_TOKEN; empty where there is none.

    Raises:
        ValueError: others may read the file, or what is in it is no token.
    """
    if file is None:
        token, origin = os.environ.get(TOKEN_VARIABLE, "").strip(), TOKEN_VARIABLE
        if not token:
            return ""
    else:
        token, origin = _token_from(file), str(file)
    if len(token) < MIN_TOKEN or not token.isascii() or not token.isprintable() or " " in token:
        raise ValueError(
            f"{origin}: a token has at least {MIN_TOKEN} printable ASCII characters and no space "
            f"(this one has {len(token)} characters); make one with: openssl rand -hex 32"
        )
    return token


def _token_from(file: Path) -> str:
    try:
        with file.open("rb") as stream:
            mode = os.fstat(stream.fileno()).st_mode
            content = stream.read(MAX_TOKEN_FILE + 1)
    except OSError as error:
        raise ValueError(f"{file}: cannot be read: {error.strerror}") from error
    if mode & (stat.S_IRWXG | stat.S_IRWXO):
        raise ValueError(f"{file}: others may read it; chmod 600 {file}")
    if len(content) > MAX_TOKEN_FILE:
        raise ValueError(f"{file}: is too long for a token")
    return content.decode("utf-8", "replace").strip()
