"""Test `image_folder.py`: links may not lead out, and headers must match the annotations."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from deta.platform.data import image_folder
from deta.platform.data.coco_annotations import Problems
from deta.platform.data.image_decoding import MAX_PIXELS, Header
from deta.platform.data.image_folder import (
    IMAGE_OF_OTHER_SIZE,
    IMAGE_UNREADABLE,
    ImageFolder,
    OutsideFolderError,
    inspect_images,
)


def test_a_path_is_inside_the_folder_whatever_its_links(tmp_path: Path) -> None:
    (tmp_path / "images" / "sub").mkdir(parents=True)
    (tmp_path / "outside").mkdir()
    (tmp_path / "images" / "a.png").write_bytes(b"")
    (tmp_path / "images" / "sub" / "inside.png").symlink_to("../a.png")
    (tmp_path / "images" / "outside.png").symlink_to(tmp_path / "outside" / "b.png")
    (tmp_path / "images" / "linked").symlink_to(tmp_path / "outside")
    (tmp_path / "link").symlink_to(tmp_path / "images")

    for folder in (tmp_path / "images", tmp_path / "link"):
        images = ImageFolder(folder)
        assert images.path("a.png") == folder / "a.png"
        assert images.path("sub/inside.png") == folder / "sub/inside.png"
        for name in ("outside.png", "linked/b.png"):
            with pytest.raises(OutsideFolderError, match="link out of the image folder"):
                images.path(name)


@pytest.mark.parametrize("many", [5_000, 1])
def test_images_are_sorted_into_sizes_and_problems_on_any_number_of_cores(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, many: int
) -> None:
    monkeypatch.setattr(image_folder, "MANY_IMAGES", many)
    for name in ("a.png", "b.png"):
        Image.new("RGB", (40, 30)).save(tmp_path / name)
    (tmp_path / "c.png").write_bytes(b"not an image")
    (tmp_path / "d.png").symlink_to("/etc/hostname")
    sizes = {"a.png": (40, 30), "b.png": (30, 40), "c.png": (40, 30), "d.png": (40, 30)}
    images = [
        {"id": number, "file_name": name, "width": width, "height": height}
        for number, (name, (width, height)) in enumerate(sizes.items())
    ]
    problems = Problems(tmp_path / "annotations.json")

    headers = inspect_images(tmp_path, images, MAX_PIXELS, False, problems)

    assert headers == {0: Header(40, 30, (tmp_path / "a.png").stat().st_size)}
    skippable = {kind: [i for i, _ in faults] for kind, faults in problems.skippable.items()}
    assert skippable == {IMAGE_OF_OTHER_SIZE: [1], IMAGE_UNREADABLE: [2]}
    assert len(problems.errors) == 1
    assert problems.errors[0].startswith("image 3, file_name: ")
