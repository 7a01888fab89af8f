"""Convert weights from one layout to another and back: every tensor is reported, every bit kept."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from deta.jobs import convert as convert_job
from deta.jobs import evaluate as evaluate_job
from deta.model.config import BackboneConfig, ModelConfig
from deta.model.detector import DETA
from deta.model.pretrained import to_published
from deta.platform.checkpoint.local import take_snapshot, write_checkpoint
from deta.platform.data.coco_dataset import Category
from deta.platform.data.image_sizes import EvaluationSize
from deta.platform.data.synthetic_shapes import ShapesDataset, write_shapes
from deta.platform.inference.predictor import Predictor
from deta.platform.run.config import DataConfig, RunConfig
from deta.platform.run.run_state import RunState
from deta.platform.weights.converted_file import read_converted
from deta.platform.weights.initial_weights import load_initial_weights
from deta.platform.weights.weight_files import read_weights, write_weights
from tests.jobs.in_process import run_job

ROOT = Path(__file__).resolve().parents[2]
SHARED = Path(os.environ.get("DETA_SHARED", ROOT / "../shared")).resolve()
LAYOUTS = ("official", "detrex", "huggingface")
SMALL = ModelConfig(
    backbone=BackboneConfig(name="resnet18.tv_in1k", pretrained=False, width=0.125),
    num_classes=5,
    num_levels=4,
    dim=32,
    num_heads=4,
    num_points=2,
    encoder_layers=1,
    decoder_layers=1,
    ffn_dim=32,
    num_queries=20,
)
# The settings that the tensors of a SMALL model do not show.
KEYS = (
    "model.backbone.name=resnet18.tv_in1k", "model.backbone.pretrained=false",
    "model.backbone.width=0.125", "model.num_heads=4", "model.num_points=2", "model.num_queries=20",
)  # fmt: skip
SIZE = ("data.evaluation_size.short_edge=80", "data.evaluation_size.max_long_edge=96")


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name], tensor), name


@pytest.fixture(scope="module")
def state() -> dict[str, Tensor]:
    torch.manual_seed(1)
    model = DETA(SMALL)
    with torch.no_grad():
        for head in model.class_heads:  # separate queries and classes
            head.weight.normal_(std=0.5)
    return model.state_dict()


@pytest.fixture(scope="module")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> ShapesDataset:
    return write_shapes(tmp_path_factory.mktemp("data"), num_train=2, num_val=4, size_px=64)


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path):
    """Run a job in this process and folder. Returns the exit code and the output."""
    monkeypatch.chdir(tmp_path)

    def run(job, *arguments: object) -> tuple[int, str]:
        code = run_job(job, *arguments)
        printed = capsys.readouterr()
        return code, printed.out + printed.err

    return run


def write_published(path: Path, state: dict[str, Tensor], layout: str, wrapper: str) -> Path:
    published = to_published(state, SMALL, layout)
    if path.suffix == ".safetensors":
        write_weights(path, published)
    else:
        torch.save({wrapper: published, "epoch": 3} if wrapper else published, path)
    return path


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    ("suffix", "wrapper"),
    [(".pth", "model"), (".pt", "state_dict"), (".bin", "ema"), (".pth", ""), (".safetensors", "")],
)
def test_published_files_become_ours_and_the_same_file_again(
    layout, suffix, wrapper, state, run, tmp_path
):
    source = write_published(tmp_path / f"source{suffix}", state, layout, wrapper)

    code, printed = run(convert_job, source, "--to", "ours", "--out", "ours.safetensors", *KEYS)
    assert code == 0, printed
    assert f"layout: {layout}" in printed
    converted = read_converted(tmp_path / "ours.safetensors")
    assert_same(converted.tensors, state)
    assert converted.source["sha256"] == hashlib.sha256(source.read_bytes()).hexdigest()
    assert converted.source["layout"] == layout

    code, printed = run(convert_job, "ours.safetensors", "--to", layout)
    assert code == 0, printed
    (back,) = tmp_path.glob(f"ours.{layout}.*")
    assert back.suffix == (".safetensors" if layout == "huggingface" else ".pth")
    assert_same(read_weights(back), to_published(state, SMALL, layout))


def test_the_account_is_a_table_and_a_file(state, run, tmp_path):
    source = write_published(tmp_path / "a.pth", state, "huggingface", "")

    code, printed = run(convert_job, source, "--report", "report.json", *KEYS)

    assert code == 0
    report = json.loads((tmp_path / "report.json").read_text())
    # Queries, keys and values apart, and heads twice: 1 of ours from 3, or from 2.
    assert len(report["used"]["decoder.layers.0.self_attention.in_proj_weight"]) == 3
    assert len(report["used"]["class_heads.0.bias"]) == 2
    rows = {line.split()[0]: line.split() for line in printed.splitlines() if line}
    assert rows["class_heads"][1:] == ["4", "330", "8", "0", "0"]
    assert rows["all"][1] == str(len(state))
    assert "complete; use --to to write it" in printed
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.pth", "report.json"]


def test_missing_and_left_over_tensors_are_errors_unless_allowed_by_name(state, run, tmp_path):
    published = to_published(state, SMALL, "official")
    del published["transformer.level_embed"], published["transformer.enc_output.bias"]
    published |= {"query_embed.weight": torch.ones(2), "mask_head.a": torch.ones(1)}
    torch.save(published, tmp_path / "a.pth")
    command = [convert_job, "a.pth", "--to", "ours", "--out", "b.safetensors", *KEYS]
    command += ["model.num_levels=4", "model.dim=32"]

    code, printed = run(*command)
    assert code == 2
    assert "2 tensors missing, 2 tensors left over" in printed
    for name in ("level_embedding", "first_stage.memory_projection.bias", "mask_head.a"):
        assert f"\n  {name}" in printed
    assert not (tmp_path / "b.safetensors").exists()

    allowed = ["--allow-missing", "first_stage.*.bias", "--allow-unused", "mask_head.*"]
    code, printed = run(*command, *allowed)
    assert code == 2
    assert "1 tensors missing, 1 tensors left over" in printed

    allowed += ["--allow-missing", "level_*", "--allow-unused", "query_embed.weight"]
    code, printed = run(*command, *allowed)
    assert code == 0, printed
    assert "missing, allowed: start untrained: 2" in printed
    assert "left over, allowed: not used: 2" in printed
    found = read_converted(tmp_path / "b.safetensors").tensors
    assert found.keys() == state.keys()
    changed = {name for name in state if not torch.equal(found[name], state[name])}
    assert changed == {"level_embedding", "first_stage.memory_projection.bias"}


def test_a_tensor_of_another_shape_cannot_be_allowed(state, run, tmp_path):
    source = write_published(tmp_path / "a.pth", state, "official", "model")

    code, printed = run(convert_job, source, *KEYS, "model.num_points=4", "--allow-missing", "*")

    assert code == 2
    assert "OTHER SHAPE" in printed
    assert "(64, 32) instead of (128, 32)" in printed


def annotations(path: Path, *names: str) -> Path:
    categories = [{"id": i, "name": name} for i, name in enumerate(names, start=1)]
    images = [{"id": 1, "file_name": "a.jpg", "width": 8, "height": 8}]
    path.write_text(json.dumps({"images": images, "annotations": [], "categories": categories}))
    return path


def test_classes_are_named_and_kept_for_a_data_set(state, run, tmp_path):
    source = write_published(tmp_path / "a.pth", state, "official", "model")
    (tmp_path / "names.txt").write_text("-\ncat\ndog\ncow\nemu\n")
    data = annotations(tmp_path / "data.json", "Dog", "yak", "cat")
    command = [convert_job, source, "--to", "ours", "--out", "b.safetensors", *KEYS]

    code, printed = run(*command, "--for-data", data)
    assert code == 2
    assert "5 rows, whose classes the file does not name" in printed

    code, printed = run(*command, "--for-data", data, "--classes", "names.txt")
    assert code == 0, printed
    assert "2 of 3 by name: Dog (there dog), cat" in printed
    assert "1 new, which start untrained: yak" in printed
    assert "2 of the file are dropped: cow, emu" in printed
    converted = read_converted(tmp_path / "b.safetensors")
    assert [converted.classes.by_row[row].name for row in range(3)] == ["Dog", "yak", "cat"]
    bias = converted.tensors["class_heads.0.bias"]
    assert torch.equal(bias[[0, 2]], state["class_heads.0.bias"][[2, 1]])
    ranking = converted.tensors["class_heads.1.bias"]
    assert torch.equal(ranking[0], state["class_heads.1.bias"][0])


def evaluation(output: str) -> str:
    """The table of an evaluation."""
    return output[output.index("AP ") : output.index("images in")]


def test_what_is_written_evaluates_predicts_and_starts_runs(state, run, tmp_path, shapes):
    names = [
        category["name"]
        for category in json.loads(shapes.val_annotations.read_text())["categories"]
    ]
    categories = tuple(Category(i, name) for i, name in enumerate(names, start=1))
    config = RunConfig(
        model=SMALL,
        data=DataConfig(
            loader_workers=0, evaluation_size=EvaluationSize(short_edge=80, max_long_edge=96)
        ),
    )
    run_state = RunState(step=3, samples_seen=6, epoch=1.0)
    snapshot = take_snapshot(run_state, config, categories, state, {})
    write_checkpoint(tmp_path / "my-run" / "checkpoints", snapshot)
    data = ["--images", shapes.val_images, "--annotations", shapes.val_annotations]
    data += ["--device", "cpu"]

    code, printed = run(convert_job, tmp_path / "my-run", "--to", "ours")
    assert code == 0, printed
    path = tmp_path / "my-run.safetensors"
    code, printed = run(evaluate_job, tmp_path / "my-run", *data, "--results", "a.json")
    assert code == 0, printed
    code, again = run(evaluate_job, path, *data, "--results", "b.json", "data.loader_workers=0")

    assert code == 0, again
    assert evaluation(again) == evaluation(printed)
    assert (tmp_path / "a.json").read_text() == (tmp_path / "b.json").read_text()
    assert Predictor.from_published(path, RunConfig()).names == names
    model = DETA(SMALL)
    assert load_initial_weights(model, path, categories) == []
    assert_same(dict(model.state_dict()), state)
    code, printed = run(evaluate_job, path, *data, "--variant", "deta_r50")
    assert (code, "holds its own" in printed) == (2, True)


def test_ids_do_not_choose_classes_of_a_published_file(run, tmp_path, shapes):
    """A data set whose ids 1 to 5 are shapes is not measured as people, bicycles and cars."""
    torch.manual_seed(0)
    config = replace(SMALL, num_classes=91)
    write_weights(
        tmp_path / "a.safetensors", to_published(DETA(config).state_dict(), config, "official")
    )

    code, printed = run(
        evaluate_job, "a.safetensors", "--images", shapes.val_images, "--annotations",
        shapes.val_annotations, *KEYS, *SIZE,
    )  # fmt: skip

    assert code == 2
    assert "91 rows, so they are COCO's ids; among them are no disc" in printed


def test_a_backbone_becomes_ours_and_is_no_detector(state, run, tmp_path):
    arrays = {
        name.removeprefix("backbone."): tensor.numpy()
        for name, tensor in to_published(state, SMALL, "detrex").items()
        if name.startswith("backbone.")
    }
    content = {
        "model": {**arrays, "stem.fc.bias": torch.ones(3).numpy()},
        "__author__": "torchvision",
    }
    (tmp_path / "R-18.pkl").write_bytes(pickle.dumps(content))

    code, printed = run(convert_job, "R-18.pkl", "--to", "ours")
    assert code == 0, printed
    assert "not used: stem.fc.bias" in printed
    found = read_weights(tmp_path / "R-18.safetensors")
    ours = {n: t for n, t in state.items() if n.startswith("pyramid.backbone.")}
    assert_same(found, ours)
    code, printed = run(convert_job, "R-18.pkl", "--to", "official")
    assert (code, "only be written with --to ours" in printed) == (2, True)
    code, printed = run(convert_job, "R-18.safetensors")
    assert code == 0, printed


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["absent.pth"], "absent.pth: no such file"),
        (["a.pth", "--to", "ours", "--out", "b.pth"], "end the name in .safetensors"),
        (["a.pth", "--to", "ours", "--out", "folder.safetensors"], "is a folder"),
        (["a.pth", "--to", "official", "optim.lr=1"], "optim.lr changes nothing here"),
        (["a.pth", "--variant", "deta_r101"], "there is no variant"),
        (["ftp://host/a.pth"], "only http and https"),
        (["https://host/a.pth#sha256=1"], "is not #sha256="),
        (["other.safetensors"], "no name of a DETA"),
        (["a.pth", "--classes", "absent.txt"], "cannot be read"),
    ],
)
def test_refused_conversions_report_what_is_wrong(arguments, says, state, run, tmp_path):
    write_published(tmp_path / "a.pth", state, "official", "model")
    write_weights(tmp_path / "other.safetensors", {"rpn.weight": torch.ones(2)})
    (tmp_path / "folder.safetensors").mkdir()

    code, printed = run(convert_job, *arguments)

    assert code == 2
    assert says in printed
    assert "Traceback" not in printed


def test_published_files_are_listed(run):
    code, printed = run(convert_job, "--list")

    assert code == 0
    assert "deta_r50_5scale_12ep_bs8.pth" in printed
    assert "No publisher states a SHA-256" in printed


def test_as_people_start_it(tmp_path):
    (tmp_path / "a.pth").write_bytes(b"<!doctype html>")
    command = [sys.executable, str(ROOT / "jobs" / "convert.py"), "a.pth"]
    env = os.environ | {"OMP_NUM_THREADS": "1"}

    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=env)

    assert done.returncode == 2
    assert done.stderr.startswith("error: a.pth: a web page")
