"""From a run to a champion in a real MLflow: versions are registered, loaded, refused, rolled back.

The models are tiny and untrained. So detections of known quality are made up for the gate, and
their evaluations are stored for the models' weights, as the gate requires.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from mlflow import MlflowClient

from deta.model.config import BackboneConfig, ModelConfig
from deta.model.detector import DETA
from deta.platform.checkpoint.format import read_checkpoint
from deta.platform.checkpoint.local import take_snapshot, write_checkpoint
from deta.platform.data.coco_dataset import CocoDataset
from deta.platform.data.image_sizes import EvaluationSize
from deta.platform.data.synthetic_shapes import write_shapes
from deta.platform.evaluation.coco_metrics import evaluate_detections
from deta.platform.evaluation.evaluation_folder import Origin, write_evaluation
from deta.platform.inference.predictor import Predictor
from deta.platform.registry.decision_log import ACCEPT, FORCE, REFUSE
from deta.platform.registry.gate_inputs import GateJudge
from deta.platform.registry.lineage import LineageError
from deta.platform.registry.mlflow_registry import MODEL_PART, Registry
from deta.platform.registry.model_address import parse_address
from deta.platform.registry.model_uri import resolve_model
from deta.platform.registry.promote import PromotionResult, promote, rollback
from deta.platform.registry.promotion_gate import Policy
from deta.platform.registry.register import prepare_registration, register
from deta.platform.run.config import DataConfig, RunConfig, to_json
from deta.platform.run.run_file import write_run_file
from deta.platform.run.run_state import RunState
from deta.platform.system.safe_read import file_sha256
from deta.platform.tracking.upload_plan import RECORD_FILE, UploadRecord

ROOT = Path(__file__).resolve().parents[3]
# Noise of the latency on a small machine must not decide a test.
POLICY = Policy(resamples=200, max_latency_ratio=None, parity=False)
BASE, BETTER = 0.5, 0.9  # share of the boxes that a made-up model finds


@dataclass
class World:
    """A data set, and MLflow with one experiment."""

    root: Path
    uri: str
    registry: Registry
    val_set: CocoDataset
    annotations: Path
    experiment: str

    def run(self, seed: int, quality: float | Mapping[str, float]) -> Path:
        """Make the folder of a run with a checkpoint, and an evaluation of the given quality."""
        folder = self.root / f"run-{seed}"
        config = small_config()
        torch.manual_seed(seed)
        state = RunState(
            step=8, samples_seen=8, epoch=1.0, metrics={"AP": 1.0}, data_fingerprint="d" * 64,
            code_commit="c" * 40,
        )  # fmt: skip
        model = DETA(config.model)
        snapshot = take_snapshot(state, config, self.val_set.categories, model.state_dict(), {})
        checkpoint = write_checkpoint(folder / "checkpoints", snapshot)
        client = MlflowClient(tracking_uri=self.uri)
        run_id = client.create_run(self.experiment, run_name=folder.name).info.run_id
        write_run_file(
            folder,
            {
                "config": json.loads(to_json(config)),
                "val_fingerprint": self.val_set.fingerprint,
                "environment": {"python": "3.11", "packages": [f"torch=={torch.__version__}"]},
            },
        )
        record = json.dumps(asdict(UploadRecord(uri=self.uri, run_id=run_id)))
        (folder / RECORD_FILE).write_text(record, encoding="utf-8")
        sha256 = file_sha256(checkpoint / "model.safetensors")
        self.evaluate(folder / "evaluations" / "best", sha256, quality, seed)
        return folder

    def evaluate(
        self, folder: Path, sha256: str, quality: float | Mapping[str, float], seed: int
    ) -> None:
        truth = self.truth()
        results = made_up_results(truth, quality, seed)
        metrics = evaluate_detections(truth, results)
        write_evaluation(folder, truth, results, metrics, Origin(weights_sha256=sha256))

    def truth(self) -> dict[str, Any]:
        return dict(json.loads(self.annotations.read_text(encoding="utf-8")))

    def register(self, name: str, seed: int, quality: float | Mapping[str, float]) -> int:
        prepared = prepare_registration(self.run(seed, quality), None, None)
        return register(self.registry, name, prepared, echo=lambda line: None).number

    def promote(
        self, name: str, number: int, policy: Policy = POLICY, **how: Any
    ) -> PromotionResult:
        gate = GateJudge(self.registry, policy, echo=lambda line: None)
        return promote(self.registry, name, number, gate, by="ann@desk", **how)


def small_config() -> RunConfig:
    return RunConfig(
        name="tiny",
        model=ModelConfig(
            backbone=BackboneConfig(name="resnet18.tv_in1k", pretrained=False), num_classes=5,
            dim=32, num_heads=4, num_levels=4, num_points=2, encoder_layers=1, decoder_layers=1,
            ffn_dim=32, num_queries=20,
        ),
        data=DataConfig(
            loader_workers=0, evaluation_size=EvaluationSize(short_edge=64, max_long_edge=96)
        ),
        micro_batch_size=1,
    )  # fmt: skip


def made_up_results(
    truth: Mapping[str, Any], quality: float | Mapping[str, float], seed: int
) -> list[dict[str, Any]]:
    """Return a share of the true boxes of each class, slightly shifted."""
    random = np.random.default_rng(seed)
    names = {one["id"]: one["name"] for one in truth["categories"]}
    results = []
    for one in truth["annotations"]:
        share = quality if isinstance(quality, float) else quality[names[one["category_id"]]]
        if random.random() < share:
            x, y, width, height = one["bbox"]
            box = [x + 0.02 * width, y, width, height]
            results.append(
                {"image_id": one["image_id"], "category_id": one["category_id"],
                 "bbox": [float(np.float32(v)) for v in box],
                 "score": float(np.float32(random.uniform(0.5, 1.0)))}
            )  # fmt: skip
    return results


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    root = tmp_path_factory.mktemp("registry")
    shapes = write_shapes(root / "shapes", num_train=1, num_val=60, size_px=64)
    uri = f"sqlite:///{root / 'mlflow.db'}"
    client = MlflowClient(tracking_uri=uri)
    experiment = client.create_experiment("tests", artifact_location=(root / "files").as_uri())
    val_set = CocoDataset.open(shapes.val_images, shapes.val_annotations)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(root / "cache"))
        yield World(root, uri, Registry(uri), val_set, shapes.val_annotations, experiment)


def test_a_version_is_the_checkpoint_that_was_evaluated(world: World):
    run = world.run(100, BASE)
    checkpoint = run / "checkpoints" / "step-00000008"
    before = Predictor.from_checkpoint(checkpoint)
    evaluated = before.evaluate(world.val_set)
    number = register(
        world.registry, "same", prepare_registration(run, None, None), echo=lambda _: None
    ).number

    model = resolve_model(f"models:/same/{number}", world.uri)
    after = Predictor.from_checkpoint(model.path)
    again = after.evaluate(world.val_set)

    assert evaluated is not None
    assert again is not None
    assert model.sha256 == file_sha256(checkpoint / "model.safetensors") == after.weights_sha256
    assert model.version == number
    assert again.metrics == evaluated.metrics
    assert again.results == evaluated.results
    names = {path.name for path in model.path.iterdir()}
    assert {"classes.json", "preprocessing.json", "lineage.json", "figures.json"} <= names
    assert not {"training.safetensors"} & names
    lineage = json.loads((model.path / "lineage.json").read_text())
    assert lineage["code_commit"] == "c" * 40
    assert not lineage["code_is_dirty"]
    # And from the cache.
    assert resolve_model(f"models:/same/{number}", world.uri) == model
    page = MlflowClient(tracking_uri=world.uri).get_model_version("same", str(number))
    assert "| run | tiny, step 8" in page.description
    assert page.tags["deta.commit"] == "c" * 40


def test_mlflow_itself_loads_a_version_without_a_pickle(world: World):
    """In a process of its own, as somebody else would, with unpickling forbidden."""
    number = world.register("loads", 110, BASE)
    world.promote("loads", number)
    image_path = world.val_set.records[0].path
    code = f"""
