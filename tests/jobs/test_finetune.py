"""One command from a checkpoint to a data set of one's own, on a cluster of its own."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from mlflow import MlflowClient
from PIL import Image

from deta.jobs.deta_r50 import VARIANTS, demo
from deta.jobs.finetune import finetune, show
from deta.platform.checkpoint.format import Checkpoint
from deta.platform.checkpoint.local import newest_checkpoint
from deta.platform.data.coco_dataset import CocoDataset
from deta.platform.data.synthetic_shapes import ShapesDataset, write_shapes
from deta.platform.launch import memory_probe as memory_probe
from deta.platform.learning.distributed import Worker
from deta.platform.run.config import override
from deta.platform.run.run import Run
from deta.platform.training.loop import train

ROOT = Path(__file__).resolve().parents[2]
TINY = {
    "model.backbone.width": "0.25",
    "model.dim": "32",
    "model.num_heads": "2",
    "model.ffn_dim": "32",
    "model.decoder_layers": "1",
    "model.num_queries": "20",
    "data.augmentation.short_edges": "48",
    "data.augmentation.max_long_edge": "72",
    "data.evaluation_size.short_edge": "48",
    "data.evaluation_size.max_long_edge": "72",
    "cluster.num_workers": "1",
    "schedule.epochs": "1",
    "schedule.warmup_epochs": "0",
}


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> ShapesDataset:
    return write_shapes(tmp_path_factory.mktemp("shapes"), num_train=8, num_val=4, size_px=64)


@pytest.fixture(scope="module")
def checkpoint(drawn: ShapesDataset, tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """Return a checkpoint of a run on drawn shapes, trained here without a cluster."""
    folder = tmp_path_factory.mktemp("first")
    train_set = CocoDataset.open(drawn.train_images, drawn.train_annotations)
    val_set = CocoDataset.open(drawn.val_images, drawn.val_annotations)
    config = override(demo(), TINY | {"model.num_classes": 5, "num_pictures": 0})
    train(Run(config, folder, train_set, val_set), Worker())
    found = newest_checkpoint(folder / "checkpoints")
    assert found is not None
    return found


@pytest.fixture(scope="module")
def own(drawn: ShapesDataset, tmp_path_factory: pytest.TempPathFactory) -> ShapesDataset:
    """Return the same images as another data set: fewer classes, one of them new."""
    folder = tmp_path_factory.mktemp("own")
    (folder / "annotations").mkdir()
    for split, images in (("train", drawn.train_images), ("val", drawn.val_images)):
        shutil.copytree(images, folder / split)
        path = drawn.folder / "annotations" / f"instances_{split}.json"
        content = json.loads(path.read_text())
        for one in content["annotations"]:
            one["category_id"] = {1: 7, 2: 7, 3: 9, 4: 9, 5: 11}[one["category_id"]]
        content["categories"] = [
            {"id": 7, "name": "disc"}, {"id": 9, "name": "star"}, {"id": 11, "name": "lamp"}
        ]  # fmt: skip
        (folder / "annotations" / f"instances_{split}.json").write_text(json.dumps(content))
    return ShapesDataset(folder)


@dataclass(frozen=True)
class Done:
    returncode: int
    stdout: str
    stderr: str


def run_job(*arguments: str) -> Done:
    """As typed, in a process of its own, with a cluster of its own."""
    environment = {
        k: v for k, v in os.environ.items() if k not in ("MLFLOW_TRACKING_URI", "RAY_ADDRESS")
    }
    done = subprocess.run(
        [sys.executable, str(ROOT / "jobs" / "deta_r50.py"), "finetune", *arguments],
        env=environment,
        capture_output=True,
        text=True,
        timeout=400,
    )
    return Done(done.returncode, done.stdout, done.stderr)


Call = Callable[..., Done]


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str]) -> Call:
    """Run it in this process, for what ends before a cluster is needed."""

    def call(*arguments: str) -> Done:
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            finetune("deta_r50.py", VARIANTS, list(arguments))
        output = capsys.readouterr()
        assert "Ray cluster" not in output.out
        assert isinstance(ended.value.code, int)
        return Done(ended.value.code, output.out, output.err)

    return call


def data_options(data: ShapesDataset) -> list[str]:
    return [
        "--train-images", str(data.train_images),
        "--data.train_annotations", str(data.train_annotations),  # both spellings
        f"--data.val_images={data.val_images}", "--val-annotations", str(data.val_annotations),
    ]  # fmt: skip


def test_one_command_fine_tunes_stops_early_and_is_tracked(
    checkpoint: Checkpoint, own: ShapesDataset, tmp_path: Path, call: Call
):
    # The run's folder, not the checkpoint in it; no --variant: none has this model.
    done = run_job(
        "--init", str(checkpoint.path.parent.parent), *data_options(own),
        "--variant", "demo", "--samples", "80", "--name", "mine", f"storage={tmp_path}",
        "schedule.patience=1", "schedule.min_delta=100", "--optim.freeze", "backbone",
        "num_pictures=1", "cluster.num_workers=1",
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    for part in (
        f"starting from {checkpoint.path}",
        "80 samples: 10 epochs of 8 images",
        "backbone does not train",
        "small, medium, large",  # the data set report
        "2 of 3 by name: disc, star",
        "stopped early after step 4 of 20",  # the second evaluation cannot be 100 better
        "training.png",
    ):
        assert part in done.stdout, f"{part!r} not in:\n{done.stdout}"
    # The report comes before the cluster.
    assert done.stdout.index("small, medium") < done.stdout.index("Ray cluster")
    folder = tmp_path / "mine"
    with Image.open(folder / "pictures" / "training.png") as sheet:
        sheet.verify()
    assert "worst micro-batch" in (folder / "first_look.txt").read_text()

    newest = newest_checkpoint(folder / "checkpoints")
    assert newest is not None
    assert newest.config.model.dim == 32  # the checkpoint's model
    assert newest.config.model.num_classes == 3
    assert newest.config.data.evaluation_size.short_edge == 48
    before, after = checkpoint.model_state(), newest.model_state()
    backbone = [name for name in after if name.startswith("pyramid.backbone")]
    assert all(torch.equal(after[name], before[name]) for name in backbone)
    assert not torch.equal(after["decoder.layers.0.ffn.linear1.weight"],
                           before["decoder.layers.0.ffn.linear1.weight"])  # fmt: skip

    client = MlflowClient(f"sqlite:///{tmp_path / 'mlflow.db'}")
    (run,) = client.search_runs([client.get_experiment_by_name("deta").experiment_id])
    assert run.info.status == "FINISHED"
    assert "stopped early" in run.data.tags["deta.reason"]
    pictures = {file.path for file in client.list_artifacts(run.info.run_id, "pictures")}
    assert "pictures/training.png" in pictures

    again = call(
        "--init", str(checkpoint.path.parent.parent), *data_options(own),
        "--variant", "demo", "--samples", "80", "--name", "mine", f"storage={tmp_path}",
        "schedule.patience=1", "schedule.min_delta=100", "--optim.freeze", "backbone",
        "num_pictures=1", "cluster.num_workers=1", "--resume",
    )  # fmt: skip
    assert again.returncode == 2
    assert "stopped early" in again.stderr


@pytest.mark.parametrize(("needed_gib", "found"), [(1, "largest micro-batch that fits"),
                                                  (10**6, "not even one image fits")])  # fmt: skip
def test_look_writes_a_sheet_and_no_run(
    checkpoint: Checkpoint, own: ShapesDataset, tmp_path: Path, call: Call, monkeypatch,
    needed_gib: int, found: str,
):  # fmt: skip
    def pretend(config, worst, num_images, device, limit_bytes) -> memory_probe.ProbeResult:
        return memory_probe.ProbeResult(num_images, needed_gib << 30, 1.0)

    monkeypatch.setattr(memory_probe, "measure_update", pretend)
    monkeypatch.setattr(memory_probe, "free_bytes", lambda *_: 8 << 30)
    looked = call(
        "--init", str(checkpoint.path), *data_options(own), "--look", "--probe",
        "--name", "mine", f"storage={tmp_path}",
    )  # fmt: skip
    assert looked.returncode == 0, looked.stdout + looked.stderr
    assert found in looked.stdout
    assert not (tmp_path / "mine").exists()
    assert (tmp_path / "first-looks" / "mine" / "pictures" / "training.png").exists()


@pytest.mark.parametrize(("free_gib", "code"), [(10, 2), (100, 0)])
def test_a_probe_stops_before_the_cluster_and_refuses_what_does_not_fit(
    checkpoint: Checkpoint, own: ShapesDataset, tmp_path: Path, call: Call, monkeypatch,
    free_gib: int, code: int,
):  # fmt: skip
    def pretend(config, worst, num_images, device, limit_bytes) -> memory_probe.ProbeResult:
        return memory_probe.ProbeResult(num_images, 5 * num_images << 30, 1.0)

    monkeypatch.setattr(memory_probe, "measure_update", pretend)
    monkeypatch.setattr(memory_probe, "free_bytes", lambda *_: free_gib << 30)
    probed = call(
        "--init", str(checkpoint.path), *data_options(own), "--probe", "--name", "mine",
        f"storage={tmp_path}", "cluster.num_workers=1", "cluster.gpu=false",
        "cluster.cpus_per_worker=1",
    )  # fmt: skip
    assert probed.returncode == code
    assert code == 0 or "micro_batch_size=1 does" in probed.stderr
    assert not (tmp_path / "mine").exists()


def broken(own: ShapesDataset, folder: Path, change: Any) -> Path:
    content = json.loads(own.train_annotations.read_text())
    change(content)
    path = folder / "broken.json"
    path.write_text(json.dumps(content))
    return path


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--init", "{missing}"], "no such file or folder"),
        ([], "give --init CHECKPOINT"),
        (["--init", "{init}", "--train-annotations", "{bad}"], "broken.json.*99"),
        (["--init", "{init}", "optim.freeze=backbon"], "no part 'backbon'"),
        (["--init", "{init}", "optim.learning_rate=1"], "no configuration key"),
        (["--init", "{init}", "--samples", "0"], "at least one sample"),
    ],
    ids=["missing", "no-init", "bad-category", "freeze", "key", "samples"],
)
def test_bad_input_is_refused_by_name_before_the_cluster(
    checkpoint: Checkpoint, own: ShapesDataset, tmp_path: Path, call: Call, arguments, message
):
    bad = broken(own, tmp_path, lambda c: c["annotations"][3].update(category_id=99))
    texts = {"missing": tmp_path / "nothing", "init": checkpoint.path, "bad": bad}
    given = [argument.format(**texts) for argument in arguments]
    refused = call(*data_options(own), *given, f"storage={tmp_path / 'runs'}")
    assert refused.returncode == 2, refused.stdout + refused.stderr
    assert re.search(message, refused.stderr, re.S), refused.stderr
    assert not (tmp_path / "runs").exists()


def test_an_image_that_does_not_decode_is_refused_and_leaves_no_run(
    checkpoint: Checkpoint, own: ShapesDataset, tmp_path: Path, call: Call
):
    shutil.copytree(own.train_images, tmp_path / "images")
    for picture in (tmp_path / "images").iterdir():
        content = bytearray(picture.read_bytes())
        picture.write_bytes(bytes(content[: len(content) // 2]))  # the header stays intact
    refused = call(
        "--init", str(checkpoint.path), *data_options(own), "--train-images",
        str(tmp_path / "images"), "--name", "mine", f"storage={tmp_path / 'runs'}",
    )  # fmt: skip
    assert refused.returncode == 2, refused.stdout + refused.stderr
    assert str(tmp_path / "images") in refused.stderr
    assert not (tmp_path / "runs" / "mine").exists()


def test_published_files_take_the_variants_model(call: Call):
    shown = call("--init", "somewhere.pth", "--variant", "official_24ep", "--show")
    assert shown.returncode == 0, shown.stderr
    assert "model.num_queries=900" in shown.stdout
    assert "name=deta-r50-24ep-finetune" in shown.stdout


def test_show_counts_the_classes_of_the_data(drawn: ShapesDataset, capsys):
    config = override(demo(), {"model.num_classes": 80})
    known = override(config, {"data.train_annotations": str(drawn.train_annotations)})
    for shown, count in ((known, 5), (config, 80)):
        with pytest.raises(SystemExit):
            show(shown)
        assert f"model.num_classes={count}\n" in capsys.readouterr().out
