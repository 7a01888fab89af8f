"""S14: Grafana requires a password, cannot be embedded, and listens on loopback.

Few systems package Grafana, so the tests read its settings as it would: the file in
dashboards/grafana, and the one written from it at each start.
"""

from __future__ import annotations

import configparser
from pathlib import Path

import pytest

from deta.platform.tracking.prometheus_grafana import write_grafana_config

ROOT = Path(__file__).resolve().parents[2]
GRAFANA = ROOT / "dashboards" / "grafana"
WANTED = {
    ("server", "http_addr"): "127.0.0.1",
    ("server", "enforce_domain"): "true",
    ("security", "allow_embedding"): "false",
    ("security", "cookie_samesite"): "strict",
    ("security", "content_security_policy"): "true",
    ("auth.anonymous", "enabled"): "false",
    ("users", "allow_sign_up"): "false",
    ("snapshots", "external_enabled"): "false",
    ("analytics", "reporting_enabled"): "false",
}
# Settings that would weaken this; each must be absent or false.
MUST_BE_OFF = [
    ("auth.proxy", "enabled"),
    ("auth.jwt", "enabled"),
    ("auth.basic", "password_policy"),
    ("security", "disable_initial_admin_creation"),
    ("security", "disable_brute_force_login_protection"),
    ("dataproxy", "send_user_header"),
    ("users", "viewers_can_edit"),
]


@pytest.fixture(params=["as in the tree", "as started"])
def settings(request: pytest.FixtureRequest, tmp_path: Path) -> configparser.ConfigParser:
    path = GRAFANA / "grafana.ini"
    if request.param == "as started":
        path = write_grafana_config(tmp_path / "grafana", port=3999)
    config = configparser.ConfigParser(interpolation=None)
    config.read_string(path.read_text(encoding="utf-8"))
    return config


def test_grafana_requires_a_password_and_listens_on_loopback(settings: configparser.ConfigParser):
    found = {key: settings.get(*key, fallback=None) for key in WANTED}
    assert found == WANTED
    assert [key for key in MUST_BE_OFF if settings.get(*key, fallback="false") != "false"] == []


def test_password_and_key_are_in_files_and_in_no_setting(settings: configparser.ConfigParser):
    for key in ("admin_password", "secret_key"):
        assert settings["security"][key].startswith("$__file{/")


def test_the_password_is_random_and_for_its_owner_alone(tmp_path: Path):
    generated = set()
    for name in ("a", "b"):
        write_grafana_config(tmp_path / name, port=3999)
        for file in ("admin-password", "secret-key"):
            path = tmp_path / name / file
            assert path.stat().st_mode & 0o077 == 0
            assert len(path.read_text()) >= 24
            generated.add(path.read_text())
    assert len(generated) == 4


def test_the_data_sources_are_proxied_and_contain_no_password():
    for path in (GRAFANA / "provisioning").rglob("*.y*ml"):
        text = path.read_text(encoding="utf-8").lower()
        for word in ("password", "basicauth", "access: direct", "token", "://"):
            assert word not in text, f"{path}: {word}"