import mlflow, pandas
mlflow.set_tracking_uri({world.uri!r})
model = mlflow.pyfunc.load_model("models:/loads@champion")
content = open({str(image_path)!r}, "rb").read()
found = model.predict(pandas.DataFrame({{"image": [content, content]}}))
assert list(found.columns) == ["boxes", "scores", "labels", "names"], found
assert len(found) == 2 and len(found["boxes"][0]) == len(found["names"][0]) > 0
assert max(abs(a - b) for a, b in zip(*found["scores"])) < 1e-6
few = model.predict(pandas.DataFrame({{"image": [content]}}), params={{"score_threshold": 0.999}})
assert len(few["boxes"][0]) == 0
assert model.metadata.signature.inputs.input_names() == ["image"]
assert model.input_example is not None
print(found["scores"][0][:3])
"""
    env = os.environ | {"MLFLOW_ALLOW_PICKLE_DESERIALIZATION": "false", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", code], env=env, cwd=world.root, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    ours = Predictor.from_checkpoint(resolve_model("models:/loads@champion", world.uri).path)
    ((_, found),) = ours.predict_files([image_path])
    assert json.loads(done.stdout) == pytest.approx(found.scores[:3].tolist(), abs=1e-6)
    whole = world.root / "whole"
    whole.mkdir()
    folder = world.registry.download(world.registry.version("loads", number), whole, "")
    suffixes = {path.suffix for path in folder.rglob("*") if path.is_file()}
    assert not suffixes & {".pkl", ".pickle", ".pt", ".pth", ".bin", ".joblib"}


def test_missing_lineage_is_named(world: World):
    run = world.run(120, BASE)
    (run / "run.json").unlink()
    with pytest.raises(LineageError, match="data fingerprint, environment is unknown"):
        prepare_registration(run, None, None)
    (run / RECORD_FILE).unlink()
    with pytest.raises(
        LineageError, match=r"(?s)environment, run is unknown.*sends the run"
    ) as error:
        prepare_registration(run, None, None)
    assert "jobs/sync.py" in str(error.value)


def test_an_evaluation_of_other_weights_is_refused(world: World):
    run, other = world.run(130, BASE), world.run(131, BASE)

    with pytest.raises(ValueError, match="of other weights"):
        prepare_registration(run, other / "evaluations" / "best", None)
    checkpoint = next((run / "checkpoints").iterdir())
    (run / "evaluations" / "best" / "evaluation.json").unlink()
    with pytest.raises(ValueError, match=f"has no evaluation of the checkpoint {checkpoint.name}"):
        prepare_registration(run, None, None)


def test_a_run_that_is_not_in_mlflow_is_refused(world: World):
    run = world.run(140, BASE)
    record = UploadRecord(uri=world.uri, run_id="0" * 32)
    (run / RECORD_FILE).write_text(json.dumps(asdict(record)), encoding="utf-8")

    with pytest.raises(ValueError, match="is not in MLflow"):
        register(
            world.registry, "unknown", prepare_registration(run, None, None), echo=lambda _: None
        )


def test_the_gate_accepts_the_better_version_and_refuses_others(world: World):
    names = [category.name for category in world.val_set.categories]
    first = world.register("gate", 1, BASE)
    worse = world.register("gate", 2, 0.3)
    lost_class = world.register("gate", 3, dict.fromkeys(names, 0.9) | {names[0]: 0.1})
    better = world.register("gate", 4, BETTER)

    assert world.promote("gate", first).action == ACCEPT
    refused = world.promote("gate", worse)
    assert refused.decision is not None
    assert refused.action == REFUSE
    assert "AP gain" in refused.decision.failed

    loses = world.promote("gate", lost_class)
    assert loses.decision is not None
    assert loses.decision.failed == ("class drops",)
    assert loses.decision.difference is not None
    assert loses.decision.difference.low > 0  # better overall

    dry = world.promote("gate", better, dry_run=True)
    assert dry.action == ACCEPT
    assert dry.entry is None
    assert world.registry.aliases("gate") == {"champion": first}
    accepted = world.promote("gate", better)
    assert accepted.champion == better
    assert accepted.decision is not None

    with pytest.raises(ValueError, match="the champion already"):
        world.promote("gate", better)
    with pytest.raises(ValueError, match="needs a reason"):
        world.promote("gate", worse, force=True)
    assert world.promote("gate", worse, force=True, reason="to see it live").action == FORCE
    assert resolve_model("models:/gate@champion", world.uri).version == worse
    with pytest.raises(ValueError, match="needs a reason"):
        rollback(world.registry, "gate", None, by="ann@desk", reason=" ")
    assert rollback(world.registry, "gate", None, by="ann@desk", reason="bad").champion_after == 4

    log = world.registry.decisions.read("gate")
    assert [entry.action for _, entry in log.entries] == [
        "accept", "refuse", "refuse", "accept", "force", "rollback",
    ]  # fmt: skip
    assert log.problems == ()
    assert world.registry.aliases("gate") == {"champion": better}
    assert log.entries[3][1].figures["low"] > 0
    client = MlflowClient(tracking_uri=world.uri)
    page = client.get_model_version("gate-history", str(log.entries[3][0])).description
    assert f"**Version {better} accepted as champion**" in page
    assert "AP gain" in page
    # Behind everybody's back:
    client.set_registered_model_alias("gate", "champion", str(first))
    assert resolve_model("models:/gate@champion", world.uri).version == better
    world.registry.decisions.sync_alias("gate")
    assert world.registry.aliases("gate") == {"champion": better}
    client.delete_model_version("gate-history", str(log.entries[2][0]))
    with pytest.raises(ValueError, match="tampered"):
        world.promote("gate", first)


def test_a_version_with_exchanged_weights_is_refused(world: World):
    first, second = world.register("hash", 11, BASE), world.register("hash", 12, BETTER)
    world.promote("hash", first)
    client = MlflowClient(tracking_uri=world.uri)
    place = client.get_model_version_download_uri("hash", str(second)).removeprefix("file://")
    stored = Path(place) / MODEL_PART
    weights = stored / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)

    refused = world.promote("hash", second)
    assert refused.action == REFUSE
    assert refused.decision is not None
    assert refused.decision.failed == ("weights",)
    with pytest.raises(ValueError, match="has changed since it was written"):
        resolve_model(f"models:/hash/{second}", world.uri)
    with pytest.raises(ValueError, match="cannot be forced"):
        world.promote("hash", second, force=True, reason="because")

    # A whole other checkpoint in its place, with a manifest that fits it.
    other = world.run(13, BETTER) / "checkpoints" / "step-00000008"
    for path in stored.iterdir():
        path.unlink()
    for path in other.iterdir():
        (stored / path.name).write_bytes(path.read_bytes())
    read_checkpoint(stored)
    assert world.promote("hash", second).decision.failed == ("weights",)  # type: ignore[union-attr]
    with pytest.raises(ValueError, match="not those that were registered"):
        resolve_model(f"models:/hash/{second}", world.uri)


def test_evaluations_of_other_images_are_not_compared(world: World):
    first, second = world.register("sets", 21, BASE), world.register("sets", 22, BETTER)
    world.promote("sets", first)
    version = world.registry.version("sets", second)
    other = world.root / "other-set"
    truth = world.truth()
    truth["annotations"] = truth["annotations"][1:]
    results = made_up_results(truth, BETTER, 22)
    origin = Origin(weights_sha256=version.sha256)
    write_evaluation(other, truth, results, evaluate_detections(truth, results), origin)
    gate = GateJudge(world.registry, POLICY, {version.sha256: other}, echo=lambda _: None)

    outcome = promote(world.registry, "sets", second, gate, by="ann@desk")

    assert outcome.action == REFUSE
    assert outcome.decision is not None
    assert "evaluation set" in outcome.decision.failed


def test_a_missing_version_is_refused_with_the_existing_ones(world: World):
    number = world.register("there", 31, BASE)
    with pytest.raises(ValueError, match="no version has this alias; there are 1"):
        world.registry.find(parse_address("models:/there@champion"))
    with pytest.raises(ValueError, match="does not exist; there are 1"):
        world.registry.find(parse_address("models:/there/7"))
    with pytest.raises(ValueError, match="no registered model 'nowhere'"):
        world.registry.find(parse_address("models:/nowhere@champion"))
    with pytest.raises(ValueError, match="has had no other champion"):
        rollback(world.registry, "there", None, by="ann@desk", reason="bad")
    assert world.promote("there", number, replace(POLICY, min_ap=0.99)).action == REFUSE
    with pytest.raises(ValueError, match="no version has this alias"):
        resolve_model("models:/there@champion", world.uri)


def test_the_command_lines(world: World):
    run = world.run(41, BASE)
    env = os.environ | {"MLFLOW_TRACKING_URI": world.uri, "PYTHONPATH": str(ROOT)}

    def call(script: str, *arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, str(ROOT / "jobs" / script), *arguments]
        return subprocess.run(command, env=env, capture_output=True, text=True)

    done = call("register.py", str(run), "--name", "commands")
    assert done.returncode == 0, done.stderr
    assert "registered: models:/commands/1" in done.stdout
    assert "promotion will refuse it: no exported file was checked" in done.stdout
    done = call("promote.py", "1", "--name", "commands", "--dry-run")
    assert done.returncode == 3, done.stderr  # no exported form
    assert "nothing was changed" in done.stdout
    done = call("promote.py", "models:/commands/1", "--dry-run", "min_first_ap=0.99")
    assert done.returncode == 3, done.stderr
    assert "of a first champion, which has no other to beat (min_first_ap=0.99)" in done.stdout
    done = call("promote.py", "models:/commands/1", "parity=false", "--reason", "a first one")
    assert done.returncode == 0, done.stderr
    done = call("promote.py", "history", "--name", "commands")
    assert "Version 1 accepted as champion" in done.stdout
    assert "1 decisions; the champion is 1" in done.stdout
    done = call(
        "evaluate.py", "models:/commands@champion", "--images", str(world.val_set.folder),
        "--annotations", str(world.annotations), "data.loader_workers=0",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "registered: commands version 1" in done.stdout
    assert "AR100" in done.stdout
