"""Run the panels' queries on a real Prometheus."""

from __future__ import annotations

import json
import re
import socket
import urllib.parse
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from deta.platform.tracking.mlflow_server import Server
from deta.platform.tracking.prometheus_grafana import (
    NotInstalledError,
    find_prometheus,
    start_prometheus,
)

ROOT = Path(__file__).resolve().parents[2]
DASHBOARDS = tuple(path.stem for path in sorted((ROOT / "dashboards" / "grafana").glob("*.json")))
_GPU = re.compile(r"gpu|gram_used", re.IGNORECASE)


@dataclass(frozen=True)
class Query:
    """One line of a panel."""

    title: str  # of the panel
    text: str  # PromQL without variables
    legend: str
    needs: str  # what is missing where it may have no answer: "gpu", "serving" or ""


def panels_of(dashboard: dict[str, Any]) -> list[dict[str, Any]]:
    return [panel for panel in dashboard["panels"] if panel["type"] != "row"]


def queries_of(dashboard: str, run: str = ".+") -> list[Query]:
    """Return the queries of dashboards/grafana/DASHBOARD.json."""
    path = ROOT / "dashboards" / "grafana" / f"{dashboard}.json"
    found = []
    for panel in panels_of(json.loads(path.read_text(encoding="utf-8"))):
        for target in panel["targets"]:
            is_gpu = "gpu" if _GPU.search(target["expr"]) else ""
            needs = "serving" if dashboard == "serving" else is_gpu
            text, legend = chosen(target["expr"], run), target["legendFormat"]
            found.append(Query(panel["title"], text, legend, needs))
    return found


def chosen(text: str, run: str) -> str:
    """Fill in the variables as Grafana does: all nodes, one run, a range of several scrapes."""
    text = text.replace("$__rate_interval", "1m").replace("$node", ".+").replace("$run", run)
    assert "$" not in text
    return text


@contextmanager
def running_prometheus(folder: Path) -> Iterator[Server]:
    """Start a Prometheus that scrapes every 2 s; skip the test if none is installed."""
    try:
        find_prometheus()
    except NotInstalledError as error:
        pytest.skip(str(error))
    text = (ROOT / "dashboards" / "prometheus" / "prometheus.yml").read_text()
    text = text.replace("scrape_interval: 10s", "scrape_interval: 2s")
    text = text.replace("scrape_timeout: 9s", "scrape_timeout: 2s")
    config = folder / "changed" / "fast.yml"  # a copy of it gets its name in `folder`
    config.parent.mkdir(parents=True)
    config.write_text(text.replace("refresh_interval: 10s", "refresh_interval: 2s"))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    server = start_prometheus(folder, port=port, config=config)
    try:
        yield server
    finally:
        server.stop()


def answer(server: Server, query: str) -> list[tuple[dict[str, str], float]]:
    """Return labels and values. An error of Prometheus, such as bad syntax, fails the test."""
    url = f"{server.url}/api/v1/query?{urllib.parse.urlencode({'query': query})}"
    with urllib.request.urlopen(url, timeout=60) as reply:
        content = json.load(reply)
    assert content["status"] == "success"
    assert content["data"]["resultType"] == "vector"
    return [(row["metric"], float(row["value"][1])) for row in content["data"]["result"]]
