"""An exported model finds what the model finds, and is refused where it does not.

One tiny model is exported once for the whole file: tracing is what takes the time.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

from deta.jobs import export as export_job
from deta.model.config import BackboneConfig, ModelConfig
from deta.model.detector import DETA
from deta.platform.checkpoint.local import take_snapshot, write_checkpoint
from deta.platform.data.coco_dataset import Category
from deta.platform.data.image_sizes import EvaluationSize
from deta.platform.inference.export_check import OutputDifference, compare_detections, run_eagerly
from deta.platform.inference.exported_model import (
    PackedImages,
    Runtime,
    open_onnx,
    pack_images,
    unpack_detections,
)
from deta.platform.inference.predictor import Predictor
from deta.platform.run.config import DataConfig, RunConfig
from deta.platform.run.run_state import RunState
from tests.jobs.in_process import run_job

SIZE = EvaluationSize(short_edge=64, max_long_edge=90)
LEAST_SIDE_PX = 33  # with three levels

# What a person has who was given the file alone: torch, and no package of ours. Loads the program
# once, since that is slow, and then answers for each file of inputs on its command line.
ALONE = """
import sys
import torch
from safetensors.torch import load_file, save_file

module = torch.export.load(sys.argv[1]).module()
for line in sys.stdin:
    inputs = load_file(line.strip())
    with torch.no_grad():
        found = module(inputs["images"], inputs["sizes_px"], inputs["original_sizes_px"])
    save_file(dict(zip(["scores", "labels", "boxes_px"], found)), line.strip() + ".found")
    packages = {name.partition(".")[0] for name in sys.modules}
    print(sorted(packages & {"deta", "torchvision", "timm"}), flush=True)
