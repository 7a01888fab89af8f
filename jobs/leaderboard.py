#!/usr/bin/env python
"""Show a leaderboard of the runs in MLflow: best AP, interval, cost, recipe, data, champions.

  python jobs/leaderboard.py ~/deta-runs                       a page on http://127.0.0.1:5050
  python jobs/leaderboard.py ~/deta-runs --out leaderboard.html   one self-contained file

The served page shows the best runs at once, the others as MLflow returns them, and follows new
runs. `make dashboards` starts it together with MLflow, Prometheus and Grafana.

MLFLOW_TRACKING_URI names MLflow; the default is the database file in the folder of the runs. Links
lead to MLflow's pages if it is a server, or to the address of --mlflow.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn

from tyro.conf import UseAppendAction

from deta.jobs.command_line import (
    OUTPUT,
    StorageOptions,
    exit_cleanly_on_signals,
    read_options,
    run_tool,
)
from deta.platform.run.run_file import tracking_uri
from deta.platform.system.child_server import is_loopback
from deta.platform.tracking.mlflow_server import host_names

if TYPE_CHECKING:
    from deta.platform.leaderboard.board import Board


@dataclass(frozen=True, kw_only=True)
class LeaderboardOptions(StorageOptions):
    out: Annotated[Path | None, OUTPUT] = None  # write one file and exit
    mlflow: str = ""  # where links point
    port: int = 5050
    host: str = "127.0.0.1"  # default: this machine only
    # Off loopback: the exact address, NAME:PORT, that people type into their browsers.
    allow_host: UseAppendAction[tuple[str, ...]] = ()
    password_file: Path | None = None  # off loopback: password of the user admin


def main() -> NoReturn:
    options = read_options(LeaderboardOptions, __doc__)
    run_tool(lambda: _write(options) if options.out else _serve(options), int)


def _uri(storage: Path) -> str:
    """
    Raises:
        ValueError: there is no database.
    """
    storage = storage.expanduser()
    uri = tracking_uri(storage)
    database = Path(uri.removeprefix("sqlite:///"))
    if uri.startswith("sqlite:///") and not database.is_file():
        raise ValueError(
            f"{database}: there is no MLflow database; give the folder of the runs, or set "
            "MLFLOW_TRACKING_URI"
        )
    return uri


def _write(options: LeaderboardOptions) -> int:
    uri = _uri(options.storage)
    assert options.out is not None
    if options.out.is_dir():
        raise ValueError(f"{options.out}: is a folder; name the file to write")
    from deta.platform.leaderboard.board import Board
    from deta.platform.leaderboard.mlflow_source import MlflowSource
    from deta.platform.leaderboard.page import leaderboard_page
    from deta.platform.system.atomic_write import write_atomic

    board = Board(uri)
    board.refresh(MlflowSource(uri))
    options.out.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(options.out, leaderboard_page(board.content, options.mlflow or uri))
    print(f"{len(board.content['rows'])} runs: {options.out}", flush=True)
    return 0


def _serve(options: LeaderboardOptions) -> int:
    exit_cleanly_on_signals()
    uri = _uri(options.storage)
    host, password = options.host, ""
    names = host_names(host, options.port, options.allow_host)
    port = int(names[0].rpartition(":")[2]) if is_loopback(host) else options.port
    if not is_loopback(host):
        if options.password_file is None:
            raise ValueError(
                f"--host {host}: others can reach it, so it needs --password-file; "
                "`make dashboards` creates one, together with MLflow's"
            )
        password = options.password_file.read_text(encoding="ascii").strip()
        if len(password) < 16:
            raise ValueError(f"{options.password_file}: a password has at least 16 characters")
    import uvicorn

    from deta.platform.leaderboard.app import create_app
    from deta.platform.leaderboard.board import Board
    from deta.platform.system.patient_http import KEEP_ALIVE_S, MAX_CONNECTIONS, patient_protocol

    folder = options.storage.expanduser() / "dashboards"
    folder.mkdir(parents=True, exist_ok=True)
    board = Board(uri, folder)
    hosts = [name.rpartition(":")[0].lower() for name in names]
    app = create_app(board, options.mlflow or uri, hosts=hosts, password=password)
    # Importing MLflow takes seconds; meanwhile the page shows the copy of the last start.
    threading.Thread(target=_follow, args=(board, uri), daemon=True).start()
    moved = "" if port == options.port else f" (port {options.port} is taken)"
    print(f"leaderboard: http://{names[0]}{moved}", flush=True)
    uvicorn.run(
        app,
        host=host,
        port=port,
        log_level="error",
        server_header=False,
        ws="none",
        timeout_graceful_shutdown=2,
        limit_concurrency=MAX_CONNECTIONS,
        timeout_keep_alive=int(KEEP_ALIVE_S),
        http=patient_protocol(),
    )
    return 0


def _follow(board: Board, uri: str) -> None:
    from deta.platform.leaderboard.mlflow_source import MlflowSource

    board.follow(MlflowSource(uri), threading.Event())


if __name__ == "__main__":
    main()
