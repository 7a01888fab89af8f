"""Test `synthetic_shapes.py`: valid COCO files, reproducible, with boxes that fit the shapes."""

from __future__ import annotations

import hashlib
import json
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from deta.platform.data.synthetic_shapes import (
    CATEGORY_NAMES,
    MARKER,
    MAX_SHAPES,
    MIN_VISIBLE,
    Shape,
    draw_scene,
    write_shapes,
)
from deta.platform.evaluation.coco_metrics import evaluate_detections


def digest(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def scenes(num: int) -> list[tuple[Image.Image, list[Shape]]]:
    return [draw_scene(np.random.default_rng([7, index]), 128) for index in range(num)]


def test_a_set_is_valid_coco(tmp_path: Path) -> None:
    dataset = write_shapes(tmp_path / "shapes", num_train=30, num_val=10)

    image_ids: list[int] = []
    for images_folder, annotation_path, count in (
        (dataset.train_images, dataset.train_annotations, 30),
        (dataset.val_images, dataset.val_annotations, 10),
    ):
        coco = json.loads(annotation_path.read_text())
        sizes = {image["id"]: (image["width"], image["height"]) for image in coco["images"]}
        image_ids += sizes
        assert len(sizes) == count
        assert [category["name"] for category in coco["categories"]] == list(CATEGORY_NAMES)
        for image in coco["images"]:
            with Image.open(images_folder / image["file_name"]) as opened:
                assert opened.size == sizes[image["id"]]
                assert opened.mode == "RGB"
        assert len({a["id"] for a in coco["annotations"]}) == len(coco["annotations"]) > count
        for annotation in coco["annotations"]:
            x, y, width, height = annotation["bbox"]
            image_width, image_height = sizes[annotation["image_id"]]
            assert 0 <= x < x + width <= image_width + 0.01  # two decimals are written
            assert 0 <= y < y + height <= image_height + 0.01
            assert min(width, height) >= 13.99
            assert 0 < annotation["area"] <= width * height * 1.05
            assert annotation["category_id"] in range(1, 6)
        perfect = [{**a, "score": 0.5} for a in coco["annotations"]]
        assert evaluate_detections(coco, perfect).AP > 0.99
    assert len(set(image_ids)) == 40
    assert len({scene.size for scene, _ in scenes(40)}) == 3


def test_the_same_seed_gives_the_same_bytes_and_another_seed_does_not(tmp_path: Path) -> None:
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        write_shapes(tmp_path / name, num_train=6, num_val=3, seed=seed)

    assert digest(tmp_path / "a") == digest(tmp_path / "b")
    first, other = digest(tmp_path / "a"), digest(tmp_path / "c")
    assert first.keys() == other.keys()
    assert all(first[name] != other[name] for name in first)


def test_an_image_does_not_depend_on_how_many_there_are(tmp_path: Path) -> None:
    few = write_shapes(tmp_path / "few", num_train=2, num_val=1).train_images
    many = write_shapes(tmp_path / "many", num_train=5, num_val=3).train_images

    assert digest(few).items() <= digest(many).items()


@pytest.mark.parametrize("index", range(0, 120, 20))
def test_a_box_fits_the_mask_that_is_drawn(index: int) -> None:
    for scene, shapes in scenes(120)[index : index + 20]:
        for shape in shapes:
            rows = np.flatnonzero(shape.coverage.max(axis=1) > 0)
            columns = np.flatnonzero(shape.coverage.max(axis=0) > 0)
            drawn = (columns[0], rows[0], columns[-1] + 1, rows[-1] + 1)
            # A pixel that the outline touches is drawn, so the mask is up to a pixel larger; a
            # tip that is thinner than a quarter of a pixel is not, so up to 0.1 smaller.
            assert np.abs(np.subtract(shape.box_px, drawn)).max() <= 1.15
            assert shape.coverage.sum() <= shape.area_px * 1.1
            assert scene.size == shape.coverage.shape[::-1]


def test_every_shape_can_be_seen_well_enough() -> None:
    for _, shapes in scenes(150):
        assert len(shapes) <= MAX_SHAPES
        over = np.zeros(())
        for shape in reversed(shapes):
            assert np.allclose(shape.visible, shape.coverage * (1 - over), atol=1e-5)
            assert shape.visible.sum() >= MIN_VISIBLE * shape.area_px
            over = shape.coverage + over * (1 - shape.coverage)


def test_shapes_overlap_and_leave_the_image_and_all_kinds_are_common() -> None:
    shapes = [shape for _, drawn in scenes(150) for shape in drawn]

    covered = [shape.visible.sum() < 0.95 * shape.coverage.sum() for shape in shapes]
    cut = [shape.coverage.sum() < 0.95 * shape.area_px for shape in shapes]
    kinds = np.bincount([shape.category_id for shape in shapes], minlength=6)[1:]
    assert 0.05 < np.mean(covered) < 0.5
    assert 0.05 < np.mean(cut) < 0.5
    assert kinds.min() > 0.12 * len(shapes)


def test_a_complete_set_is_not_written_again_and_an_incomplete_one_is(tmp_path: Path) -> None:
    folder = tmp_path / "shapes"
    dataset = write_shapes(folder, num_train=4, num_val=2)
    times = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    expected = digest(folder)

    assert write_shapes(folder, num_train=4, num_val=2).folder == dataset.folder
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == times

    next(dataset.train_images.iterdir()).unlink()
    write_shapes(folder, num_train=4, num_val=2)
    assert digest(folder) == expected

    write_shapes(folder, num_train=3, num_val=2)
    assert len(list(dataset.train_images.iterdir())) == 3
    assert [path.name for path in tmp_path.iterdir()] == ["shapes"]  # nothing left beside it


def test_a_folder_with_something_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")

    with pytest.raises(ValueError, match=MARKER):
        write_shapes(tmp_path, num_train=1, num_val=1)

    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


@pytest.mark.parametrize("bad", [{"num_train": 0}, {"num_val": -1}, {"size_px": 8}, {"seed": -1}])
def test_arguments_out_of_range_are_refused(tmp_path: Path, bad: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(bad))}={next(iter(bad.values()))}"):
        write_shapes(tmp_path / "shapes", **bad)


def _write(folder: Path) -> dict[str, str]:
    return digest(write_shapes(folder, num_train=3, num_val=2).folder)


def test_several_processes_may_write_the_same_set(tmp_path: Path) -> None:
    with ProcessPoolExecutor(3) as pool:
        digests = list(pool.map(_write, [tmp_path / "shapes"] * 3))

    assert digests[0] == digests[1] == digests[2]
    assert [path.name for path in tmp_path.iterdir()] == ["shapes"]
