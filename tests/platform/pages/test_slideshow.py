"""Boxes lie on their image, with names that stay within it."""

from __future__ import annotations

from deta.platform.pages.slideshow import SlideBox


def test_a_box_is_cut_at_the_edges_of_its_image():
    box = SlideBox(-0.1, 0.9, 0.3, 0.5, "wrong", "cat")
    assert box.css_style == "left:0.00%;top:90.00%;width:20.00%;height:10.00%"
    assert box.css_class == "box wrong"


def test_names_near_the_top_and_the_right_edge_move_inwards():
    assert SlideBox(0.7, 0.01, 0.1, 0.1, "right", "cat", True).css_class == (
        "box right strong within to-left"
    )
