"""Prometheus and Grafana: what is scraped, who has access, and what happens if one is missing."""

from __future__ import annotations

import configparser
import json
import os
import socket
import stat
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from deta.platform.system.child_server import ChildServerError
from deta.platform.tracking.mlflow_server import Server
from deta.platform.tracking.prometheus_grafana import (
    DASHBOARDS,
    STALE_S,
    TARGETS,
    TARGETS_FILE,
    NotInstalledError,
    copy_targets,
    find_grafana,
    find_prometheus,
    start_grafana,
    start_prometheus,
    write_grafana_config,
)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture(scope="module")
def prometheus(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    try:
        find_prometheus()
    except NotInstalledError as error:
        pytest.skip(str(error))
    folder = tmp_path_factory.mktemp("prometheus")
    server = start_prometheus(folder, port=free_port())
    yield server
    server.stop()


def session(ray: Path, name: str, content: str, age_s: float = 0.0) -> Path:
    path = ray / name / TARGETS_FILE
    path.parent.mkdir(parents=True)
    path.write_text(content)
    os.utime(path, (time.time() - age_s,) * 2)
    return path


TARGET = json.dumps([{"labels": {"job": "ray"}, "targets": ["127.0.0.1:1"]}])


def test_running_clusters_are_followed_and_ended_ones_removed(tmp_path: Path):
    ray, targets = tmp_path / "ray", tmp_path / "targets"
    targets.mkdir()
    alive = session(ray, "session_1", TARGET)
    session(ray, "session_2", TARGET, age_s=STALE_S + 30)
    session(ray, "session_3", "[{half")
    (ray / "session_latest").symlink_to(ray / "session_1")
    (targets / "own.json").write_text("[]")  # a person's
    folders = [ray, ray / "session_1", tmp_path / "none"]
    assert copy_targets(targets, folders) == ["session_1"]
    assert (targets / "session_1.json").read_text() == TARGET
    alive.write_text("[]")
    copy_targets(targets, folders)
    assert (targets / "session_1.json").read_text() == "[]"
    os.utime(alive, (0, 0))
    assert copy_targets(targets, folders) == []
    assert [path.name for path in targets.glob("*")] == ["own.json"]


@pytest.mark.skipif(os.getuid() != 0, reason="only root can give files away")
def test_files_of_other_users_in_tmp_are_not_scraped(tmp_path: Path):
    path = session(tmp_path / "ray", "session_1", TARGET)
    os.chown(path, 65534, 65534)
    assert copy_targets(tmp_path / "targets", [tmp_path / "ray"]) == []


def test_prometheus_reads_the_folder_beside_its_configuration():
    config = yaml.safe_load((DASHBOARDS / "prometheus" / "prometheus.yml").read_text())
    (job,) = config["scrape_configs"]
    assert job["file_sd_configs"][0]["files"] == [f"{TARGETS}/*.json"]


def test_grafana_requires_a_password_that_only_its_owner_can_read(tmp_path: Path):
    folder = tmp_path / "grafana"
    path = write_grafana_config(folder, port=3456)
    config = configparser.ConfigParser(interpolation=None)
    config.read(path)
    assert config["server"]["http_addr"] == "127.0.0.1"
    assert config["server"]["http_port"] == "3456"
    assert config["auth.anonymous"]["enabled"] == "false"
    assert config["security"]["allow_embedding"] == "false"
    assert config["users"]["allow_sign_up"] == "false"
    assert Path(config["paths"]["provisioning"]).is_dir()
    for key, name in (("admin_password", "admin-password"), ("secret_key", "secret-key")):
        secret = folder / name
        assert config["security"][key] == f"$__file{{{secret}}}"
        assert stat.S_IMODE(secret.stat().st_mode) == 0o600
        assert len(secret.read_text()) >= 32
        assert secret.read_text() not in path.read_text()
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700


def test_the_password_stays_and_becomes_private_again(tmp_path: Path):
    write_grafana_config(tmp_path / "grafana")
    secret = tmp_path / "grafana" / "admin-password"
    word = secret.read_text()
    secret.chmod(0o644)
    write_grafana_config(tmp_path / "grafana")
    assert secret.read_text() == word
    assert stat.S_IMODE(secret.stat().st_mode) == 0o600


def test_a_missing_program_is_reported_with_where_to_get_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("DETA_PROMETHEUS", raising=False)
    monkeypatch.delenv("DETA_GRAFANA", raising=False)
    with pytest.raises(NotInstalledError, match="apt-get install prometheus"):
        start_prometheus(tmp_path)
    with pytest.raises(NotInstalledError, match=r"grafana\.com/grafana/download"):
        start_grafana(tmp_path, "http://127.0.0.1:9090")
    monkeypatch.setenv("DETA_GRAFANA", str(tmp_path / "nothing"))
    with pytest.raises(NotInstalledError, match=r"DETA_GRAFANA=.*nothing is not a program"):
        find_grafana()


def listening(port: int) -> set[str]:
    """Return the addresses of this port that something listens on, as the kernel writes them."""
    lines = [
        line.split()
        for name in ("tcp", "tcp6")
        for line in Path(f"/proc/net/{name}").read_text().splitlines()[1:]
    ]
    return {
        fields[1].split(":")[0]
        for fields in lines
        if fields[3] == "0A" and int(fields[1].split(":")[1], 16) == port
    }


def test_prometheus_listens_on_loopback_only(prometheus: Server):
    port = int(prometheus.url.rpartition(":")[2])
    assert listening(port) == {"0100007F"}


def test_pages_of_other_origins_cannot_read_prometheus(prometheus: Server):
    def allowed(origin: str) -> str | None:
        request = urllib.request.Request(
            f"{prometheus.url}/api/v1/query?query=1", headers={"Origin": origin}
        )
        with urllib.request.urlopen(request, timeout=20) as answer:
            return answer.headers["Access-Control-Allow-Origin"]

    assert allowed("https://elsewhere.example") is None
    assert allowed(prometheus.url + ".elsewhere.example") is None
    assert allowed(prometheus.url) == prometheus.url


def test_nothing_is_deleted_or_stopped_through_prometheus(prometheus: Server):
    for path in ("/-/quit", "/-/reload", "/api/v1/admin/tsdb/delete_series?match[]=up"):
        request = urllib.request.Request(prometheus.url + path, method="POST")
        with pytest.raises(urllib.error.HTTPError):
            urllib.request.urlopen(request, timeout=20)


def test_a_taken_port_is_reported(prometheus: Server, tmp_path: Path):
    with pytest.raises(ChildServerError, match="choose another port"):
        start_prometheus(tmp_path, port=int(prometheus.url.rpartition(":")[2]))
