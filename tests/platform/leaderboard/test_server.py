"""The leaderboard: its rows, what it sends, what it answers to, and that names stay names."""

from __future__ import annotations

import base64
import gzip
import http.client
import json
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from deta.platform.leaderboard.cache import Board
from deta.platform.leaderboard.mlflow_source import Models, Source
from deta.platform.leaderboard.page import live_page, whole_page
from deta.platform.leaderboard.rows import Promotion, Row, row_of, with_seed_intervals
from deta.platform.leaderboard.server import LeaderboardServer
from deta.platform.registry.decision_log import Entry

ROOT = Path(__file__).resolve().parents[3]
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
HOSTILE = (
    "<script>document.title='owned'</script>",
    '"><img src=x onerror="document.title=1">',
    "</script><svg onload=alert(1)>\u2028%{y} <b>",
)


def some_row(number: int, **changes: Any) -> Row:
    row = Row(
        id=f"{number:032x}",
        experiment_id="1",
        name=f"run-{number}",
        recipe=f"deta_r50.v{number % 3}",
        data=f"val{number % 2} 0123abcd",
        status="FINISHED",
        ap=float(number % 60),
        gpu_hours=1.0 + number % 7,
        started_s=1_700_000_000.0 + number,
    )
    return replace(row, **changes)


class FixedSource:
    """What MLflow would say; pages of ten."""

    def __init__(self, rows: list[Row], models: Models | None = None) -> None:
        self.rows, self.found = rows, models or Models()

    def pages(self) -> Iterator[list[Row]]:
        for begin in range(0, len(self.rows), 10):
            yield self.rows[begin : begin + 10]

    def recent(self, since_s: float) -> Iterator[list[Row]]:
        yield [row for row in self.rows if row.status == "RUNNING" or row.ended_s >= since_s]

    def one(self, run_id: str) -> Row | None:
        return next((row for row in self.rows if row.id == run_id), None)

    def models(self) -> Models:
        return self.found


def described(seed: int, ap: float, lr: str = "0.1", **more: float) -> Row:
    return row_of(
        run_id=f"{seed}-{lr}",
        experiment_id="1",
        experiment="deta",
        name="a",
        status="FINISHED",
        start_ms=1000,
        end_ms=3_601_000,
        metrics={"best/AP": ap, "val/AP": ap - 1, **more},
        params={"seed": str(seed), "optim.lr": lr, "name": f"run-{seed}", "data.val_images": "x"},
        tags={"deta.recipe": "deta_r50.demo"},
        data=("val", "sha256:0123456789abcdef", 50),
    )


def test_a_row_has_the_best_ap_the_cost_and_the_data():
    row = described(
        1, 40.0, **{"cost/gpu_hours": 8.0, "cost/wall_s": 7200.0, "val/seconds": 25.0,
                    "best/AP_low": 39.0, "best/AP_high": 41.5}
    )  # fmt: skip
    assert (row.ap, row.low, row.high, row.interval) == (40.0, 39.0, 41.5, "images")
    assert (row.gpu_hours, row.hours, row.images_per_s) == (8.0, 2.0, 2.0)
    assert (row.data, row.recipe) == ("val 01234567", "deta_r50.demo")
    old = described(1, 40.0)
    assert (old.hours, old.gpu_hours, old.interval) == (1.0, None, "")  # before costs were logged


def test_a_number_that_is_none_is_left_out():
    assert described(1, float("nan")).ap is None
    row = described(1, 40.0, **{"best/AP_low": float("nan"), "best/AP_high": 41.0})
    assert (row.low, row.high, row.interval) == (None, None, "")


def test_runs_that_differ_in_the_seed_alone_have_the_interval_of_their_mean():
    rows = with_seed_intervals([described(1, 40.0), described(2, 42.0), described(3, 50.0, "0.2")])
    # mean 41, standard deviation 1.41421, t of one degree 12.706: 41 -+ 12.706
    assert rows[0].low == pytest.approx(41 - 12.706, abs=1e-3)
    assert rows[1].high == pytest.approx(41 + 12.706, abs=1e-3)
    assert rows[0].interval == "2 seeds"
    assert rows[2].interval == ""  # another learning rate
    failed = replace(described(2, 42.0), status="FAILED")
    assert with_seed_intervals([described(1, 40.0), failed])[0].interval == ""


def test_an_interval_of_seeds_goes_when_its_seeds_go():
    rows = with_seed_intervals([described(1, 40.0), described(2, 42.0)])
    assert with_seed_intervals(rows[:1])[0].interval == ""


