"""Prometheus and Grafana beside the runs of this machine: found, configured, started on loopback.

Neither is a Python package, and neither is needed to train: a run exports its numbers whether
anybody reads them or not (platform/training/run_metrics.py). This starts the programs that are installed, with
the files of `dashboards/`, and says where to get those that are not.

Every local run may have a Ray cluster of its own, which lists its metrics ports in a file and
renews it while it lives. `SessionFollower` keeps the lists of those that are alive where Prometheus
looks, so that runs come and go while one Prometheus shows them all.
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
# The head of a cluster renews its list every 5 s; one this old belongs to a cluster that is gone,
# whose ports may be another's by now.
STALE_S = 60.0
LOOK_EVERY_S = 5.0
START_WITHIN_S = 60.0
KEEP_DAYS, KEEP_SIZE = 30, "4GB"

PROMETHEUS_MISSING = (
    "Prometheus is not installed. Debian and Ubuntu: apt-get install prometheus (its service can "
    "stay off: systemctl disable --now prometheus); elsewhere https://prometheus.io/download. A "
    "binary that is not on the PATH is named by DETA_PROMETHEUS=/path/to/prometheus"
)
GRAFANA_MISSING = (
    "Grafana is not installed, and comes with no package here because of its licence (AGPL). Get "
    "it from https://grafana.com/grafana/download and name it by DETA_GRAFANA=/path/to/grafana, "
    "where it is not on the PATH; its dashboards are in dashboards/grafana. Until then, Prometheus "
    "draws any of their queries"
)


class NotInstalledError(RuntimeError):
    """A program is not on this machine; says where to get it."""


@dataclass(frozen=True)
class Server:
    """A program that answers on loopback until it is closed, or this process ends."""

    service: ChildServer
    url: str

    def close(self) -> None:
        self.service.stop()


def find_prometheus() -> Path:
    """`DETA_PROMETHEUS`, or the one on the PATH.

    Raises:
        NotInstalledError: says where to get it.
    """
    return _find("DETA_PROMETHEUS", ("prometheus",), PROMETHEUS_MISSING)


def find_grafana() -> Path:
    """`DETA_GRAFANA`, or the one on the PATH, by its present name or its former one.

    Raises:
        NotInstalledError: says where to get it.
    """
    return _find("DETA_GRAFANA", ("grafana", "grafana-server"), GRAFANA_MISSING)


def ray_folders() -> list[Path]:
    """Where Ray clusters of this machine keep their sessions."""
    own = os.environ.get("RAY_TMPDIR")
    found = [Path(own), Path(own) / "ray"] if own else []
    return [*found, Path(tempfile.gettempdir()) / "ray"]


def write_prometheus_config(folder: Path) -> Path:
    """prometheus.yml in a folder of its own, with room for targets beside it; returns its path."""
    (folder / TARGETS).mkdir(parents=True, exist_ok=True)
    path = folder / "prometheus.yml"
    shutil.copyfile(DASHBOARDS / "prometheus" / "prometheus.yml", path)
    return path


class SessionFollower:
    """Keeps the lists of metrics ports, of the Ray clusters that are alive, in a folder.

    A session is alive while its list is renewed. Use it as a context, or call `look` yourself.
    """

    def __init__(self, targets: Path, ray_folders: Sequence[Path]) -> None:
        """
        Args:
            targets: where the lists go; made by `write_prometheus_config`.
            ray_folders: those that hold `session_…` folders, or a session itself.
        """
        self.targets, self.ray_folders = targets, list(ray_folders)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._follow, daemon=True)

    def __enter__(self) -> SessionFollower:
        self.look()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def look(self) -> list[str]:
        """Bring the folder up to date; returns the names of the sessions that are alive."""
        alive = self._alive()
        for name, content in alive.items():
            path = self.targets / f"{name}.json"
            if not path.exists() or path.read_text(encoding="utf-8") != content:
                write_atomic(path, content)
        for path in self.targets.glob("session_*.json"):  # others may be somebody's own
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
                    # Anybody may write to /tmp; what is scraped is this user's own.
                    if status.st_uid == os.getuid() and time.time() - status.st_mtime < STALE_S:
                        content = path.read_text(encoding="utf-8")
                        json.loads(content)
                        found[session] = content
                except (OSError, ValueError):  # gone, or being written
                    continue
        return found

    def _follow(self) -> None:
        while not self._stop.wait(LOOK_EVERY_S):
            self.look()


def start_prometheus(folder: Path, *, port: int = 9090) -> Server:
    """Start Prometheus with the configuration in a folder, which also holds what it gathers.

    It answers on loopback only. It knows no passwords, so pages of other origins, which a browser
    on this machine may show, cannot read its answers.

    Args:
        folder: with prometheus.yml, from `write_prometheus_config`.
        port: where it answers.

    Raises:
        NotInstalledError: says where to get it.
        ChildServerError: it did not start, with what it said; the port may be taken.
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
    """grafana.ini of `dashboards/grafana`, with the paths of this machine and secrets of its own.

    The password of `admin` is in `<folder>/admin-password`, which its owner alone may read. It
    stays the same from start to start.
    """
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    for name in ("admin-password", "secret-key"):
        _keep_secret(folder / name)
    # Its values hold $ and %, which mean something to Grafana and nothing here.
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

    Whoever looks signs in as `admin` with the password in `<folder>/admin-password`.

    Args:
        folder: for its configuration and data; made where it is missing.
        prometheus_url: where its numbers are, as `Server.url` of Prometheus says.

    Raises:
        NotInstalledError: says where to get it.
        ChildServerError: it did not start, with what it said.
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
        raise NotInstalledError(f"{variable}={named} is no program. {missing}")
    for name in names:
        found = shutil.which(name)
        if found:
            return Path(found)
    raise NotInstalledError(missing)


def _grafana_home(program: Path) -> Path:
    """What Grafana was installed with: beside it in its archive, in /usr/share from packages."""
    beside = program.resolve().parent.parent
    return beside if (beside / "conf").is_dir() else Path("/usr/share/grafana")


def _keep_secret(path: Path) -> None:
    """A random word in a file of its owner's alone; one that is there stays."""
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
