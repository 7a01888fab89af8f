"""Text from people stays text, in labels, in links, and in the JSON of a page."""

from __future__ import annotations

import json
import math
import re

import pytest

from deta.platform.pages.safe_text import (
    checked_address,
    figure_text,
    is_web_address,
    json_text,
    visible,
)
from tests.platform.pages.hostile import HOSTILE


def test_data_cannot_leave_its_script():
    values = {"names": HOSTILE[:7], "not a number": [math.nan, math.inf, 1.5]}
    text = json_text(values)
    assert not re.search("[<>&\u2028\u2029]", text)
    assert json.loads(text) == {"names": list(HOSTILE[:7]), "not a number": [None, None, 1.5]}


def test_names_of_figures_are_shown_as_they_are_written():
    assert figure_text("<b>x</b> & y\nz\u2028") == "&lt;b&gt;x&lt;/b&gt; &amp; y z\ufffd"


def test_visible_text_is_one_line():
    assert visible("a\r\nb\x1bc") == "a  b\ufffdc"


@pytest.mark.parametrize(
    "address",
    ["javascript:alert(1)", " https://a", "data:text/html,x", "//host", "https://a b", "file:///x"],
)
def test_only_web_addresses_become_links(address: str):
    assert not is_web_address(address)
    with pytest.raises(ValueError, match="no http"):
        checked_address(address)


@pytest.mark.parametrize("address", ["https://a.example/b?c#d", "http://localhost:5000", "#errors"])
def test_web_addresses_and_fragments_are_links(address: str):
    assert checked_address(address) == address
