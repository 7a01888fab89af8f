"""Test `coco_dataset.py` with `coco_annotations.py`, `coco_tables.py` and `image_folder.py`."""

from __future__ import annotations

import copy
import json
import os
import pickle
import re
import shutil
import struct
import warnings
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps

from deta.platform.data import coco_annotations
from deta.platform.data.coco_annotations import (
    CocoFile,
    DatasetError,
    Problems,
    file_name_fault,
    read_coco_file,
)
from deta.platform.data.coco_dataset import CocoDataset
from deta.platform.data.coco_tables import MIN_SIDE_PX, training_boxes
from deta.platform.data.image_decoding import ImageError
from deta.platform.data.image_sizes import PixelRules

SHARED = Path(
    os.environ.get("DETA_SHARED", Path(__file__).resolve().parents[3] / "../shared")
).resolve()
BAD = SHARED / "bad"
CATALOGUE: dict[str, dict[str, Any]] = (
    json.loads((BAD / "catalogue.json").read_text()) if (BAD / "catalogue.json").exists() else {}
)
BAD_IMAGES = sorted(name.removeprefix("images/") for name in CATALOGUE if name[:7] == "images/")
BAD_JSON = sorted(name.removeprefix("json/") for name in CATALOGUE if name[:5] == "json/")
REAL = sorted(SHARED.glob("data/*/annotations/instances_*.json"))

# How an error names the record and the field.
RECORD_AND_FIELD = re.compile(
    r"(top level|(annotation|image|category) (-?\d+|at position \d+)), \w+: "
)


def small_coco() -> dict[str, Any]:
    """Three images of 40 x 30 px, listed out of order; a gap in the category ids; one crowd."""
    return {
        "images": [
            {"id": 7, "file_name": "b.png", "width": 40, "height": 30},
            {"id": 3, "file_name": "a.png", "width": 40, "height": 30},
            {"id": 9, "file_name": "sub/c.png", "width": 40, "height": 30},
        ],
        "annotations": [
            note(0, 7, 90, [5, 6, 10, 12]),
            note(5, 3, 2, [30.5, 20, 20, 20]),
            note(6, 3, 90, [1, 1, 30, 20], iscrowd=1, area=123.5),
            note(8, 7, 2, [0, 0, 0, 10]),
        ],
        "categories": [
            {"id": 90, "name": "toothbrush"},
            {"id": 2, "name": "bicycle"},
            {"id": 50, "name": "unused"},
        ],
    }


def note(number: int, image_id: int, category_id: int, bbox: list[float], **more: Any) -> dict:
    return {
        "id": number,
        "image_id": image_id,
        "category_id": category_id,
        "bbox": bbox,
        "area": 1.0,
        "iscrowd": 0,
    } | more


def write(folder: Path, coco: object, size: tuple[int, int] = (40, 30)) -> tuple[Path, Path]:
    """Image folder and annotation file of a small data set."""
    images = folder / "images"
    (images / "sub").mkdir(parents=True, exist_ok=True)
    for seed, name in enumerate(("a.png", "b.png", "sub/c.png")):
        pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), np.uint8)
        Image.fromarray(pixels).save(images / name)
    path = folder / "annotations.json"
    path.write_text(json.dumps(coco))
    return images, path


def outcome(images: Path, annotations: Path, lenient: bool = False) -> tuple[bool, str]:
    """Whether a data set opens and decodes whole, and what is said of it."""
    try:
        dataset = CocoDataset.open(images, annotations, lenient=lenient)
        samples = [dataset[i] for i in range(len(dataset))]
    except (DatasetError, ImageError) as error:
        return False, str(error)
    for sample, record in zip(samples, dataset.records, strict=True):
        assert sample.image.mode == "RGB"
        assert sample.image.size == (record.width, record.height)
        assert np.isfinite(record.boxes_px).all()
        assert (record.boxes_px[:, 2:] > record.boxes_px[:, :2]).all()
        assert (record.labels < len(dataset.categories)).all()
    return True, "\n".join([dataset.fingerprint, *dataset.notes])


# --- Bad inputs ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", BAD_IMAGES)
def test_bad_image_is_loaded_or_refused_by_name(name: str, tmp_path: Path) -> None:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of bombs
            with Image.open(BAD / "images" / name) as image:
                width, height = image.size
    except Exception:  # not readable, or a bomb: then any size will do
        width, height = 160, 120
    coco = small_coco()
    coco["images"] = [{"id": 3, "file_name": name, "width": width, "height": height}]
    coco["annotations"] = [note(1, 3, 2, [0, 0, width, height])]
    path = tmp_path / "annotations.json"
    path.write_text(json.dumps(coco))

    loads, said = outcome(BAD / "images", path)

    assert (loads, said) == outcome(BAD / "images", path)
    if CATALOGUE[f"images/{name}"]["ok"] is not None:
        assert loads is CATALOGUE[f"images/{name}"]["ok"], said
    if not loads:
        assert name in said
        assert not outcome(BAD / "images", path, lenient=True)[0]  # no image is left


