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

import itertools
import os
import signal
import sys
import threading
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn
from urllib.parse import urlsplit, urlunsplit

from tyro.conf import UseAppendAction

from deta.jobs.command_line import (
    StorageOptions,
    echo,
    exit_cleanly_on_signals,
    read_options,
    run_tool,
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
from deta.platform.tracking.mlflow_server import (
    PORT,
    USER,
    Server,
    address_here,
    answers,
    ensure_password_file,
    host_names,
    start_mlflow_server,
)
from deta.platform.tracking.prometheus_grafana import (
    TARGETS,
    NotInstalledError,
    copy_targets,
    ray_folders,
    start_grafana,
    start_prometheus,
)

LEADERBOARD = Path(__file__).resolve().parent / "leaderboard.py"
POLL_INTERVAL_S, NUM_POLLS = 1.0, 5  # targets are copied at every fifth poll


@dataclass(frozen=True, kw_only=True)
class DashboardOptions(StorageOptions):
    host: str = "127.0.0.1"  # default: this machine only
    # With --host: the exact address, NAME:PORT, that people type into their browsers.
    allow_host: UseAppendAction[tuple[str, ...]] = ()
    mlflow_port: int = PORT
    leaderboard_port: int = 5050
    prometheus_port: int = 9090
    grafana_port: int = 3000

    def names(self, port: int) -> list[str]:
        """Return the allowed names for this port, and malformed ones, which are refused later."""
        return [name for name in self.allow_host if name.endswith(f":{port}") or ":" not in name]


def main() -> NoReturn:
    options = read_options(DashboardOptions, __doc__)
    run_tool(lambda: _run(options), int)


def _run(options: DashboardOptions) -> NoReturn:
    """Start all servers that are installed, and wait until interrupted, or until one has ended."""
    exit_cleanly_on_signals()
    storage = options.storage.expanduser().resolve()
    folder = storage / "dashboards"
    folder.mkdir(parents=True, exist_ok=True)
    with ExitStack() as started:
        try:
            services = [one.service for one in _start_pages(options, storage, folder, started)]
            _start_monitoring(options, folder, started)
            echo("Ctrl-C stops them")
            for number in itertools.count():
                for service in services:
                    _require_alive(service)
                if number % NUM_POLLS == 0:
                    copy_targets(folder / "prometheus" / TARGETS, ray_folders())
                threading.Event().wait(POLL_INTERVAL_S)
        finally:  # no signal interrupts the shutdown
            for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
                signal.signal(number, signal.SIG_IGN)
            echo("stopping …")
    raise AssertionError("unreachable")


def _start_pages(
    options: DashboardOptions, storage: Path, folder: Path, started: ExitStack
) -> list[Server]:
    """Start MLflow's pages and the leaderboard; `started` stops them in reverse order."""
    servers = []
    uri = tracking_uri(storage)
    password_file = None if is_loopback(options.host) else ensure_password_file(folder)
    if uri.startswith(("http://", "https://")):
        parts = urlsplit(uri)
        pages = urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2]))
        echo(f"MLflow       {redact(uri)} (MLFLOW_TRACKING_URI; it is not started here)")
    else:
        names = options.names(options.mlflow_port)
        mlflow = start_mlflow_server(
            uri, folder, host=options.host, port=options.mlflow_port, allowed_hosts=names
        )
        servers.append(_started("MLflow", mlflow, options.mlflow_port, started))
        pages = mlflow.url
    host, port = options.host, options.leaderboard_port
    names = host_names(host, port, options.names(port))
    here = int(names[0].rpartition(":")[2]) if is_loopback(host) else port
    command = [sys.executable, str(LEADERBOARD), str(storage), f"--mlflow={pages}"]
    command += [f"--host={host}", f"--port={here}"]
    if password_file is not None:
        command += [f"--allow-host={name}" for name in names]
        command += [f"--password-file={password_file}"]
    health = f"{address_here(host, here)}/health"
    log = folder / "leaderboard.log"
    service = start_child_server("the leaderboard", command, log, lambda: answers(health))
    leaderboard = Server(service, f"http://{names[0]}", password_file)
    servers.append(_started("Leaderboard", leaderboard, port, started))
    return servers


def _start_monitoring(options: DashboardOptions, folder: Path, started: ExitStack) -> None:
    """Start Prometheus and Grafana; print a line for the first that is not installed."""
    try:
        port = free_port("127.0.0.1", options.prometheus_port)
        prometheus = start_prometheus(folder / "prometheus", port=port)
        _started("Prometheus", prometheus, options.prometheus_port, started)
        port = free_port("127.0.0.1", options.grafana_port)
        grafana = start_grafana(folder / "grafana", prometheus.url, port=port)
        _started("Grafana", grafana, options.grafana_port, started)
    except NotInstalledError as error:
        echo(str(error))
    except RuntimeError as error:  # the other servers work without
        echo(f"not started: {redact(str(error))}")


def _started(name: str, server: Server, wanted: int, started: ExitStack) -> Server:
    """Print the address of a server, and stop it at the end."""
    started.callback(server.stop)
    is_here = server.url.startswith("http://127.0.0.1:")
    is_moved = wanted and is_here and not server.url.endswith(f":{wanted}")
    echo(f"{name:<12} {server.url}" + (f" (port {wanted} is taken)" if is_moved else ""))
    if server.password_file is not None:
        echo(f"             user {USER}, password in {server.password_file}")
    return server


def _require_alive(service: ChildServer) -> None:
    if not service.is_alive():
        raise ChildServerError(f"{service.name} has ended:\n{service.log_tail()}")


if __name__ == "__main__":
    os.umask(0o077)  # databases and logs of this machine's user
    main()
