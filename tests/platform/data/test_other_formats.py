"""Test `other_formats.py`: the wrong kind of annotation is named for what it is, in a sentence."""

from __future__ import annotations

import gzip
import io
import json
import os
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from deta.platform.data.coco_annotations import DatasetError, Problems, read_coco_file
from deta.platform.data.coco_dataset import CocoDataset
from deta.platform.inference.image_paths import read_listing

SHARED = Path(
    os.environ.get("DETA_SHARED", Path(__file__).resolve().parents[3] / "../shared")
).resolve()
REPORTED = sorted((SHARED / "reports").glob("wrong_kind*/*.json"))
IMAGES = [{"id": 1, "file_name": "a.png", "width": 40, "height": 30}]
CATEGORIES = [{"id": 1, "name": "cat"}]


def coco(**record: Any) -> dict[str, Any]:
    return {"images": IMAGES, "annotations": [record] * 2, "categories": CATEGORIES}


def zipped(content: bytes) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("a.json", content)
    return buffer.getvalue()


def tarred(content: bytes) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        info = tarfile.TarInfo("a.json")
        info.size = len(content)
        archive.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


def png() -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (4, 4)).save(buffer, "png")
    return buffer.getvalue()


DOCUMENTS = {
    "panoptic": coco(image_id=1, file_name="a.png", segments_info=[{"id": 3, "bbox": [1] * 4}]),
    "captions": coco(image_id=1, id=2, caption="a cat"),
    "keypoints": coco(image_id=1, id=2, category_id=1, keypoints=[1, 1, 2], num_keypoints=1),
    "results": coco(image_id=1, category_id=1, bbox=[1, 1, 2, 2], score=0.5),
    "without annotations": {"images": IMAGES, "categories": CATEGORIES, "info": {}},
    "LVIS": {
        "images": [{"id": 1, "width": 4, "height": 3, "coco_url": "http://x/train2017/1.jpg"}],
        "annotations": [], "categories": CATEGORIES,
    },
    "results file": [{"image_id": 1, "category_id": 1, "bbox": [1, 1, 2, 2], "score": 0.5}],
    "LabelMe": {"shapes": [], "imagePath": "a.png", "version": "5.0"},
    "VGG": {"_via_settings": {}, "_via_img_metadata": {}},
    "Datumaro": {"info": {}, "categories": {}, "items": []},
    "Supervisely": {"description": "", "size": {"height": 3, "width": 4}, "objects": []},
    "Label Studio": [{"id": 1, "data": {"image": "a.png"}, "annotations": []}],
    "CreateML": [{"image": "a.png", "annotations": [{"label": "cat"}]}],
    "BDD100K": [{"name": "a.png", "labels": []}],
}  # fmt: skip
JSON = json.dumps(coco(image_id=1, id=1)).encode()
CONTENTS = {
    "zip archive": zipped(JSON),
    "gzip": gzip.compress(JSON),
    "tar archive": tarred(JSON),
    "an image": png(),
    "empty file": b" \n",
    "LFS": b"version https://git-lfs.github.com/spec/v1\noid sha256:1\n",
    "web page": b"<!DOCTYPE html><html></html>",
    "Pascal VOC": b"<annotation><folder>a</folder></annotation>",
    "CVAT": b'<?xml version="1.0"?><annotations><version>1.1</version></annotations>',
    "YOLO's format": b"0 0.5 0.5 0.1 0.2\n13 .25 0.5 1e-1 0.2\n",
    "data.yaml": b"path: ../data\ntrain: images/train\nnc: 2\nnames: ['cat', 'dog']\n",
    "a list of image files": b"images/a.jpg\nimages/b.PNG\n",
    "CSV": b"filename,width,height,class,xmin\na.jpg,4,3,cat,1\n",
    "JSON Lines": b'{"image": "a.png"}\n{"image": "b.png"}\n',
}


def refusal(tmp_path: Path, annotations: Path) -> str:
    images = tmp_path / "images"
    images.mkdir(exist_ok=True)
    Image.new("RGB", (40, 30)).save(images / "a.png")
    said = []
    for lenient in (False, True):
        with pytest.raises(DatasetError) as caught:
            CocoDataset.open(images, annotations, lenient=lenient)
        said.append(str(caught.value))
    assert said[0] == said[1]
    assert str(annotations) in said[0]
    assert len(said[0].splitlines()) == 1
    assert ";" in said[0]  # what to do
    return said[0]


@pytest.mark.parametrize("kind", DOCUMENTS)
def test_json_of_another_kind_is_named(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "annotations.json"
    path.write_text(json.dumps(DOCUMENTS[kind]))

    assert kind in refusal(tmp_path, path)


@pytest.mark.parametrize("kind", CONTENTS)
@pytest.mark.parametrize("name", ["annotations.json", "other.txt"])
def test_a_file_of_another_format_is_named(kind: str, name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_bytes(CONTENTS[kind])

    assert kind in refusal(tmp_path, path)


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (["labels/a.txt", "labels/b.txt", "data.yaml"], "2 label files, as YOLO has them"),
        (["a.xml"], "1 XML files, as Pascal VOC"),
        (["captions.json", "instances_train.json"], "such as instances_train.json"),
        (["a.png"], "give a .json file"),
    ],
)
def test_a_folder_is_named_by_what_it_holds(names: list[str], said: str, tmp_path: Path) -> None:
    folder = tmp_path / "given"
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"0 0.5 0.5 0.1 0.1\n")

    assert said in refusal(tmp_path, folder)


@pytest.mark.parametrize("path", REPORTED, ids=lambda path: path.stem)
def test_a_reported_file_is_one_sentence(path: Path, tmp_path: Path) -> None:
    refusal(tmp_path, path)


def test_a_list_of_images_serves_a_prediction(tmp_path: Path) -> None:
    path = tmp_path / "image_info_test.json"
    path.write_text(json.dumps(DOCUMENTS["without annotations"]))

    categories, ids = read_listing(path)

    assert [category.name for category in categories] == ["cat"]
    assert ids == {"a.png": 1}


def test_lvis_with_file_names_is_read_with_a_warning(tmp_path: Path) -> None:
    content = coco(image_id=1, id=1, category_id=1, bbox=[1, 1, 5, 5])
    content["annotations"].pop()
    content["images"] = [IMAGES[0] | {"neg_category_ids": [2], "not_exhaustive_category_ids": []}]
    path = tmp_path / "lvis.json"
    path.write_text(json.dumps(content))
    Image.new("RGB", (40, 30)).save(tmp_path / "a.png")

    (note,) = CocoDataset.open(tmp_path, path).notes

    assert note.startswith("! ")
    assert "LVIS" in note


def test_coco_itself_is_no_other_kind(tmp_path: Path) -> None:
    for record in (
        {"bbox": [1, 1, 2, 2], "keypoints": [1, 1, 2], "caption": "a"},
        {"bbox": [1, 1, 2, 2], "extra": 1},
    ):
        content = coco(image_id=1, category_id=1, **record)
        for number, one in enumerate(content["annotations"]):
            content["annotations"][number] = one | {"id": number}
        path = tmp_path / "annotations.json"
        path.write_text(json.dumps(content))
        assert len(read_coco_file(path, Problems(path)).annotations) == 2