@pytest.mark.parametrize("name", BAD_JSON)
def test_bad_json_is_loaded_or_refused_by_name(name: str) -> None:
    path = BAD / "json" / name
    expected = CATALOGUE[f"json/{name}"]

    loads, said = outcome(BAD / "images", path)

    assert (loads, said) == outcome(BAD / "images", path)
    if expected["ok"] is not None:
        assert loads is expected["ok"], said
        assert outcome(BAD / "images", path, lenient=True)[0] is expected["ok"]
    if not loads:
        assert str(path) in said
        if "the record" in expected["should"]:
            assert RECORD_AND_FIELD.search(said), said


# --- Real data -----------------------------------------------------------------------------------


@pytest.mark.parametrize("path", REAL, ids=lambda p: f"{p.parts[-3]}-{p.stem}")
def test_a_published_data_set_opens_strictly_and_every_image_decodes(path: Path) -> None:
    split = path.stem.removeprefix("instances_").removesuffix("_free")
    dataset = CocoDataset.open(path.parents[1] / split, path)
    coco = json.loads(path.read_text())

    assert len(dataset) == len(coco["images"])
    assert len(dataset.ground_truth["annotations"]) == len(coco["annotations"])
    with ThreadPoolExecutor(2) as pool:
        sizes = list(pool.map(lambda i: dataset[i].image.size, range(len(dataset))))
    assert sizes == [(record.width, record.height) for record in dataset.records]


# --- What a data set holds -----------------------------------------------------------------------


def test_images_are_in_the_order_of_their_ids_and_labels_in_that_of_category_ids(
    tmp_path: Path,
) -> None:
    dataset = CocoDataset.open(*write(tmp_path, small_coco()))

    assert [record.image_id for record in dataset.records] == [3, 7, 9]
    assert [category.id for category in dataset.categories] == [2, 50, 90]
    assert dataset.records[1].labels.tolist() == [2]
    assert dataset.records[-1].path == tmp_path / "images/sub/c.png"
    assert [record.image_id for record in dataset.records[1:]] == [7, 9]


def test_a_sample_holds_clipped_boxes_without_crowds_and_boxes_without_area(
    tmp_path: Path,
) -> None:
    dataset = CocoDataset.open(*write(tmp_path, small_coco()))

    assert dataset[0].boxes_px.tolist() == [[30.5, 20, 40, 30]]
    assert dataset[1].boxes_px.tolist() == [[5, 6, 15, 18]]
    assert dataset[2].boxes_px.shape == (0, 4)
    assert dataset[0].original_size_px == (30, 40)
    with pytest.raises(IndexError):
        dataset[3]
    assert len([note for note in dataset.notes if "no area" in note and "ids 8" in note]) == 1


def test_ground_truth_is_the_file_with_new_annotation_ids(tmp_path: Path) -> None:
    coco = small_coco()
    del coco["annotations"][0]["area"]
    truth = CocoDataset.open(*write(tmp_path, coco)).ground_truth

    assert [a["id"] for a in truth["annotations"]] == [1, 2, 3, 4]
    assert [a["bbox"] for a in truth["annotations"]] == [
        [30.5, 20, 20, 20],
        [1, 1, 30, 20],
        [5, 6, 10, 12],
        [0, 0, 0, 10],
    ]
    assert [a["area"] for a in truth["annotations"]] == [1, 123.5, 120, 1]
    assert [a["iscrowd"] for a in truth["annotations"]] == [0, 1, 0, 0]
    assert [a["category_id"] for a in truth["annotations"]] == [2, 90, 90, 2]
    json.dumps(truth)


def test_the_first_images_are_a_data_set_of_their_own(tmp_path: Path) -> None:
    dataset = CocoDataset.open(*write(tmp_path, small_coco()))
    first = dataset.first(2)

    assert [record.image_id for record in first.records] == [3, 7]
    assert [a["image_id"] for a in first.ground_truth["annotations"]] == [3, 3, 7, 7]
    assert first.fingerprint != dataset.fingerprint
    assert dataset.subset([2, 1, 0]).fingerprint == dataset.fingerprint
    last = dataset.subset([2, 1])
    assert last.records[0].boxes_px.tolist() == dataset.records[1].boxes_px.tolist()
    assert len(last.records[1].boxes_px) == 0
    for wrong in (0, 4):
        with pytest.raises(ValueError, match="of a data set of 3"):
            dataset.first(wrong)


