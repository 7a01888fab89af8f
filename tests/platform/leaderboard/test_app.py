"""The leaderboard's server: names, password and headers; the page in a browser."""

from __future__ import annotations

import base64
import gzip
import http.client
import json
import shutil
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import uvicorn

from deta.platform.leaderboard.app import create_app
from deta.platform.leaderboard.board import Board
from tests.platform.leaderboard.leaderboard_case import (
    HOSTILE,
    filled_board,
    hostile_board,
    some_row,
)

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")


@contextmanager
def served(board: Board, **options: Any) -> Iterator[tuple[str, int]]:
    hosts = ("127.0.0.1", "localhost")
    app = create_app(board, "http://127.0.0.1:5000", hosts=hosts, **options)
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="error"))
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    try:
        yield "127.0.0.1", server.servers[0].sockets[0].getsockname()[1]
    finally:
        server.should_exit = True
        thread.join()


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
        for host in ("evil.example", "10.evil.example", "127.0.0.1.evil.example", ""):
            assert request(place, "/rows", Host=host)[0].status == 403
        assert request(place, "/rows", Origin="http://evil.example")[0].status == 403
        assert request(place, "/", method="POST")[0].status == 405
        assert request(place, "/../../etc/passwd")[0].status == 404


def test_the_page_has_the_best_rows_and_all_are_sent_compressed_once():
    with served(filled_board(*(some_row(n) for n in range(300)))) as place:
        assert request(place, "/")[1].count(b"run-") == 100
        answer, body = request(place, "/rows", Accept_Encoding="gzip")
        assert len(json.loads(gzip.decompress(body))["rows"]) == 300
        answer, body = request(place, "/rows", If_None_Match=answer.headers["ETag"])
        assert (answer.status, body) == (304, b"")
        assert answer.headers["Last-Modified"].endswith("GMT")


def test_a_server_with_a_password_requires_it():
    with served(Board("x"), password="correct horse battery") as place:
        assert request(place, "/")[0].status == 401
        for word, status in (("wrong", 401), ("correct horse battery", 200)):
            token = base64.b64encode(f"admin:{word}".encode()).decode()
            assert request(place, "/", Authorization=f"Basic {token}")[0].status == status


@pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium")
def test_the_table_is_filtered_and_sorted_in_a_browser(tmp_path: Path):
    api = pytest.importorskip("playwright.sync_api")
    hostile = [some_row(n, name=text, recipe=text, data=text) for n, text in enumerate(HOSTILE, 1)]
    board = filled_board(*hostile, *(some_row(n) for n in range(10, 260)))
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