def test_only_what_changed_is_sent():
    board = Board("x")
    source = FixedSource([some_row(n) for n in range(25)])
    board.read_all(source)
    first = board.changes(0)
    assert len(first["rows"]) == 25
    aps = [row[first["columns"].index("ap")] for row in first["rows"]]
    assert aps == sorted(aps, reverse=True)
    assert first["is_complete"]
    assert board.changes(first["revision"])["rows"] == []

    source.rows[3] = replace(source.rows[3], ap=59.5)
    del source.rows[7]
    board.read_all(source)
    second = board.changes(first["revision"])
    assert [row[0] for row in second["rows"]] == [f"{3:032x}"]
    assert second["removed"] == [f"{7:032x}"]
    assert board.best(1)[0].id == f"{3:032x}"


def test_a_run_that_ended_unseen_is_asked_for():
    """A dead machine's run is ended with a time in the past, which no search for news finds."""
    board = Board("x")
    source = FixedSource([some_row(1, status="RUNNING"), some_row(2)])
    board.read_all(source)
    source.rows[0] = some_row(1, status="KILLED", ended_s=5.0)
    board.read_recent(source)
    assert {row.id: row.status for row in board.rows()}[f"{1:032x}"] == "KILLED"


def test_the_copy_on_disk_is_there_at_once_and_of_this_mlflow_only(tmp_path: Path):
    cache = tmp_path / "board.json.gz"
    champion = Promotion(model="deta", version=1, time="2026-11-21T03:00:00+00:00", action="accept")
    board = Board("sqlite:////a", cache)
    board.read_all(FixedSource([some_row(1)], Models(promotions=(champion,))))
    again = Board("sqlite:////a", cache)
    assert [row.id for row in again.rows()] == [f"{1:032x}"]
    assert again.promotions == (champion,)
    assert not again.is_complete
    assert Board("sqlite:////b", cache).rows() == []
    cache.write_bytes(gzip.compress(b'{"format": 1, "of"'))
    assert Board("sqlite:////a", cache).rows() == []


def test_mlflow_being_away_is_told_and_what_was_known_stays():
    class Away(FixedSource):
        def pages(self) -> Iterator[list[Row]]:
            raise OSError("refused by http://me:secret@host/")

    board, stop = Board("x"), threading.Event()
    board.read_all(FixedSource([some_row(1)]))
    thread = threading.Thread(target=board.follow, args=(Away([]), stop))
    thread.start()
    deadline_s = time.monotonic() + 20
    while not board.error and time.monotonic() < deadline_s:
        time.sleep(0.01)
    stop.set()
    thread.join()
    assert "refused" in board.error
    assert "secret" not in board.error
    assert len(board.rows()) == 1