"""


class Alone:
    """Runs a program in a process that has only torch."""

    def __init__(self, program: Path, folder: Path) -> None:
        self.folder = folder
        self.loaded_packages: set[str] = set()  # those that it should do without
        self.num_asked = 0
        # -P and another folder, so that nothing of this repository is imported by accident; an
        # editable installation would show among the packages.
        self.process = subprocess.Popen(
            [sys.executable, "-P", "-c", ALONE, str(program)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=folder,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )

    def __call__(self, packed: PackedImages) -> tuple[Tensor, Tensor, Tensor]:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.num_asked += 1
        path = self.folder / f"{self.num_asked}.safetensors"
        save_file(packed._asdict(), path)
        self.process.stdin.write(f"{path}\n")
        self.process.stdin.flush()
        answer = self.process.stdout.readline()
        assert answer, f"it ended with code {self.process.wait()}"
        self.loaded_packages |= set(json.loads(answer.replace("'", '"')))
        found = load_file(f"{path}.found")
        return found["scores"], found["labels"], found["boxes_px"]

    def end(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


@dataclass
class Exported:
    run: Path  # what was exported
    folder: Path  # what came out
    pictures: Path
    captured: str
    predictor: Predictor
    runtimes: dict[str, Runtime]
    alone: Alone  # the runtime of the program


def tiny_config() -> RunConfig:
    return RunConfig(
        model=ModelConfig(
            backbone=BackboneConfig(
                name="resnet10t", pretrained=False, norm="group", frozen_parts=(), width=0.25
            ),
            num_classes=3,
            dim=16,
            num_heads=2,
            num_levels=3,
            num_points=1,
            encoder_layers=1,
            decoder_layers=1,
            ffn_dim=16,
            num_queries=15,
        ),
        data=DataConfig(loader_workers=0, evaluation_size=SIZE),
    )


def pictures(*sizes_px: tuple[int, int]) -> list[Image.Image]:
    """Noise of the given (height, width), coarse enough to survive resizing."""
    rng = np.random.default_rng(len(sizes_px))
    return [
        Image.fromarray(rng.integers(0, 256, (7, 9, 3), dtype=np.uint8)).resize(
            (width, height), Image.Resampling.BICUBIC
        )
        for height, width in sizes_px
    ]


def packed(images: list[Image.Image]) -> PackedImages:
    return pack_images(images, SIZE, LEAST_SIDE_PX)


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Exported]:
    pytest.importorskip("onnxscript")
    pytest.importorskip("onnxruntime")
    root = tmp_path_factory.mktemp("export")
    config = tiny_config()
    torch.manual_seed(0)
    model = DETA(config.model)
    with torch.no_grad():  # heads that separate queries and classes
        for head in model.class_heads:
            head.weight.normal_(std=0.5)
        for head in model.box_heads:
            head.mlp[-1].weight.normal_(std=0.5)
    categories = tuple(Category(i + 3, name) for i, name in enumerate(["disc", "star", "ring"]))
    state = RunState(step=12, samples_seen=96, epoch=3.0)
    snapshot = take_snapshot(state, config, categories, model.state_dict(), {})
    write_checkpoint(root / "run" / "checkpoints", snapshot)
    (root / "pictures").mkdir()
    for number, picture in enumerate(pictures((100, 130), (90, 90), (77, 64))):
        picture.save(root / "pictures" / f"{number}.png")
    captured: list[str] = []
    opened: list[Alone] = []

    def open_alone(path: Path, device: object = "cpu") -> Runtime:
        opened.append(Alone(path, root))
        return opened[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(export_job, "echo", captured.append)
        patch.setattr("deta.platform.inference.exported_model.open_program", open_alone)
        patch.setattr("deta.platform.inference.export_check.MEASURED_S", 0.1)
        code = run_job(
            export_job, root / "run", "--out", root / "out", "--device", "cpu",
            "--check-images", root / "pictures" / "*.png", "--check-batch", "2",
        )  # fmt: skip
    assert code == 0, captured
    (alone,) = opened
    yield Exported(
        root / "run",
        root / "out",
        root / "pictures",
        "\n".join(captured),
        Predictor.from_checkpoint(root / "run"),
        {"pt2": alone, "onnx": open_onnx(root / "out" / "model.onnx")},
        alone,
    )
    alone.end()


@pytest.mark.parametrize("runtime", ["pt2", "onnx"])
@pytest.mark.parametrize(
    "sizes_px",
    [
        [(100, 130)],
        [(130, 100), (60, 60)],
        [(200, 200), (77, 160), (31, 32), (64, 64), (90, 50)],
        [(20, 400)],  # thinner than the least side, and padded to it
    ],
)
def test_parity_of_exported_files_with_the_model(exported, runtime, sizes_px):
    images = pictures(*sizes_px)
    batch = packed(images)

    found = unpack_detections(*exported.runtimes[runtime](batch))

    expected = run_eagerly(exported.predictor, batch)
    for image, one, other in zip(images, expected, found, strict=True):
        difference = compare_detections(one, other, (image.height, image.width), 100)
        assert difference.num_detections >= 10
        assert difference.num_unmatched == 0
        # float32 rounding through a few layers.
        assert difference.scores < 2e-5
        assert difference.boxes < 2e-5


def test_a_packed_image_is_predicted_as_the_image_itself(exported):
    for image in pictures((100, 130), (64, 61)):
        (expected,) = exported.predictor.predict([image])
        (found,) = run_eagerly(exported.predictor, packed([image]))
        assert torch.equal(found.scores, expected.scores)
        assert torch.equal(found.boxes_px, expected.boxes_px)


def test_padding_does_not_matter(exported):
    batch = packed(pictures((130, 100), (60, 60)))
    noisy = batch.images.clone()
    height, width = batch.sizes_px[1].tolist()
    noisy[1, :, height:] = 255
    noisy[1, :, :, width:] = 17

    for run in exported.runtimes.values():
        for one, other in zip(run(batch), run(batch._replace(images=noisy)), strict=True):
            assert torch.equal(one, other)


def test_a_program_runs_where_only_torch_is(exported):
    """All that the tests here ask of the program, and the check when it was made, went there."""
    exported.runtimes["pt2"](packed(pictures((90, 90))))

    assert exported.alone.num_asked > 5  # the check: three single images, two batches, the speed
    assert exported.alone.loaded_packages == set()


def test_onnx_holds_standard_operators_alone_and_names_its_sizes(exported):
    import onnx

    model = onnx.load(exported.folder / "model.onnx")

    assert {entry.domain: entry.version for entry in model.opset_import}[""] == 18
    assert {node.domain for node in model.graph.node} == {""}
    assert {"GridSample", "Loop", "TopK"} <= {node.op_type for node in model.graph.node}
    assert [one.name for one in model.graph.input] == ["images", "sizes_px", "original_sizes_px"]
    images = model.graph.input[0].type.tensor_type
    assert [dim.dim_param or dim.dim_value for dim in images.shape.dim] == [
        "batch", 3, "height", "width"
    ]  # fmt: skip
    onnx.checker.check_model(model)


def test_the_description_beside_the_files_is_true(exported):
    about = json.loads((exported.folder / "model.json").read_text())

    assert about["verified"] is True
    weights = next((exported.run / "checkpoints").glob("*/model.safetensors"))
    assert about["weights"]["sha256"] == hashlib.sha256(weights.read_bytes()).hexdigest()
    assert sorted(path.name for path in exported.folder.iterdir()) == [
        "model.json", "model.onnx", "model.pt2"
    ]  # fmt: skip
    for name, file in about["files"].items():
        content = (exported.folder / name).read_bytes()
        assert file["sha256"] == hashlib.sha256(content).hexdigest()
        assert file["difference"]["num_images"] == 6  # three, alone and in batches
        assert file["difference"]["scores"] < 1e-4
        assert file["speed"]["latency_ms"] > 0
        assert f"{name}: largest differences: scores" in exported.captured
    assert about["classes"][1] == {"id": 4, "name": "star"}
    assert about["input"]["short_edge"] == 64
    assert about["input"]["least_height_and_width"] == LEAST_SIDE_PX
    assert about["config"]["model.num_queries"] == 15


def test_a_file_with_other_detections_is_deleted(tmp_path, exported, monkeypatch):
    """Use the existing program instead of a new one, and a comparison that finds a difference."""
    captured: list[str] = []
    monkeypatch.setattr(export_job, "echo", captured.append)
    monkeypatch.setattr("deta.platform.inference.export.trace_detector", lambda *_: None)
    monkeypatch.setattr("torch.export.save", lambda _, path: path.write_bytes(b"a program"))
    monkeypatch.setattr(
        "deta.platform.inference.exported_model.open_program", lambda *_: exported.runtimes["pt2"]
    )
    monkeypatch.setattr("deta.platform.inference.export_check.MEASURED_S", 0.1)
    monkeypatch.setattr(
        "deta.platform.inference.export_check.compare_detections",
        lambda *_: OutputDifference(1, 10, scores=0.002),
    )

    code = run_job(
        export_job, exported.run, "--out", tmp_path / "out", "--device", "cpu",
        "--format", "pt2", "--check-images", exported.pictures,
    )  # fmt: skip

    assert code == 1
    assert "model.pt2: DELETED" in "\n".join(captured)
    assert list((tmp_path / "out").iterdir()) == []


@pytest.fixture
def refusal(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Return the error for arguments that must be refused with exit code 2."""

    def refusal(*arguments: object) -> str:
        assert run_job(export_job, *arguments) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ")
        return error

    return refusal


def test_refused_exports_say_what_is_wrong_and_write_nothing(tmp_path, exported, refusal):
    to = ["--out", tmp_path / "out"]
    checked = ["--check-images", exported.pictures]

    assert "add --unverified" in refusal(exported.run, *to)
    assert "add --unverified" in refusal(exported.run, *to, "--unverified", *checked)
    assert "no such" in refusal(exported.run, *to, "--check-images", tmp_path / "absent.jpg")
    assert "matches this pattern" in refusal(
        exported.run, *to, "--check-images", tmp_path / "*.jpg"
    )
    assert "no such" in refusal(tmp_path / "absent", *to, *checked)
    assert "exported in fp32" in refusal(exported.run, "precision=bf16", *to, *checked)
    assert "optim.lr changes nothing" in refusal(exported.run, "optim.lr=1", *to, *checked)
    (tmp_path / "bad.jpg").write_text("no picture")
    assert "is not JPEG" in refusal(exported.run, *to, "--check-images", tmp_path / "bad.jpg")
    assert not (tmp_path / "out").exists()
