"""Files, folders and patterns name the images that a user expects."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from deta.platform.data.coco_dataset import Category
from deta.platform.inference.image_paths import find_images, read_listing


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("a.jpg", "b.PNG", "notes.txt", ".hidden.jpg", "x/c.jpg", "x/y/d.webp", "[1].jpg"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    return tmp_path


def names(*texts: Path | str) -> list[str]:
    return [image.name for image in find_images([str(text) for text in texts], lambda _: None)]


def test_a_folder_gives_all_its_images_by_their_names_below_it(folder):
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


def test_an_existing_path_is_not_a_pattern(folder):
    assert names(folder / "[1].jpg") == ["[1].jpg"]
    assert names(folder / "notes.txt") == ["notes.txt"]  # given by its own path


def test_each_file_is_listed_once_where_it_was_first_named(folder):
    assert names(folder / "x" / "c.jpg", folder, folder / "**/*.jpg")[0] == "c.jpg"
    assert len(names(folder / "x" / "c.jpg", folder, folder / "**/*.jpg")) == 5


def test_omitted_files_are_reported_and_an_empty_result_is_refused(folder):
    printed: list[str] = []

    find_images([str(folder)], printed.append)

    assert printed == [f"{folder}: 1 other file left out (1 .txt)"]
    for text, message in (
        ("absent.jpg", "no such file"),
        ("*.gif", "no file matches this pattern"),
        ("*.txt", "no file in it ends in"),
    ):
        with pytest.raises(ValueError, match=message):
            names(folder / text)


def test_a_listing_names_categories_by_id_and_images_by_file(tmp_path: Path):
    content = {
        "images": [
            {"id": 9, "file_name": "b.jpg", "width": 8, "height": 8},
            {"id": 4, "file_name": "a.jpg", "width": 8, "height": 8},
        ],
        "annotations": [],
        "categories": [{"id": 7, "name": "ring"}, {"id": 3, "name": "disc"}],
    }
    path = tmp_path / "listing.json"
    path.write_text(json.dumps(content))

    categories, image_ids = read_listing(path)

    assert categories == (Category(3, "disc"), Category(7, "ring"))
    assert image_ids == {"b.jpg": 9, "a.jpg": 4}
    content["images"][1]["file_name"] = "b.jpg"
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match="is already the name of image 9"):
        read_listing(path)