def test_a_data_set_survives_the_way_to_a_worker_and_threads(tmp_path: Path) -> None:
    dataset = CocoDataset.open(*write(tmp_path, small_coco()))
    there = pickle.loads(pickle.dumps(dataset))

    assert there.fingerprint == dataset.fingerprint
    with ThreadPoolExecutor(4) as pool:
        images = list(pool.map(lambda i: there[i % 3].image.tobytes(), range(60)))
    assert images == [dataset[i % 3].image.tobytes() for i in range(60)]


def test_changing_a_sample_does_not_change_the_data_set(tmp_path: Path) -> None:
    dataset = CocoDataset.open(*write(tmp_path, small_coco()))
    before = dataset[1].boxes_px.clone()
    dataset[1].boxes_px.zero_()

    assert dataset[1].boxes_px.equal(before)


def test_fingerprint_is_that_of_the_content_and_not_of_the_place(tmp_path: Path) -> None:
    coco = small_coco()
    here = CocoDataset.open(*write(tmp_path / "here", coco)).fingerprint
    coco["images"].reverse()
    coco["images"][-1]["file_name"] = "./b.png"
    there = CocoDataset.open(*write(tmp_path / "there", coco)).fingerprint

    assert here == there


@pytest.mark.parametrize(
    "change",
    [
        lambda coco: coco["annotations"][0]["bbox"].__setitem__(0, 5.25),
        lambda coco: coco["annotations"][0].update(category_id=50),
        lambda coco: coco["annotations"][0].update(iscrowd=1),
        lambda coco: coco["annotations"].pop(0),
        lambda coco: coco["categories"].append({"id": 91, "name": "new"}),
        lambda coco: coco["categories"][0].update(name="other"),
        lambda coco: coco["images"].pop(),
        lambda coco: coco["images"][2].update(id=8),
        lambda coco: [
            image.update(file_name=name)
            for image, name in zip(coco["images"][:2], ("a.png", "b.png"), strict=True)
        ],
    ],
)
def test_fingerprint_changes_with_what_is_trained_on(change: Any, tmp_path: Path) -> None:
    coco = small_coco()
    images, path = write(tmp_path, coco)
    before = CocoDataset.open(images, path).fingerprint
    change(coco)
    path.write_text(json.dumps(coco))

    assert CocoDataset.open(images, path).fingerprint != before


def test_fingerprint_changes_with_the_length_of_an_image_file(tmp_path: Path) -> None:
    images, path = write(tmp_path, small_coco())
    before = CocoDataset.open(images, path).fingerprint
    with open(images / "a.png", "ab") as file:
        file.write(b"more")

    assert CocoDataset.open(images, path).fingerprint != before


# --- Geometry ------------------------------------------------------------------------------------


@settings(max_examples=300, deadline=None)
@given(st.lists(st.floats(-1e308, 1e308) | st.floats(-5, 60), min_size=4, max_size=4))
def test_a_training_box_is_inside_its_image_and_has_area(bbox: list[float]) -> None:
    boxes, reasons = training_boxes(np.array([bbox]), np.array([[30, 40]]))
    dropped = sum(int(mask[0]) for mask in reasons.values())

    assert dropped in (0, 1)
    x1, y1, x2, y2 = boxes[0].tolist()
    assert 0 <= x1 <= 40
    assert 0 <= y2 <= 30
    if not dropped:
        assert x2 - x1 >= MIN_SIDE_PX * 0.999  # of a difference of float32
        assert y2 - y1 >= MIN_SIDE_PX * 0.999


@pytest.mark.parametrize(
    ("bbox", "note"),
    [
        ([5, 5, 0, 3], "no area"),
        ([-9, 5, 8, 3], "outside"),
        ([40, 5, 8, 3], "outside"),
        ([5, 30.5, 8, 3], "outside"),
        ([5, 5, 1e-4, 3], "a side under"),
    ],
)
def test_a_box_not_trained_on_is_counted_once(bbox: list[float], note: str, tmp_path: Path) -> None:
    coco = small_coco()
    coco["annotations"] = [coco["annotations"][0]]
    coco["annotations"].append(coco["annotations"][0] | {"id": 77, "bbox": bbox})
    dataset = CocoDataset.open(*write(tmp_path, coco))

    assert len(dataset.notes) == 1
    assert "1 record not trained on" in dataset.notes[0]
    assert note in dataset.notes[0]
    assert "ids 77" in dataset.notes[0]
    assert len(dataset.records[1].boxes_px) == 1
    assert dataset.ground_truth["annotations"][1]["bbox"] == bbox


