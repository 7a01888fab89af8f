"""Parts of a page refuse what they cannot show, and write numbers as their columns say."""

from __future__ import annotations

import math

import pytest

from deta.platform.pages.content import Box, Jpeg, Link, Number, table


def test_a_row_with_another_number_of_cells_is_refused():
    with pytest.raises(ValueError, match=r"table 'T': row 2 has 3 cells, not 2"):
        table("T", ["a", "b"], [["1", "2"], ["1", "2", "3"]])


def test_numbers_are_written_and_missing_ones_are_dashes():
    columns = ["a", Number("b", "points", 1), Number("c")]
    rows = table("T", columns, [["x", -0.26, 12800], ["y", None, math.nan], ["z", "± 1", 0]]).rows
    assert rows == [["x", "\u22120.3", "12,800"], ["y", "–", "–"], ["z", "± 1", "0"]]


def test_columns_in_which_nothing_is_written_are_left_out():
    found = table("", ["a", "b", Number("c")], [["1", "", None], ["", "", None]])
    assert (found.columns, found.rows) == (["a"], [["1"], [""]])
    assert len(table("", ["a", "b"], []).columns) == 2


def test_long_texts_keep_some_width_and_numbers_stay_numbers():
    long = "a sentence of more than 24 letters"
    found = table("T", ["a", "b", Number("c")], [[long, Link(long, ""), long]])
    classes = [found.cell_class(i, cell) for i, cell in enumerate(found.rows[0])]
    assert classes == ["word long", "word", "number"]


def test_a_box_has_its_place_in_percent():
    box = Box(0, 0.9, 0.2, 0.1, "wrong", "cat")
    assert box.css_style == "left:0.00%;top:90.00%;width:20.00%;height:10.00%"
    assert box.css_class == "box wrong"
    assert Jpeg(b"\xff\xd8", (1, 1)).base64 == "/9g="


def test_names_near_the_top_and_the_right_edge_move_inwards():
    assert Box(0.7, 0.01, 0.1, 0.1, "right", "cat", True).css_class == (
        "box right strong within to-left"
    )
