"""Check Host, Origin and token of a request, and add security headers to each response.

Any page in a browser on this machine can send requests to a service on loopback. So the Host must
be a name of this machine, which a foreign name that resolves to it (DNS rebinding) is not, and
requests from pages of another origin are refused. If other machines can reach the service, each
request needs the token, except for paths that reveal nothing.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from deta.platform.serving.config import Refusal, ServingConfig

log = logging.getLogger(__name__)

# The page and the description are the same for every service; the page asks for the token.
OPEN_PATHS = frozenset({"/", "/health", "/ready", "/openapi.json"})
# The response of a page replaces the last one.
HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-store",
    "Content-Security-Policy": "default-src 'none'; frame-ancestors 'none'",
}


class OriginGuard:
    """ASGI middleware around the whole application."""

    def __init__(self, app: ASGIApp, config: ServingConfig) -> None:
        self.app, self.config = app, config

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            if scope["type"] == "websocket":
                await send({"type": "websocket.close", "code": 1008})
            else:
                await self.app(scope, receive, send)
            return
        has_started = False

        async def send_guarded(message: Message) -> None:
            nonlocal has_started
            if message["type"] == "http.response.start":
                has_started = True
                headers = MutableHeaders(scope=message)
                for name, value in HEADERS.items():
                    headers.setdefault(name, value)
            await send(message)

        try:
            check_request(scope["path"], Headers(scope=scope), self.config)
            await self.app(scope, receive, send_guarded)
        except Refusal as refusal:
            await send_refusal(refusal, send_guarded)
        except Exception:
            log.exception("%s %s", scope["method"], scope["path"])
            if has_started:
                raise
            await send_refusal(
                Refusal(500, "internal", "an error of the service; see its log"),
                send_guarded,
            )


def check_request(path: str, headers: Mapping[str, str], config: ServingConfig) -> None:
    """Check a request's Host, Origin and token.

    Raises:
        Refusal: 401 or 403.
    """
    host = headers.get("host", "")
    if config.hosts and host_name(host) not in config.hosts:
        raise Refusal(
            403, "host", f"no service for the host {host[:80]!r}; use {' or '.join(config.hosts)}"
        )
    origin = headers.get("origin")
    if origin is not None and urlsplit(origin).netloc != host:
        raise Refusal(403, "origin", f"a page of {origin[:80]!r} may not call this service")
    if path in OPEN_PATHS:
        return
    scheme, _, token = headers.get("authorization", "").partition(" ")
    if not config.accepts_token(token.strip() if scheme.lower() == "bearer" else ""):
        raise Refusal(
            401,
            "token",
            "send the service's token: Authorization: Bearer …",
            {"WWW-Authenticate": "Bearer"},
        )


def host_name(host: str) -> str:
    """Return a Host header without its port, in lower case."""
    name, _, port = host.rpartition(":")
    if name and port.isdecimal():
        return name.lower()
    return host.lower()


async def send_refusal(refusal: Refusal, send: Send) -> None:
    """Send the response of a refusal."""
    body = json.dumps(refusal.body()).encode()
    headers = {
        "Content-Type": "application/json",
        "Content-Length": str(len(body)),
        **refusal.headers,
    }
    raw = [(name.lower().encode(), value.encode("latin-1")) for name, value in headers.items()]
    await send({"type": "http.response.start", "status": refusal.status, "headers": raw})
    await send({"type": "http.response.body", "body": body})
