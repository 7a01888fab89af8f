"""Finds, configures and starts Prometheus and Grafana on loopback for the runs of this machine.

Neither is a Python package, and training needs neither: a run exports its metrics
(`training/run_metrics.py`) even if nothing reads them. This file starts the installed programs with
the files of `dashboards/`; if one is missing, the error says where to get it.

Every local run may have its own Ray cluster. A cluster lists its metrics ports in a file and
renews that file while it runs. `SessionFollower` copies the lists of running clusters to where
Prometheus looks for targets, so one Prometheus shows all runs as they come and go.
"""

from __future__ import annotations

import configparser
import json
import os
import re
import secrets
import shutil
import tempfile
import threading
import time
import urllib.request
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from deta.platform.system.atomic_write import write_atomic
from deta.platform.system.child_server import ChildServer, ChildServerError, start_child_server
from deta.platform.system.places import PROJECT_ROOT

DASHBOARDS = PROJECT_ROOT / "deta" / "dashboards"
TARGETS_FILE = "prom_metrics_service_discovery.json"  # in the folder of a Ray session
TARGETS = "targets"  # beside prometheus.yml, which names it
# The head node renews its list every 5 s. A list this old belongs to a cluster that has ended, and
# another process may use its ports by now.
STALE_S = 60.0
POLL_EVERY_S = 5.0
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


@dataclass(frozen=True)
class Server:
    """A server on loopback that runs until it is closed or this process ends."""

    service: ChildServer
    url: str

    def close(self) -> None:
        self.service.stop()


def find_prometheus() -> Path:
    """Return the path of Prometheus: `DETA_PROMETHEUS`, or the one on the PATH.

    Raises:
        NotInstalledError: there is none.
    """
    return _find("DETA_PROMETHEUS", ("prometheus",), PROMETHEUS_MISSING)


def find_grafana() -> Path:
    """Return the path of Grafana: `DETA_GRAFANA`, or the one on the PATH, also by its old name.

    Raises:
        NotInstalledError: there is none.
    """
    return _find("DETA_GRAFANA", ("grafana", "grafana-server"), GRAFANA_MISSING)


def ray_folders() -> list[Path]:
    """Return the folders in which Ray clusters of this machine have their sessions."""
    own = os.environ.get("RAY_TMPDIR")
    found = [Path(own), Path(own) / "ray"] if own else []
    return [*found, Path(tempfile.gettempdir()) / "ray"]


def write_prometheus_config(folder: Path) -> Path:
    """Write prometheus.yml and a folder for its targets; return the path of prometheus.yml."""
    (folder / TARGETS).mkdir(parents=True, exist_ok=True)
    path = folder / "prometheus.yml"
    shutil.copyfile(DASHBOARDS / "prometheus" / "prometheus.yml", path)
    return path


class SessionFollower:
    """Copies the lists of metrics ports of all running Ray clusters to a folder.

    A session is alive while its list is renewed. Use it as a context manager, or call `poll`.
    """

    def __init__(self, targets: Path, ray_folders: Sequence[Path]) -> None:
        """
        Args:
            targets: the folder for the lists, from `write_prometheus_config`.
            ray_folders: folders that contain `session_…` folders, or a session itself.
        """
        self.targets, self.ray_folders = targets, list(ray_folders)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._follow, daemon=True)

    def __enter__(self) -> SessionFollower:
        self.poll()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def poll(self) -> list[str]:
        """Update the folder; return the names of the sessions that are alive."""
        alive = self._alive()
        for name, content in alive.items():
            path = self.targets / f"{name}.json"
            if not path.exists() or path.read_text(encoding="utf-8") != content:
                write_atomic(path, content)
        for path in self.targets.glob("session_*.json"):  # other files may be the user's
            if path.stem not in alive:
                path.unlink()
        return sorted(alive)

    def _alive(self) -> dict[str, str]:
        found: dict[str, str] = {}
        for folder in self.ray_folders:
            for path in [folder / TARGETS_FILE, *folder.glob(f"session_*/{TARGETS_FILE}")]:
                session = path.resolve().parent.name  # session_latest is a link to one of them
                try:
                    status = path.stat()
                    # Anybody may write to /tmp, so only this user's files are used.
                    if status.st_uid == os.getuid() and time.time() - status.st_mtime < STALE_S:
                        content = path.read_text(encoding="utf-8")
                        json.loads(content)
                        found[session] = content
                except (OSError, ValueError):  # gone, or being written
                    continue
        return found

    def _follow(self) -> None:
        while not self._stop.wait(POLL_EVERY_S):
            self.poll()