class _Nodes(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []
        self.scripts: list[str] = []
        self.handlers: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.names.append(tag)
        self.handlers += [name for name, _ in attrs if name.startswith("on")]

    def handle_data(self, data: str) -> None:
        if self.names and self.names[-1] == "script":
            self.scripts.append(data)


def hostile_board() -> Board:
    board = Board("x")
    rows = [
        some_row(n, name=text, recipe=text, data=text, models=text, report=text, commit=text)
        for n, text in enumerate(HOSTILE, 1)
    ]
    told = Promotion(
        model=HOSTILE[0], version=1, time=HOSTILE[1], action=HOSTILE[2], by=HOSTILE[0],
        reason=HOSTILE[1], run_id=rows[0].id,
    )  # fmt: skip
    versions = {row.id: [HOSTILE[0]] for row in rows}
    board.read_all(FixedSource(rows, Models(versions, frozenset(), (told,))))
    return board


@pytest.mark.parametrize("kind", ["live", "whole"])
def test_hostile_names_make_no_nodes(kind: str):
    def nodes(board: Board) -> _Nodes:
        content = board.changes(0)
        page = (
            live_page(content, "http://127.0.0.1:5000", "0")
            if kind == "live"
            else whole_page(content, "http://127.0.0.1:5000")
        )
        parsed = _Nodes()
        parsed.feed(page)
        return parsed

    hostile, empty = nodes(hostile_board()), nodes(Board("x"))
    assert hostile.names == empty.names
    assert not hostile.handlers
    names = {row[2] for row in json.loads(hostile.scripts[0])["content"]["rows"]}
    assert names == set(HOSTILE)


def test_links_lead_to_web_addresses_only():
    page = live_page(Board("x").changes(0), "javascript:alert(1)//http://x", "0")
    assert "javascript:" not in page
    assert "secret" not in live_page(Board("x").changes(0), "http://me:secret@host", "0")


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


def ask(
    place: tuple[str, int], path: str, method: str = "GET", **headers: str
) -> tuple[Any, bytes]:
    connection = http.client.HTTPConnection(*place, timeout=20)
    connection.request(method, path, headers={k.replace("_", "-"): v for k, v in headers.items()})
    answer = connection.getresponse()
    body = answer.read()
    connection.close()
    return answer, body


def test_it_answers_to_its_names_alone_and_forbids_what_pages_need_not():
    with served(hostile_board()) as place:
        answer, body = ask(place, "/")
        assert answer.status == 200
        policy = answer.headers["Content-Security-Policy"]
        assert policy.startswith("default-src 'none'; script-src 'sha256-")
        assert "unsafe-inline" not in policy.split("style-src")[0]
        assert answer.headers["X-Frame-Options"] == "DENY"
        assert answer.headers["X-Content-Type-Options"] == "nosniff"
        assert b"<script>document" not in body
        for host in ("evil.example", "10.evil.example", f"127.0.0.1:{place[1] + 1}", ""):
            assert ask(place, "/rows?since=0", Host=host)[0].status == 403
        assert ask(place, "/", method="POST")[0].status == 501
        assert ask(place, "/../../etc/passwd")[0].status == 404
        for since in ("-1", "x", "9" * 40, "%00"):
            assert ask(place, f"/rows?since={since}")[0].status == 400


def test_rows_are_sent_once_packed_and_all_again_after_a_restart():
    board = Board("x")
    board.read_all(FixedSource([some_row(n) for n in range(300)]))
    with served(board) as place:
        _, body = ask(place, "/rows?since=0", Accept_Encoding="gzip")
        content = json.loads(gzip.decompress(body))
        assert len(content["rows"]) == 300
        again = f"/rows?since={content['revision']}&of="
        assert json.loads(ask(place, again + content["of"])[1])["rows"] == []
        assert len(json.loads(ask(place, again + "another")[1])["rows"]) == 300
        page = ask(place, "/")[1]
        assert page.count(b"run-") == 100  # the rest comes behind it


def test_off_loopback_it_wants_the_password():
    with served(Board("x"), password="correct horse battery") as place:
        assert ask(place, "/")[0].status == 401
        for word, status in (("wrong", 401), ("correct horse battery", 200)):
            token = base64.b64encode(f"admin:{word}".encode()).decode()
            assert ask(place, "/", Authorization=f"Basic {token}")[0].status == status


def test_it_knows_the_registry_by_the_names_that_the_registry_has():
    from deta.platform.leaderboard import mlflow_source as leaderboard_data
    from deta.platform.registry import mlflow_registry as registry
    from deta.platform.registry.decision_log import CHAMPION

    assert leaderboard_data.CHAMPION == CHAMPION
    assert leaderboard_data.HISTORY_SUFFIX == registry.HISTORY_SUFFIX
    assert leaderboard_data.ENTRY_TAG == registry.ENTRY_TAG


def test_it_needs_no_torch():
    code = "import sys, deta.platform.leaderboard.mlflow_source; assert not {'torch', 'ray'} & {*sys.modules}"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_runs_versions_and_champions_come_from_mlflow(tmp_path: Path):
    from deta.platform.tracking.mlflow_store import MlflowStore

    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    client = MlflowStore(uri)._connect()
    experiment = client.create_experiment("deta", artifact_location=(tmp_path / "f").as_uri())
    ids = []
    for number, ap in enumerate((30.0, 50.0, 40.0)):
        run = client.create_run(
            experiment, run_name=HOSTILE[number], tags={"deta.recipe": f"deta_r50.v{number}"}
        )
        ids.append(run.info.run_id)
        client.log_metric(ids[-1], "best/AP", ap)
    client.create_run(experiment, run_name="sweep", tags={"deta.kind": "sweep"})
    client.create_registered_model("deta")
    client.create_model_version("deta", (tmp_path / "f").as_uri(), run_id=ids[2])
    client.set_registered_model_alias("deta", "champion", "1")
    board = Board(uri)
    board.read_all(Source(uri))
    assert [row.id for row in board.rows()] == [ids[1], ids[2], ids[0]]
    assert board.rows()[0].name == HOSTILE[1]
    champion = board.rows()[1]
    assert (champion.models, champion.is_champion) == ("deta 1 @champion", True)
    assert board.promotions[0].run_id == ids[2]

    client.log_metric(ids[0], "best/AP", 60.0, step=2)
    client.delete_run(ids[1])
    board.read_recent(Source(uri))
    assert [row.id for row in board.rows()] == [ids[0], ids[2]]

    entry = Entry(
        id="a", previous="", action="accept", version=1, sha256="0" * 64, champion_before=None,
        champion_after=1, by="anna@gpu1", time="2026-11-21T03:00:00+00:00", reason=HOSTILE[0],
        text="accepted",
    )  # fmt: skip
    client.create_registered_model("deta-history")
    client.create_model_version(
        "deta-history", "models:/deta/1", tags={"deta.entry": entry.to_line()},
        description=entry.text,
    )  # fmt: skip
    board.read_recent(Source(uri))
    (told,) = board.promotions
    assert (told.by, told.action, told.run_id) == ("anna@gpu1", "accept", ids[2])
    assert told.reason == HOSTILE[0]


@pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium")
def test_it_is_filtered_and_sorted_in_a_browser(tmp_path: Path):
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
