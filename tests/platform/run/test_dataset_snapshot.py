"""S5: the data-set snapshot of a run carries no code and stays inside its folders."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load, save

from deta.platform.data.coco_dataset import CocoDataset
from deta.platform.data.synthetic_shapes import ShapesDataset, write_shapes
from deta.platform.run.config import DataConfig, RunConfig
from deta.platform.run.dataset_snapshot import (
    DATA_FILE,
    SnapshotError,
    read_dataset_snapshot,
    read_run_snapshot,
    write_dataset_snapshot,
)
from deta.platform.run.run import Run
from deta.platform.shards.object_store import ObjectStore
from deta.platform.shards.open_dataset import open_dataset
from deta.platform.shards.packer import pack_dataset


class Bomb:
    """Makes a folder when it is unpickled."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[Callable[..., object], tuple[Path]]:
        return Path.mkdir, (self.trace,)


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> ShapesDataset:
    return write_shapes(tmp_path_factory.mktemp("shapes"), num_train=5, num_val=2, size_px=64)


@pytest.fixture
def run(drawn: ShapesDataset, tmp_path: Path) -> Run:
    """A run with files for training and shards for validation."""
    shards = tmp_path / "shards"
    val_set = CocoDataset.open(drawn.val_images, drawn.val_annotations)
    pack_dataset(val_set, ObjectStore(shards), shard_bytes=10**6)
    data = DataConfig(
        train_images=str(drawn.train_images),
        train_annotations=str(drawn.train_annotations),
        val_images=str(shards),
    )
    folder = tmp_path / "run"
    folder.mkdir()
    return Run(
        RunConfig(name="kept", data=data),
        folder,
        open_dataset(data.train_images, data.train_annotations),
        open_dataset(data.val_images),
        code_commit="abc",
        notes=("a note",),
    )


def test_a_snapshot_gives_back_the_same_data(run: Run):
    write_dataset_snapshot(run)
    again = read_run_snapshot(run.folder)

    assert (again.config, again.folder, again.code_commit, again.notes) == (
        run.config, run.folder, "abc", ("a note",)
    )  # fmt: skip
    for one, other in ((run.train_set, again.train_set), (run.val_set, again.val_set)):
        assert type(one) is type(other)
        assert one.fingerprint == other.fingerprint
        assert one.ground_truth == other.ground_truth
        assert (one.categories, one.notes) == (other.categories, other.notes)
        for index in range(len(one)):
            assert one.content(index) == other.content(index)
            assert one[index].image.tobytes() == other[index].image.tobytes()
            assert one[index].boxes_px.equal(other[index].boxes_px)
    first = read_run_snapshot(run.folder).train_set.first(2)
    assert first.fingerprint == run.train_set.first(2).fingerprint


def test_a_pickle_in_a_run_folder_is_not_opened(run: Run, tmp_path: Path):
    write_dataset_snapshot(run)
    trace = tmp_path / "trace"
    bomb = pickle.dumps(Bomb(trace))
    annotations = run.config.data.train_annotations
    (run.folder / "data.pickle").write_bytes(bomb)  # where earlier versions stored the data
    assert read_run_snapshot(run.folder).code_commit == "abc"
    for content in (bomb, pickle.dumps((Bomb(trace), {})), b"", b"\0" * 100):
        (run.folder / DATA_FILE).write_bytes(content)
        with pytest.raises(SnapshotError, match="is damaged"):
            read_run_snapshot(run.folder)
        assert read_dataset_snapshot(run.folder, "train", annotations) is None
    assert not trace.exists()
    pickle.loads(bomb)  # the payload works
    assert trace.exists()


def _change(part: str, **values: Any) -> Callable[[dict[str, Any], dict[str, np.ndarray]], None]:
    def change(about: dict[str, Any], rows: dict[str, np.ndarray]) -> None:
        about[part] |= values

    return change


def _cut(name: str) -> Callable[[dict[str, Any], dict[str, np.ndarray]], None]:
    def change(about: dict[str, Any], rows: dict[str, np.ndarray]) -> None:
        rows[name] = rows[name][:-1]

    return change


def _scramble(about: dict[str, Any], rows: dict[str, np.ndarray]) -> None:
    rows["train.images"] = rows["train.images"] ^ 0x55


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (_change("train", file_names=["../../../etc/passwd"] * 5), "could leave the image folder"),
        (_change("train", file_names=["/etc/passwd"] * 5), "absolute path"),
        (_change("train", file_names=["a.png"]), "file names for"),
        (_change("train", file_names=[1] * 5), "not a string"),
        (_change("train", categories=[]), "point at categories"),
        (_change("train", fingerprint="0" * 64), "fingerprint"),
        (_change("val", shards=[]), "point at shards"),
        (_change("val", shards=[{"name": "../x", "num_images": 1, "num_bytes": 1, "sha256": ""}]),
         "not the name of a shard"),
        (_change("config", nme="x"), "nme"),
        (_cut("train.images"), "multiple"),
        (_cut("val.places"), "multiple"),
        (_scramble, "point at annotations"),
    ],
)  # fmt: skip
def test_an_altered_snapshot_is_refused(run: Run, change: Any, says: str):
    write_dataset_snapshot(run)
    path = run.folder / DATA_FILE
    rows = load(path.read_bytes())
    about = json.loads(rows.pop("about").tobytes())
    change(about, rows)
    rows["about"] = np.frombuffer(json.dumps(about).encode(), np.uint8)
    path.write_bytes(save(rows))

    with pytest.raises(SnapshotError, match=says):
        read_run_snapshot(run.folder)


def test_a_flipped_bit_of_a_table_is_detected(run: Run):
    """In the tables; the JSON has checks of its own."""
    write_dataset_snapshot(run)
    path = run.folder / DATA_FILE
    content = path.read_bytes()
    rows = load(content)
    rng = np.random.default_rng(5)
    for name in ("train.images", "val.places"):
        table = rows[name].copy()
        for position in rng.integers(0, len(table), 20):
            table[position] ^= 1 << int(rng.integers(8))
            path.write_bytes(save(rows | {name: table}))
            try:
                again = read_run_snapshot(run.folder)
                for index in range(len(again.val_set)):
                    again.val_set.content(index)
            except ValueError:
                continue
            pytest.fail(f"{name}: a flipped bit at {position} was not detected")


def test_a_snapshot_of_other_annotations_is_not_used(run: Run, tmp_path: Path):
    write_dataset_snapshot(run)
    annotations = Path(run.config.data.train_annotations)
    kept = read_dataset_snapshot(run.folder, "train", str(annotations))
    assert kept is not None
    assert kept.fingerprint == run.train_set.fingerprint
    other = tmp_path / "other.json"
    other.write_text(annotations.read_text() + "\n")
    assert read_dataset_snapshot(run.folder, "train", str(other)) is None
    assert (
        read_dataset_snapshot(replace(run, folder=tmp_path).folder, "train", str(annotations))
        is None
    )
