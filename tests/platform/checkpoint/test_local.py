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
    delete_checkpoint,
    find_checkpoint,
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


def test_the_room_that_a_snapshot_needs_grows_with_its_tensors_and_lists(tmp_path: Path):
    def needs(broken: int, num_categories: int, length: int = 3) -> int:
        state = RunState(
            step=1, samples_seen=1, epoch=0.1, broken_images=dict.fromkeys(map(str, range(broken)))
        )
        categories = tuple(Category(n, f"c{n}") for n in range(num_categories))
        tensors = {"w": torch.zeros(length)}
        return take_snapshot(state, RunConfig(), categories, tensors, tensors).num_bytes

    assert needs(15, 16) - needs(14, 16) == 0
    assert needs(15, 17) - needs(15, 16) == 4096  # 32 in all
    assert needs(0, 16) - needs(0, 0) == 4096
    assert needs(0, 0, 2000) - needs(0, 0, 1000) == 2 * 4000  # headers of one length
    path = write(tmp_path, 1)
    on_disk = sum(one.stat().st_size for one in path.iterdir())
    assert on_disk <= needs(0, 2, 3) + 4096
    assert needs(0, 0, 0) - 8 * 4096 < 1000  # eight small files, and two empty headers


def test_a_path_refers_to_itself_or_to_the_best_of_its_run(tmp_path: Path):
    run = tmp_path / "run"
    folder = run / "checkpoints"
    first, second = write(folder, 1, ap=5.0), write(folder, 2, ap=4.0)
    third = write(folder, 3)
    assert find_checkpoint(second) == second
    for path in (run, folder, run / "best", folder / "best"):
        assert find_checkpoint(path) == first
    for path in (first, second):
        shutil.rmtree(path)
    for path in (run, folder, run / "best"):
        assert find_checkpoint(path) == third  # none has an AP


def test_a_folder_that_is_named_best_is_a_folder(tmp_path: Path):
    best = tmp_path / "best"
    path = write(best / "checkpoints", 1)
    write(tmp_path / "checkpoints", 2)
    assert find_checkpoint(best) == path


def test_a_path_without_a_checkpoint_says_what_to_give(tmp_path: Path):
    with pytest.raises(ValueError, match=r"/none: there is no such file or folder$"):
        find_checkpoint(tmp_path / "none")
    (tmp_path / "best").mkdir()
    for path in (tmp_path, tmp_path / "best"):
        with pytest.raises(ValueError, match="neither") as caught:
            find_checkpoint(path)
        assert str(caught.value) == (
            f"{path}: is neither a checkpoint (no MANIFEST.json in it) nor a run with checkpoints; "
            "give …/NAME or …/NAME/checkpoints/step-…"
        )
    with pytest.raises(ValueError, match="nowhere/best: there is no such file or folder"):
        find_checkpoint(tmp_path / "nowhere" / "best")


def test_checkpoints_are_in_the_order_of_their_steps(tmp_path: Path):
    assert all_checkpoints(tmp_path / "none") == []
    names = ["step-00000009", "step-00000010", "step-100000000", "step-99999999"]
    for name in [*names, "step-0000001", "step-00000001.old", "damaged-step-00000003"]:
        (tmp_path / name).mkdir()
    assert [path.name for path in all_checkpoints(tmp_path)] == [
        "step-00000009", "step-00000010", "step-99999999", "step-100000000",
    ]  # fmt: skip


def test_the_best_is_the_newest_of_equals(tmp_path: Path):
    write(tmp_path, 1, ap=3.0)
    second = write(tmp_path, 2, ap=3.0)
    write(tmp_path, 3, ap=2.0)
    write(tmp_path, 4)
    assert best_checkpoint(tmp_path) == second


def test_by_default_one_of_the_newest_is_kept_and_what_is_protected(tmp_path: Path):
    paths = [write(tmp_path, step) for step in range(1, 6)]
    keep_newest_and_best(tmp_path, protect=[paths[1]])
    assert all_checkpoints(tmp_path) == [paths[1], paths[4]]
    assert sorted(one.name for one in tmp_path.iterdir()) == [paths[1].name, paths[4].name]


def test_a_checkpoint_of_another_version_is_complete_and_is_kept_as_the_newest(tmp_path: Path):
    old, newer = write(tmp_path, 1), write(tmp_path, 2)
    manifest = json.loads((newer / "MANIFEST.json").read_text())
    manifest["format_version"] += 1
    manifest.pop("sha256")
    (newer / "MANIFEST.json").write_text(json.dumps(manifest))
    keep_newest_and_best(tmp_path)
    assert all_checkpoints(tmp_path) == [newer]
    assert not old.exists()