def test_what_looks_like_a_mistake_is_noted(tmp_path: Path) -> None:
    coco = small_coco()
    coco["categories"][0]["name"] = "bicycle"
    coco["annotations"] = [note(1, 3, 2, [0.1, 0.2, 0.5, 0.5])]
    notes = "\n".join(CocoDataset.open(*write(tmp_path, coco)).notes)
    assert "share the name 'bicycle'" in notes
    assert "normalised boxes?" in notes

    coco["annotations"] = []
    notes = "\n".join(CocoDataset.open(*write(tmp_path, coco)).notes)
    assert "no box to train on" in notes


def test_boxes_that_are_drawn_backwards_are_named_and_turned_round(tmp_path: Path) -> None:
    coco = small_coco()
    coco["annotations"] = [
        note(1, 3, 2, [15, 18, -10, -12]),
        note(2, 7, 2, [5, 18, 10, -12]),
        note(3, 9, 2, [5, 6, 10, 12]),
    ]
    images, path = write(tmp_path, coco)
    with pytest.raises(
        DatasetError, match=r"2 problems[^$]*annotation 1, bbox.*negative width"
    ) as e:
        CocoDataset.open(images, path)
    assert "no area" not in str(e.value)
    assert "turn round" in str(e.value)

    dataset = CocoDataset.open(images, path, lenient=True)

    assert [record.boxes_px.tolist() for record in dataset.records] == [[[5, 6, 15, 18]]] * 3
    assert [a["bbox"] for a in dataset.ground_truth["annotations"]] == [[5, 6, 10, 12]] * 3
    assert "2 records repaired" in dataset.notes[0]
    assert "ids 1, 2" in dataset.notes[0]


def test_a_set_whose_boxes_are_all_dropped_is_refused_with_the_reasons(tmp_path: Path) -> None:
    coco = small_coco()
    coco["annotations"] = [note(1, 3, 2, [50, 0, 10, 9]), note(2, 3, 2, [5, 6, 0, 12])]
    for lenient in (False, True):
        with pytest.raises(DatasetError, match="none of its 2 boxes") as caught:
            CocoDataset.open(*write(tmp_path, coco), lenient=lenient)
        assert "no area" in str(caught.value)
        assert "outside" in str(caught.value)

    coco["annotations"] = [note(1, 3, 2, [1, 1, 10, 9], iscrowd=1)]  # no boxes to begin with
    assert len(CocoDataset.open(*write(tmp_path, coco))) == 3


def test_the_same_box_twice_is_counted(tmp_path: Path) -> None:
    coco = small_coco()
    same = [note(20 + i, 7, 90, [5.01, 6, 10, 12]) for i in range(2)]
    other = [note(30, 7, 2, [5, 6, 10, 12]), note(31, 9, 90, [5, 6, 10, 12])]
    coco["annotations"] += same + other

    (said,) = [n for n in CocoDataset.open(*write(tmp_path, coco)).notes if n.startswith("! ")]

    assert "2 records of the same class and place" in said
    assert "ids 20, 21" in said


def test_two_ids_of_a_file_are_noted_if_both_have_boxes(tmp_path: Path) -> None:
    coco = small_coco()
    coco["images"].append({"id": 11, "file_name": "./a.png", "width": 40, "height": 30})
    coco["annotations"].append(note(40, 11, 2, [1, 2, 3, 4]))

    (said,) = [n for n in CocoDataset.open(*write(tmp_path, coco)).notes if "another id" in n]

    assert "1 record" in said
    assert "ids 11" in said


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda coco: coco["annotations"][0].update(iscrowd=False), "true or false"),
        (lambda coco: coco["annotations"][0].update(iscrowd=None), "iscrowd is null"),
        (lambda coco: coco["annotations"][0].update(iscrowd=0.0), "decimal point"),
        (lambda coco: coco["annotations"][0].pop("area"), None),
        (lambda coco: coco["annotations"][0].update(area=None), "area is null"),
        (lambda coco: coco["annotations"][0].update(id=0.0, image_id=7.0), "decimal point"),
        (lambda coco: coco["annotations"][0].update(category_id=90.0), "decimal point"),
        (lambda coco: coco["images"][0].update(id=7.0, width=40.0, height=30.0), "decimal point"),
        (lambda coco: coco["categories"][0].update(id=90.0), "decimal point"),
    ],
)
def test_values_of_an_odd_type_with_one_meaning_are_read_and_counted(
    change: Any, said: str | None, tmp_path: Path
) -> None:
    plain = CocoDataset.open(*write(tmp_path / "plain", small_coco()))
    coco = small_coco()
    change(coco)
    odd = CocoDataset.open(*write(tmp_path / "odd", coco))

    assert odd.fingerprint == plain.fingerprint
    assert odd.records[1].boxes_px.tolist() == plain.records[1].boxes_px.tolist()
    assert len(odd.notes) - len(plain.notes) >= (said is not None)
    assert said is None or any(said in n and "1 record " in n for n in odd.notes)


