"""Before a request is read: who may ask, and what every answer says to a browser.

A service on this machine alone can still be reached by any page that its user's browser has open.
So a browser must come by a name of this machine, which a foreign name that was made to lead here
(DNS rebinding) is not, and a page of another origin is refused. Where others can reach the service,
each request must bring the token, except for what gives nothing away.
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

# The page and the description are the same everywhere; the page asks its user for the token.
OPEN_PATHS = frozenset({"/", "/health", "/ready", "/openapi.json"})
HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-store",
    "Content-Security-Policy": "default-src 'none'; frame-ancestors 'none'",  # but the page's own
}


class Guard:
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
        has_begun = False

        async def send_guarded(message: Message) -> None:
            nonlocal has_begun
            if message["type"] == "http.response.start":
                has_begun = True
                headers = MutableHeaders(scope=message)
                for name, value in HEADERS.items():
                    headers.setdefault(name, value)
            await send(message)

        try:
            check(scope["path"], Headers(scope=scope), self.config)
            await self.app(scope, receive, send_guarded)
        except Refusal as refusal:
            await send_refusal(refusal, send_guarded)
        except Exception:
            log.exception("%s %s", scope["method"], scope["path"])
            if has_begun:
                raise
            await send_refusal(
                Refusal(500, "internal", "this is the service's fault; its log says more"),
                send_guarded,
            )


def check(path: str, headers: Mapping[str, str], config: ServingConfig) -> None:
    """
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
    """A Host header without its port, in lower case."""
    name, _, port = host.rpartition(":")
    if name and port.isdecimal():
        return name.lower()
    return host.lower()


async def send_refusal(refusal: Refusal, send: Send) -> None:
    body = json.dumps(refusal.body()).encode()
    headers = {
        "Content-Type": "application/json",
        "Content-Length": str(len(body)),
        **refusal.headers,
    }
    raw = [(name.lower().encode(), value.encode("latin-1")) for name, value in headers.items()]
    await send({"type": "http.response.start", "status": refusal.status, "headers": raw})
    await send({"type": "http.response.body", "body": body})
