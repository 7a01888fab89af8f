"""The files of a checkpoint hold what is promised, and damage is told by its cause."""

from __future__ import annotations

import hashlib
import json
import math
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from deta.platform.checkpoint.format import (
    CheckpointError,
    OtherVersionError,
    manifest_to_json,
    parse_manifest,
    parse_metrics,
    read_checkpoint,
    read_manifest,
    read_metrics,
    state_to_json,
)
from deta.platform.checkpoint.host_snapshot import WrittenFile
from deta.platform.checkpoint.local import take_snapshot, write_checkpoint
from deta.platform.data.coco_dataset import Category
from deta.platform.run.config import RunConfig
from deta.platform.run.run_state import FORMAT_VERSION, RunState
from deta.platform.system.safe_read import MAX_JSON_BYTES

FILES = {
    name: WrittenFile(number, f"{number:064x}")
    for number, name in enumerate(
        ("training.safetensors", "state.json", "model.safetensors", "config.json"), 1
    )
}


def write(folder: Path) -> Path:
    state = RunState(step=1, samples_seen=4, epoch=0.1, metrics={"AP": 2.0})
    tensors = {"w": torch.arange(3.0)}
    snapshot = take_snapshot(state, RunConfig(), (Category(1, "disc"),), tensors, tensors)
    return write_checkpoint(folder, snapshot)


def with_hash(manifest: dict[str, Any]) -> str:
    """Return a manifest as text, with the SHA-256 of its compact, sorted form."""
    text = json.dumps(manifest, sort_keys=True, separators=(",", ":"))
    return json.dumps(manifest | {"sha256": hashlib.sha256(text.encode()).hexdigest()})


def entries(**more: object) -> dict[str, object]:
    return {name: {"bytes": f.num_bytes, "sha256": f.sha256} for name, f in FILES.items()} | more


def test_a_manifest_names_sorted_files_and_its_own_hash():
    text = manifest_to_json(7, FILES)
    manifest = json.loads(text)
    assert list(manifest) == ["format_version", "step", "files", "sha256"]
    assert manifest["format_version"] == FORMAT_VERSION
    assert manifest["step"] == 7
    assert list(manifest["files"]) == sorted(FILES)
    assert manifest["files"] == entries()
    assert text == json.dumps(manifest, indent=2)
    own = manifest.pop("sha256")
    assert json.loads(with_hash(manifest))["sha256"] == own
    assert parse_manifest(text, "here") == FILES
    assert parse_manifest(text.encode(), "here") == FILES


def test_the_state_is_readable_json_without_metrics_that_are_not_finite():
    metrics = {"AP": 12.5, "bad": math.nan, "worse": -math.inf}
    state = RunState(step=3, samples_seen=12, epoch=0.5, metrics=metrics, format_version=1)
    text = state_to_json(state, (Category(1, "disc"), Category(90, "star")))
    content = json.loads(text)
    assert content["metrics"] == {"AP": 12.5}
    assert content["format_version"] == FORMAT_VERSION
    assert [one["name"] for one in content["categories"]] == ["disc", "star"]
    assert [one["id"] for one in content["categories"]] == [1, 90]
    assert content["step"] == 3
    assert text == json.dumps(content, indent=2)


def test_a_manifest_of_format_1_is_the_files_alone():
    assert parse_manifest(json.dumps(entries()), "here") == FILES


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("not JSON", "Expecting value"),
        ("[]", "has no attribute|indices"),
        ("3", "not iterable"),
        ("[" * 100_000, "recursion"),
        (json.dumps({"format_version": 2, "files": entries()}), "does not match its own SHA-256"),
        (with_hash({"format_version": 2, "files": entries()}).replace("1", "3", 1),
         "does not match its own SHA-256"),
        (with_hash({"format_version": "x", "files": {}}), "invalid literal"),
        (with_hash({"format_version": 2}), "'files'"),
        (with_hash({"format_version": 2, "files": {}}),
         "does not name config.json, model.safetensors, state.json"),
        (with_hash({"format_version": 2, "files": {n: e for n, e in entries().items()
                                                   if n != "config.json"}}),
         "does not name config.json"),
        (json.dumps(entries(**{"../x": {"bytes": 1, "sha256": ""}})),
         "names files outside its folder"),
        (json.dumps(entries(**{".x": {"bytes": 1, "sha256": ""}})),
         "names files outside its folder"),
        (json.dumps(entries(x={"bytes": "many", "sha256": ""})), "invalid literal"),
        (json.dumps(entries(x={"sha256": ""})), "'bytes'"),
        (json.dumps(entries(x={"bytes": 1})), "'sha256'"),
    ],
)  # fmt: skip
def test_a_damaged_manifest_is_refused_with_the_cause(text: str, why: str):
    with pytest.raises(CheckpointError) as caught:
        parse_manifest(text, "runs/MANIFEST.json")
    assert not isinstance(caught.value, OtherVersionError)
    begin, end = "runs/MANIFEST.json: is not an intact checkpoint manifest (", "); use an older"
    message = str(caught.value)
    assert message.startswith(begin)
    assert message.endswith(end + " checkpoint")
    assert re.search(why, message)
    if why.startswith(("does not", "names files")):  # ours, in full
        assert message.removeprefix(begin).partition(")")[0] == why