@pytest.mark.parametrize("value", ["1", 1.5, True, 2.0**60, [1]])
def test_values_that_could_mean_something_else_stay_faults(value: object, tmp_path: Path) -> None:
    coco = small_coco()
    coco["annotations"][0]["image_id"] = value
    with pytest.raises(DatasetError, match="annotation 0, image_id"):
        CocoDataset.open(*write(tmp_path, coco))


# --- Faults --------------------------------------------------------------------------------------


def test_all_faults_are_told_at_once(tmp_path: Path) -> None:
    coco = small_coco()
    coco["images"][0]["width"] = True
    coco["annotations"][0]["bbox"] = [1, 2, "3", 4]
    coco["annotations"][1]["category_id"] = 4
    coco["annotations"][2]["image_id"] = 4
    coco["annotations"][3]["area"] = "1"
    with pytest.raises(DatasetError) as caught:
        CocoDataset.open(*write(tmp_path, coco))

    said = str(caught.value)
    assert "5 problems" in said
    for where in (
        "image 7, width: is True",
        "annotation 0, bbox: is [1, 2, '3', 4]",
        "annotation 5, category_id: 4",
        "annotation 6, image_id: no image has the id 4",
        "annotation 8, area: is '1'",
        "would skip 1 of them",
    ):
        assert where in said


def test_a_long_list_of_faults_is_counted(tmp_path: Path) -> None:
    coco = small_coco()
    coco["annotations"] = [note(i, 3, 2, [1, 2, 3]) for i in range(500)]
    with pytest.raises(DatasetError, match=r"500 problems[^$]*and 490 more") as caught:
        CocoDataset.open(*write(tmp_path, coco))

    assert len(str(caught.value).splitlines()) == 13


def test_a_long_list_is_counted_by_kind_too(tmp_path: Path) -> None:
    coco = small_coco()
    coco["images"] += [
        {"id": 100 + i, "file_name": f"gone{i}.png", "width": 40, "height": 30} for i in range(20)
    ]
    coco["annotations"] += [note(200 + i, 999, 2, [1, 1, 5, 5]) for i in range(3)]
    with pytest.raises(DatasetError, match="23 problems") as caught:
        CocoDataset.open(*write(tmp_path, coco))

    assert "20 image missing or unreadable" in str(caught.value)
    assert "3 annotation of an image that is not listed" in str(caught.value)


def test_lenient_skips_and_counts_by_kind(tmp_path: Path) -> None:
    coco = small_coco()
    coco["images"] += [
        coco["images"][0].copy(),
        {"id": 20, "file_name": "gone.png", "width": 40, "height": 30},
        {"id": 22, "file_name": "./a.png", "width": 40, "height": 30},
        {"id": 21, "file_name": "sub/c.png", "width": 30, "height": 40},
    ]
    coco["annotations"] += [
        note(30, 20, 2, [1, 1, 5, 5]),
        note(31, 444, 2, [1, 1, 5, 5]),
    ]
    images, path = write(tmp_path, coco)
    with pytest.raises(DatasetError, match="5 problems"):
        CocoDataset.open(images, path)
    dataset = CocoDataset.open(images, path, lenient=True)

    assert [record.image_id for record in dataset.records] == [3, 7, 9]
    assert len(dataset.ground_truth["annotations"]) == 4
    for kind, record_id in (
        ("given twice", 7),
        ("missing or unreadable", 20),
        ("of another size", 21),
        ("under another id", 22),
        ("not listed", 31),
    ):
        assert [n for n in dataset.notes if kind in n and f"ids {record_id}" in n], kind


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"[" * 100_000,
        b'{"images": "x", "annotations": [1], "categories": {}}',
        b"\xff\xfe\x00",
        b'{"images": [{"file_name": "\xe9"}]}',
        b"7",
        json.dumps(small_coco()).encode("utf-16-le"),
        json.dumps(small_coco()).replace('"id": 7', '"id": 1' + "0" * 4000).encode(),
        json.dumps(small_coco()).replace('"b.png"', '"\\ud800.png"').encode(),
        json.dumps(small_coco()).replace("[5, 6,", "[1" + "0" * 400 + ", 6,").encode(),
    ],
)
def test_a_broken_annotation_file_is_a_dataset_error_that_names_it(
    content: bytes, tmp_path: Path
) -> None:
    images, path = write(tmp_path, small_coco())
    path.write_bytes(content)

    for lenient in (False, True):
        with pytest.raises(DatasetError, match=re.escape(str(path))):
            CocoDataset.open(images, path, lenient=lenient)


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_any_value_in_any_field_loads_or_is_a_named_error(
    data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.getbasetemp() / "any_value"
    coco = copy.deepcopy(small_coco())
    images, path = (
        (folder / "images", folder / "annotations.json") if folder.exists() else write(folder, coco)
    )
    record = data.draw(st.sampled_from([r for part in coco.values() for r in part]))
    key = data.draw(st.sampled_from(sorted(record)))
    numbers = st.integers() | st.floats() | st.sampled_from([2**63, -(2**63), 10**400])
    record[key] = data.draw(
        numbers | st.none() | st.booleans() | st.text(max_size=6) | st.lists(numbers, max_size=5)
    )
    path.write_text(json.dumps(coco))

    loads, said = outcome(images, path)

    assert loads or str(path) in said


# --- Paths ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    ["/a.png", "../a.png", "sub/../../a.png", "..", "C:/a.png", "c:a.png", "\\\\host\\a.png"]
    + ["sub\\c.png", "http://host/a.png", "file:///a.png", "a\0.png", "", 1, None, "\ud800"],
)
def test_a_file_name_that_could_lead_elsewhere_is_refused(name: object) -> None:
    assert file_name_fault(name)


