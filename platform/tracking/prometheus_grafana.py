"""Finds, configures and starts Prometheus and Grafana on loopback for the runs of this machine.

Neither is a Python package, and training needs neither. This file starts the installed programs
with the files of `dashboards/`; if one is missing, the error says where to get it.

Every local run may have its own Ray cluster, which lists its metrics ports in a file and renews
that file while it runs. `copy_targets` copies the lists of running clusters to where Prometheus
looks for them, so one Prometheus shows all runs as they come and go. What Ray itself ships
(`ray metrics launch-prometheus`) follows one session, and its Grafana admits everybody.
"""

from __future__ import annotations

import configparser
import json
import os
import re
import shutil
import tempfile
import time
from collections.abc import Iterable, Mapping
from pathlib import Path

from deta.platform.system.atomic_write import write_atomic
from deta.platform.system.child_server import ChildServerError, start_child_server
from deta.platform.system.places import PROJECT_ROOT
from deta.platform.tracking.mlflow_server import Server, answers, ensure_secret

DASHBOARDS = PROJECT_ROOT / "deta" / "dashboards"
TARGETS_FILE = "prom_metrics_service_discovery.json"  # in the folder of a Ray session
TARGETS = "targets"  # beside prometheus.yml, which names it
# The head node renews its list every 5 s. A list this old belongs to a cluster that has ended, and
# another process may use its ports by now.
STALE_S = 60.0
START_WITHIN_S = 60.0
KEEP_DAYS, KEEP_SIZE = 30, "4GB"

PROMETHEUS_MISSING = (
    "Prometheus is not installed. On Debian and Ubuntu: apt-get install prometheus (its service is "
    "not needed: systemctl disable --now prometheus); elsewhere https://prometheus.io/download. If "
    "it is not on the PATH, set DETA_PROMETHEUS=/path/to/prometheus"
)
GRAFANA_MISSING = (
    "Grafana is not installed; this package does not include it because of its licence (AGPL). Get "
    "it from https://grafana.com/grafana/download. If it is not on the PATH, set "
    "DETA_GRAFANA=/path/to/grafana. The dashboards are in dashboards/grafana. Without Grafana, "
    "Prometheus can draw each of their queries"
)


class NotInstalledError(RuntimeError):
    """A program is not on this machine; the message says where to get it."""


def find_prometheus() -> Path:
    """Return the path of Prometheus: `DETA_PROMETHEUS`, or the one on the PATH."""
    return _find("DETA_PROMETHEUS", ("prometheus",), PROMETHEUS_MISSING)


def find_grafana() -> Path:
    """Return the path of Grafana: `DETA_GRAFANA`, or the one on the PATH, also by its old name."""
    return _find("DETA_GRAFANA", ("grafana", "grafana-server"), GRAFANA_MISSING)


def ray_folders() -> list[Path]:
    """Return the folders in which Ray clusters of this machine have their sessions."""
    own = os.environ.get("RAY_TMPDIR")
    found = [Path(own), Path(own) / "ray"] if own else []
    return [*found, Path(tempfile.gettempdir()) / "ray"]


def copy_targets(targets: Path, folders: Iterable[Path]) -> list[str]:
    """Copy the lists of metrics ports of all running Ray clusters; remove those of ended ones.

    Args:
        targets: the folder for the lists, created if it is missing.
        folders: folders that contain `session_…` folders, or a session itself.

    Returns:
        The names of the sessions that are alive.
    """
    targets.mkdir(parents=True, exist_ok=True)
    alive: set[str] = set()
    for folder in folders:
        for path in [folder / TARGETS_FILE, *folder.glob(f"session_*/{TARGETS_FILE}")]:
            session = path.resolve().parent.name  # session_latest is a link to one of them
            try:
                status = path.stat()
                # Anybody may write to /tmp, so only this user's files are used.
                if status.st_uid == os.getuid() and time.time() - status.st_mtime < STALE_S:
                    content = path.read_text(encoding="utf-8")
                    json.loads(content)
                    write_atomic(targets / f"{session}.json", content)
                    alive.add(session)
            except (OSError, ValueError):  # gone, or being written
                continue
    for path in targets.glob("session_*.json"):  # other files may be the user's
        if path.stem not in alive:
            path.unlink()
    return sorted(alive)


