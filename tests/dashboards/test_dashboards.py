"""The files that Grafana reads are complete, consistent, and query metrics that exist."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from deta.platform.serving.metrics import DESCRIPTIONS
from deta.platform.training.run_metrics import METRICS
from tests.dashboards.prometheus import panels_of

ROOT = Path(__file__).resolve().parents[2]
GRAFANA = ROOT / "dashboards" / "grafana"
FILES = sorted(GRAFANA.glob("*.json"))


def read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))


def queries_of(dashboard: dict[str, Any]) -> list[str]:
    return [target["expr"] for panel in panels_of(dashboard) for target in panel["targets"]]


def test_addresses_of_dashboards_never_change():
    found = {path.stem: read(path)["uid"] for path in FILES}
    assert found == {
        "training": "deta-training", "machines": "deta-machines", "serving": "deta-serving",
    }  # fmt: skip


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_panel_is_complete(path: Path):
    dashboard = read(path)
    numbers = [panel["id"] for panel in dashboard["panels"]]
    assert len(set(numbers)) == len(numbers)
    titles = [panel["title"] for panel in panels_of(dashboard)]
    assert len(set(titles)) == len(titles)
    for panel in panels_of(dashboard):
        assert panel["type"] in ("timeseries", "stat")
        assert panel["title"]
        assert panel["description"].endswith(".")
        assert panel["fieldConfig"]["defaults"]["unit"]
        assert panel["targets"]
        for target in panel["targets"]:
            assert target["legendFormat"]
        names = [target["refId"] for target in panel["targets"]]
        assert len(set(names)) == len(names)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_panels_do_not_overlap(path: Path):
    taken: set[tuple[int, int]] = set()
    for panel in read(path)["panels"]:
        place = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert place["x"] + place["w"] <= 24
        assert not cells & taken, panel["title"]
        taken |= cells


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_no_data_source_is_built_in(path: Path):
    dashboard = read(path)
    chosen = {"type": "prometheus", "uid": "${datasource}"}
    for panel in panels_of(dashboard):
        assert panel["datasource"] == chosen
        assert all(target["datasource"] == chosen for target in panel["targets"])
    variables = {one["name"]: one for one in dashboard["templating"]["list"]}
    assert variables["datasource"]["type"] == "datasource"
    assert all(one.get("datasource", chosen) == chosen for one in variables.values())
    assert path.read_text().count('"uid"') == 1 + path.read_text().count('"uid": "${datasource}"')


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_variables_are_declared_and_used(path: Path):
    dashboard = read(path)
    declared = {one["name"] for one in dashboard["templating"]["list"]}
    used = set(re.findall(r"\$(?!__)\{?(\w+)", json.dumps(dashboard["panels"])))
    assert used == declared


def test_runs_and_nodes_can_be_chosen():
    names = {one["name"] for one in read(GRAFANA / "training.json")["templating"]["list"]}
    assert {"run", "node"} <= names


def series_of(query: str) -> set[str]:
    found = set(re.findall(r"\b(?:ray_)?(deta_\w+)", query))
    return found | set(re.findall(r"\(ray_\)\?(deta_\w+)", query))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_metric_of_ours_in_a_query_is_exported(path: Path):
    exported = set(DESCRIPTIONS)
    for metric in METRICS:
        endings = {"counter": ("_total",), "gauge": ("",),
                   "histogram": ("_bucket", "_sum", "_count")}[metric.kind]  # fmt: skip
        exported |= {metric.name + ending for ending in endings}
    exported |= {name + end for name in DESCRIPTIONS for end in ("_bucket", "_sum", "_count")}
    for query in queries_of(read(path)):
        assert series_of(query) <= exported, query


def test_every_metric_of_a_run_is_in_a_panel():
    shown = {name for path in FILES for query in queries_of(read(path)) for name in
             series_of(query)}  # fmt: skip
    shown = {re.sub("_(total|bucket|sum|count)$", "", name) for name in shown}
    assert {metric.name for metric in METRICS} <= shown


def test_provisioning_contains_nothing_of_this_machine():
    source = yaml.safe_load((GRAFANA / "provisioning/datasources/prometheus.yaml").read_text())
    (prometheus,) = source["datasources"]
    assert prometheus["type"] == "prometheus"
    assert prometheus["url"] == "${DETA_PROMETHEUS_URL}"
    provider = yaml.safe_load((GRAFANA / "provisioning/dashboards/deta.yaml").read_text())
    (dashboards,) = provider["providers"]
    assert dashboards["options"]["path"] == "${DETA_GRAFANA_DASHBOARDS}"
    assert dashboards["allowUiUpdates"] is False


def test_the_configuration_of_the_dashboards_is_closed_by_default():
    text = (GRAFANA / "grafana.ini").read_text()
    assert "http_addr = 127.0.0.1" in text
    assert re.search(r"\[auth\.anonymous\]\nenabled = false", text)
    assert "allow_embedding = false" in text
    assert re.search(r"admin_password = \$__file\{", text)