def start_prometheus(folder: Path, *, port: int = 9090) -> Server:
    """Start Prometheus with the configuration in a folder; its data is stored there too.

    It listens on loopback only. It has no passwords, so web pages of other origins must not read
    its answers: only its own origin is allowed.

    Args:
        folder: contains prometheus.yml, from `write_prometheus_config`.
        port: the port it listens on.

    Raises:
        NotInstalledError: there is no Prometheus.
        ChildServerError: it did not start, with its output; the port may be taken.
    """
    url = f"http://127.0.0.1:{port}"
    command = [str(find_prometheus()), f"--config.file={folder / 'prometheus.yml'}"]
    command += [f"--web.listen-address=127.0.0.1:{port}", f"--web.external-url={url}"]
    command += [f"--web.cors.origin={re.escape(url)}"]  # its default is every origin
    command += [f"--storage.tsdb.path={folder / 'data'}", "--log.level=warn"]
    command += [f"--storage.tsdb.retention.time={KEEP_DAYS}d"]
    command += [f"--storage.tsdb.retention.size={KEEP_SIZE}"]
    return _start("Prometheus", command, folder / "prometheus.log", url, "/-/ready")


def write_grafana_config(folder: Path, *, port: int = 3000) -> Path:
    """Write a copy of `dashboards/grafana/grafana.ini` with local paths and secrets.

    The password of `admin` is in `<folder>/admin-password`, which only its owner may read. It
    stays the same over restarts.
    """
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    for name in ("admin-password", "secret-key"):
        _create_secret(folder / name)
    # Its values contain $ and %, which have a meaning for Grafana but not here.
    config = configparser.ConfigParser(interpolation=None)
    config.read(DASHBOARDS / "grafana" / "grafana.ini", encoding="utf-8")
    config["server"]["http_port"] = str(port)
    config["paths"]["provisioning"] = str(DASHBOARDS / "grafana" / "provisioning")
    for part in ("data", "logs", "plugins"):
        config["paths"][part] = str(folder / part)
    config["security"]["admin_password"] = f"$__file{{{folder / 'admin-password'}}}"
    config["security"]["secret_key"] = f"$__file{{{folder / 'secret-key'}}}"
    path = folder / "grafana.ini"
    with path.open("w", encoding="utf-8") as file:
        config.write(file)
    return path


def start_grafana(folder: Path, prometheus_url: str, *, port: int = 3000) -> Server:
    """Start Grafana on loopback, with the dashboards of `dashboards/grafana`.

    Users sign in as `admin` with the password in `<folder>/admin-password`.

    Args:
        folder: for its configuration and data; created if it is missing.
        prometheus_url: `Server.url` of Prometheus.

    Raises:
        NotInstalledError: there is no Grafana.
        ChildServerError: it did not start, with its output.
    """
    program = find_grafana()
    config = write_grafana_config(folder.absolute(), port=port)
    command = [str(program), *(["server"] if program.name == "grafana" else [])]
    command += [f"--config={config}", f"--homepath={_grafana_home(program)}"]
    env = {
        "DETA_PROMETHEUS_URL": prometheus_url,
        "DETA_GRAFANA_DASHBOARDS": str(DASHBOARDS / "grafana"),
    }
    url = f"http://127.0.0.1:{port}"
    return _start("Grafana", command, folder / "grafana.log", url, "/api/health", env)


def _find(variable: str, names: Sequence[str], missing: str) -> Path:
    named = os.environ.get(variable)
    if named:
        if os.access(named, os.X_OK) and Path(named).is_file():
            return Path(named)
        raise NotInstalledError(f"{variable}={named} is not a program. {missing}")
    for name in names:
        found = shutil.which(name)
        if found:
            return Path(found)
    raise NotInstalledError(missing)


def _grafana_home(program: Path) -> Path:
    """Return Grafana's own files: beside the program in an archive, in /usr/share for packages."""
    beside = program.resolve().parent.parent
    return beside if (beside / "conf").is_dir() else Path("/usr/share/grafana")


def _create_secret(path: Path) -> None:
    """Write a random secret to a file that only its owner can read; leave an existing one."""
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError:
        path.chmod(0o600)
        return
    with os.fdopen(descriptor, "w", encoding="ascii") as file:
        file.write(secrets.token_urlsafe(24))


def _start(
    name: str,
    command: list[str],
    log: Path,
    url: str,
    ready: str,
    env: Mapping[str, str] | None = None,
) -> Server:
    def is_ready() -> bool:
        try:
            with urllib.request.urlopen(url + ready, timeout=2):
                return True
        except OSError:
            return False

    if is_ready():
        raise ChildServerError(f"{name}: something answers at {url} already; choose another port")
    return Server(
        start_child_server(name, command, log, is_ready, env=env, within_s=START_WITHIN_S), url
    )
