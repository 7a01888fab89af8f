"""Checkpoints are copied to a store completely or not at all, and restored from it."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path

import pytest
import torch
from pyarrow.fs import FileSelector, LocalFileSystem, SubTreeFileSystem, _MockFileSystem

from deta.platform.checkpoint.async_writer import CheckpointWriter
from deta.platform.checkpoint.format import OtherVersionError
from deta.platform.checkpoint.local import (
    Snapshot,
    all_checkpoints,
    newest_checkpoint,
    take_snapshot,
)
from deta.platform.checkpoint.remote import (
    CheckpointStore,
    StoreError,
    copy_run,
    open_store,
    restore_from_store,
    without_credentials,
)
from deta.platform.data.coco_dataset import Category
from deta.platform.run.config import RunConfig
from deta.platform.run.fence import Fence, FencedOffError
from deta.platform.run.run_state import RunState

NAME = "my-run"


def make(step: int, ap: float | None = None) -> Snapshot:
    metrics = {} if ap is None else {"AP": ap}
    state = RunState(step=step, samples_seen=step, epoch=0.0, metrics=metrics)
    weights = torch.full((1000,), float(step))
    return take_snapshot(state, RunConfig(), (Category(1, "disc"),), {"w": weights}, {})


def train(
    run: Path, store: CheckpointStore | str | Path, aps: dict[int, float | None], keep: int = 2
):
    """Save and copy steps one after another."""
    run.mkdir(parents=True, exist_ok=True)
    if not (run / "run.json").exists():
        (run / "run.json").write_text(json.dumps({"key": "1f"}))
    writer = CheckpointWriter(run / "checkpoints", keep=keep, store=store)
    errors = []
    for step, ap in aps.items():
        with (run / "journal.jsonl").open("a") as journal:
            journal.write(json.dumps({"kind": "progress", "step": step}) + "\n")
        (run / "mlflow.json").write_text(json.dumps({"step": step}))
        assert writer.save(lambda _, step=step, ap=ap: make(step, ap), wait=True)
        assert writer.close(30)
        errors += [outcome.error for outcome in writer.poll() if outcome.error]
    return errors


def listing(store: CheckpointStore) -> list[str]:
    """Return all files of the run, relative to its folder."""
    selector = FileSelector(f"{store.root}/{NAME}", recursive=True, allow_not_found=True)
    found = store.filesystem.get_file_info(selector)
    return sorted(i.path.partition(f"{NAME}/")[2] for i in found if i.is_file)


def steps(store: CheckpointStore) -> list[int]:
    return sorted(int(n[5:13]) for n in listing(store) if n.endswith("/MANIFEST.json"))


@pytest.fixture(params=["folder", "file URI", "subtree", "memory"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> CheckpointStore:
    place = tmp_path / "store"
    if request.param == "folder":
        return open_store(place)
    if request.param == "file URI":
        return open_store(place.as_uri())
    if request.param == "subtree":
        place.mkdir()
        return CheckpointStore(SubTreeFileSystem(str(place), LocalFileSystem()), "runs", "subtree")
    return CheckpointStore(_MockFileSystem(), "runs", "memory")


def test_a_run_is_restored_from_the_store(tmp_path: Path, store: CheckpointStore):
    run, fresh = tmp_path / "a" / NAME, tmp_path / "b" / NAME
    assert train(run, store, {1: 5.0, 2: 9.0, 3: None, 4: 7.0, 5: None}) == []
    assert steps(store) == [2, 4, 5]
    assert not [name for name in listing(store) if "unfinished" in name]

    assert restore_from_store(store, NAME, fresh)
    assert [path.name[-1] for path in all_checkpoints(fresh / "checkpoints")] == ["2", "5"]
    newest = newest_checkpoint(fresh / "checkpoints")
    assert newest is not None
    assert newest.state.step == 5
    assert (newest.model_state()["w"] == 5).all()
    for name in ("run.json", "mlflow.json", "journal.jsonl"):
        assert (fresh / name).read_bytes() == (run / name).read_bytes()
    assert not restore_from_store(store, NAME, fresh), "all of it is here"
    assert not restore_from_store(store, "unknown", tmp_path / "c")


def test_only_what_is_older_is_replaced(tmp_path: Path, store: CheckpointStore):
    run, other = tmp_path / "a" / NAME, tmp_path / "b" / NAME
    train(run, store, {1: None, 2: None})
    shutil.copytree(run, other)
    train(run, store, {3: None})
    assert restore_from_store(store, NAME, other)
    newest = newest_checkpoint(other / "checkpoints")
    assert newest is not None
    assert newest.state.step == 3
    assert (other / "journal.jsonl").read_bytes() == (run / "journal.jsonl").read_bytes()

    ahead = tmp_path / "nowhere"
    train(other, ahead, {4: None, 5: None})
    before = (other / "journal.jsonl").read_bytes(), (other / "mlflow.json").read_bytes()
    assert not restore_from_store(store, NAME, other)
    assert before == ((other / "journal.jsonl").read_bytes(), (other / "mlflow.json").read_bytes())


def test_damaged_or_partial_copies_in_the_store_are_skipped(tmp_path: Path):
    store = open_store(tmp_path / "store")
    run = tmp_path / "a" / NAME
    train(run, store, {1: None, 2: None, 3: None}, keep=3)
    place = tmp_path / "store" / NAME
    flipped = bytearray((place / "step-00000003/model.safetensors").read_bytes())
    flipped[-1] ^= 1
    (place / "step-00000003/model.safetensors").write_bytes(flipped)
    (place / "step-00000002/MANIFEST.json").unlink()
    told: list[str] = []
    fresh = tmp_path / "b" / NAME
    assert restore_from_store(store, NAME, fresh, told.append)
    newest = newest_checkpoint(fresh / "checkpoints")
    assert newest is not None
    assert newest.state.step == 1
    assert any("step-00000003" in line and "changed" in line for line in told)
    assert [path.name for path in (fresh / "checkpoints").iterdir()] == ["step-00000001"]

    train(run, store, {4: None}, keep=3)  # what is half there goes at the next copy
    assert steps(store) == [1, 3, 4]
    assert not (place / "step-00000002").exists()


def test_a_damaged_checkpoint_on_disk_is_replaced_from_the_store(tmp_path: Path):
    run = tmp_path / "a" / NAME
    train(run, tmp_path / "store", {1: None, 2: None})
    (run / "checkpoints/step-00000002/model.safetensors").write_bytes(b"")
    assert restore_from_store(tmp_path / "store", NAME, run)
    newest = newest_checkpoint(run / "checkpoints")
    assert newest is not None
    assert newest.state.step == 2


def test_a_newer_format_in_the_store_is_refused(tmp_path: Path):
    run = tmp_path / "a" / NAME
    train(run, tmp_path / "store", {1: None})
    manifest = tmp_path / "store" / NAME / "step-00000001/MANIFEST.json"
    manifest.write_text(json.dumps({"format_version": 9}))
    with pytest.raises(OtherVersionError, match="has format 9"):
        restore_from_store(tmp_path / "store", NAME, tmp_path / "b" / NAME)


def test_a_step_that_was_written_again_is_copied_again(tmp_path: Path, store: CheckpointStore):
    run = tmp_path / "a" / NAME
    train(run, store, {1: None})
    train(run, store, {1: 4.5})
    assert restore_from_store(store, NAME, tmp_path / "b" / NAME)
    newest = newest_checkpoint(tmp_path / "b" / NAME / "checkpoints")
    assert newest is not None
    assert newest.state.metrics == {"AP": 4.5}


def test_an_unreachable_store_costs_no_checkpoint_and_catches_up(tmp_path: Path):
    run, place = tmp_path / "a" / NAME, tmp_path / "store"
    place.write_text("a file where the store should be")
    errors = train(run, place, {1: 8.0, 2: None, 3: None})
    assert [path.name[-1] for path in all_checkpoints(run / "checkpoints")] == ["1", "2", "3"]
    assert len(errors) == 3
    assert all(str(place) in error and "on disk is complete" in error for error in errors)
    place.unlink()
    assert train(run, place, {4: None}) == []
    assert steps(open_store(place)) == [1, 4]  # the best had missed its turn


def test_a_store_that_hangs_delays_no_save(tmp_path: Path):
    run = tmp_path / NAME
    run.mkdir()
    address = (
        "s3://AKIDEXAMPLE:top%2Fsecret@bucket/runs?endpoint_override=127.0.0.1:1&scheme=http"
        "&region=us-east-1"
    )
    writer = CheckpointWriter(run / "checkpoints", store=address)
    began_s = time.monotonic()
    for step in (1, 2, 3):
        assert writer.save(lambda _, step=step: make(step), wait=True)
    assert time.monotonic() - began_s < 5
    assert all(outcome.path is not None for outcome in writer.poll())
    assert writer.close(60)
    told = [outcome.error for outcome in writer.poll() if outcome.place == "store"]
    assert told
    for error in told:
        assert error is not None
        assert "s3://bucket/runs" in error
        assert not any(secret in error for secret in ("AKIDEXAMPLE", "secret"))
    with pytest.raises(StoreError) as found:
        restore_from_store(address, NAME, tmp_path / "other")
    chain = [found.value, found.value.__cause__]
    assert not any("secret" in str(error) for error in chain)


@pytest.mark.parametrize(
    ("address", "shown"),
    [
        ("s3://AKID:pass@bucket/runs?region=x&session_token=abc", "s3://bucket/runs"),
        ("s3://AKID:pa/ss?#@bucket/runs", "s3://bucket/runs"),
        ("abfs://account.core/x?sig=pass#pass", "abfs://account.core/x"),
        ("file:///data/runs", "file:///data/runs"),
    ],
)
def test_no_error_shows_credentials(address: str, shown: str):
    assert without_credentials(address) == shown
    with pytest.raises(ValueError, match=r"wrong:.*with credentials in the environment") as found:
        open_store(address.replace(address.partition(":")[0], "wrong", 1))
    assert "pass" not in str(found.value)
    assert found.value.__cause__ is None
    assert found.value.__context__ is None


def test_two_runs_of_one_name_are_not_mixed(tmp_path: Path, store: CheckpointStore):
    train(tmp_path / "a" / NAME, store, {5: None})
    other = tmp_path / "b" / NAME
    other.mkdir(parents=True)
    (other / "run.json").write_text(json.dumps({"key": "2e"}))
    (error,) = train(other, store, {1: None})
    assert "holds another run named my-run" in error
    assert steps(store) == [5]
    with pytest.raises(StoreError, match="another run"):
        restore_from_store(store, NAME, other)


def test_a_group_that_was_replaced_changes_nothing_in_the_store(tmp_path: Path):
    run, store = tmp_path / "a" / NAME, open_store(tmp_path / "store")
    train(run, store, {1: None, 2: None})
    fence = Fence.acquire(run, "old")
    Fence.acquire(run, "new")
    shutil.rmtree(tmp_path / "store" / NAME / "step-00000002")
    with pytest.raises(FencedOffError):
        copy_run(store, run, run / "checkpoints/step-00000002", keep=1, fence=fence)
    assert steps(store) == [1]