def test_only_leftovers_of_saves_are_removed(tmp_path: Path):
    others = [
        ".step-1.0a.unfinished", ".step-00000001.xyz.unfinished", ".step-00000001.0a.other",
        ".step-00000001.0a.deleted.more", "damaged-step-00000001", "step-00000001.unfinished",
    ]  # fmt: skip
    for name in [*others, ".step-00000001.0a1b.deleted", ".step-123456789.unfinished"]:
        (tmp_path / name).mkdir()
    clean_leftovers(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(others)


def test_a_replaced_checkpoint_comes_back_only_in_its_own_place(tmp_path: Path):
    there = write(tmp_path, 1)
    for name in (".step-00000001.0a.replaced", ".step-00000002.0a.replaced", ".step-x.0a.replaced"):
        shutil.copytree(there, tmp_path / name)
    (there / "mark").touch()
    assert newest(tmp_path).path == tmp_path / "step-00000002"
    assert (there / "mark").exists()
    assert (tmp_path / ".step-x.0a.replaced").exists()


def test_a_damaged_checkpoint_that_cannot_be_renamed_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    good, bad = write(tmp_path, 1), write(tmp_path, 2)
    (bad / "state.json").write_text("")
    true_rename = Path.rename

    def rename(path: Path, target: Path) -> Path:
        if path == bad:
            raise OSError(30, "Read-only file system")
        return true_rename(path, target)

    monkeypatch.setattr(Path, "rename", rename)
    assert newest(tmp_path).path == good  # the log is the default place for warnings
    assert caplog.messages == [
        f"{bad / 'state.json'}: is missing or cut short; use an older checkpoint; left in place, "
        "since it cannot be renamed (Read-only file system)"
    ]
    monkeypatch.undo()
    warnings: list[str] = []
    newest_checkpoint(tmp_path, warnings.append)
    assert warnings == [
        f"{bad / 'state.json'}: is missing or cut short; use an older checkpoint; set aside as "
        "damaged-step-00000002"
    ]


def test_a_checkpoint_that_vanishes_while_it_is_read_is_no_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    good, gone = write(tmp_path, 1), write(tmp_path, 2)
    listed = all_checkpoints(tmp_path)
    shutil.rmtree(gone)
    monkeypatch.setattr("deta.platform.checkpoint.local.all_checkpoints", lambda _folder: listed)
    warnings: list[str] = []
    found = newest_checkpoint(tmp_path, warnings.append)
    assert found is not None
    assert found.path == good
    assert warnings == []


def test_a_failed_save_leaves_nothing_and_a_repeated_one_replaces(tmp_path: Path):
    path = write(tmp_path, 1, ap=1.0)
    write(tmp_path, 1, ap=2.0)
    assert read_checkpoint(path).state.metrics == {"AP": 2.0}
    assert [one.name for one in tmp_path.iterdir()] == [path.name]
    delete_checkpoint(path)
    assert list(tmp_path.iterdir()) == []


def test_of_equal_aps_the_later_step_is_the_best_also_with_more_digits(tmp_path: Path):
    write(tmp_path, 99_999_999, ap=3.0)
    assert best_checkpoint(tmp_path) == (later := tmp_path / "step-99999999")
    assert write(tmp_path, 100_000_000, ap=3.0) == best_checkpoint(tmp_path) != later


def test_what_cannot_be_deleted_or_renamed_stops_nobody(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """As on a disk that became read-only."""

    def refuse(*_: object, **__: object) -> None:
        raise OSError(30, "Read-only file system")

    path, left = write(tmp_path, 1), tmp_path / ".step-00000002.0a1b.deleted"
    shutil.copytree(path, left)
    replaced = tmp_path / ".step-00000003.0a1b.replaced"
    shutil.copytree(path, replaced)
    monkeypatch.setattr(os, "unlink", refuse)
    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", refuse)
        clean_leftovers(tmp_path)
        assert replaced.exists()
    delete_checkpoint(path)
    assert not path.exists()
    assert all_checkpoints(tmp_path) == []
    assert left.exists()


@pytest.mark.parametrize("gone", ["key", "part"])
def test_a_checkpoint_of_format_1_need_not_have_the_keys_that_are_gone(tmp_path: Path, gone: str):
    path = tmp_path / FORMAT_1.name
    shutil.copytree(FORMAT_1, path)
    values = json.loads((path / "config.json").read_text())
    if gone == "key":
        values["cluster"].pop("max_failures")
    else:
        values.pop("cluster")
    content = json.dumps(values).encode()
    (path / "config.json").write_bytes(content)
    manifest = json.loads((path / "MANIFEST.json").read_text())
    sha256 = hashlib.sha256(content).hexdigest()
    manifest["config.json"] = {"bytes": len(content), "sha256": sha256}
    (path / "MANIFEST.json").write_text(json.dumps(manifest))
    assert read_checkpoint(path).config.optim.lr == 1e-5


def test_a_save_that_cannot_even_be_removed_reports_why_it_failed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def refuse(*_: object, **__: object) -> None:
        raise OSError(30, "Read-only file system")

    old = Fence.acquire(tmp_path, "old")
    Fence.acquire(tmp_path, "new")
    snapshot = take_snapshot(RunState(step=1, samples_seen=1, epoch=0.1), RunConfig(), (), {}, {})
    monkeypatch.setattr(os, "unlink", refuse)
    with pytest.raises(FencedOffError):
        write_checkpoint(tmp_path / "checkpoints", snapshot, old)
