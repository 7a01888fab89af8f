"""The limits of a detection service, its token, and the exception for a refused request.

A service reads what strangers send, so each limit has the reason for its default. A `Refusal` has
an HTTP status, one word for programs, which is also a label of the metrics, and a sentence for
people.
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

    max_bytes: int = 20_000_000  # of one image; a camera's largest JPEG has about 15 MB
    max_pixels: int = 25_000_000  # of one image; each active decoder holds 3 bytes per pixel
    max_batch: int = 8  # images per batch, all of one size
    batch_wait_s: float = 0.005  # how long the first image of a batch waits for others
    max_requests: int = 32  # concurrent, from first byte to response; more get 503
    decoders: int = 2  # threads that decode and resize
    read_timeout_s: float = 15.0  # for the body of a request to arrive
    answer_timeout_s: float = 30.0  # from the last byte of the body to the response
    stuck_s: float = 120.0  # a batch that takes longer makes the process unhealthy
    poll_s: float = 10.0  # between two checks of an alias
    token_sha256: str = ""  # of the token that requests need; empty: none
    hosts: tuple[str, ...] = ()  # accepted Host names; empty: all

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
        """Return whether a request with this token, or with none (empty), is allowed."""
        if not self.token_sha256:
            return True
        return hmac.compare_digest(token_hash(token), self.token_sha256)


class Refusal(Exception):
    """A request that is refused, with its HTTP response."""

    def __init__(
        self, status: int, kind: str, detail: str, headers: Mapping[str, str] | None = None
    ) -> None:
        """
        Args:
            status: of HTTP.
            kind: one word, the same for every request with this fault.
            detail: what was found and what to do.
            headers: of the response.
        """
        super().__init__(detail)
        self.status, self.kind, self.detail = status, kind, detail
        self.headers = dict(headers or {})

    def __str__(self) -> str:
        return f"{self.status} {self.kind}: {self.detail}"

    def body(self) -> dict[str, str]:
        """Return the body of the response, for JSON."""
        return {"error": self.kind, "detail": self.detail}


def token_hash(token: str) -> str:
    """Return the SHA-256 of a token. Other processes, and so Ray's logs, get only this."""
    return hashlib.sha256(token.encode("utf-8", "surrogateescape")).hexdigest()


def read_token(file: Path | None) -> str:
    """Return the token from a file, else from the variable DETA_SERVE_TOKEN; empty if unset.

    Raises:
        ValueError: others can read the file, or its content is no valid token.
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
        raise ValueError(f"{file}: other accounts can read it; chmod 600 {file}")
    if len(content) > MAX_TOKEN_FILE:
        raise ValueError(f"{file}: is too long for a token")
    return content.decode("utf-8", "replace").strip()
