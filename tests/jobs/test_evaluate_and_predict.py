"""The tools that use a model, run as people run them."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from PIL import Image

from deta.jobs import evaluate as evaluate_job
from deta.jobs import predict as predict_job
from deta.model.config import BackboneConfig, ModelConfig
from deta.model.detector import DETA
from deta.model.pretrained import to_published
from deta.platform.checkpoint.local import take_snapshot, write_checkpoint
from deta.platform.data.coco_dataset import CocoDataset
from deta.platform.data.image_sizes import EvaluationSize
from deta.platform.data.synthetic_shapes import ShapesDataset, write_shapes
from deta.platform.inference.predictor import Predictor
from deta.platform.run.config import DataConfig, RunConfig
from deta.platform.run.run_state import RunState
from deta.platform.weights.weight_files import write_weights
from tests.jobs import in_process

ROOT = Path(__file__).resolve().parents[2]
SHARED = Path(os.environ.get("DETA_SHARED", ROOT / "../shared")).resolve()

SIZE = EvaluationSize(short_edge=80, max_long_edge=96)


@dataclass
class Trained:
    run: Path
    official: Path  # the same weights as a published file
    shapes: ShapesDataset
    val_set: CocoDataset
    own_annotations: Path  # what the model finds, as if it were true: AP 100
    table: str  # of an evaluation with these annotations, in this process
    results: list[dict]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    root = tmp_path_factory.mktemp("tools")
    shapes = write_shapes(root / "shapes", num_train=4, num_val=8, size_px=64)
    val_set = CocoDataset.open(shapes.val_images, shapes.val_annotations)
    config = RunConfig(
        model=ModelConfig(
            backbone=BackboneConfig(name="resnet18.tv_in1k", pretrained=False),
            num_classes=5,
            dim=32,
            num_levels=4,
            num_points=2,
            encoder_layers=1,
            decoder_layers=1,
            ffn_dim=32,
            num_queries=20,
        ),
        data=DataConfig(loader_workers=0, evaluation_size=SIZE),
        micro_batch_size=1,
    )
    torch.manual_seed(0)
    model = DETA(config.model)
    with torch.no_grad():
        for head in model.class_heads:  # separate queries and classes
            head.weight.normal_(std=0.5)
    state = RunState(step=12, samples_seen=96, epoch=3.0, metrics={"AP": 1.5})
    snapshot = take_snapshot(state, config, val_set.categories, model.state_dict(), {})
    write_checkpoint(root / "run" / "checkpoints", snapshot)
    official = root / "official.safetensors"
    write_weights(official, to_published(model.state_dict(), config.model, "official"))

    predictor = Predictor.from_checkpoint(root / "run")
    first = predictor.evaluate(val_set)
    assert first is not None
    truth = val_set.ground_truth
    truth["annotations"] = [
        {key: result[key] for key in ("image_id", "category_id", "bbox")} | {"id": i}
        for i, result in enumerate(first.results, start=1)
    ]
    own_annotations = root / "own.json"
    own_annotations.write_text(json.dumps(truth))
    own = CocoDataset.open(shapes.val_images, own_annotations)
    evaluation = predictor.evaluate(own)
    assert evaluation is not None
    table = evaluation.metrics.table(own.categories)
    assert table.startswith("AP    100.0")
    return Trained(
        root / "run", official, shapes, val_set, own_annotations, table, evaluation.results
    )


@pytest.fixture
def refusal(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Return the error of a job that must exit with 2; runs in this process."""

    def refusal(job, *arguments: object) -> str:
        assert in_process.run_job(job, *arguments) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ")
        return error

    return refusal


