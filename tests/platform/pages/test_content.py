"""Parts of a page refuse what they cannot show."""

from __future__ import annotations

import pytest

from deta.platform.pages.content import Column, ImageCard, Jpeg, Link, Table


def test_a_row_with_another_number_of_cells_is_refused():
    columns = [Column(title="a"), Column(title="b")]
    with pytest.raises(ValueError, match=r"table 'T': row 2 has 3 cells, not 2"):
        Table(caption="T", columns=columns, rows=[["1", "2"], ["1", "2", "3"]])


def test_long_texts_keep_some_width_and_numbers_stay_numbers():
    columns = [Column(title="a"), Column(title="b"), Column(title="c", is_number=True)]
    long = "a sentence of more than 24 letters"
    table = Table(
        caption="T", columns=columns, rows=[[long, long, long], ["x", Link(long, ""), ""]]
    )
    assert [table.cell_class(0, i) for i in range(3)] == ["word long", "word long", "number"]
    assert [table.cell_class(1, i) for i in range(3)] == ["word", "word", "number"]


def test_an_image_is_described_by_its_title_and_lines():
    assert ImageCard("t", ["a", "b"], []).description == "t: a, b"
    assert Jpeg(b"\xff\xd8", (1, 1)).base64 == "/9g="
