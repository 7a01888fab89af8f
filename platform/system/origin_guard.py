"""Check Host, Origin and token of a request, and add security headers to each response.

Any page in a browser on this machine can send requests to a service on loopback. So the Host must
be a name of this machine, which a foreign name that resolves to it (DNS rebinding) is not, and
requests from pages of another origin are refused. If other machines can reach the service, each
request needs the token, except for paths that reveal nothing.

Starlette's TrustedHostMiddleware could do the first part alone, and it answers 400 as plain text,
not 403 in the form of the service's other refusals.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Collection, Mapping
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

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


class Refusal(HTTPException):
    """A request that is refused.

    Its response has an HTTP status, one word for programs (`kind`), the same for every request with
    this fault, and a sentence for people: what was found, and what to do.
    """

    def __init__(
        self, status: int, kind: str, detail: str, headers: Mapping[str, str] | None = None
    ) -> None:
        super().__init__(status, detail, headers)
        self.kind = kind

    def response(self) -> JSONResponse:
        body = {"error": self.kind, "detail": self.detail}
        return JSONResponse(body, self.status_code, self.headers)


class OriginGuard:
    """ASGI middleware around a whole application."""

    def __init__(
        self,
        app: ASGIApp,
        hosts: Collection[str] = (),
        accepts_token: Callable[[str], bool] = lambda token: True,
    ) -> None:
        """
        Args:
            hosts: accepted Host names without port, in lower case; empty: all.
            accepts_token: whether a request with this token, or with none (empty), is allowed.
        """
        self.app, self.hosts, self.accepts_token = app, hosts, accepts_token

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
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
            self.check(scope["path"], Headers(scope=scope))
            await self.app(scope, receive, send_guarded)
        except Refusal as refusal:
            await refusal.response()(scope, receive, send_guarded)
        except Exception:
            log.exception("%s %s", scope["method"], scope["path"])
            if has_started:
                raise
            failure = Refusal(500, "internal", "an error of the service; see its log")
            await failure.response()(scope, receive, send_guarded)

    def check(self, path: str, headers: Mapping[str, str]) -> None:
        """Check a request's Host, Origin and token.

        Raises:
            Refusal: 401 or 403.
        """
        host = headers.get("host", "")
        if self.hosts and re.sub(r":\d+$", "", host).lower() not in self.hosts:
            known = " or ".join(self.hosts)
            raise Refusal(403, "host", f"no service for the host {host[:80]!r}; use {known}")
        origin = headers.get("origin")
        if origin is not None and urlsplit(origin).netloc != host:
            raise Refusal(403, "origin", f"a page of {origin[:80]!r} may not call this service")
        scheme, _, token = headers.get("authorization", "").partition(" ")
        token = token.strip() if scheme.lower() == "bearer" else ""
        if path not in OPEN_PATHS and not self.accepts_token(token):
            detail = "send the service's token: Authorization: Bearer …"
            raise Refusal(401, "token", detail, {"WWW-Authenticate": "Bearer"})
