"""Test `class_mapping.py`: classes are matched by name, and unknown classes are reported."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from deta.platform.data.coco_dataset import Category
from deta.platform.weights.class_mapping import (
    COCO_CATEGORIES,
    FileClasses,
    listed_classes,
    own_classes,
    plan_classes,
    published_classes,
)

SHARED = Path(
    os.environ.get("DETA_SHARED", Path(__file__).resolve().parents[3] / "../shared")
).resolve()


def categories(*names: str) -> tuple[Category, ...]:
    return tuple(Category(id_, name) for id_, name in enumerate(names, start=1))


def test_the_table_is_cocos_own():
    path = SHARED / "data" / "coco_mini" / "annotations" / "instances_val.json"
    if not path.is_file():
        pytest.skip("no shared annotations")
    listed = json.loads(path.read_text())["categories"]

    assert [(c.id, c.name) for c in COCO_CATEGORIES] == [(c["id"], c["name"]) for c in listed]


def test_names_decide_and_not_ids():
    """Ids 1 to 3 are person, bicycle and car in COCO."""
    file = published_classes(91)

    plan = plan_classes(file, categories("dog", "Person", "resistor"))

    assert plan.rows == (18, 1, None)
    told = "\n".join(plan.lines)
    assert "2 of 3 by name: dog, Person (there person)" in told
    assert "1 new, which start untrained: resistor" in told
    assert "78 of the file are dropped" in told


def test_80_rows_are_cocos_classes_in_order():
    plan = plan_classes(published_classes(80), categories("toothbrush", "person"))

    assert plan.rows == (79, 0)


def test_case_and_underscores_are_not_compared_but_an_equal_name_comes_first():
    file = own_classes(categories("dining table", "cup", "Cup", "hot-dog"), "here")

    plan = plan_classes(file, categories("Dining_Table", "Cup", "cup", "Hot Dog", "CUP"))

    assert plan.rows == (0, 2, 1, 3, None)


def test_a_row_is_given_once():
    file = own_classes(categories("cat"), "here")

    assert plan_classes(file, categories("CAT", "Cat")).rows == (0, None)


def test_rows_without_names_are_not_guessed():
    file = published_classes(12)

    with pytest.raises(ValueError, match="12 rows, whose classes the file does not name"):
        plan_classes(file, categories(*"abcdefghijkl"))
    assert plan_classes(file, categories(*"abcdefghijkl"), "in_order").rows == tuple(range(12))
    assert plan_classes(file, categories("a", "b"), "drop").rows == (None, None)
    with pytest.raises(ValueError, match="12 rows, the data set 2 classes"):
        plan_classes(file, categories("a", "b"), "in_order")


def test_a_file_without_names_shows_its_rows_as_numbers():
    rows, shown = published_classes(3).rows_and_categories
    assert rows == [0, 1, 2]
    assert [category.name for category in shown] == ["0", "1", "2"]
    rows, shown = published_classes(91).rows_and_categories
    assert (rows[10], shown[10]) == (11, Category(11, "fire hydrant"))
    assert (rows[11], shown[11]) == (13, Category(13, "stop sign"))
    assert len(rows) == 80


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("a.txt", "-\ncat\ndog\n", {1: Category(1, "cat"), 2: Category(2, "dog")}),
        (
            "a.json",
            {"categories": [{"id": 2, "name": "dog"}, {"id": 1, "name": "cat"}]},
            {1: Category(1, "cat"), 2: Category(2, "dog")},
        ),
        (
            "b.json",
            {"categories": [{"id": i, "name": str(i)} for i in (7, 9, 30)]},
            {0: Category(7, "7"), 1: Category(9, "9"), 2: Category(30, "30")},
        ),
        (
            "config.json",
            {"id2label": {"0": "N/A", "1": "cat", "2": "LABEL_2"}},
            {1: Category(1, "cat")},
        ),
    ],
)
def test_lists_of_names_in_four_forms(tmp_path, name, content, expected):
    path = tmp_path / name
    path.write_text(content if isinstance(content, str) else json.dumps(content))

    found = listed_classes(path, 3)

    assert isinstance(found, FileClasses)
    assert dict(found.by_row) == expected


@pytest.mark.parametrize(
    ("name", "text", "says"),
    [
        ("a.txt", "cat\n", "1 lines, the class heads 3 rows"),
        ("a.json", "{", "cannot be read"),
        ("a.json", "[]", "neither `categories` nor `id2label`"),
        ("a.json", '{"categories": [{"id": 5, "name": "a"}]}', "ids up to 5"),
        ("a.json", '{"id2label": {"7": "a"}}', "id2label has '7'"),
    ],
)
def test_bad_lists_of_names_are_refused(tmp_path, name, text, says):
    (tmp_path / name).write_text(text)

    with pytest.raises(ValueError, match=says):
        listed_classes(tmp_path / name, 3)
