"""Test `weight_parts.py`: weights in parts are read as one, or the missing part is named."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from deta.platform.weights.weight_files import WeightsError, read_weights
from deta.platform.weights.weight_parts import (
    PartsError,
    is_weights_folder,
    weight_parts,
    weights_sha256,
)

# Only both parts together show that not all names share the prefix `model.`.
PARTS = (
    {"model.a": torch.ones(1), "model.b": torch.ones(2)},
    {"model.c": torch.ones(3), "head.d": torch.ones(4)},
)
BOTH = PARTS[0] | PARTS[1]


def write_parts(folder: Path, suffix: str = ".safetensors", *, index: bool = True) -> list[Path]:
    stem = "model" if suffix == ".safetensors" else "pytorch_model"
    paths = [folder / f"{stem}-{number:05d}-of-00002{suffix}" for number in (1, 2)]
    for path, part in zip(paths, PARTS, strict=True):
        save_file(part, path) if suffix == ".safetensors" else torch.save(part, path)
    if index:
        where = {n: path.name for path, part in zip(paths, PARTS, strict=True) for n in part}
        content = {"metadata": {"total_size": 40}, "weight_map": where}
        (folder / f"{stem}{suffix}.index.json").write_text(json.dumps(content))
    return paths


@pytest.mark.parametrize("suffix", [".safetensors", ".bin"])
def test_folder_index_and_each_part_mean_all_parts(tmp_path: Path, suffix: str) -> None:
    paths = write_parts(tmp_path, suffix)

    assert is_weights_folder(tmp_path)
    for given in (tmp_path, next(tmp_path.glob("*.index.json")), *paths):
        said: list[str] = []
        found = read_weights(given, said.append)
        assert found.keys() == BOTH.keys()
        assert all(torch.equal(found[name], BOTH[name]) for name in BOTH)
        assert "read 2 files" in said[0]
        assert weights_sha256(given) == weights_sha256(tmp_path)


def test_a_part_without_an_index_finds_the_others_by_name(tmp_path: Path) -> None:
    paths = write_parts(tmp_path, index=False)
    assert read_weights(paths[1]).keys() == BOTH.keys()

    paths[0].unlink()
    with pytest.raises(WeightsError, match=r"in 2 parts, of which 1 \(model-00001-of-00002"):
        read_weights(paths[1])


def test_a_missing_part_and_a_damaged_index_are_named(tmp_path: Path) -> None:
    paths = write_parts(tmp_path)
    index = tmp_path / "model.safetensors.index.json"
    paths[1].unlink()
    for given in (tmp_path, index, paths[0]):
        with pytest.raises(WeightsError, match=r"1 .model-00002-of-00002\.safetensors. are not"):
            read_weights(given)
    for text in (
        "{",
        "[]",
        '{"weight_map": 3}',
        '{"weight_map": {}}',
        '{"weight_map": {"a": "../x"}}',
    ):
        index.write_text(text)
        with pytest.raises(PartsError, match=r"model\.safetensors\.index\.json"):
            weight_parts(index)


def test_a_tensor_in_two_parts_is_refused(tmp_path: Path) -> None:
    paths = write_parts(tmp_path)
    save_file(PARTS[0], paths[1])

    with pytest.raises(WeightsError, match=r"holds model\.a, model\.b, as another part does"):
        read_weights(tmp_path)


def test_a_folder_with_one_file_is_that_file_and_a_checkpoint_is_no_such_folder(
    tmp_path: Path,
) -> None:
    (tmp_path / "whole").mkdir()
    save_file(BOTH, tmp_path / "whole" / "model.safetensors")
    assert read_weights(tmp_path / "whole").keys() == BOTH.keys()

    (tmp_path / "whole" / "state.json").write_text("{}")
    assert not is_weights_folder(tmp_path / "whole")
    with pytest.raises(WeightsError, match="a folder without"):
        read_weights(tmp_path / "whole")
