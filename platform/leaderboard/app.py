"""The leaderboard's read-only application, behind the same guard of Host and Origin as serving.

On loopback it requires no password, like MLflow; off loopback it requires that of MLflow.
"""

from __future__ import annotations

import hashlib
import hmac
import json
from collections.abc import Collection
from email.utils import formatdate
from typing import Annotated, Any

from fastapi import Depends, FastAPI, HTTPException, Request, Response
from fastapi.security import HTTPBasic, HTTPBasicCredentials
from starlette.middleware.gzip import GZipMiddleware

from deta.platform.leaderboard.board import Board, first_rows
from deta.platform.leaderboard.page import leaderboard_page, live_policy
from deta.platform.pages.render import plotly_source
from deta.platform.system.origin_guard import OriginGuard

FIRST_ROWS = 100
USER = "admin"  # as MLflow's
BASIC = HTTPBasic(realm="deta")


def create_app(board: Board, mlflow: str, *, hosts: Collection[str], password: str = "") -> FastAPI:
    """Return the application that serves a board.

    Args:
        mlflow: address of MLflow's pages, for links; empty: no links.
        hosts: accepted names of this server, without ports.
        password: of the user `admin`; empty: none is required.
    """

    def check(given: Annotated[HTTPBasicCredentials, Depends(BASIC)]) -> None:
        found = f"{given.username}:{given.password}".encode()
        if not hmac.compare_digest(found, f"{USER}:{password}".encode()):
            raise HTTPException(401, "no such user or password", {"WWW-Authenticate": "Basic"})

    needed = [Depends(check)] if password else []
    app = FastAPI(dependencies=needed, docs_url=None, redoc_url=None, openapi_url=None)
    app.add_middleware(GZipMiddleware, minimum_size=2000, compresslevel=1)
    app.add_middleware(OriginGuard, hosts=hosts)

    @app.get("/")
    def page() -> Response:
        content = first_rows(board.content, FIRST_ROWS)
        headers = {"Content-Security-Policy": live_policy()}
        return Response(leaderboard_page(content, mlflow, is_live=True), 200, headers, "text/html")

    @app.get("/rows")
    def rows(request: Request) -> Response:
        content: dict[str, Any] = board.content
        body = json.dumps(content | {"refreshed_s": 0}, separators=(",", ":")).encode()
        tag = f'"{hashlib.sha256(body).hexdigest()[:32]}"'
        headers = {"ETag": tag, "Last-Modified": formatdate(content["refreshed_s"], usegmt=True)}
        if request.headers.get("If-None-Match") == tag:
            return Response(None, 304, headers)
        body = json.dumps(content, separators=(",", ":")).encode()
        return Response(body, 200, headers, "application/json")

    @app.get("/health")
    def health() -> Response:
        return Response("OK", media_type="text/plain")

    @app.get("/plotly.js")
    def plotly() -> Response:
        headers = {"Cache-Control": "max-age=86400"}
        return Response(plotly_source(), 200, headers, "text/javascript")

    return app
