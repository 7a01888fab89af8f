"""Checkpoints are complete or absent, and damage is detected."""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from deta.platform.checkpoint import format as checkpoint_format
from deta.platform.checkpoint.format import (
    Checkpoint,
    CheckpointError,
    OtherVersionError,
    read_checkpoint,
)
from deta.platform.checkpoint.local import (
    all_checkpoints,
    best_checkpoint,
    clean_leftovers,
    keep_newest_and_best,
    newest_checkpoint,
    take_snapshot,
    write_checkpoint,
)
from deta.platform.data.coco_dataset import Category
from deta.platform.run.config import RunConfig, override
from deta.platform.run.fence import Fence, FencedOffError
from deta.platform.run.run_state import RunState

CATEGORIES = (Category(1, "disc"), Category(90, "Zahnbürste"))
FORMAT_1 = Path(__file__).parents[1] / "golden/checkpoint-format-1/step-00000007"
FILES = ["model.safetensors", "training.safetensors", "state.json", "config.json", "MANIFEST.json"]


def write(folder: Path, step: int, ap: float | None = None, **state: object) -> Path:
    snapshot = take_snapshot(
        RunState(
            step=step,
            samples_seen=16 * step,
            epoch=step / 10,
            metrics={} if ap is None else {"AP": ap},
            best_ap=ap,
            data_fingerprint="f",
            **state,  # type: ignore[arg-type]
        ),
        override(RunConfig(), {"optim.lr": 1e-5}),
        CATEGORIES,
        {"weight": torch.full((3,), float(step)), "count": torch.tensor(step)},
        {"optimizer/exp_avg/weight": torch.arange(3.0)},
    )
    return write_checkpoint(folder, snapshot)


def newest(folder: Path) -> Checkpoint:
    found = newest_checkpoint(folder)
    assert found is not None
    return found


def test_a_written_checkpoint_is_read_back(tmp_path: Path):
    found = read_checkpoint(write(tmp_path, 7, ap=12.5))
    assert found.state.step == 7
    assert found.state.samples_seen == 112
    assert found.state.metrics == {"AP": 12.5}
    assert found.config.optim.lr == 1e-5
    assert found.categories == CATEGORIES
    assert torch.equal(found.model_state()["weight"], torch.full((3,), 7.0))
    assert found.model_state()["count"] == 7
    assert torch.equal(found.training_state()["optimizer/exp_avg/weight"], torch.arange(3.0))


def test_every_field_of_the_state_is_read_back(tmp_path: Path):
    state = RunState(
        step=3, samples_seen=48, epoch=0.3, metrics={"AP": 1.0}, best_ap=2.0,
        ap_history=[2.0, 1.0], data_fingerprint="f", code_commit="c", skipped_steps=4,
        skipped_in_a_row=2, broken_images={"17": "cut short"}, useful_s=12.5, config_sha256="s",
    )  # fmt: skip
    assert all(value != default for value, default in zip(
        asdict(state).values(), asdict(RunState(step=0, samples_seen=0, epoch=0.0)).values(),
        strict=True) if value is not state.format_version)  # fmt: skip
    path = write_checkpoint(tmp_path, take_snapshot(state, RunConfig(), CATEGORIES, {}, {}))
    assert read_checkpoint(path).state == state


def test_a_metric_that_is_not_finite_is_omitted(tmp_path: Path):
    path = write(tmp_path, 1, ap=float("nan"))
    assert read_checkpoint(path).state.metrics == {}
    assert best_checkpoint(tmp_path) is None


def test_a_checkpoint_of_format_1_is_read(tmp_path: Path):
    """The golden file was written by the code of format 1, with a key that was removed since."""
    shutil.copytree(FORMAT_1, tmp_path / FORMAT_1.name)
    found = newest(tmp_path)
    assert found.state.ap_history == [10.0, 12.5]
    assert found.state.broken_images == {}
    assert found.config.optim.lr == 1e-5
    assert found.config.ema_decay == 0.999
    assert found.categories == CATEGORIES
    assert torch.equal(found.model_state()["weight"], torch.arange(6.0).reshape(2, 3))
    assert found.model_state()["half"].tolist() == [1.5, -2.0]
    assert found.training_state()["num_averaged"] == 7
    assert best_checkpoint(tmp_path) == tmp_path / FORMAT_1.name


@pytest.mark.parametrize("with_hash", [True, False])
def test_a_newer_format_is_refused_and_not_deleted(tmp_path: Path, with_hash: bool):
    write(tmp_path, 1)
    path = write(tmp_path, 2)
    manifest = json.loads((path / "MANIFEST.json").read_text())
    del manifest["sha256"]
    manifest = {"format_version": 3, "step": 2, "contents": ["of another kind"]}
    if with_hash:
        text = json.dumps(manifest, sort_keys=True, separators=(",", ":"))
        manifest["sha256"] = hashlib.sha256(text.encode()).hexdigest()
    (path / "MANIFEST.json").write_text(json.dumps(manifest))
    with pytest.raises(OtherVersionError, match=r"has format 3.*reads up to 2.*needs a newer"):
        read_checkpoint(path)
    with pytest.raises(OtherVersionError):  # and not the previous checkpoint
        newest_checkpoint(tmp_path)
    keep_newest_and_best(tmp_path)
    assert path.exists()


