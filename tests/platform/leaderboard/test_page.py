"""The page of the leaderboard: hostile names stay text, and links are addresses of the web."""

from __future__ import annotations

import json
from html.parser import HTMLParser

import pytest

from deta.platform.leaderboard.board import Board
from deta.platform.leaderboard.page import leaderboard_page
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


@pytest.mark.parametrize("is_live", [True, False])
def test_hostile_names_make_no_nodes(is_live: bool):
    def nodes(board: Board) -> _Nodes:
        page = leaderboard_page(board.content, "http://127.0.0.1:5000", is_live=is_live)
        parsed = _Nodes()
        parsed.feed(page)
        return parsed

    hostile, empty = nodes(hostile_board()), nodes(Board("x"))
    assert hostile.names == empty.names
    assert not hostile.handlers
    names = {row[2] for row in json.loads(hostile.scripts[0])["content"]["rows"]}
    assert names == set(HOSTILE)


def test_links_lead_to_web_addresses_only():
    for address in ("javascript:alert(1)//http://x", "http://me:secret@host"):
        page = leaderboard_page(Board("x").content, address, is_live=True)
        assert '"mlflow":""' in page.replace(" ", "")
