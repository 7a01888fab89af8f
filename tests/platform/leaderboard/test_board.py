"""The leaderboard in memory and on disk: order, refreshes, an unreachable MLflow."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from deta.platform.leaderboard.board import Board, first_rows
from deta.platform.leaderboard.rows import LeaderboardRow, Promotion, RegisteredModels
from tests.platform.leaderboard.leaderboard_case import FixedSource, column, filled_board, some_row


def test_the_best_run_is_first_and_deleted_ones_go_at_the_next_full_refresh():
    source = FixedSource([some_row(n) for n in range(25)])
    board = Board("x")
    board.refresh(source)
    assert column(board.content, "ap") == sorted(column(board.content, "ap"), reverse=True)
    assert board.content["is_complete"]
    assert len(first_rows(board.content, 7)["rows"]) == 7

    source.rows[3] = replace(source.rows[3], ap=59.5, ended_s=time.time())
    del source.rows[7]
    board.refresh(source, is_full=False)
    assert column(board.content, "id")[0] == f"{3:032x}"
    assert len(board.content["rows"]) == 25
    board.refresh(source)
    assert f"{7:032x}" not in column(board.content, "id")


def test_the_copy_on_disk_is_read_at_once_and_only_for_its_own_mlflow(tmp_path: Path):
    champion = Promotion(model="deta", version=1, time="2026-11-21T03:00:00+00:00", action="accept")
    board = Board("sqlite:////a", tmp_path)
    board.refresh(FixedSource([some_row(1)], RegisteredModels(promotions=(champion,))))
    again = Board("sqlite:////a", tmp_path)
    assert column(again.content, "id") == [f"{1:032x}"]
    assert again.content["promotions"][0]["version"] == 1
    assert not again.content["is_complete"]
    assert Board("sqlite:////b", tmp_path).content["rows"] == []
    assert board.cache is not None
    board.cache.write_text('{"rows": [')
    assert Board("sqlite:////a", tmp_path).content["rows"] == []


def test_an_unreachable_mlflow_is_reported_redacted_and_rows_stay():
    class Unreachable(FixedSource):
        def pages(self, since_s: float | None = None) -> Iterator[list[LeaderboardRow]]:
            raise OSError("refused by http://me:secret@host/")

    board, stop = filled_board(some_row(1)), threading.Event()
    thread = threading.Thread(target=board.follow, args=(Unreachable([]), stop))
    thread.start()
    deadline_s = time.monotonic() + 20
    while not board.content["error"] and time.monotonic() < deadline_s:
        time.sleep(0.01)
    stop.set()
    thread.join()
    assert "refused" in board.content["error"]
    assert "secret" not in board.content["error"]
    assert len(board.content["rows"]) == 1
