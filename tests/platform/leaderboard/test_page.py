"""The page of the leaderboard: hostile names stay text, and links are addresses of the web."""

from __future__ import annotations

import json
from html.parser import HTMLParser

import pytest

from deta.platform.leaderboard.cache import Board
from deta.platform.leaderboard.page import live_page, whole_page
from tests.platform.leaderboard.leaderboard_case import HOSTILE, hostile_board


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
