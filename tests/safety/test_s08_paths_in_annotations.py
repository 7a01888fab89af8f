"""S8: no file name in annotations opens a file outside the image folder."""

from __future__ import annotations

import json
import os
import random
import sys
from pathlib import Path

import pytest
from PIL import Image

from deta.platform.data.coco_annotations import DatasetError
from deta.platform.data.coco_dataset import CocoDataset
from deta.platform.system.safe_read import gunzip, read_bounded, read_json
from deta.platform.weights.class_mapping import listed_classes

NUM_NAMES = 1000
PARTS = [
    "..", ".", "", "etc", "passwd", "secret.png", "a.png", "sub", "~", "~root", "%2e%2e", "..%2f",
    "link", "\0", "\\", "..\\", "C:", "file:", "//", "\u2024\u2024", "\u202e", "proc", "self",
    "environ", "…", "con", " ", "\n", "*", "$HOME", "`id`", "-rf",
]  # fmt: skip

_opened: list[str] | None = None


def _record_opened(event: str, arguments: tuple[object, ...]) -> None:
    if _opened is not None and event in ("open", "os.listdir", "os.scandir"):
        _opened.append(os.fsdecode(arguments[0]) if isinstance(arguments[0], str | bytes) else "")


def names() -> list[str]:
    rng = random.Random(8)
    plain = ["../secret.png", "/etc/passwd", "link/secret.png", "sub/../../secret.png", "a\0.png"]
    plain += ["a.png", "sub/a.png", "./a.png", "sub//a.png"]  # good ones
    while len(plain) < NUM_NAMES:
        name = "/".join(rng.choices(PARTS, k=rng.randint(1, 5)))
        plain.append(rng.choice(["", "", "/", "../", "./"]) + name)
    return plain


def test_1000_names_open_nothing_outside_the_folder(tmp_path: Path):
    global _opened
    images = tmp_path / "images"
    (images / "sub").mkdir(parents=True)
    (tmp_path / "outside").mkdir()
    for place in (images / "a.png", images / "sub" / "a.png", tmp_path / "secret.png",
                  tmp_path / "outside" / "secret.png"):  # fmt: skip
        Image.new("RGB", (4, 4)).save(place)
    (images / "link").symlink_to(tmp_path / "outside")
    annotations = tmp_path / "annotations.json"
    categories = [{"id": 1, "name": "x"}]
    sys.addaudithook(_record_opened)  # cannot be removed; it does nothing without a list

    num_opened, outside = 0, []
    for name in names():
        content = {
            "images": [{"id": 1, "file_name": name, "width": 4, "height": 4}],
            "annotations": [],
            "categories": categories,
        }
        annotations.write_text(json.dumps(content))
        _opened = []
        try:
            sample = CocoDataset.open(images, annotations)[0]
            assert sample.image.size == (4, 4)
        except DatasetError:
            pass
        seen, _opened = _opened, None
        for path in seen:
            if Path(path) == annotations:
                continue
            num_opened += 1
            if not Path(os.path.realpath(path)).is_relative_to(images):
                outside.append((name, path))

    assert num_opened >= 8  # the audit hook works
    imports = (sys.prefix, sys.base_prefix)
    assert [each for each in outside if not each[1].startswith(imports)] == []


def test_a_device_a_pipe_or_a_folder_is_not_read_as_a_file(tmp_path: Path):
    pipe = tmp_path / "pipe.json"
    os.mkfifo(pipe)
    for path in (pipe, Path("/dev/zero"), tmp_path):
        with pytest.raises(DatasetError, match="is a folder"):
            CocoDataset.open(tmp_path, path)
        with pytest.raises(ValueError, match="not a file"):
            read_json(path)
        with pytest.raises(ValueError, match="not a file"):
            listed_classes(path, 3)


def test_a_file_over_its_limit_is_not_read_whole(tmp_path: Path):
    path = tmp_path / "sparse"
    with path.open("wb") as file:
        file.truncate(1 << 40)  # a sparse terabyte
    with pytest.raises(ValueError, match="has over 1,000 bytes"):
        read_bounded(path, 1000)
    path.write_bytes(bytes(1000))
    assert len(read_bounded(path, 1000)) == 1000


def test_a_gzip_bomb_is_refused_at_the_limit():
    import gzip

    bomb = gzip.compress(bytes(100_000_000))
    assert len(bomb) < 200_000
    with pytest.raises(ValueError, match="over 1,000,000 bytes when decompressed"):
        gunzip(bomb, 1_000_000)
    with pytest.raises(ValueError, match="intact"):
        gunzip(gzip.compress(b"x" * 1000)[:-9], 10_000)
    with pytest.raises(ValueError, match="intact"):
        gunzip(b"no gzip", 10)
    assert gunzip(gzip.compress(b"x" * 1000), 1000) == b"x" * 1000
