#!/usr/bin/env python
"""Start MLflow's pages, the leaderboard, Prometheus and Grafana for the runs of this machine.

  python jobs/dashboards.py                    runs in ~/deta-runs; `make dashboards` is this
  python jobs/dashboards.py STORAGE            runs in another folder
  python jobs/dashboards.py --host 0.0.0.0 --allow-host gpu1:5000 --allow-host gpu1:5050

All servers listen on this machine only. Each address is printed when its server answers. Ctrl-C
stops all of them. Prometheus and Grafana start if they are installed; the rest needs nothing
but this project.

With --host, MLflow and the leaderboard can be reached from other machines: under the names of
--allow-host and no others, and with a password, which is created once and stored in
STORAGE/dashboards/mlflow-auth. It is sent in clear text, so use a proxy with TLS that passes on one
of the names as Host. Clients that send runs to this MLflow then need MLFLOW_TRACKING_USERNAME and
MLFLOW_TRACKING_PASSWORD. Prometheus, which has no passwords, and Grafana stay on this machine.

If MLFLOW_TRACKING_URI names a server, that server shows the runs and none is started here.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import threading
import urllib.error
import urllib.request
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import NoReturn
from urllib.parse import urlsplit, urlunsplit

from deta.jobs.command_line import (
    add_storage_argument,
    described_parser,
    echo,
    exit_cleanly_on_signals,
)
from deta.platform.run.run_file import tracking_uri
from deta.platform.system.child_server import (
    ChildServer,
    ChildServerError,
    free_port,
    is_loopback,
    start_child_server,
)
from deta.platform.system.redaction import redact
from deta.platform.tracking.mlflow_server import PORT as MLFLOW_PORT
from deta.platform.tracking.mlflow_server import (
    USER,
    MlflowServer,
    check_hosts,
    ensure_password_file,
    start_mlflow_server,
)

LEADERBOARD = Path(__file__).resolve().parent / "leaderboard.py"
LEADERBOARD_PORT, PROMETHEUS_PORT, GRAFANA_PORT = 5050, 9090, 3000
POLL_INTERVAL_S = 1.0


def main() -> NoReturn:
    parser = described_parser(__doc__)
    add_storage_argument(parser)
    parser.add_argument("--host", default="127.0.0.1", help="default: this machine only")
    parser.add_argument(
        "--allow-host", action="append", default=[], metavar="NAME:PORT",
        help="with --host: the exact address that people type into their browsers",
    )  # fmt: skip
    for name, port in (
        ("mlflow", MLFLOW_PORT), ("leaderboard", LEADERBOARD_PORT),
        ("prometheus", PROMETHEUS_PORT), ("grafana", GRAFANA_PORT),
    ):  # fmt: skip
        parser.add_argument(f"--{name}-port", type=int, default=port, help=f"default {port}")
    arguments = parser.parse_args()
    exit_cleanly_on_signals()
    try:
        sys.exit(_run(arguments))
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except (RuntimeError, OSError) as error:
        print(f"failed: {error}", file=sys.stderr)
        sys.exit(1)


def _run(arguments: argparse.Namespace) -> int:
    storage = arguments.storage.expanduser().resolve()
    folder = storage / "dashboards"
    folder.mkdir(parents=True, exist_ok=True)
    uri = tracking_uri(storage)
    with ExitStack() as started:
        try:
            services = _start_all(arguments, storage, folder, uri, started)
            echo("Ctrl-C stops them")
            return _wait(services)
        finally:  # no signal interrupts the shutdown
            for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
                signal.signal(number, signal.SIG_IGN)
            echo("stopping …")


def _start_all(
    arguments: argparse.Namespace, storage: Path, folder: Path, uri: str, started: ExitStack
) -> list[ChildServer]:
    """Start all servers that are installed; `started` stops them in reverse order."""
    services: list[ChildServer] = []
    password_file = None
    if uri.startswith(("http://", "https://")):
        pages = _without_user(uri)
        if not is_loopback(arguments.host):
            password_file = ensure_password_file(folder)  # for the leaderboard
        echo(f"MLflow       {redact(uri)} (MLFLOW_TRACKING_URI; it is not started here)")
    else:
        mlflow = _start_mlflow(arguments, folder, uri)
        started.callback(mlflow.stop)
        services.append(mlflow.service)
        pages, password_file = mlflow.address, mlflow.password_file
        _print_address("MLflow", pages, arguments.mlflow_port)
    service, address = _start_leaderboard(arguments, storage, folder, pages, password_file)
    started.callback(service.stop)
    services.append(service)
    _print_address("Leaderboard", address, arguments.leaderboard_port)
    if password_file is not None:
        echo(f"             user {USER}, password in {password_file}")
    _start_monitoring(arguments, folder, started)
    return services


def _start_mlflow(arguments: argparse.Namespace, folder: Path, uri: str) -> MlflowServer:
    return start_mlflow_server(
        uri,
        folder,
        host=arguments.host,
        port=arguments.mlflow_port,
        allowed_hosts=_names(arguments.allow_host, arguments.mlflow_port),
    )


def _start_leaderboard(
    arguments: argparse.Namespace,
    storage: Path,
    folder: Path,
    mlflow: str,
    password_file: Path | None,
) -> tuple[ChildServer, str]:
    host = arguments.host
    port = free_port(host, arguments.leaderboard_port)
    name = f"127.0.0.1:{port}"
    command = [sys.executable, str(LEADERBOARD), str(storage), f"--host={host}", f"--port={port}"]
    command += [f"--mlflow={mlflow}"]
    if not is_loopback(host):
        if port != arguments.leaderboard_port:
            raise ValueError(f"--leaderboard-port {arguments.leaderboard_port} is taken")
        names = check_hosts(host, port, _names(arguments.allow_host, arguments.leaderboard_port))
        name = names[0]
        command += [f"--allow-host={one}" for one in names]
        command += [f"--password-file={password_file}"]
    inner = f"http://{'127.0.0.1' if host in ('0.0.0.0', 'localhost') else host}:{port}/health"
    service = start_child_server(
        "the leaderboard", command, folder / "leaderboard.log", lambda: _answers(inner)
    )
    return service, f"http://{name}"


def _start_monitoring(arguments: argparse.Namespace, folder: Path, started: ExitStack) -> None:
    """Start Prometheus and Grafana; print a line for each one that is not installed."""
    from deta.platform.tracking.prometheus_grafana import (
        NotInstalledError,
        SessionFollower,
        ray_folders,
        start_grafana,
        start_prometheus,
        write_prometheus_config,
    )

    try:
        place = folder / "prometheus"
        config = write_prometheus_config(place)
        port = free_port("127.0.0.1", arguments.prometheus_port)
        prometheus = start_prometheus(place, port=port)
        started.callback(prometheus.close)
        started.enter_context(SessionFollower(config.parent / "targets", ray_folders()))
        _print_address("Prometheus", prometheus.url, arguments.prometheus_port)
        port = free_port("127.0.0.1", arguments.grafana_port)
        grafana = start_grafana(folder / "grafana", prometheus.url, port=port)
        started.callback(grafana.close)
        _print_address("Grafana", grafana.url, arguments.grafana_port)
        echo(f"             user admin, password in {folder / 'grafana' / 'admin-password'}")
    except NotInstalledError as error:
        echo(str(error))
    except (ChildServerError, RuntimeError) as error:  # the other servers work without
        echo(f"not started: {redact(str(error))}")


def _wait(services: Sequence[ChildServer]) -> int:
    """Wait until interrupted, or until one of the servers has ended by itself."""
    while True:
        threading.Event().wait(POLL_INTERVAL_S)
        for service in services:
            if not service.is_alive():
                raise ChildServerError(f"{service.name} has ended:\n{service.log_tail()}")


def _names(names: Sequence[str], port: int) -> list[str]:
    """Return the allowed names for this port, and malformed ones, which are refused later."""
    return [name for name in names if name.endswith(f":{port}") or ":" not in name]


def _without_user(uri: str) -> str:
    parts = urlsplit(uri)
    return urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2]))


def _print_address(name: str, address: str, wanted: int) -> None:
    is_moved = wanted and address.startswith("http://127.0.0.1:")
    is_moved = is_moved and not address.endswith(f":{wanted}")
    echo(f"{name:<12} {address}" + (f" (port {wanted} is taken)" if is_moved else ""))


def _answers(address: str) -> bool:
    try:
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        # Off loopback the server refuses other names and needs a password: that is an answer too.
        with opener.open(address, timeout=2):
            return True
    except urllib.error.HTTPError:
        return True
    except (OSError, ValueError):
        return False


if __name__ == "__main__":
    os.umask(0o077)  # databases and logs of this machine's user
    main()