@pytest.mark.parametrize("name", ["a.png", "./a.png", "sub//c.png", "..a.png", "a..b/c", "ü ñ.png"])
def test_a_file_name_below_the_folder_is_accepted(name: str) -> None:
    assert file_name_fault(name) is None


def test_a_link_may_not_lead_out_of_the_image_folder(tmp_path: Path) -> None:
    images, path = write(tmp_path, small_coco())
    outside = tmp_path / "outside"
    outside.mkdir()
    shutil.move(images / "sub/c.png", outside / "c.png")

    (images / "sub/c.png").symlink_to("../a.png")
    assert outcome(images, path)[0]

    (images / "sub/c.png").unlink()
    (images / "sub/c.png").symlink_to(outside / "c.png")
    for lenient in (False, True):
        assert "image 9, file_name" in outcome(images, path, lenient)[1]

    (images / "sub/c.png").unlink()
    (images / "sub").rmdir()
    (images / "sub").symlink_to(outside)
    assert "link out of the image folder" in outcome(images, path)[1]


def test_the_image_folder_may_be_a_link(tmp_path: Path) -> None:
    images, path = write(tmp_path, small_coco())
    (tmp_path / "link").symlink_to(images)

    assert outcome(tmp_path / "link", path) == outcome(images, path)


def test_pipes_long_names_and_loops_are_errors_and_do_not_hang(tmp_path: Path) -> None:
    coco = small_coco()
    coco["images"][0]["file_name"] = "pipe"
    coco["images"][1]["file_name"] = "x" * 5000
    coco["images"][2]["file_name"] = "loop/c.png"
    images, path = write(tmp_path, coco)
    os.mkfifo(images / "pipe")
    (images / "loop").symlink_to("loop")

    assert "3 problems" in outcome(images, path)[1]


def test_missing_folder_or_file_is_a_dataset_error(tmp_path: Path) -> None:
    images, path = write(tmp_path, small_coco())
    with pytest.raises(DatasetError, match=r"gone: is not a folder"):
        CocoDataset.open(tmp_path / "gone", path)
    with pytest.raises(DatasetError, match=r"gone\.json: cannot be read"):
        CocoDataset.open(images, tmp_path / "gone.json")


@pytest.mark.parametrize("lenient", [False, True])
def test_a_folder_without_any_of_the_images_is_told_once(lenient: bool, tmp_path: Path) -> None:
    images, path = write(tmp_path, small_coco())
    other = tmp_path / "other"
    other.mkdir()
    (other / "x.png").write_bytes(b"")
    for folder, advice in (
        (other, r"0 of the 3 images of .*, such as b\.png .*1 other.*wrong folder\?"),
        (images / "sub", rf"the images are in {re.escape(str(images))}; give that folder"),
        (tmp_path, rf"the images are in {re.escape(str(images))}; give that folder"),
    ):
        with pytest.raises(DatasetError, match=advice) as caught:
            CocoDataset.open(folder, path, lenient=lenient)
        assert len(str(caught.value).splitlines()) == 1

    coco = small_coco()
    for image in coco["images"]:
        image["file_name"] = "train/" + image["file_name"]
    with pytest.raises(DatasetError, match="take the folders off the file names"):
        CocoDataset.open(*write(tmp_path, coco), lenient=lenient)


def test_lenient_is_no_advice_where_it_would_skip_all_images(tmp_path: Path) -> None:
    coco = small_coco()
    for image in coco["images"]:
        image["width"] = 41
    with pytest.raises(DatasetError, match=r"data\.lenient=true would skip all images"):
        CocoDataset.open(*write(tmp_path, coco))


