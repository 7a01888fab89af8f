#!/usr/bin/env python
"""MLflow's pages, the leaderboard, Prometheus and Grafana over the runs of this machine.

  python jobs/dashboards.py                    runs in ~/deta-runs; `make dashboards` is this
  python jobs/dashboards.py STORAGE            runs in another folder
  python jobs/dashboards.py --host 0.0.0.0 --allow-host gpu1:5000 --allow-host gpu1:5050

Everything answers on this machine alone, and its address is printed as soon as it does. Ctrl-C
ends all of it. Prometheus and Grafana are shown where they are installed; the rest needs nothing
besides this project.

With --host, MLflow and the leaderboard can be reached from elsewhere: under the names of
--allow-host and no others, and with a password, which is made once and kept in
STORAGE/dashboards/mlflow-auth. It travels as it is, so put a proxy with TLS in front, which passes
one of the names on as Host. Who sends runs to this MLflow then needs MLFLOW_TRACKING_USERNAME and
MLFLOW_TRACKING_PASSWORD. Prometheus, which knows no passwords, and Grafana stay on this machine.

Where MLFLOW_TRACKING_URI is a server, that one shows the runs and none is started here.
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
    Service,
    ServiceError,
    free_port,
    is_loopback,
    start_service,
)
from deta.platform.system.redaction import mask_text
from deta.platform.tracking.mlflow_server import PORT as MLFLOW_PORT
from deta.platform.tracking.mlflow_server import (
    USER,
    MlflowServer,
    check_hosts,
    password,
    start_mlflow_server,
)

LEADERBOARD = Path(__file__).resolve().parent / "leaderboard.py"
LEADERBOARD_PORT, PROMETHEUS_PORT, GRAFANA_PORT = 5050, 9090, 3000
LOOK_EVERY_S = 1.0


def main() -> NoReturn:
    parser = described_parser(__doc__)
    add_storage_argument(parser)
    parser.add_argument("--host", default="127.0.0.1", help="default: this machine alone")
    parser.add_argument(
        "--allow-host", action="append", default=[], metavar="NAME:PORT",
        help="with --host: what people write into their browsers, exactly",
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
            echo("Ctrl-C ends them")
            return _wait(services)
        finally:  # nothing interrupts the ending
            for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
                signal.signal(number, signal.SIG_IGN)
            echo("ending …")


def _start_all(
    arguments: argparse.Namespace, storage: Path, folder: Path, uri: str, started: ExitStack
) -> list[Service]:
    """Start what there is, and have `started` end it, the last one first."""
    services: list[Service] = []
    password_file = None
    if uri.startswith(("http://", "https://")):
        pages = _without_user(uri)
        if not is_loopback(arguments.host):
            password_file = password(folder)  # of the leaderboard
        echo(f"MLflow       {mask_text(uri)} (MLFLOW_TRACKING_URI; it is not started here)")
    else:
        mlflow = _start_mlflow(arguments, folder, uri)
        started.callback(mlflow.stop)
        services.append(mlflow.service)
        pages, password_file = mlflow.address, mlflow.password_file
        _tell("MLflow", pages, arguments.mlflow_port)
    service, address = _start_leaderboard(arguments, storage, folder, pages, password_file)
    started.callback(service.stop)
    services.append(service)
    _tell("Leaderboard", address, arguments.leaderboard_port)
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
) -> tuple[Service, str]:
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
    service = start_service(
        "the leaderboard", command, folder / "leaderboard.log", lambda: _answers(inner)
    )
    return service, f"http://{name}"


def _start_monitoring(arguments: argparse.Namespace, folder: Path, started: ExitStack) -> None:
    """Prometheus and Grafana; one line instead of each that is not installed."""
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
        _tell("Prometheus", prometheus.url, arguments.prometheus_port)
        port = free_port("127.0.0.1", arguments.grafana_port)
        grafana = start_grafana(folder / "grafana", prometheus.url, port=port)
        started.callback(grafana.close)
        _tell("Grafana", grafana.url, arguments.grafana_port)
        echo(f"             user admin, password in {folder / 'grafana' / 'admin-password'}")
    except NotInstalledError as error:
        echo(str(error))
    except (ServiceError, RuntimeError) as error:  # the rest is of use without
        echo(f"not shown: {mask_text(str(error))}")


def _wait(services: Sequence[Service]) -> int:
    """Until somebody ends it; or until one of these has ended by itself."""
    while True:
        threading.Event().wait(LOOK_EVERY_S)
        for service in services:
            if not service.is_alive():
                raise ServiceError(f"{service.name} has ended:\n{service.last_words()}")


def _names(names: Sequence[str], port: int) -> list[str]:
    """Of the names that were allowed, those for this port; bad ones too, which are refused."""
    return [name for name in names if name.endswith(f":{port}") or ":" not in name]


def _without_user(uri: str) -> str:
    parts = urlsplit(uri)
    return urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2]))


def _tell(name: str, address: str, wanted: int) -> None:
    is_moved = wanted and address.startswith("http://127.0.0.1:")
    is_moved = is_moved and not address.endswith(f":{wanted}")
    echo(f"{name:<12} {address}" + (f" (port {wanted} is taken)" if is_moved else ""))


def _answers(address: str) -> bool:
    try:
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        # Off loopback it answers to its names alone, and wants a password: that is an answer too.
        with opener.open(address, timeout=2):
            return True
    except urllib.error.HTTPError:
        return True
    except (OSError, ValueError):
        return False


if __name__ == "__main__":
    os.umask(0o077)  # databases and logs of this machine's user
    main()