def test_a_configuration_of_another_version_is_refused_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(
        "deta.platform.checkpoint.local.to_json", lambda config: '{"of_tomorrow": 1}'
    )
    path = write(tmp_path, 1)
    with pytest.raises(OtherVersionError, match="of_tomorrow"):
        newest_checkpoint(tmp_path)
    assert path.exists()


def test_200_single_flipped_bits_are_found(tmp_path: Path):
    path = write(tmp_path, 1)
    contents = {name: bytearray((path / name).read_bytes()) for name in FILES}
    generator = random.Random(0)
    for number in range(200):
        name = FILES[number % len(FILES)]
        bit = generator.randrange(8 * len(contents[name]))
        flipped = bytearray(contents[name])
        flipped[bit // 8] ^= 1 << bit % 8
        (path / name).write_bytes(flipped)
        with pytest.raises(CheckpointError) as found:
            read_checkpoint(path)
        assert name in str(found.value)
        assert not isinstance(found.value, OtherVersionError), "it would not be set aside"
        (path / name).write_bytes(contents[name])
    read_checkpoint(path)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", ["last bytes", "half", "empty", "missing"])
def test_after_a_truncated_or_missing_file_the_previous_checkpoint_is_used(
    tmp_path: Path, name: str, damage: str
):
    good, path = write(tmp_path, 1), write(tmp_path, 2)
    content = (path / name).read_bytes()
    (path / name).unlink()
    if damage != "missing":
        size = {"last bytes": len(content) - 5, "half": len(content) // 2, "empty": 0}[damage]
        (path / name).write_bytes(content[:size])
    with pytest.raises(CheckpointError, match=name):
        read_checkpoint(path)
    warnings: list[str] = []
    found = newest_checkpoint(tmp_path, warnings.append)
    assert found is not None
    assert found.path == good
    assert len(warnings) == 1
    assert "set aside as damaged-step-00000002" in warnings[0]
    assert newest(tmp_path).path == good


def test_a_manifest_that_names_outside_files_is_refused(tmp_path: Path):
    path = write(tmp_path / "inner", 1)
    shutil.copy(path / "state.json", tmp_path / "state.json")
    files = {name: {"bytes": 1, "sha256": ""} for name in [*FILES[:4], "../../state.json"]}
    (path / "MANIFEST.json").write_text(json.dumps(files))
    with pytest.raises(CheckpointError, match="outside its folder"):
        read_checkpoint(path)


def test_only_the_last_damaged_checkpoint_is_kept(tmp_path: Path):
    good = write(tmp_path, 1)
    for step in (2, 3, 2):
        (write(tmp_path, step) / "model.safetensors").write_bytes(b"")
        assert newest(tmp_path).path == good
        damaged = [path.name for path in tmp_path.glob("damaged-*")]
        assert damaged == [f"damaged-step-{step:08d}"]


def test_an_unreadable_checkpoint_is_skipped_and_kept(tmp_path: Path):
    good, path = write(tmp_path, 1), write(tmp_path, 2)
    # Opening a link to itself is an error of the system, not of the content.
    (path / "MANIFEST.json").unlink()
    (path / "MANIFEST.json").symlink_to("MANIFEST.json")
    warnings: list[str] = []
    found = newest_checkpoint(tmp_path, warnings.append)
    assert found is not None
    assert found.path == good
    assert path.exists()
    assert "cannot be read" in warnings[0]
    shutil.rmtree(good)
    with pytest.raises(
        OSError, match="symbolic"
    ):  # not None, which would restart the run from scratch
        newest_checkpoint(tmp_path)


def test_an_interrupted_save_is_ignored_and_removed(tmp_path: Path):
    write(tmp_path, 1)
    for name in ("2.unfinished", "2.0a1b.unfinished", "1.0a1b.replaced", "0.0a1b.deleted"):
        (tmp_path / f".step-0000000{name}").mkdir()
        (tmp_path / f".step-0000000{name}" / "model.safetensors").write_bytes(b"half")
    assert newest(tmp_path).state.step == 1
    clean_leftovers(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]
    clean_leftovers(tmp_path / "nothing")


def test_death_while_a_step_is_written_again_loses_nothing(tmp_path: Path):
    path = write(tmp_path, 2, ap=1.0)
    path.rename(tmp_path / ".step-00000002.0a1b2c3d.replaced")
    (tmp_path / ".step-00000002.0a1b2c3d.unfinished").mkdir()
    assert newest(tmp_path).path == path
    clean_leftovers(tmp_path)
    assert read_checkpoint(write(tmp_path, 2, ap=3.0)).state.metrics == {"AP": 3.0}
    assert [each.name for each in tmp_path.iterdir()] == ["step-00000002"]


@settings(max_examples=15, deadline=None)
@given(
    aps=st.lists(st.none() | st.sampled_from([0.0, 1.5, 2.5, 40.0]), min_size=1, max_size=7),
    keep=st.integers(1, 3),
)
def test_retention_never_deletes_the_newest_or_the_best(tmp_path_factory, aps, keep):
    folder = tmp_path_factory.mktemp("run")
    for step, ap in enumerate(aps):
        write(folder, step, ap)
        keep_newest_and_best(folder, keep)
    steps = {int(path.name[5:]) for path in all_checkpoints(folder)}
    expected = set(range(len(aps)))
    assert steps >= set(sorted(expected)[-keep:])
    evaluated = [(ap, step) for step, ap in enumerate(aps) if ap is not None]
    if evaluated:
        assert max(evaluated)[1] in steps
    assert len(steps) <= keep + 1


def test_a_truncated_checkpoint_does_not_count_among_the_newest(tmp_path: Path):
    write(tmp_path, 1)
    (write(tmp_path, 2) / "model.safetensors").write_bytes(b"")
    write(tmp_path, 3)
    keep_newest_and_best(tmp_path, keep=2)
    assert [path.name[-1] for path in all_checkpoints(tmp_path)] == ["1", "2", "3"]


def test_an_empty_folder_has_no_checkpoint(tmp_path: Path):
    assert newest_checkpoint(tmp_path / "nothing") is None
    assert best_checkpoint(tmp_path) is None


def test_a_fenced_off_writer_leaves_nothing(tmp_path: Path):
    fence = Fence.acquire(tmp_path, "old")
    snapshot = take_snapshot(
        RunState(step=1, samples_seen=1, epoch=0.1), RunConfig(), CATEGORIES, {}, {}
    )
    write_checkpoint(tmp_path / "checkpoints", snapshot, fence)
    Fence.acquire(tmp_path, "new")
    with pytest.raises(FencedOffError, match=r"old.*new"):
        write_checkpoint(tmp_path / "checkpoints", snapshot, fence)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-00000001"]


def test_a_snapshot_shares_no_memory_with_the_run_and_reuses_its_own(tmp_path: Path):
    weights, moments = torch.ones(1000), torch.ones(500)
    state = RunState(step=1, samples_seen=1, epoch=0.1, broken_images={"1": "cut"})

    def snapshot(into=None):
        return take_snapshot(state, RunConfig(), CATEGORIES, {"w": weights}, {"m": moments}, into)

    first = snapshot()
    place = first.model.data.data_ptr(), first.training.data.data_ptr()
    weights.zero_(), moments.zero_(), state.broken_images.clear()
    found = read_checkpoint(write_checkpoint(tmp_path, first))
    assert found.model_state()["w"].min() == 1
    assert found.training_state()["m"].min() == 1
    assert found.state.broken_images == {"1": "cut"}
    second = snapshot(first)
    assert (second.model.data.data_ptr(), second.training.data.data_ptr()) == place
    assert read_checkpoint(write_checkpoint(tmp_path, second)).model_state()["w"].max() == 0
    moments = torch.full((501,), 5.0)  # no longer fits
    third = read_checkpoint(write_checkpoint(tmp_path, snapshot(second)))
    assert third.training_state()["m"].tolist() == [5.0] * 501


@pytest.mark.skipif(not torch.cuda.is_available(), reason="copies from a GPU")
def test_a_snapshot_of_a_gpu_is_pinned_and_exact(tmp_path: Path):
    tensors = {"w": torch.randn(1000, 7, device="cuda"), "step": torch.tensor(3.0)}
    expected = {name: tensor.cpu().clone() for name, tensor in tensors.items()}
    state = RunState(step=1, samples_seen=1, epoch=0.1)
    snapshot = take_snapshot(state, RunConfig(), CATEGORIES, tensors, {})
    tensors["w"].zero_()
    again = take_snapshot(state, RunConfig(), CATEGORIES, tensors, {}, None)
    assert snapshot.model.data.is_pinned()
    loaded = read_checkpoint(write_checkpoint(tmp_path, snapshot)).model_state()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in expected.items())
    assert read_checkpoint(write_checkpoint(tmp_path, again)).model_state()["w"].abs().sum() == 0


def test_files_have_the_permissions_of_the_umask(tmp_path: Path):
    former = os.umask(0o022)
    try:
        path = write(tmp_path, 1)
    finally:
        os.umask(former)
    assert all(file.stat().st_mode & 0o777 == 0o644 for file in path.iterdir())
    assert checkpoint_format.FORMAT_VERSION == read_checkpoint(path).state.format_version == 2
