"""`make dashboards`: MLflow's pages and the leaderboard come up, show a run, and leave nothing."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from deta.platform.pages.content import Paragraph, Section
from deta.platform.pages.page import write_page
from deta.platform.system.places import child_environment
from deta.platform.system.process_tree import RUN_MARK, marked_processes, new_mark

ROOT = Path(__file__).resolve().parents[2]
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
WITHIN_S = 400  # it takes 15, and minutes on a machine whose cores are all taken


@dataclass(frozen=True)
class Dashboards:
    process: subprocess.Popen[str]
    mark: str
    lines: list[str]
    addresses: dict[str, str]
    run: tuple[str, str]  # ids of its experiment and of itself


def tracked_run(storage: Path) -> tuple[str, str]:
    """Log a run with a report and an image, as training does."""
    from deta.platform.tracking.mlflow_store import MlflowStore

    client = MlflowStore(f"sqlite:///{storage / 'mlflow.db'}")._connect()
    experiment = client.create_experiment(
        "deta", artifact_location=(storage / "mlartifacts" / "deta").as_uri()
    )
    tags = {"deta.recipe": "deta_r50.demo", "deta.report": "evaluation/report.html"}
    run = client.create_run(experiment, run_name="first <b>run</b>", tags=tags).info.run_id
    client.log_metric(run, "best/AP", 41.25)
    page = storage / "report.html"
    section = Section(name="one", title="Errors", parts=[Paragraph("mostly localisation")])
    write_page(page, title="What went wrong", summary=[], sections=[section])
    client.log_artifact(run, str(page), "evaluation")
    Image.new("RGB", (64, 48), (200, 30, 30)).save(storage / "sheet.png")
    client.log_artifact(run, str(storage / "sheet.png"), "pictures")
    client.set_terminated(run)
    return experiment, run


@pytest.fixture(scope="module")
def dashboards(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Dashboards]:
    storage = tmp_path_factory.mktemp("runs")
    run = tracked_run(storage)
    mark = new_mark()
    env = child_environment({RUN_MARK: mark})
    env.pop("MLFLOW_TRACKING_URI", None)
    command = [sys.executable, str(ROOT / "jobs" / "dashboards.py"), str(storage)]
    command += [f"--{name}-port=0" for name in ("mlflow", "leaderboard", "prometheus", "grafana")]
    process = subprocess.Popen(
        command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        start_new_session=True,
    )  # fmt: skip
    assert process.stdout is not None
    lines: list[str] = []
    for line in process.stdout:
        lines.append(line)
        if line.startswith("Ctrl-C"):
            break
    text = "".join(lines)
    addresses = dict(re.findall(r"^(\w+) +(http://127\.0\.0\.1:\d+)", text, re.MULTILINE))
    assert {"MLflow", "Leaderboard"} <= addresses.keys(), text
    yield Dashboards(process, mark, lines, addresses, run)
    if process.poll() is None:
        process.send_signal(signal.SIGTERM)
        process.wait(WITHIN_S)


def test_what_is_not_installed_costs_one_line(dashboards: Dashboards):
    has_prometheus = shutil.which("prometheus") or os.environ.get("DETA_PROMETHEUS")
    missing = [line for line in dashboards.lines if "is not installed" in line]
    assert len(missing) == 1 or (has_prometheus and len(missing) <= 1)


@pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium")
def test_from_the_leaderboard_to_a_report_in_mlflow(dashboards: Dashboards):
    api = pytest.importorskip("playwright.sync_api")
    with api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1400, "height": 900})
        page.set_default_timeout(1000 * WITHIN_S)
        page.goto(dashboards.addresses["Leaderboard"])
        page.get_by_text("1 run, as of").wait_for()
        assert page.locator("#rows th").inner_text() == "first <b>run</b>"
        page.get_by_role("link", name="report").click()
        page.wait_for_url(f"**/runs/{dashboards.run[1]}/artifacts/evaluation/report.html")
        assert dashboards.addresses["MLflow"] in page.url
        _wait_for_text(page, "mostly localisation")
        page.goto(page.url.replace("evaluation/report.html", "pictures/sheet.png"))
        page.reload()
        _wait_for_picture(page, 64)
        browser.close()


def test_at_sigterm_nothing_is_left(dashboards: Dashboards):
    assert marked_processes(RUN_MARK, dashboards.mark)
    dashboards.process.send_signal(signal.SIGTERM)
    assert dashboards.process.wait(WITHIN_S) == 143
    assert not [
        p for p in marked_processes(RUN_MARK, dashboards.mark) if p != dashboards.process.pid
    ]
    for address in dashboards.addresses.values():
        with pytest.raises(OSError, match="refused"):
            urllib.request.urlopen(address, timeout=5)


def _wait_for_text(page: Any, text: str) -> None:
    """In the page or in one of its frames, in which MLflow shows reports."""
    deadline_s = time.monotonic() + WITHIN_S
    while not any(frame.get_by_text(text).count() for frame in page.frames):
        assert time.monotonic() < deadline_s, f"{text!r} is not shown"
        page.wait_for_timeout(200)


def _wait_for_picture(page: Any, width_px: int) -> None:
    deadline_s = time.monotonic() + WITHIN_S
    widths = "[...document.images].map((image) => image.naturalWidth)"
    while width_px not in page.evaluate(widths):
        assert time.monotonic() < deadline_s, "the picture is not shown"
        page.wait_for_timeout(200)