def start_prometheus(
    folder: Path, *, port: int = 9090, config: Path = DASHBOARDS / "prometheus" / "prometheus.yml"
) -> Server:
    """Start Prometheus; it scrapes what `copy_targets` writes to `<folder>/targets`.

    It listens on loopback only. It has no passwords, so web pages of other origins must not read
    its answers: only its own origin is allowed.

    Args:
        folder: for its data and a copy of its configuration, which names files beside it.

    Raises:
        NotInstalledError: there is no Prometheus.
        ChildServerError: it did not start, with its output; the port may be taken.
    """
    url = f"http://127.0.0.1:{port}"
    program = find_prometheus()
    (folder / TARGETS).mkdir(parents=True, exist_ok=True)
    command = [str(program), f"--config.file={shutil.copyfile(config, folder / config.name)}"]
    command += [f"--web.listen-address=127.0.0.1:{port}", f"--web.external-url={url}"]
    command += [f"--web.cors.origin={re.escape(url)}"]  # its default is every origin
    command += [f"--storage.tsdb.path={folder / 'data'}", "--log.level=warn"]
    command += [f"--storage.tsdb.retention.time={KEEP_DAYS}d"]
    command += [f"--storage.tsdb.retention.size={KEEP_SIZE}"]
    return _start("Prometheus", command, folder, url, "/-/ready")


def write_grafana_config(folder: Path, *, port: int = 3000) -> Path:
    """Write a copy of `dashboards/grafana/grafana.ini` with local paths and secrets.

    The password of `admin` is in `<folder>/admin-password`, which only its owner may read. It
    stays the same over restarts.
    """
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    # Its values contain $ and %, which have a meaning for Grafana but not here.
    config = configparser.ConfigParser(interpolation=None)
    config.read(DASHBOARDS / "grafana" / "grafana.ini", encoding="utf-8")
    config["server"]["http_port"] = str(port)
    config["paths"]["provisioning"] = str(DASHBOARDS / "grafana" / "provisioning")
    for part in ("data", "logs", "plugins"):
        config["paths"][part] = str(folder / part)
    for key, name in (("admin_password", "admin-password"), ("secret_key", "secret-key")):
        ensure_secret(folder / name)
        (folder / name).chmod(0o600)
        config["security"][key] = f"$__file{{{folder / name}}}"
    path = folder / "grafana.ini"
    with path.open("w", encoding="utf-8") as file:
        config.write(file)
    return path


def start_grafana(folder: Path, prometheus_url: str, *, port: int = 3000) -> Server:
    """Start Grafana on loopback, with the dashboards of `dashboards/grafana`.

    Args:
        folder: for its configuration and data; created if it is missing.
        prometheus_url: `Server.url` of Prometheus.

    Raises:
        NotInstalledError: there is no Grafana.
        ChildServerError: it did not start, with its output.
    """
    program = find_grafana()
    config = write_grafana_config(folder.absolute(), port=port)
    # Its own files: beside the program in an archive, in /usr/share for packages.
    home = program.resolve().parent.parent
    home = home if (home / "conf").is_dir() else Path("/usr/share/grafana")
    command = [str(program), *(["server"] if program.name == "grafana" else [])]
    command += [f"--config={config}", f"--homepath={home}"]
    env = {
        "DETA_PROMETHEUS_URL": prometheus_url,
        "DETA_GRAFANA_DASHBOARDS": str(DASHBOARDS / "grafana"),
    }
    url = f"http://127.0.0.1:{port}"
    server = _start("Grafana", command, folder, url, "/api/health", env)
    return Server(server.service, url, folder / "admin-password")


def _find(variable: str, names: Iterable[str], missing: str) -> Path:
    """
    Raises:
        NotInstalledError: there is no such program.
    """
    if named := os.environ.get(variable):
        if os.access(named, os.X_OK) and Path(named).is_file():
            return Path(named)
        raise NotInstalledError(f"{variable}={named} is not a program. {missing}")
    if found := next(filter(None, map(shutil.which, names)), None):
        return Path(found)
    raise NotInstalledError(missing)


def _start(
    name: str,
    command: list[str],
    folder: Path,
    url: str,
    ready: str,
    env: Mapping[str, str] | None = None,
) -> Server:
    if answers(url + ready):
        raise ChildServerError(f"{name}: something answers at {url} already; choose another port")
    service = start_child_server(
        name, command, folder / f"{name.lower()}.log", lambda: answers(url + ready),
        env=env, within_s=START_WITHIN_S,
    )  # fmt: skip
    return Server(service, url)
