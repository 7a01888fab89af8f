"""The leaderboard in memory and on disk: changes, refreshes, an unreachable MLflow."""

from __future__ import annotations

import gzip
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from deta.platform.leaderboard.cache import Board
from deta.platform.leaderboard.mlflow_source import RegisteredModels
from deta.platform.leaderboard.rows import LeaderboardRow, Promotion
from tests.platform.leaderboard.leaderboard_case import FixedSource, some_row


def test_only_changes_are_sent():
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


def test_a_run_that_no_longer_runs_is_read_again():
    """The end of a run on a dead machine is set in the past, where no search for news finds it."""
    board = Board("x")
    source = FixedSource([some_row(1, status="RUNNING"), some_row(2)])
    board.read_all(source)
    source.rows[0] = some_row(1, status="KILLED", ended_s=5.0)
    board.read_recent(source)
    assert {row.id: row.status for row in board.rows()}[f"{1:032x}"] == "KILLED"


def test_the_cache_on_disk_is_read_at_once_and_only_for_its_own_mlflow(tmp_path: Path):
    cache = tmp_path / "board.json.gz"
    champion = Promotion(model="deta", version=1, time="2026-11-21T03:00:00+00:00", action="accept")
    board = Board("sqlite:////a", cache)
    board.read_all(FixedSource([some_row(1)], RegisteredModels(promotions=(champion,))))
    again = Board("sqlite:////a", cache)
    assert [row.id for row in again.rows()] == [f"{1:032x}"]
    assert again.promotions == (champion,)
    assert not again.is_complete
    assert Board("sqlite:////b", cache).rows() == []
    cache.write_bytes(gzip.compress(b'{"format": 1, "of"'))
    assert Board("sqlite:////a", cache).rows() == []


def test_an_unreachable_mlflow_is_reported_redacted_and_rows_stay():
    class Unreachable(FixedSource):
        def pages(self) -> Iterator[list[LeaderboardRow]]:
            raise OSError("refused by http://me:secret@host/")

    board, stop = Board("x"), threading.Event()
    board.read_all(FixedSource([some_row(1)]))
    thread = threading.Thread(target=board.follow, args=(Unreachable([]), stop))
    thread.start()
    deadline_s = time.monotonic() + 20
    while not board.error and time.monotonic() < deadline_s:
        time.sleep(0.01)
    stop.set()
    thread.join()
    assert "refused" in board.error
    assert "secret" not in board.error
    assert len(board.rows()) == 1
