"""The leaderboard's server: names, password and headers; the page in a browser."""

from __future__ import annotations

import base64
import gzip
import http.client
import json
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from deta.platform.leaderboard.cache import Board
from deta.platform.leaderboard.server import LeaderboardServer
from tests.platform.leaderboard.leaderboard_case import (
    HOSTILE,
    FixedSource,
    hostile_board,
    some_row,
)

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")


@contextmanager
def served(board: Board, **options: Any) -> Iterator[tuple[str, int]]:
    server = LeaderboardServer(board, "http://127.0.0.1:5000", port=0, **options)
    thread = threading.Thread(target=server.serve_forever, args=(0.05,))
    thread.start()
    try:
        yield "127.0.0.1", server.server_address[1]
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def request(
    place: tuple[str, int], path: str, method: str = "GET", **headers: str
) -> tuple[Any, bytes]:
    connection = http.client.HTTPConnection(*place, timeout=20)
    connection.request(method, path, headers={k.replace("_", "-"): v for k, v in headers.items()})
    answer = connection.getresponse()
    body = answer.read()
    connection.close()
    return answer, body


def test_other_host_names_and_other_paths_are_refused():
    with served(hostile_board()) as place:
        answer, body = request(place, "/")
        assert answer.status == 200
        policy = answer.headers["Content-Security-Policy"]
        assert policy.startswith("default-src 'none'; script-src 'sha256-")
        assert "unsafe-inline" not in policy.split("style-src")[0]
        assert answer.headers["X-Frame-Options"] == "DENY"
        assert answer.headers["X-Content-Type-Options"] == "nosniff"
        assert b"<script>document" not in body
        for host in ("evil.example", "10.evil.example", f"127.0.0.1:{place[1] + 1}", ""):
            assert request(place, "/rows?since=0", Host=host)[0].status == 403
        assert request(place, "/", method="POST")[0].status == 501
        assert request(place, "/../../etc/passwd")[0].status == 404
        for since in ("-1", "x", "9" * 40, "%00"):
            assert request(place, f"/rows?since={since}")[0].status == 400


def test_rows_are_sent_once_compressed_and_all_again_after_a_restart():
    board = Board("x")
    board.read_all(FixedSource([some_row(n) for n in range(300)]))
    with served(board) as place:
        _, body = request(place, "/rows?since=0", Accept_Encoding="gzip")
        content = json.loads(gzip.decompress(body))
        assert len(content["rows"]) == 300
        again = f"/rows?since={content['revision']}&of="
        assert json.loads(request(place, again + content["of"])[1])["rows"] == []
        assert len(json.loads(request(place, again + "another")[1])["rows"]) == 300
        page = request(place, "/")[1]
        assert page.count(b"run-") == 100  # the first poll brings the rest


def test_a_server_with_a_password_requires_it():
    with served(Board("x"), password="correct horse battery") as place:
        assert request(place, "/")[0].status == 401
        for word, status in (("wrong", 401), ("correct horse battery", 200)):
            token = base64.b64encode(f"admin:{word}".encode()).decode()
            assert request(place, "/", Authorization=f"Basic {token}")[0].status == status


@pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium")
def test_the_table_is_filtered_and_sorted_in_a_browser(tmp_path: Path):
    api = pytest.importorskip("playwright.sync_api")
    board = hostile_board()
    rows = [*board.rows(), *(some_row(n) for n in range(10, 260))]
    board.read_all(FixedSource(rows))
    with served(board) as place, api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page()
        faults: list[str] = []
        page.on("pageerror", lambda error: faults.append(str(error)))
        page.on("console", lambda m: faults.append(m.text) if m.type == "error" else None)
        page.goto(f"http://127.0.0.1:{place[1]}/")
        lines = page.locator("#rows tr")
        page.get_by_text("253 runs, as of").wait_for()
        assert lines.count() == 100
        assert lines.first.locator(".ap").inner_text() == "59.0"

        page.keyboard.press("/")
        page.keyboard.type("onerror")
        page.get_by_text("1 of 253 runs").wait_for()
        assert lines.first.locator("th").inner_text() == HOSTILE[1]
        page.get_by_role("button", name="Clear filters").click()

        page.get_by_label("Recipe").select_option("deta_r50.v1")
        page.get_by_role("button", name="GPU-hours").focus()
        page.keyboard.press("Enter")
        page.keyboard.press("Enter")
        assert page.locator("th[aria-sort=descending]").inner_text().startswith("GPU-hours")
        assert lines.first.locator("[data-key=gpu_hours]").inner_text() == "7.00"
        assert "recipe=deta_r50.v1" in page.url

        page.reload()  # the address holds all of it
        page.locator("th[aria-sort=descending]", has_text="GPU-hours").wait_for()
        page.locator("#pareto .main-svg").first.wait_for()
        assert page.title() == "Leaderboard"
        assert not page.evaluate("document.querySelectorAll('#rows script, #rows img').length")
        assert not faults
        browser.close()
