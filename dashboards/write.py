"""Write `grafana/*.json`. Run this after every change of a table:

python -m deta.dashboards.write
"""

from __future__ import annotations

import json
from pathlib import Path

from deta.dashboards.machine_panels import MACHINES
from deta.dashboards.panel import Dashboard, to_grafana
from deta.dashboards.serving_panels import SERVING
from deta.dashboards.training_panels import TRAINING

FOLDER = Path(__file__).absolute().parent / "grafana"
DASHBOARDS = {"training": TRAINING, "machines": MACHINES, "serving": SERVING}


def to_json(dashboard: Dashboard) -> str:
    """Return the content of a dashboard's file."""
    return json.dumps(to_grafana(dashboard), indent=2) + "\n"


def main() -> None:
    for name, dashboard in DASHBOARDS.items():
        (FOLDER / f"{name}.json").write_text(to_json(dashboard), encoding="utf-8")


if __name__ == "__main__":
    main()
