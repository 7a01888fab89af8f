"""Test `shards/`: shards equal the loose files, and altered shards are errors."""

from __future__ import annotations

import json
import os
import pickle
import threading
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from deta.platform.data.coco_annotations import DatasetError
from deta.platform.data.coco_dataset import CocoDataset
from deta.platform.data.data_loader import batch_tensors, evaluation_loader, train_loader
from deta.platform.data.image_sizes import AugmentationConfig, EvaluationSize
from deta.platform.shards.manifest import ShardError, read_pack_manifest, verify_shards
from deta.platform.shards.object_store import ObjectStore
from deta.platform.shards.open_dataset import open_dataset
from deta.platform.shards.packer import consecutive, locate_images, pack_dataset
from deta.platform.shards.sharded_dataset import ShardedDataset

SHARED = Path(
    os.environ.get("DETA_SHARED", Path(__file__).resolve().parents[3] / "../shared")
).resolve()
REAL = sorted(SHARED.glob("data/*/annotations/instances_*.json"))

SMALL = AugmentationConfig(
    short_edges=(24, 32), max_long_edge=48, crop_pre_short_edges=(24, 28), crop_min=16, crop_max=24
)
NUM_IMAGES = 40


def write_loose(folder: Path, num_images: int = NUM_IMAGES, seed: int = 0) -> CocoDataset:
    """Images of many sizes in two formats and a subfolder; crowds, odd boxes, images without."""
    random = np.random.default_rng(seed)
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    (folder / "images" / "sub").mkdir(parents=True)
    for index in range(num_images):
        width, height = random.integers(20, 90, 2).tolist()
        name = ("{}.png", "sub/ü {}.jpg")[index % 2].format(index)
        pixels = random.integers(0, 256, (height, width, 3), np.uint8)
        Image.fromarray(pixels).save(folder / "images" / name)
        image_id = 3 * (num_images - index)  # not in the order of the list
        images.append({"id": image_id, "file_name": name, "width": width, "height": height})
        for number in range(index % 4):
            bbox = [
                random.uniform(-5, width),
                random.uniform(-5, height),
                *random.uniform(0, 50, 2),
            ]
            one = {"id": len(annotations), "image_id": image_id, "bbox": [float(b) for b in bbox]}
            one |= {"category_id": int(random.choice([2, 90, 7])), "iscrowd": int(index % 5 == 1)}
            if number:
                one["area"] = float(random.uniform(0, 1000))
            annotations.append(one)
    annotations[0]["bbox"] = [1, 2, 0, 5]  # no area
    categories = [{"id": i, "name": f"kind {i}"} for i in (90, 2, 50, 7)]
    path = folder / "annotations.json"
    path.write_text(
        json.dumps({"images": images, "annotations": annotations, "categories": categories})
    )
    return CocoDataset.open(folder / "images", path)


@pytest.fixture(scope="module")
def loose(tmp_path_factory: pytest.TempPathFactory) -> CocoDataset:
    return write_loose(tmp_path_factory.mktemp("loose"))