def test_an_image_exchanged_after_opening_is_an_error(tmp_path: Path) -> None:
    images, path = write(tmp_path, small_coco())
    dataset = CocoDataset.open(images, path)
    Image.new("RGB", (41, 30)).save(images / "a.png")

    with pytest.raises(ImageError, match=r"a\.png: has 41 x 30 pixels"):
        dataset[0]


def test_the_pixel_limit_can_be_lowered_and_raised(tmp_path: Path) -> None:
    images, path = write(tmp_path, small_coco())
    with pytest.raises(DatasetError, match="max_pixels=1,199"):
        CocoDataset.open(images, path, max_pixels=40 * 30 - 1)

    assert len(CocoDataset.open(images, path, max_pixels=40 * 30, progress=True)) == 3


# --- Orientation and 16 bits ---------------------------------------------------------------------

APPLY = PixelRules(exif="apply")


def write_turned(
    folder: Path, orientation: int, size: tuple[int, int], annotated: tuple[int, int]
) -> tuple[Path, Path]:
    """A bright box of 8 x 6 px at (12, 10) of the upright picture; its file is turned."""
    upright = Image.new("RGB", size, (20, 20, 20))
    upright.paste((250, 250, 250), (12, 10, 20, 16))
    exif = Image.Exif()
    exif[0x0112] = orientation
    back = {1: 1, 2: 2, 3: 3, 4: 4, 5: 5, 6: 8, 7: 7, 8: 6}[orientation]
    there = Image.Exif()
    there[0x0112] = back
    upright.info["exif"] = there.tobytes()
    upright.getexif()[0x0112] = back
    stored = ImageOps.exif_transpose(upright)
    (folder / "images").mkdir(parents=True, exist_ok=True)
    stored.save(folder / "images" / "a.png", exif=exif)
    coco = small_coco()
    width, height = annotated
    coco["images"] = [{"id": 3, "file_name": "a.png", "width": width, "height": height}]
    coco["annotations"] = [note(1, 3, 2, [12, 10, 8, 6])]
    (folder / "annotations.json").write_text(json.dumps(coco))
    return folder / "images", folder / "annotations.json"


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("shape", [(40, 30), (40, 40)])
@pytest.mark.parametrize("writes", ["stored", "upright"])
def test_boxes_of_an_upright_picture_lie_right_with_exif_applied(
    orientation: int, shape: tuple[int, int], writes: str, tmp_path: Path
) -> None:
    """Tools write the stored size or the upright one beside boxes of the upright picture."""
    turns = orientation > 4
    annotated = shape[::-1] if turns and writes == "stored" else shape
    given = write_turned(tmp_path, orientation, shape, annotated)

    dataset = CocoDataset.open(*given, rules=APPLY)

    record, sample = dataset.records[0], dataset[0]
    assert sample.image.size == (record.width, record.height) == shape
    x1, y1, x2, y2 = map(int, record.boxes_px[0])
    assert (np.asarray(sample.image)[y1:y2, x1:x2] == 250).all()
    assert (np.asarray(sample.image) == 250).sum() == 3 * 8 * 6
    truth = dataset.ground_truth["images"][0]
    assert (truth["width"], truth["height"]) == shape
    assert len([n for n in dataset.notes if "turned upright" in n]) == (orientation != 1)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("shape", [(40, 30), (40, 40)])
def test_orientation_is_counted_in_both_modes_and_a_swapped_size_tells_the_cure(
    orientation: int, shape: tuple[int, int], tmp_path: Path
) -> None:
    stored = shape[::-1] if orientation > 4 else shape
    given = write_turned(tmp_path, orientation, shape, stored)
    for lenient in (False, True):
        warned = [n for n in CocoDataset.open(*given, lenient=lenient).notes if "EXIF" in n]
        assert len(warned) == (orientation != 1)
        for said in warned:
            assert said.startswith("! ")
            assert "1 of 1 images have an EXIF orientation other than 1" in said
            assert f": 1 with {orientation} (ids 3)" in said
            assert "data.exif=apply" in said
    if stored != shape:
        given = write_turned(tmp_path, orientation, shape, shape)
        with pytest.raises(DatasetError, match=r"upright picture; set data\.exif=apply"):
            CocoDataset.open(*given)


def test_a_size_that_fits_neither_way_is_a_fault_with_exif_applied(tmp_path: Path) -> None:
    given = write_turned(tmp_path, 6, (40, 30), (41, 30))
    with pytest.raises(DatasetError, match="41 x 30 are annotated"):
        CocoDataset.open(*given, rules=APPLY)
    given = write_turned(tmp_path, 1, (40, 30), (30, 40))  # an image that is not turned
    with pytest.raises(DatasetError, match="30 x 40 are annotated"):
        CocoDataset.open(*given, rules=APPLY)


