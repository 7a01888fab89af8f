"""A read-only HTTP server of the leaderboard.

It answers only requests with one of its own host names, so that no web page can reach it through
a foreign name (DNS rebinding). On loopback it requires no password, like MLflow; off loopback it
requires that of MLflow.
"""

from __future__ import annotations

import base64
import gzip
import hmac
import json
import logging
import secrets
import socket
import threading
from collections.abc import Sequence
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from socketserver import TCPServer
from typing import Any
from urllib.parse import parse_qs, urlsplit

from deta.platform.leaderboard.cache import Board
from deta.platform.leaderboard.page import live_page, live_policy
from deta.platform.pages.render import plotly_source

logger = logging.getLogger(__name__)

PORT = 5050
FIRST_ROWS = 100
IDLE_S = 30.0  # before a silent connection is closed
MIN_GZIP_BYTES = 2000
MAX_CONNECTIONS = 64


class LeaderboardServer(ThreadingHTTPServer):
    """Serves a board; `serve_forever` until `shutdown`."""

    daemon_threads = True
    allow_reuse_address = True

    def __init__(
        self,
        board: Board,
        mlflow: str,
        *,
        host: str = "127.0.0.1",
        port: int = PORT,
        allowed_hosts: Sequence[str] = (),
        password: str = "",
    ) -> None:
        """
        Args:
            mlflow: address of MLflow's pages, for links; empty: no links.
            allowed_hosts: accepted Host headers, with ports; default: those of loopback.
            password: of the user `admin`; empty: none is required.

        Raises:
            OSError: the port is taken.
        """
        if ":" in host:
            self.address_family = socket.AF_INET6
        super().__init__((host, port), _Handler)
        port = self.server_address[1]
        self.board, self.mlflow = board, mlflow
        self.allowed_hosts = {*(allowed_hosts or (f"127.0.0.1:{port}", f"localhost:{port}"))}
        token = base64.b64encode(f"admin:{password}".encode()).decode()
        self.authorization = f"Basic {token}".encode() if password else b""
        self.id = secrets.token_hex(8)  # of this process; revisions of another mean nothing
        self._connections = threading.BoundedSemaphore(MAX_CONNECTIONS)

    def server_bind(self) -> None:
        """Bind as HTTPServer does, but without a DNS query for its own name."""
        TCPServer.server_bind(self)
        self.server_name, self.server_port = "leaderboard", self.server_address[1]

    def process_request(self, request: Any, client_address: Any) -> None:
        if not self._connections.acquire(blocking=False):
            self.shutdown_request(request)
            return
        super().process_request(request, client_address)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._connections.release()

    def page(self) -> str:
        content = self.board.changes(0)
        # The first poll, for all changes since revision 0, brings the others.
        content |= {"rows": content["rows"][:FIRST_ROWS], "revision": 0, "is_complete": False}
        return live_page(content, self.mlflow, self.id)


class _Handler(BaseHTTPRequestHandler):
    server: LeaderboardServer
    protocol_version = "HTTP/1.1"
    server_version, sys_version = "leaderboard", ""
    timeout = IDLE_S

    def do_GET(self) -> None:
        server = self.server
        if self.headers.get("Host") not in server.allowed_hosts:
            self._refuse(HTTPStatus.FORBIDDEN, "this Host is no name of this server")
            return
        authorization = self.headers.get("Authorization", "").encode("utf-8", "replace")
        if server.authorization and not hmac.compare_digest(authorization, server.authorization):
            self._refuse(HTTPStatus.UNAUTHORIZED, "the password of MLflow's user admin is needed")
            return
        address = urlsplit(self.path)
        if address.path == "/":
            self._respond("text/html; charset=utf-8", server.page().encode(), live_policy())
        elif address.path == "/rows":
            self._rows(address.query)
        elif address.path == "/health":
            self._respond("text/plain", b"OK")
        elif address.path == "/plotly.js":
            self._plotly()
        else:
            self._refuse(HTTPStatus.NOT_FOUND, "no such path; there are /, /rows and /health")

    do_HEAD = do_GET

    def _rows(self, query: str) -> None:
        parameters = parse_qs(query)
        since = parameters.get("since", ["0"])[0]
        if not since.isdecimal() or len(since) > 15:
            self._refuse(HTTPStatus.BAD_REQUEST, "since: a revision, such as 0")
            return
        if parameters.get("of", [self.server.id])[0] != self.server.id:
            since = "0"
        content = self.server.board.changes(int(since)) | {"of": self.server.id}
        self._respond("application/json", json.dumps(content, separators=(",", ":")).encode())

    def _plotly(self) -> None:
        try:
            source = plotly_source().encode()
        except RuntimeError as error:  # plotly is not installed: the page works without the figure
            self._refuse(HTTPStatus.NOT_FOUND, str(error))
            return
        self._respond("text/javascript; charset=utf-8", source, cache="max-age=86400")

    def _respond(
        self, content_type: str, body: bytes, policy: str = "", cache: str = "no-store"
    ) -> None:
        self.send_response(HTTPStatus.OK)
        if len(body) > MIN_GZIP_BYTES and "gzip" in self.headers.get("Accept-Encoding", ""):
            body = _compressed(body)
            self.send_header("Content-Encoding", "gzip")
        self._send(
            content_type, body, policy or "default-src 'none'; frame-ancestors 'none'", cache
        )

    def _refuse(self, status: HTTPStatus, reason: str) -> None:
        self.send_response(status)
        if status is HTTPStatus.UNAUTHORIZED:
            self.send_header("WWW-Authenticate", 'Basic realm="deta", charset="UTF-8"')
        self._send("text/plain; charset=utf-8", f"{reason}\n".encode(), "default-src 'none'")

    def _send(self, content_type: str, body: bytes, policy: str, cache: str = "no-store") -> None:
        for name, value in (
            ("Content-Type", content_type),
            ("Content-Length", str(len(body))),
            ("Content-Security-Policy", policy),
            ("X-Content-Type-Options", "nosniff"),
            ("X-Frame-Options", "DENY"),
            ("Referrer-Policy", "no-referrer"),
            ("Cross-Origin-Resource-Policy", "same-origin"),
            ("Cache-Control", cache),
            ("Vary", "Accept-Encoding"),
        ):
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        logger.debug(format, *args)


_compressed_bodies: dict[int, bytes] = {}


def _compressed(body: bytes) -> bytes:
    """Return the body compressed; plotly, which is large and constant, only once."""
    if len(body) < 2_000_000:
        return gzip.compress(body, 1, mtime=0)
    key = hash(body)
    if key not in _compressed_bodies:
        _compressed_bodies.clear()
        _compressed_bodies[key] = gzip.compress(body, 6, mtime=0)
    return _compressed_bodies[key]
