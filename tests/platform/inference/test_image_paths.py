"""Files, folders and patterns mean the pictures that a person would expect."""

from __future__ import annotations

from pathlib import Path

import pytest

from deta.platform.inference.image_paths import find_pictures


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("a.jpg", "b.PNG", "notes.txt", ".hidden.jpg", "x/c.jpg", "x/y/d.webp", "[1].jpg"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    return tmp_path


def names(*texts: Path | str) -> list[str]:
    return [
        picture.name for picture in find_pictures([str(text) for text in texts], lambda _: None)
    ]


def test_a_folder_gives_all_its_pictures_by_their_names_below_it(folder):
    assert names(folder) == ["[1].jpg", "a.jpg", "b.PNG", "x/c.jpg", "x/y/d.webp"]


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("*.jpg", ["[1].jpg", "a.jpg"]),
        ("*", ["[1].jpg", "a.jpg", "b.PNG"]),
        ("**/*.jpg", ["[1].jpg", "a.jpg", "x/c.jpg"]),
        ("**", ["[1].jpg", "a.jpg", "b.PNG", "x/c.jpg", "x/y/d.webp"]),
        ("x/**/?.*", ["c.jpg", "y/d.webp"]),
        ("[ab].*", ["a.jpg", "b.PNG"]),
        ("?/*.jpg", ["x/c.jpg"]),
    ],
)
def test_a_pattern_gives_what_it_matches_by_names_below_its_fixed_part(folder, pattern, expected):
    assert names(folder / pattern) == expected


def test_what_exists_is_no_pattern(folder):
    assert names(folder / "[1].jpg") == ["[1].jpg"]
    assert names(folder / "notes.txt") == ["notes.txt"]  # asked for by its own name


def test_each_file_is_taken_once_where_it_was_first_asked_for(folder):
    assert names(folder / "x" / "c.jpg", folder, folder / "**/*.jpg")[0] == "c.jpg"
    assert len(names(folder / "x" / "c.jpg", folder, folder / "**/*.jpg")) == 5


def test_what_is_left_out_is_told_and_nothing_found_is_refused(folder):
    told: list[str] = []

    find_pictures([str(folder)], told.append)

    assert told == [f"{folder}: 1 other file left out (1 .txt)"]
    for text, message in (
        ("absent.jpg", "no such file"),
        ("*.gif", "no file is of this pattern"),
        ("*.txt", "no file in it ends in"),
    ):
        with pytest.raises(ValueError, match=message):
            names(folder / text)