@pytest.mark.parametrize("is_hashed", [False, True])
def test_a_newer_format_is_told_from_damage(is_hashed: bool):
    newer = {"format_version": FORMAT_VERSION + 1, "files": "of a kind that is not known yet"}
    text = with_hash(newer) if is_hashed else json.dumps(newer)
    with pytest.raises(OtherVersionError) as caught:
        parse_manifest(text, "here")
    assert str(caught.value) == (
        f"here: has format {FORMAT_VERSION + 1}; this version of deta-platform reads up to "
        f"{FORMAT_VERSION}, so it needs a newer one"
    )


def test_a_newer_format_with_a_wrong_hash_is_damage():
    text = with_hash({"format_version": FORMAT_VERSION + 1, "files": entries()})
    with pytest.raises(CheckpointError, match="does not match its own SHA-256"):
        parse_manifest(text.replace("state", "stade"), "here")


def test_what_is_no_complete_checkpoint_says_what_is_missing(tmp_path: Path):
    def refused(path: Path) -> str:
        with pytest.raises(CheckpointError) as caught:
            read_manifest(path)
        return str(caught.value)

    incomplete = "is not a complete checkpoint, it has no MANIFEST.json; use an older checkpoint"
    assert refused(tmp_path) == f"{tmp_path}: {incomplete}"
    (tmp_path / "file").touch()
    assert refused(tmp_path / "file") == f"{tmp_path / 'file'}: {incomplete}"
    cut_short = "is missing or cut short; use an older checkpoint"
    path = write(tmp_path)
    assert set(read_manifest(path)) == {p.name for p in path.iterdir()} - {"MANIFEST.json"}
    for name in ("model.safetensors", "state.json"):
        content = (path / name).read_bytes()
        for damaged in (content[:-1], content + b"x", b""):
            (path / name).write_bytes(damaged)
            assert (
                refused(path) == f"{path / name}: is missing or cut short; use an older checkpoint"
            )
        (path / name).unlink()
        assert refused(path) == f"{path / name}: {cut_short}"
        (path / name).mkdir()
        assert "is missing or cut short" in refused(path)
        (path / name).rmdir()
        (path / name).write_bytes(content)
    manifest = (path / "MANIFEST.json").read_text()
    (path / "MANIFEST.json").write_text(manifest.replace('"step": 1', '"step": 2'))
    assert refused(path).startswith(f"{path / 'MANIFEST.json'}: is not an intact checkpoint")
    (path / "MANIFEST.json").write_text(manifest + " " * MAX_JSON_BYTES)
    assert refused(path) == (
        f"{path / 'MANIFEST.json'}: has over {MAX_JSON_BYTES:,} bytes, the limit for such a file; "
        "use an older checkpoint"
    )
    (path / "MANIFEST.json").write_text(manifest + " " * (MAX_JSON_BYTES - len(manifest)))
    read_manifest(path)


def test_a_changed_file_of_the_right_length_is_refused_by_name(tmp_path: Path):
    path = write(tmp_path)
    content = bytearray((path / "training.safetensors").read_bytes())
    content[-1] ^= 1
    (path / "training.safetensors").write_bytes(content)
    with pytest.raises(CheckpointError) as caught:
        read_checkpoint(path)
    assert str(caught.value) == (
        f"{path / 'training.safetensors'}: has changed since it was written; use an older "
        "checkpoint"
    )


@pytest.mark.parametrize(
    "change",
    [
        {"state.json": '{"step": 1}'},  # no categories
        {"state.json": "[]"},
        {"config.json": "[]"},
        {"config.json": '{"unheard_of": 1}'},
    ],
)
def test_verified_content_that_is_not_understood_is_of_another_version(
    tmp_path: Path, change: dict[str, str]
):
    path = write(tmp_path)
    for name, text in change.items():
        (path / name).write_text(text)
    files = {
        one.name: WrittenFile(one.stat().st_size, hashlib.sha256(one.read_bytes()).hexdigest())
        for one in path.iterdir()
        if one.name != "MANIFEST.json"
    }
    (path / "MANIFEST.json").write_text(manifest_to_json(1, files))
    with pytest.raises(OtherVersionError) as caught:
        read_checkpoint(path)
    assert str(caught.value).startswith(
        f"{path}: cannot be read by this version of deta-platform ("
    )
    assert str(caught.value).endswith("); use the version that wrote it")


def test_metrics_of_a_checkpoint_that_cannot_be_read_are_empty(tmp_path: Path):
    path = write(tmp_path)
    assert read_metrics(path) == {"AP": 2.0}
    shutil.rmtree(path)
    assert read_metrics(path) == {}
    assert parse_metrics(b'{"metrics": {"AP": 1, "bad": NaN, "worse": Infinity}}') == {"AP": 1.0}
    for damaged in (b"", b"{}", b"[]", b'{"metrics": []}', b'{"metrics": {"AP": "x"}}', b"\xff"):
        assert parse_metrics(damaged) == {}