def run_job(name: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    """As a person starts it, from another folder."""
    command = [sys.executable, str(ROOT / "jobs" / name), *map(str, arguments)]
    return subprocess.run(
        command,
        capture_output=True,
        text=True,
        cwd=ROOT.parent,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )


def data_of(trained: Trained) -> list[object]:
    return ["--images", trained.shapes.val_images, "--annotations", trained.own_annotations]


def test_a_run_is_evaluated_as_in_this_process(tmp_path, trained):
    results, pictures = tmp_path / "new" / "results.json", tmp_path / "sheet.png"

    done = run_job(
        "evaluate.py", trained.run, *data_of(trained), "--device", "cpu",
        "--results", results, "--pictures", pictures, "num_pictures=3",
    )  # fmt: skip

    assert done.returncode == 0, done.stderr
    assert trained.table in done.stdout
    assert "step-00000012 (step 12, epoch 3.00, AP 1.5" in done.stdout
    assert "images/s on cpu" in done.stdout
    assert json.loads(results.read_text()) == trained.results
    assert Image.open(pictures).width > 600
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["new", "results.json", "sheet.png"]


def test_the_same_weights_as_a_published_file_have_the_same_ap(tmp_path, trained):
    done = run_job(
        "evaluate.py", trained.official, *data_of(trained), "--results", tmp_path / "r.json",
        "--device", "cpu", "model.backbone.name=resnet18.tv_in1k", "model.num_queries=20",
        "model.num_points=2", "data.evaluation_size.short_edge=80",
        "data.evaluation_size.max_long_edge=96", "micro_batch_size=1",
    )  # fmt: skip

    assert done.returncode == 0, done.stderr
    assert trained.table in done.stdout
    assert json.loads((tmp_path / "r.json").read_text()) == trained.results


def test_a_damaged_image_stops_an_evaluation_with_code_1(tmp_path, trained):
    (tmp_path / "val").mkdir()
    for path in trained.shapes.val_images.iterdir():
        (tmp_path / "val" / path.name).write_bytes(path.read_bytes())
    damaged = sorted((tmp_path / "val").iterdir())[5]
    damaged.write_bytes(damaged.read_bytes()[:-200])

    done = run_job(
        "evaluate.py", trained.run, "--images", tmp_path / "val", "--device", "cpu",
        "--annotations", trained.own_annotations, "data.loader_workers=1",
    )  # fmt: skip

    assert done.returncode == 1
    assert f"failed: {damaged}: does not decode" in done.stderr
    assert "Traceback" not in done.stderr


def test_predictions_of_a_folder_are_those_of_the_evaluation(tmp_path, trained):
    output = tmp_path / "out"

    done = run_job(
        "predict.py", trained.run, trained.shapes.val_images, "--out", output,
        "--annotations", trained.own_annotations, "--threshold", "0.2", "--device", "cpu",
        "--batch-size", 1,  # as the evaluation: in larger ones float32 sums have another order
    )  # fmt: skip

    assert done.returncode == 0, done.stderr
    assert json.loads((output / "results.json").read_text()) == trained.results
    names = [record.path.name for record in trained.val_set.records]
    assert sorted(path.name for path in (output / "pictures").iterdir()) == names
    for record in trained.val_set.records:
        picture = Image.open(output / "pictures" / record.path.name)
        assert picture.size == (record.width, record.height)
    assert f"8/8  {names[-1]}  " in done.stdout
    counts = sum(result["score"] >= 0.2 for result in trained.results)
    printed = [line.split("  ")[-1] for line in done.stdout.splitlines() if "/8  " in line]
    assert sum(int(text.split()[0]) for text in printed) == counts > 0


def test_a_damaged_image_is_reported_and_the_others_are_predicted(tmp_path, trained):
    folder = tmp_path / "mixed"
    (folder / "below").mkdir(parents=True)
    first, second, third = sorted(trained.shapes.val_images.iterdir())[:3]
    (folder / "a.jpg").write_bytes(first.read_bytes())
    (folder / "b.JPG").write_bytes(second.read_bytes()[:-200])
    Image.open(third).save(folder / "below" / "c.webp", lossless=True)
    (folder / "notes.txt").write_text("no picture")
    (folder / "z.png").write_text("no picture either")
    elsewhere = tmp_path / "elsewhere" / "a.jpg"  # as in the folder
    elsewhere.parent.mkdir()
    elsewhere.write_bytes(third.read_bytes())

    done = run_job(
        "predict.py", trained.run, folder, elsewhere, "--output", tmp_path / "out",
        "--device", "cpu", "postprocess.max_detections=7",
    )  # fmt: skip

    assert done.returncode == 1, done.stderr
    assert "1 other file left out (1 .txt)" in done.stdout
    assert "2 of 5 images could not be read" in done.stdout
    assert f"not readable: {folder / 'b.JPG'}" in done.stdout
    written = {p.relative_to(tmp_path / "out").as_posix() for p in (tmp_path / "out").rglob("*.*")}
    assert written == {
        "pictures/mixed/a.jpg", "pictures/mixed/below/c.webp.png", "pictures/elsewhere/a.jpg",
        "images.json", "results.json", "detections.parquet",
    }  # fmt: skip
    listing = json.loads((tmp_path / "out" / "images.json").read_text())
    assert {image["id"]: image["file_name"] for image in listing["images"]} == {
        1: "mixed/a.jpg",
        3: "mixed/below/c.webp",
        5: "elsewhere/a.jpg",
    }
    unreadable = [entry["file_name"] for entry in listing["unreadable"]]
    assert unreadable == ["mixed/z.png", "mixed/b.JPG"]
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert [result["image_id"] for result in results] == [1] * 7 + [3] * 7 + [5] * 7


def test_a_pattern_gives_the_same_detections_in_batches_and_as_a_table(tmp_path, trained):
    import pyarrow.parquet

    folder = trained.shapes.val_images

    done = run_job(
        "predict.py", trained.run, folder.parent / f"{folder.name[:2]}*" / "**" / "*[0-9].jpg",
        "--out", tmp_path / "out", "--annotations", trained.own_annotations,
        "--batch-size", "3", "--no-pictures", "--device", "cpu",
    )  # fmt: skip

    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert len(results) == len(trained.results)
    table = pyarrow.parquet.read_table(tmp_path / "out" / "detections.parquet").to_pylist()
    assert len(table) == len(results)
    names = {category.id: category.name for category in trained.val_set.categories}
    paths = {record.image_id: record.path for record in trained.val_set.records}
    weights = next((trained.run / "checkpoints").glob("*/model.safetensors"))
    digest = hashlib.sha256(weights.read_bytes()).hexdigest()
    for row, result, alone in zip(table, results, trained.results, strict=True):
        assert row["image_id"] == result["image_id"] == alone["image_id"]
        assert Path(row["image"]).samefile(paths[row["image_id"]])
        assert row["category_id"] == result["category_id"]
        assert row["category"] == names[row["category_id"]]
        assert trained.val_set.categories[row["label"]].id == row["category_id"]
        assert row["score"] == pytest.approx(result["score"], abs=1e-6)
        assert result["score"] == pytest.approx(alone["score"], abs=1e-5)
        x, y, width, height = result["bbox"]
        corners = [row[f"{name}_px"] for name in ("x1", "y1", "x2", "y2")]
        assert corners == pytest.approx([x, y, x + width, y + height], abs=1e-2)
        assert row["weights_sha256"] == digest
    assert not (tmp_path / "out" / "pictures").exists()


def test_photographs_are_predicted(tmp_path, trained):
    photographs = sorted((SHARED / "data" / "coco_mini" / "val").glob("*.jpg"))[:3]
    if not photographs:
        pytest.skip("no shared photographs")

    done = run_job(
        "predict.py", trained.run, *photographs, "--out", tmp_path, "--device", "cpu",
        "--batch-size", "2", "--threshold", "0.25",
    )  # fmt: skip

    assert done.returncode == 0, done.stderr
    listing = json.loads((tmp_path / "images.json").read_text())
    for image, photograph in zip(listing["images"], photographs, strict=True):
        assert image["file_name"] == photograph.name
        assert (image["width"], image["height"]) == Image.open(photograph).size
        assert (tmp_path / "pictures" / photograph.name).is_file()


def test_refused_evaluations_say_what_is_wrong(tmp_path, trained, refusal):
    data = data_of(trained)
    job = evaluate_job
    assert "no such file or folder" in refusal(job, tmp_path / "absent", *data)
    assert "neither a checkpoint" in refusal(job, tmp_path, *data)
    assert "did you mean" in refusal(job, trained.run, *data, "postproces.nms_iou=0.5").lower()
    assert "optim.lr changes nothing" in refusal(job, trained.run, *data, "optim.lr=1")
    assert "leave it out" in refusal(job, trained.run, *data, "--variant", "official_12ep")
    assert "end the name" in refusal(job, trained.run, *data, "--pictures", tmp_path / "a.txt")
    assert "wrong shape" in refusal(
        job, trained.official, *data, "model.backbone.name=resnet18.tv_in1k"
    )  # 4 points are the default, these weights have 2
    truth = json.loads(trained.own_annotations.read_text())
    truth["categories"][2]["name"] = "wedge"
    (tmp_path / "other.json").write_text(json.dumps(truth))
    data[-1] = tmp_path / "other.json"
    assert "id 3 is 'triangle' there and 'wedge' here" in refusal(job, trained.run, *data)


def test_refused_predictions_say_what_is_wrong_and_write_nothing(tmp_path, trained, refusal):
    output = tmp_path / "out"
    pictures = trained.shapes.val_images
    one = sorted(pictures.iterdir())[0]
    (tmp_path / "empty").mkdir()
    (tmp_path / "bad.jpg").write_text("no picture")
    (tmp_path / one.name).write_bytes(one.read_bytes())

    def refused(*arguments: object) -> str:
        return refusal(predict_job, trained.run, *arguments, "--out", output)

    assert "absent.jpg: there is no such" in refused(pictures, tmp_path / "absent.jpg")
    assert "or configuration key" in refused(pictures, "postprocess.nms=0.5")
    assert "changes nothing" in refused(pictures, "optim.lr=1")
    assert "no images are given" in refused("precision=fp32")
    assert "no file matches this pattern" in refused(pictures / "*.gif")
    assert "no file in it ends in" in refused(tmp_path / "empty")
    assert "bad.jpg: is not JPEG" in refused(one, tmp_path / "bad.jpg", "--strict")
    assert "not in 0..1" in refused(one, "--threshold", "30")
    bad = ["--annotations", trained.own_annotations]
    assert "bad.jpg; leave out" in refused(one, tmp_path / "bad.jpg", *bad)
    assert not output.exists()
    output.mkdir()
    (output / "a.jpg").write_bytes(one.read_bytes())
    assert "could be overwritten" in refused(output / "a.jpg")