@pytest.mark.parametrize(("most", "warns"), [(65535, False), (30000, False), (4095, True)])
def test_sixteen_bit_images_that_use_few_levels_are_counted(
    most: int, warns: bool, tmp_path: Path
) -> None:
    images, path = write(tmp_path, small_coco())
    values = np.random.default_rng(0).integers(0, most + 1, (30, 40)).astype(np.uint16)
    Image.fromarray(values).save(images / "b.png")
    for lenient in (False, True):
        dataset = CocoDataset.open(images, path, lenient=lenient)
        said = [n for n in dataset.notes if "16 bits" in n]
        assert len(said) == warns
        assert not said or (
            said[0].startswith("! ")
            and "1 of 3 images" in said[0]
            and "(ids 7)" in said[0]
            and "data.sixteen_bit=stretch" in said[0]
        )
    found = dataset.sixteen_bit_range()
    assert found is not None
    assert 0 <= found[0] <= 0.01 * most
    assert 0.99 * most <= found[1] <= most
    rules = PixelRules(sixteen_bit="stretch", sixteen_bit_range=found)
    stretched = CocoDataset.open(images, path, rules=rules)
    assert not [n for n in stretched.notes if "16 bits" in n]
    assert len(np.unique(np.asarray(stretched[1].image))) > 200
    assert stretched.fingerprint == dataset.fingerprint


@pytest.mark.parametrize("most", [15, 255])
def test_colours_of_sixteen_bits_that_use_few_levels_are_counted(most: int, tmp_path: Path) -> None:
    images, path = write(tmp_path, small_coco())
    rng = np.random.default_rng(0)
    values = rng.integers(0, most * 257 + 1, (30, 40, 3)).astype(">u2")
    rows = b"".join(b"\0" + row.tobytes() for row in values)
    header = struct.pack(">IIBBBBB", 40, 30, 16, 2, 0, 0, 0)
    content = b"\x89PNG\r\n\x1a\n"
    for name, data in ((b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b"")):
        content += struct.pack(">I", len(data)) + name + data
        content += struct.pack(">I", zlib.crc32(name + data))
    (images / "b.png").write_bytes(content)

    said = [n for n in CocoDataset.open(images, path).notes if "16 bits" in n]

    assert len(said) == (most == 15)
    assert not said or ("1 of 3 images" in said[0] and "at most 15 of 256" in said[0])


REPORTED = sorted((SHARED / "reports").glob("*/ann.json"))


@pytest.mark.parametrize("path", REPORTED, ids=lambda path: path.parent.name)
def test_a_reported_set_is_opened_with_a_word_or_refused(path: Path) -> None:
    loads, said = outcome(path.parent / "images", path)

    is_of_detections = "compare.py" in path.with_name("README.md").read_text()
    assert is_of_detections or len(said.splitlines()) > loads  # after the fingerprint


def without_quick_parser(path: Path, monkeypatch: pytest.MonkeyPatch) -> CocoFile:
    with monkeypatch.context() as patched:
        patched.setattr(coco_annotations, "_parse_quickly", lambda content: None)
        return read_coco_file(path, Problems(path))


def used(file: CocoFile) -> list[list[dict[str, Any]]]:
    fields = ("id", "name", "file_name", "width", "height", "image_id", "category_id", "bbox")
    fields += ("area", "iscrowd", "neg_category_ids")
    lists = (file.categories, file.images, file.annotations)
    return [[{f: r[f] for f in fields if f in r} for r in records] for records in lists]


@pytest.mark.parametrize("path", REAL, ids=lambda path: path.parts[-3] + "/" + path.stem)
def test_the_quick_parser_reads_what_the_complete_one_does(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert coco_annotations._parse_quickly(path.read_bytes()) is not None
    expected = without_quick_parser(path, monkeypatch)
    assert used(read_coco_file(path, Problems(path))) == used(expected)


def test_what_the_quick_parser_skips_or_cannot_read_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    coco = small_coco()
    coco["images"][0] |= {"neg_category_ids": [4], "license": 1}
    coco["annotations"][1] |= {"iscrowd": False, "area": None, "segmentation": [[0.5, 1, 2, 3]]}
    text = json.dumps(coco)
    for changed in (text, text.replace("[[0.5,", "[[NaN,"), "\ufeff" + text):
        path = tmp_path / "coco.json"
        path.write_text(changed, encoding="utf-8")
        found, expected = Problems(path), Problems(path)
        assert used(read_coco_file(path, found)) == used(without_quick_parser(path, monkeypatch))
        read_coco_file(path, expected)
        assert found.notes() == expected.notes() != []
    path.write_bytes(text.encode().replace(b'"license"', b'"licens\xff"'))
    with pytest.raises(DatasetError, match="is not UTF-8"):
        read_coco_file(path, Problems(path))
