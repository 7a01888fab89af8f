"""Grafana dashboards as Python tables, and their conversion to Grafana's JSON.

The tables are in `training_panels.py`, `machine_panels.py` and `serving_panels.py`; `write.py`
converts them to `grafana/*.json`. Panels name no data source: they use the one that is selected at
the top of the page.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

SCHEMA = 42  # the last version of Grafana's classic dashboards; other Grafana versions read it
WIDTH = 24  # of a page, in Grafana's grid columns

Kind = Literal["timeseries", "stat"]
# What a panel needs in addition to a run. Without it, the panel is empty.
Needs = Literal["", "gpu", "serving", "evaluation"]


@dataclass(frozen=True)
class Panel:
    """A panel: its queries and how to display them."""

    title: str
    description: str
    unit: str  # a unit id of Grafana, or `suffix:` and a text
    queries: tuple[tuple[str, str], ...]  # PromQL, and the legend
    kind: Kind = "timeseries"
    needs: Needs = ""
    width: int = 8
    min: float | None = 0
    max: float | None = None
    log: bool = False
    warn_above: float | None = None  # values above need attention
    bad_above: float | None = None  # values above are a failure


@dataclass(frozen=True)
class Row:
    """A titled row of panels, below each other if they do not fit."""

    title: str
    panels: tuple[Panel, ...]


@dataclass(frozen=True)
class Variable:
    """A selection at the top of a page; everything is selected by default."""

    name: str
    label: str
    query: str


@dataclass(frozen=True)
class Dashboard:
    """A dashboard: one page of rows."""

    uid: str  # part of its URL, so it must never change
    title: str
    description: str
    variables: tuple[Variable, ...]
    rows: tuple[Row, ...]


NODES = Variable("node", "Node", "label_values(ray_node_cpu_utilization, instance)")
NODE = 'instance=~"$node"'


def to_grafana(dashboard: Dashboard) -> dict[str, Any]:
    """Convert a dashboard to the object that Grafana's JSON files contain."""
    panels: list[dict[str, Any]] = []
    y = 0
    for row in dashboard.rows:
        panels.append(_row(len(panels) + 1, row.title, y))
        y += 1
        x = height = 0
        for panel in row.panels:
            if x + panel.width > WIDTH:
                x, y, height = 0, y + height, 0
            own_height = 4 if panel.kind == "stat" else 8
            place = {"x": x, "y": y, "w": panel.width, "h": own_height}
            panels.append(_panel(len(panels) + 1, panel, place))
            x, height = x + panel.width, max(height, own_height)
        y += height
    return {
        "uid": dashboard.uid,
        "title": dashboard.title,
        "description": dashboard.description,
        "tags": ["deta"],
        "schemaVersion": SCHEMA,
        "version": 1,
        "editable": True,
        "graphTooltip": 1,  # a shared crosshair over all panels
        "refresh": "10s",
        "time": {"from": "now-1h", "to": "now"},
        "timezone": "browser",
        "annotations": {"list": []},
        "links": [
            {
                "type": "dashboards",
                "tags": ["deta"],
                "title": "DETA",
                "includeVars": True,
                "keepTime": True,
                "asDropdown": False,
            }
        ],
        "templating": {"list": [_source(), *map(_variable, dashboard.variables)]},
        "panels": panels,
    }


SOURCE = {"type": "prometheus", "uid": "${datasource}"}


def _source() -> dict[str, Any]:
    return {
        "name": "datasource",
        "label": "Data source",
        "type": "datasource",
        "query": "prometheus",
        "hide": 0,
        "refresh": 1,
    }


def _variable(variable: Variable) -> dict[str, Any]:
    return {
        "name": variable.name,
        "label": variable.label,
        "type": "query",
        "datasource": SOURCE,
        "definition": variable.query,
        "query": {"query": variable.query, "refId": variable.name},
        "refresh": 2,  # when the time range changes, because runs start and end
        "sort": 1,
        "multi": True,
        "includeAll": True,
        "allValue": ".+",
        "current": {"selected": True, "text": ["All"], "value": ["$__all"]},
        "hide": 0,
    }


def _row(number: int, title: str, y: int) -> dict[str, Any]:
    place = {"x": 0, "y": y, "w": WIDTH, "h": 1}
    return {
        "id": number, "type": "row", "title": title, "collapsed": False, "gridPos": place,
        "panels": [],
    }  # fmt: skip


def _panel(number: int, panel: Panel, place: dict[str, int]) -> dict[str, Any]:
    defaults: dict[str, Any] = {"unit": panel.unit, "thresholds": _thresholds(panel)}
    if panel.min is not None:
        defaults["min"] = panel.min
    if panel.max is not None:
        defaults["max"] = panel.max
    if panel.kind == "timeseries":
        defaults["color"] = {"mode": "palette-classic"}
        defaults["custom"] = _lines(panel)
    else:
        defaults["color"] = {"mode": "thresholds"}
    return {
        "id": number,
        "type": panel.kind,
        "title": panel.title,
        "description": panel.description + _requirement(panel),
        "datasource": SOURCE,
        "gridPos": place,
        "fieldConfig": {"defaults": defaults, "overrides": []},
        "options": _options(panel),
        "targets": [
            {
                "refId": "ABCDEF"[index],
                "datasource": SOURCE,
                "editorMode": "code",
                "expr": query,
                "legendFormat": legend,
                "instant": panel.kind == "stat",
                "range": panel.kind == "timeseries",
            }
            for index, (query, legend) in enumerate(panel.queries)
        ],
    }


def _requirement(panel: Panel) -> str:
    return {
        "": "",
        "gpu": " Empty without GPUs.",
        "serving": " Empty while no model is served.",
        "evaluation": " Empty before the first evaluation.",
    }[panel.needs]


def _thresholds(panel: Panel) -> dict[str, Any]:
    steps: list[dict[str, Any]] = [{"color": "green", "value": None}]
    for limit, color in ((panel.warn_above, "orange"), (panel.bad_above, "red")):
        if limit is not None:
            steps.append({"color": color, "value": limit})
    return {"mode": "absolute", "steps": steps}


def _lines(panel: Panel) -> dict[str, Any]:
    has_limit = panel.warn_above is not None or panel.bad_above is not None
    scale: dict[str, Any] = {"type": "log", "log": 10} if panel.log else {"type": "linear"}
    return {
        "drawStyle": "line",
        "lineInterpolation": "linear",
        "lineWidth": 1,
        "fillOpacity": 0,
        "showPoints": "auto",
        "spanNulls": 60_000,  # ms: a missed scrape leaves no gap, a restart does
        "scaleDistribution": scale,
        "thresholdsStyle": {"mode": "dashed" if has_limit else "off"},
    }


def _options(panel: Panel) -> dict[str, Any]:
    if panel.kind == "stat":
        return {
            "reduceOptions": {"calcs": ["lastNotNull"], "fields": "", "values": False},
            "colorMode": "value",
            "graphMode": "none",
            "textMode": "auto",
            "orientation": "auto",
        }
    return {
        "legend": {
            "displayMode": "table",
            "placement": "bottom",
            "showLegend": True,
            "calcs": ["lastNotNull", "max"],
        },
        "tooltip": {"mode": "multi", "sort": "desc"},
    }
