"""A list in one line counts what it leaves out."""

from __future__ import annotations

import pytest

from deta.platform.system.short_list import short_list


@pytest.mark.parametrize(
    ("values", "text"),
    [([], ""), ([1], "1"), ([1, "b"], "1, b"), ([1, 2, 3, 4], "1, 2 and 2 more")],
)
def test_what_is_left_out_is_counted(values: list[object], text: str):
    assert short_list(values, 2) == text
