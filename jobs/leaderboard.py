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

import argparse
import logging
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from deta.jobs.command_line import (
    add_storage_argument,
    described_parser,
    exit_cleanly_on_signals,
)
from deta.platform.run.run_file import tracking_uri
from deta.platform.system.child_server import is_loopback
from deta.platform.tracking.mlflow_server import host_names

if TYPE_CHECKING:
    from deta.platform.leaderboard.board import Board

PORT = 5050


def main() -> NoReturn:
    parser = described_parser(__doc__)
    add_storage_argument(parser)
    parser.add_argument("--out", type=Path, metavar="FILE", help="write one file and exit")
    parser.add_argument("--mlflow", metavar="ADDRESS", default="", help="where links point")
    parser.add_argument("--port", type=int, default=PORT, help=f"default {PORT}")
    parser.add_argument("--host", default="127.0.0.1", help="default: this machine only")
    parser.add_argument(
        "--allow-host", action="append", default=[], metavar="NAME:PORT",
        help="off loopback: the exact address that people type into their browsers",
    )  # fmt: skip
    parser.add_argument(
        "--password-file",
        type=Path,
        metavar="FILE",
        help="off loopback: password of the user admin",
    )
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    exit_cleanly_on_signals()
    try:
        sys.exit(_write(arguments) if arguments.out is not None else _serve(arguments))
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except (RuntimeError, OSError) as error:
        print(f"failed: {error}", file=sys.stderr)
        sys.exit(1)


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


def _write(arguments: argparse.Namespace) -> int:
    uri = _uri(arguments.storage)
    if arguments.out.is_dir():
        raise ValueError(f"{arguments.out}: is a folder; name the file to write")
    from deta.platform.leaderboard.board import Board
    from deta.platform.leaderboard.mlflow_source import MlflowSource
    from deta.platform.leaderboard.page import leaderboard_page
    from deta.platform.system.atomic_write import write_atomic

    board = Board(uri)
    board.refresh(MlflowSource(uri))
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(arguments.out, leaderboard_page(board.content, arguments.mlflow or uri))
    print(f"{len(board.content['rows'])} runs: {arguments.out}", flush=True)
    return 0


def _serve(arguments: argparse.Namespace) -> int:
    uri = _uri(arguments.storage)
    host, password = arguments.host, ""
    names = host_names(host, arguments.port, arguments.allow_host)
    port = int(names[0].rpartition(":")[2]) if is_loopback(host) else arguments.port
    if not is_loopback(host):
        if arguments.password_file is None:
            raise ValueError(
                f"--host {host}: others can reach it, so it needs --password-file; "
                "`make dashboards` creates one, together with MLflow's"
            )
        password = arguments.password_file.read_text(encoding="ascii").strip()
        if len(password) < 16:
            raise ValueError(f"{arguments.password_file}: a password has at least 16 characters")
    import uvicorn

    from deta.platform.leaderboard.app import create_app
    from deta.platform.leaderboard.board import Board

    folder = arguments.storage.expanduser() / "dashboards"
    folder.mkdir(parents=True, exist_ok=True)
    board = Board(uri, folder)
    hosts = [name.rpartition(":")[0].lower() for name in names]
    app = create_app(board, arguments.mlflow or uri, hosts=hosts, password=password)
    # Importing MLflow takes seconds; meanwhile the page shows the copy of the last start.
    threading.Thread(target=_follow, args=(board, uri), daemon=True).start()
    moved = "" if port == arguments.port else f" (port {arguments.port} is taken)"
    print(f"leaderboard: http://{names[0]}{moved}", flush=True)
    uvicorn.run(
        app,
        host=host,
        port=port,
        log_level="error",
        server_header=False,
        ws="none",
        timeout_graceful_shutdown=2,
    )
    return 0


def _follow(board: Board, uri: str) -> None:
    from deta.platform.leaderboard.mlflow_source import MlflowSource

    board.follow(MlflowSource(uri), threading.Event())


if __name__ == "__main__":
    main()