@pytest.fixture(scope="module")
def folder(loose: CocoDataset, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pack of several shards; not to be written to."""
    path = tmp_path_factory.mktemp("packed") / "shards"
    manifest = pack_dataset(loose, ObjectStore(path), shard_bytes=60_000).manifest
    assert len(manifest.shards) > 2
    return path


@pytest.fixture
def own(folder: Path, tmp_path: Path) -> Path:
    """A copy of it to harm."""
    copy = tmp_path / "shards"
    copy.mkdir()
    for file in folder.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    return copy


def assert_equal(sharded: CocoDataset, loose: CocoDataset) -> None:
    """Alike in all but where the images are."""
    assert sharded.fingerprint == loose.fingerprint
    assert sharded.categories == loose.categories
    assert sharded.notes == loose.notes
    assert sharded.ground_truth == loose.ground_truth
    assert len(sharded) == len(loose)
    for one, other in zip(sharded.tables[1:], loose.tables[1:], strict=True):
        assert one.dtype == other.dtype
        assert one.tobytes() == other.tobytes()
    for index in range(len(loose)):
        assert sharded.content(index) == loose.content(index)
    for index in {0, len(loose) // 2, len(loose) - 1, -1}:
        one, other = sharded[index], loose[index]
        assert one.image.tobytes() == other.image.tobytes()
        assert one.boxes_px.equal(other.boxes_px)
        assert one.labels.equal(other.labels)
        assert (one.image_id, one.original_size_px) == (other.image_id, other.original_size_px)
        assert sharded.records[index].path.name == loose.records[index].path.name


def test_shards_open_as_the_loose_files_do(folder, loose):
    sharded = open_dataset(str(folder))
    assert isinstance(sharded, ShardedDataset)
    assert_equal(sharded, loose)
    assert_equal(pickle.loads(pickle.dumps(sharded)), loose)
    assert_equal(open_dataset(f"file://{folder}", verify=True, progress=True), loose)


@pytest.mark.parametrize("path", REAL, ids=lambda path: f"{path.parents[1].name}-{path.stem}")
def test_shards_of_a_real_data_set_equal_it(path, tmp_path):
    split = path.stem.removeprefix("instances_")
    if not (path.parents[1] / split).is_dir():
        split = split.partition("_")[0]
    dataset = CocoDataset.open(path.parents[1] / split, path)
    pack_dataset(dataset, ObjectStore(tmp_path / "shards"), shard_bytes=1 << 20)
    assert_equal(ShardedDataset.open_shards(tmp_path / "shards"), dataset)


def test_subsets_of_shards_are_subsets_of_the_data_set(folder, loose):
    sharded = open_dataset(folder)
    assert_equal(sharded.first(7), loose.first(7))
    chosen = [NUM_IMAGES - 1, 3, 17]
    assert_equal(sharded.subset(chosen), loose.subset(chosen))
    assert_equal(sharded.subset(chosen).first(2), loose.subset(chosen).first(2))


@pytest.mark.parametrize("num_loader_workers", [0, 2])
def test_batches_from_shards_equal_those_from_loose_files(folder, loose, num_loader_workers):
    def loaded(dataset: CocoDataset, workers: int) -> list:
        steps = train_loader(
            dataset, SMALL, seed=3, total_batch_size=8, micro_batch_size=3, end_step=8,
            num_loader_workers=workers,
        )  # fmt: skip
        evaluation = evaluation_loader(
            dataset,
            EvaluationSize(short_edge=32, max_long_edge=48),
            batch_size=8,
            num_loader_workers=workers,
        )
        return [*chain(*steps), *evaluation]

    sharded = open_dataset(folder)
    sharded.content(0)  # a file is open before the loader forks
    expected, found = loaded(loose, 0), loaded(sharded, num_loader_workers)
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        assert one.image_ids == other.image_ids
        for a, b in zip(batch_tensors(one.batch), batch_tensors(other.batch), strict=True):
            assert a.equal(b)


def test_threads_may_read_one_data_set(folder, loose):
    sharded = open_dataset(folder)
    wrong: list[int] = []

    def read(start: int) -> None:
        order = np.random.default_rng(start).permutation(len(loose)).tolist()
        wrong.extend(i for i in order if sharded.content(i) != loose.content(i))

    threads = [threading.Thread(target=read, args=[start]) for start in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_any_reader_of_parquet_finds_images_and_annotations(folder, loose):
    tables = [pq.read_table(path).to_pylist() for path in sorted(folder.glob("shard-*.parquet"))]
    rows = list(chain(*tables))
    assert [row["image"] for row in rows] == [loose.content(i) for i in range(len(loose))]
    truth = loose.ground_truth
    for row, image in zip(rows, truth["images"], strict=True):
        own = [a for a in truth["annotations"] if a["image_id"] == image["id"]]
        assert row["file_name"] == image["file_name"]
        assert row["boxes"] == [a["bbox"] for a in own]
        assert row["category_id"] == [a["category_id"] for a in own]
        assert row["area"] == [a["area"] for a in own]


# --- Faults --------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_no_flipped_bit_goes_unseen(folder, tmp_path_factory, data):
    name = data.draw(st.sampled_from(sorted(path.name for path in folder.iterdir())))
    content = bytearray((folder / name).read_bytes())
    bit = data.draw(st.integers(0, 8 * len(content) - 1))
    content[bit // 8] ^= 1 << bit % 8
    harmed = tmp_path_factory.mktemp("harmed")
    for file in folder.iterdir():
        if file.name == name:
            (harmed / name).write_bytes(content)
        else:
            (harmed / file.name).symlink_to(file)

    whole = open_dataset(folder)
    try:
        opened = ShardedDataset.open_shards(harmed)
        for index in range(len(whole)):  # a flip beside the images harms nothing
            assert opened.content(index) == whole.content(index)
        assert opened.fingerprint == whole.fingerprint
        assert opened.categories == whole.categories
    except DatasetError as error:
        fault = error
    else:
        fault = None
    assert fault is None or str(harmed) in str(fault)
    if name.startswith("shard-"):
        with pytest.raises(ShardError, match=name):
            ShardedDataset.open_shards(harmed, verify=True)


def test_a_shard_that_is_missing_or_cut_is_named_when_opening(own):
    names = sorted(path.name for path in own.glob("*.parquet"))
    for name in names:
        content = (own / name).read_bytes()
        (own / name).write_bytes(content[:-1])
        with pytest.raises(ShardError, match=rf"{name}: has .* bytes.*pack the data set again"):
            open_dataset(own)
        (own / name).unlink()
        with pytest.raises(ShardError, match=f"{name}: is missing; copy it again"):
            open_dataset(own)
        (own / name).write_bytes(content)
    open_dataset(own, verify=True)


def test_a_shard_harmed_while_training_ends_it_by_name(own):
    steps = iter(
        train_loader(
            open_dataset(own), SMALL, seed=3, total_batch_size=NUM_IMAGES, micro_batch_size=4,
            end_step=3,
        )
    )  # fmt: skip
    next(steps)
    shard = own / "shard-00001.parquet"
    with shard.open("r+b") as file:
        file.truncate(shard.stat().st_size // 2)
    # It is not replaced, as a single broken image would be.
    with pytest.raises(ShardError, match=r"shard-00001\.parquet: .* .cut, or the CRC"):
        list(steps)


def test_all_harmed_shards_are_named_at_once(own):
    for name in ("shard-00000.parquet", "shard-00002.parquet"):
        content = bytearray((own / name).read_bytes())
        content[500] ^= 1
        (own / name).write_bytes(content)
    store = ObjectStore(own)
    with pytest.raises(ShardError, match=r"(?s)shard-00000.*shard-00002") as caught:
        verify_shards(store, read_pack_manifest(store))
    assert "shard-00001" not in str(caught.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": 2}, "'deta shards', 2"),
        ({"format": "other"}, "is no manifest"),
        ({"shards": 1}, "is no manifest"),
        ({"more": 1}, "unexpected keyword argument 'more'"),
        ({"fingerprint": "0" * 64}, "fingerprint"),
        ({"categories": [{"id": 2, "name": "other"}]}, "fingerprint|no manifest"),
        ({"annotations": None}, "is incomplete"),
        (
            {"shards": [{"name": "../x", "num_images": 1, "num_bytes": 1, "sha256": ""}]},
            "is not the name of a shard",
        ),
    ],
)
def test_a_manifest_that_does_not_fit_is_refused(own, change, message):
    path = own / "MANIFEST.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(DatasetError, match=message):
        ShardedDataset.open_shards(own)


def test_other_files_and_addresses_are_distinguished_from_data_sets(own, folder, loose, tmp_path):
    with pytest.raises(DatasetError, match="has no annotations; give the COCO file"):
        open_dataset(loose.folder)
    with pytest.raises(DatasetError, match="would not be read; leave the annotations empty"):
        open_dataset(folder, "annotations.json")
    (own / "MANIFEST.json").rename(own / "PACKING.json")
    with pytest.raises(ShardError, match="is an incomplete pack"):
        open_dataset(own)


def test_a_password_in_an_address_is_refused_and_never_shown():
    for address in (
        "s3://name:hunter2@bucket/data",
        "s3://bucket/data?secret_key=hunter2",
        "abfs://:hunter2@account.dfs.core.windows.net/data",
        "nowhere://name:hunter2@bucket/data",
    ):
        with pytest.raises(DatasetError) as caught:
            open_dataset(address, "annotations.json")
        assert "hunter2" not in f"{caught.value!r} {caught.value.__cause__!r}"
    with pytest.raises(DatasetError, match="pyarrow cannot open this address"):
        open_dataset("nowhere://bucket/data")


def test_images_larger_than_the_limit_are_refused_or_left_out(folder, loose):
    areas = [record.width * record.height for record in loose.records]
    limit = sorted(areas)[-3]
    with pytest.raises(DatasetError, match=r"2 images.*raise the limit"):
        open_dataset(folder, max_pixels=limit)
    kept = open_dataset(folder, max_pixels=limit, lenient=True)
    assert kept.fingerprint == loose.subset(np.flatnonzero(np.array(areas) <= limit)).fingerprint
    assert "were skipped" in kept.notes[0] + kept.notes[-2]


# --- Packing -------------------------------------------------------------------------------------


@given(
    st.lists(st.integers(0, 50), min_size=1, max_size=40), st.integers(1, 120), st.integers(1, 9)
)
def test_ranges_hold_all_images_in_order_and_no_more_than_fits(lengths, max_bytes, max_images):
    ranges = consecutive(np.array(lengths), max_bytes, max_images)
    assert [index for part in ranges for index in part] == list(range(len(lengths)))
    for part in ranges:
        assert 1 <= len(part) <= max_images
        assert len(part) == 1 or sum(lengths[part.start : part.stop]) <= max_bytes


def test_the_same_data_set_packs_to_the_same_bytes(folder, loose, tmp_path):
    pack_dataset(loose, ObjectStore(tmp_path), shard_bytes=60_000)
    names = sorted(path.name for path in folder.iterdir())
    assert names == sorted(path.name for path in tmp_path.iterdir())
    for name in names:
        assert (tmp_path / name).read_bytes() == (folder / name).read_bytes()


def test_packing_goes_on_with_whole_shards_and_writes_harmed_ones_again(folder, loose, own):
    manifest = json.loads((own / "MANIFEST.json").read_text())
    (own / "MANIFEST.json").unlink()
    (own / "annotations.parquet").unlink()
    begun = manifest | {"annotations": None, "shards": manifest["shards"][:-1]}
    (own / "PACKING.json").write_text(json.dumps(begun))
    (own / "shard-00000.parquet").write_bytes(b"cut")
    (own / ".shard-00002.parquet.1a2b.unfinished").write_bytes(b"half")

    packed = pack_dataset(loose, ObjectStore(own), shard_bytes=60_000)

    assert packed.num_reused == len(manifest["shards"]) - 2
    assert sorted(path.name for path in own.iterdir()) == sorted(
        path.name for path in folder.iterdir()
    )
    for path in folder.iterdir():
        assert (own / path.name).read_bytes() == path.read_bytes()
    again = pack_dataset(loose, ObjectStore(own), shard_bytes=60_000)
    assert (again.num_reused, again.manifest) == (len(manifest["shards"]), packed.manifest)


def test_a_folder_of_something_else_is_left_alone(folder, loose, own, tmp_path):
    with pytest.raises(DatasetError, match="contains another data set"):
        pack_dataset(loose.first(3), ObjectStore(folder), shard_bytes=60_000)
    with pytest.raises(DatasetError, match="is not empty"):
        pack_dataset(loose, ObjectStore(loose.folder), shard_bytes=60_000)
    manifest = json.loads((own / "MANIFEST.json").read_text())
    (own / "MANIFEST.json").unlink()
    (own / "PACKING.json").write_text(json.dumps(manifest | {"annotations": None}))
    with pytest.raises(DatasetError, match="another --shard-mb"):
        pack_dataset(loose, ObjectStore(own), shard_bytes=50_000)


def test_images_that_do_not_decode_are_refused_or_left_out(tmp_path):
    dataset = write_loose(tmp_path, 12)
    broken = dataset.records[5].path
    content = broken.read_bytes()
    broken.write_bytes(content[: len(content) // 2] + bytes(len(content) - len(content) // 2))
    with pytest.raises(DatasetError, match=f"(?s)1 problem.*{broken.name}"):
        pack_dataset(dataset, ObjectStore(tmp_path / "a"), shard_bytes=60_000, decode=True)
    assert not (tmp_path / "a").exists()
    pack_dataset(
        dataset, ObjectStore(tmp_path / "a"), shard_bytes=60_000, decode=True, lenient=True
    )
    expected = dataset.subset(i for i in range(12) if i != 5)
    assert open_dataset(tmp_path / "a").fingerprint == expected.fingerprint


def test_an_image_that_changes_while_packing_is_an_error(tmp_path):
    dataset = write_loose(tmp_path, 12)
    path = dataset.records[5].path
    path.write_bytes(path.read_bytes() + b"x")
    with pytest.raises(ValueError, match=f"{path.name}: has .* bytes, but had"):
        pack_dataset(dataset, ObjectStore(tmp_path / "a"), shard_bytes=60_000)


def test_images_are_found_where_one_is_the_beginning_of_another(tmp_path):
    """Also equal images, and one that holds a whole other with its length before it."""
    inner = b"\x89PNG" + bytes(20)
    contents = [inner, inner, inner + inner, len(inner).to_bytes(4, "little") + inner, inner[:9]]

    class Bytes(CocoDataset):
        def content(self, index: int) -> bytes:
            return contents[index]

    dataset = write_loose(tmp_path, 5)
    dataset.tables.images["num_bytes"] = [len(content) for content in contents]
    drawn = Bytes(dataset.folder, dataset.tables, dataset.categories, [], 10**6)
    pack_dataset(drawn, ObjectStore(tmp_path / "shards"), shard_bytes=1000)
    shard = (tmp_path / "shards" / "shard-00000.parquet").read_bytes()
    locations = locate_images(shard)
    for (offset, _), content in zip(locations, contents, strict=True):
        assert shard[offset : offset + len(content)] == content
    assert [offset for offset, _ in locations] == sorted({offset for offset, _ in locations})
