"""Test that hostile and broken weight files are refused by name, and that none of their code runs.

Each kind of file is given to the reader and to each tool that takes weights. Kinds that can contain
code contain code that would create a folder.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import pickle
import signal
import struct
import sys
import tarfile
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from deta.jobs import convert as convert_job
from deta.jobs import evaluate as evaluate_job
from deta.jobs import predict as predict_job
from deta.platform.data.synthetic_shapes import ShapesDataset, write_shapes
from deta.platform.weights.weight_files import read_weights, write_weights

STATE = {"conv.weight": torch.arange(6.0).view(2, 3), "bias": torch.ones(4)}
Build = Callable[[Path, str], Path]  # a folder, and the folder that the planted code would make

KINDS: dict[str, tuple[Build, str]] = {}  # by name: how it is made, what the refusal says
# Those whose code runs when they are loaded by the means that they are made for.
LIVE: dict[str, Callable[[Path], object]] = {}


class Planted:
    """Makes a folder when it is unpickled."""

    def __init__(self, trace: str) -> None:
        self.trace = trace

    def __reduce__(self):
        return os.mkdir, (self.trace,)


def kind(says: str, live: Callable[[Path], object] | None = None) -> Callable[[Build], Build]:
    def add(build: Build) -> Build:
        KINDS[build.__name__] = (build, says)
        if live is not None:
            LIVE[build.__name__] = live
        return build

    return add


def _unsafe_load(path: Path) -> object:
    return torch.load(path, weights_only=False)


def _unpickle(path: Path) -> object:
    with path.open("rb") as file:
        return pickle.load(file)


def _written(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


def _zip_of(path: Path, members: dict[str, bytes], compression: int = zipfile.ZIP_STORED) -> Path:
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return path


def _members(folder: Path) -> dict[str, bytes]:
    torch.save(STATE, folder / "plain.pth")
    with zipfile.ZipFile(folder / "plain.pth") as archive:
        return {info.filename: archive.read(info) for info in archive.infolist()}


def _safetensors(path: Path, header: object, data: bytes = b"") -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return _written(path, struct.pack("<Q", len(text)) + text + data)


@kind(r"run the code of \w+\.mkdir", _unsafe_load)
def pickled_code_beside_the_model(folder, trace):
    torch.save({"model": STATE, "optimizer": Planted(trace)}, folder / "a.pth")
    return folder / "a.pth"


@kind(r"run the code of \w+\.mkdir", _unsafe_load)
def pickled_code_within_the_state_dict(folder, trace):
    nested = {"model": OrderedDict(STATE, deep=[{"deeper": (Planted(trace),)}])}
    torch.save(nested, folder / "a.pt")
    return folder / "a.pt"


@kind(r"run the code of \w+\.mkdir", _unsafe_load)
def pickled_code_in_the_old_format(folder, trace):
    torch.save(
        {"model": STATE, "x": Planted(trace)},
        folder / "a.bin",
        _use_new_zipfile_serialization=False,
    )
    return folder / "a.bin"


@pytest.mark.filterwarnings("ignore")
@kind(r"run the code of \w+\.mkdir", _unpickle)
def pickled_code_in_a_pkl_backbone(folder, trace):
    arrays = {"stem.conv1.weight": np.ones((2, 3), "f4"), "x": Planted(trace)}
    return _written(
        folder / "R-50.pkl", pickle.dumps({"model": arrays, "__author__": "torchvision"})
    )


@kind(r"run the code of builtins\.eval|run the code of __builtin__\.eval", _unpickle)
def pickled_code_by_opcodes_of_protocol_0(folder, trace):
    return _written(
        folder / "a.pkl", f"c__builtin__\neval\n(V__import__('os').mkdir({trace!r})\ntR.".encode()
    )


@kind("instruction that weight files do not need", _unpickle)
def pickled_code_by_the_inst_opcode(folder, trace):
    return _written(folder / "a.pkl", f"(V{trace}\nios\nmkdir\n.".encode())


@kind(r"run the code of \w+\.Model|run the code of .*Sequential", _unsafe_load)
def a_whole_model_instead_of_its_weights(folder, trace):
    torch.save(torch.nn.Sequential(torch.nn.Linear(2, 2)), folder / "a.pth")
    return folder / "a.pth"


LIVE.pop("a_whole_model_instead_of_its_weights")  # harmless, and refused all the same


@kind("tar archive")
def the_tar_format_of_old_torch(folder, trace):
    with tarfile.open(folder / "a.pth", "w", format=tarfile.USTAR_FORMAT) as archive:
        for name in ("sys_info", "pickle", "storages"):
            content = pickle.dumps(Planted(trace))
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return folder / "a.pth"


@kind("points outside of the file")
def a_zip_with_a_path_that_climbs_out(folder, trace):
    return _zip_of(folder / "a.pth", _members(folder) | {f"../../../..{trace}/x": b"x"})


@kind("a TorchScript")
def a_torchscript_archive(folder, trace):
    members = {
        "a/data.pkl": b"",
        "a/constants.pkl": pickle.dumps(Planted(trace)),
        "a/code/x.py": b"1",
    }
    return _zip_of(folder / "a.pt", {k: v for k, v in members.items() if k != "a/data.pkl"})


@kind("an exported program")
def an_exported_program(folder, trace):
    inputs = io.BytesIO()
    torch.save(Planted(trace), inputs)
    members = {"a/archive_format": b"pt2", "a/data/sample_inputs/model.pt": inputs.getvalue()}
    return _zip_of(folder / "a.pt", members)


@kind("distributed checkpoint")
def a_distributed_checkpoint(folder, trace):
    (folder / "dcp").mkdir()
    (folder / "dcp" / ".metadata").write_bytes(pickle.dumps(Planted(trace)))
    return folder / "dcp"


@kind("not a complete safetensors file")
def a_safetensors_header_longer_than_the_file(folder, trace):
    return _written(folder / "a.safetensors", struct.pack("<Q", 2**62) + b"{}")


@kind("not a complete safetensors file")
def a_safetensors_header_of_a_gigabyte(folder, trace):
    path = _written(folder / "a.safetensors", struct.pack("<Q", 2**30) + b"{")
    os.truncate(path, 2**30 + 8)  # a hole, so it takes no disk
    return path


def _wrong_header(header: object) -> Build:
    return lambda folder, _: _safetensors(folder / "a.safetensors", header, b"12345678")


_PAIR = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
for _name, _header in {
    "a_safetensors_header_nested_without_end": b'{"a":' + b"[" * 1_000_000,
    "safetensors_with_offsets_beyond_the_data": {"a": _PAIR | {"data_offsets": [0, 4000]}},
    "safetensors_with_offsets_that_overlap": {"a": _PAIR, "b": _PAIR},
    "safetensors_with_a_shape_of_terabytes": {"a": _PAIR | {"shape": [2**40]}},
    "safetensors_of_an_unknown_type": {"a": _PAIR | {"dtype": "CODE"}},
}.items():
    KINDS[_name] = (_wrong_header(_header), "not a complete safetensors file")


@kind("damaged|cut off|directory")
def a_truncated_zip(folder, trace):
    torch.save(STATE, folder / "a.pth")
    os.truncate(folder / "a.pth", (folder / "a.pth").stat().st_size * 2 // 3)
    return folder / "a.pth"


@kind("not a complete safetensors file")
def truncated_safetensors(folder, trace):
    write_weights(folder / "a.safetensors", STATE)
    os.truncate(folder / "a.safetensors", (folder / "a.safetensors").stat().st_size - 3)
    return folder / "a.safetensors"


@kind("is damaged")
def a_flipped_bit_in_a_storage(folder, trace):
    torch.save({"a": torch.zeros(1000)}, folder / "a.pth")
    content = bytearray((folder / "a.pth").read_bytes())
    content[content.index(bytes(4000)) + 2000] ^= 1
    return _written(folder / "a.pth", bytes(content))


@kind("an empty file")
def no_bytes_at_all(folder, trace):
    return _written(folder / "a.pth", b"")


@kind("a web page, not weights")
def an_error_page(folder, trace):
    return _written(folder / "a.pth", b"\n<!DOCTYPE html><html><script>x</script></html>")


@kind("git lfs pull")
def a_pointer_of_git_lfs(folder, trace):
    text = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 194000000\n"
    return _written(folder / "a.safetensors", text)


@kind("not finite")
def weights_that_are_nan(folder, trace):
    write_weights(folder / "a.safetensors", {**STATE, "bias": torch.tensor([1.0, float("nan")])})
    return folder / "a.safetensors"


@kind("declares")
def a_storage_that_declares_terabytes(folder, trace):
    """The old format, where torch.load makes room for what the pickle says."""
    torch.save({"a": torch.zeros(7)}, folder / "a.pth", _use_new_zipfile_serialization=False)
    content = (folder / "a.pth").read_bytes()
    place = content.index(b"K\x07N")  # the number of elements, and no view
    huge = b"\x8a\x06" + (2**42).to_bytes(6, "little")
    content = content[:place] + huge + content[place + 2 :]
    count = content.rindex((7).to_bytes(8, "little"))  # once more before the elements
    content = content[:count] + (2**42).to_bytes(8, "little") + content[count + 8 :]
    return _written(folder / "a.pth", content)


@kind("declares shape")
def a_tensor_that_is_one_number_a_billion_times(folder, trace):
    torch.save({"a": torch.zeros(1).expand(2**20, 2**20)}, folder / "a.pth")
    return folder / "a.pth"


@kind("declares more bytes than it has")
def a_pickle_that_declares_terabytes(folder, trace):
    return _written(folder / "a.pkl", b"\x80\x05\x96" + struct.pack("<Q", 2**43) + b"abc")


@kind("declares .* bytes, compressed into")
def a_zip_bomb(folder, trace):
    members = _members(folder)
    storage = next(name for name in members if "/data/" in name)
    return _zip_of(folder / "a.pth", members | {storage: bytes(2**24)}, zipfile.ZIP_DEFLATED)


@kind("declares 24 bytes of a storage of 4|elements")
def a_storage_shorter_than_its_tensor(folder, trace):
    members = _members(folder)
    storage = next(name for name in members if "/data/" in name)
    return _zip_of(folder / "a.pth", members | {storage: b"1234"})


@kind("no named weights|entries are not tensors")
def things_that_are_no_tensors(folder, trace):
    torch.save({"model": {"a": argparse.Namespace(b=1), "c": "text"}}, folder / "a.pth")
    return folder / "a.pth"


@kind("that does not exist")
def a_link_into_nothing(folder, trace):
    (folder / "a.pth").symlink_to(folder / "elsewhere.pth")
    return folder / "a.pth"


@kind("a device or pipe")
def a_pipe_that_never_ends(folder, trace):
    os.mkfifo(folder / "a.pth")
    return folder / "a.pth"


@kind("a folder")
def a_folder_with_the_name_of_a_file(folder, trace):
    (folder / "a.safetensors").mkdir()
    return folder / "a.safetensors"


@pytest.fixture(scope="module")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> ShapesDataset:
    return write_shapes(tmp_path_factory.mktemp("data"), num_train=1, num_val=1, size_px=64)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("name", KINDS)
def test_a_bad_file_is_refused_by_name_and_nothing_of_it_runs(name, tmp_path):
    build, says = KINDS[name]
    trace = tmp_path / "trace"
    path = build(tmp_path, str(trace))

    with pytest.raises(ValueError, match=says) as caught:
        read_weights(path)

    assert str(path) in str(caught.value)
    assert not trace.exists()
    if name in LIVE:  # the plant is alive: whoever trusts it, runs it
        LIVE[name](path)
        assert trace.exists()


def test_there_are_at_least_12_kinds_of_bad_files():
    assert len(KINDS) >= 30
    assert len(LIVE) >= 6


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("name", KINDS)
def test_tools_refuse_a_bad_file_with_exit_code_2(name, tmp_path, shapes, monkeypatch, capsys):
    trace = tmp_path / "trace"
    path = KINDS[name][0](tmp_path, str(trace))
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    data = ["--images", shapes.val_images, "--annotations", shapes.val_annotations]
    output = ["--output", tmp_path / "out"]
    for job, arguments in (
        (convert_job, ["--to", "ours", "--output", tmp_path / "new.safetensors"]),
        (evaluate_job, data),
        (predict_job, [*sorted(shapes.val_images.iterdir())[:1], *output]),
    ):
        monkeypatch.setattr(sys, "argv", [job.__file__, str(path), *map(str, arguments)])

        with pytest.raises(SystemExit) as caught:
            job.main()

        error = capsys.readouterr().err
        assert caught.value.code == 2, error
        assert error.startswith("error: ")
        assert path.name in error
        assert "Traceback" not in error
        assert not trace.exists()
        assert not (tmp_path / "new.safetensors").exists()
