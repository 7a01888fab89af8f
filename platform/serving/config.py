"""The limits of a detection service, and its token.

A service reads what strangers send, so each limit has the reason for its default.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import stat
from dataclasses import asdict, dataclass
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
    batch_wait_s: float = 0.005  # the first image of a batch waits for others
    max_requests: int = 32  # concurrent, from first byte to response; more get 503
    decoders: int = 2  # threads that decode and resize
    read_timeout_s: float = 15.0  # for the body of a request to arrive
    answer_timeout_s: float = 30.0  # from the last byte of the body to the response
    stuck_s: float = 120.0  # a batch that takes longer makes the process unhealthy
    poll_s: float = 10.0  # between two checks of an alias
    token_sha256: str = ""  # of the token that requests need; empty: none
    hosts: tuple[str, ...] = ()  # accepted Host names; empty: all

    def __post_init__(self) -> None:
        if self.batch_wait_s < 0:
            raise ValueError(f"batch_wait_s={self.batch_wait_s} must be at least 0")
        for key, value in asdict(self).items():
            if isinstance(value, int | float) and value <= 0 and key != "batch_wait_s":
                raise ValueError(f"{key}={value} must be above 0")

    def accepts_token(self, token: str) -> bool:
        """Return whether a request with this token, or with none (empty), is allowed."""
        return not self.token_sha256 or hmac.compare_digest(token_hash(token), self.token_sha256)


def token_hash(token: str) -> str:
    """Return the SHA-256 of a token. Other processes, and so Ray's logs, get only this."""
    return hashlib.sha256(token.encode("utf-8", "surrogateescape")).hexdigest()


def read_token(file: Path | None) -> str:
    """Return the token from a file, else from the variable DETA_SERVE_TOKEN; empty if unset.

    Raises:
        ValueError: others can read the file, or its content is no valid token.
    """
    if file is None:
        token = os.environ.get(TOKEN_VARIABLE, "").strip()
        if not token:
            return ""
    else:
        try:
            with file.open("rb") as stream:
                mode = os.fstat(stream.fileno()).st_mode
                token = stream.read(MAX_TOKEN_FILE + 1).decode("utf-8", "replace").strip()
        except OSError as error:
            raise ValueError(f"{file}: cannot be read: {error.strerror}") from error
        if mode & (stat.S_IRWXG | stat.S_IRWXO):
            raise ValueError(f"{file}: other accounts can read it; chmod 600 {file}")
    printable = token.isascii() and token.isprintable() and " " not in token
    if not MIN_TOKEN <= len(token) <= MAX_TOKEN_FILE or not printable:
        raise ValueError(
            f"{file or TOKEN_VARIABLE}: a token has at least {MIN_TOKEN} printable ASCII "
            f"characters and no space (this one has {len(token)} characters); make one with: "
            "openssl rand -hex 32"
        )
    return token
