"""Predictions for images are those of an evaluation, wherever the weights are from."""

from __future__ import annotations

import json
import os
import threading
import time
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from deta.model.config import ModelConfig
from deta.model.detector import DETA
from deta.model.postprocess import Detections
from deta.model.pretrained import published_logit_eps, to_published
from deta.platform.checkpoint.local import find_checkpoint, take_snapshot, write_checkpoint
from deta.platform.data.coco_dataset import Category, CocoDataset
from deta.platform.data.image_decoding import ImageError, decode
from deta.platform.data.image_sizes import EvaluationSize
from deta.platform.data.synthetic_shapes import ShapesDataset, write_shapes
from deta.platform.evaluation import coco_engines
from deta.platform.evaluation.coco_metrics import to_coco_results
from deta.platform.inference.predictor import Predictor
from deta.platform.run.config import DataConfig, RunConfig
from deta.platform.run.run_state import RunState
from deta.platform.weights.weight_files import write_weights
from tests.platform.weights.small_detector import SMALL

SHARED = Path(os.environ.get("DETA_SHARED", Path(__file__).resolve().parents[3] / "../shared"))
SHARED = SHARED.resolve()

CATEGORIES = tuple(
    Category(i + 1, name) for i, name in enumerate(["disc", "square", "triangle", "star", "ring"])
)


def small_config(
    num_classes: int = 5, logit_eps: float = 1e-5, width: float = SMALL.backbone.width
) -> RunConfig:
    backbone = replace(SMALL.backbone, width=width)
    return RunConfig(
        model=replace(SMALL, backbone=backbone, num_classes=num_classes, logit_eps=logit_eps),
        data=DataConfig(
            loader_workers=0, evaluation_size=EvaluationSize(short_edge=80, max_long_edge=96)
        ),
        micro_batch_size=1,
    )


def small_model(config: RunConfig) -> DETA:
    """Random weights, but heads that distinguish queries and classes."""
    torch.manual_seed(0)
    model = DETA(config.model)
    with torch.no_grad():
        for head in model.class_heads:
            head.weight.normal_(std=0.5)
        for head in model.box_heads:
            head.mlp[-1].weight.normal_(std=0.5)
    return model


@dataclass
class Trained:
    """A run with one checkpoint, and its data."""

    folder: Path
    checkpoint: Path
    config: RunConfig
    model: DETA
    shapes: ShapesDataset
    val_set: CocoDataset


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    root = tmp_path_factory.mktemp("predict")
    shapes = write_shapes(root / "shapes", num_train=4, num_val=8, size_px=64)
    config = small_config()
    model = small_model(config)
    state = RunState(step=12, samples_seen=96, epoch=3.0, metrics={"AP": 1.5})
    snapshot = take_snapshot(state, config, CATEGORIES, model.state_dict(), {})
    checkpoint = write_checkpoint(root / "run" / "checkpoints", snapshot)
    val_set = CocoDataset.open(shapes.val_images, shapes.val_annotations)
    return Trained(root / "run", checkpoint, config, model, shapes, val_set)


@pytest.fixture(scope="module")
def predictor(trained: Trained) -> Predictor:
    return Predictor.from_checkpoint(trained.checkpoint)


@pytest.fixture(scope="module")
def paths(trained: Trained) -> list[Path]:
    return [record.path for record in trained.val_set.records]


def assert_same(found: Detections, expected: Detections) -> None:
    assert len(expected.scores) > 0
    assert torch.equal(found.labels, expected.labels)
    assert torch.equal(found.scores, expected.scores)
    assert torch.equal(found.boxes_px, expected.boxes_px)


def test_predictions_of_an_image_are_those_of_the_evaluation_within_its_border(
    trained, predictor, paths
):
    evaluation = predictor.evaluate(trained.val_set)
    alike = predictor.predict_files(paths, batch_size=predictor.config.micro_batch_size)

    paths_by_id = {record.image_id: record.path for record in trained.val_set.records}
    results = []
    for record, (path, found) in zip(trained.val_set.records, alike, strict=True):
        assert path == record.path
        results += to_coco_results(found, record.image_id, predictor.category_ids)

    clipped = []
    for result in evaluation.results:
        width, height = Image.open(paths_by_id[result["image_id"]]).size
        x, y, w, h = result["bbox"]
        left, top = max(x, 0), max(y, 0)
        box = [left, top, min(x + w, width) - left, min(y + h, height) - top]
        clipped.append(result | {"bbox": pytest.approx(box, abs=1e-4)})
    assert results == clipped
    assert [one["bbox"] for one in results] != [one["bbox"] for one in evaluation.results]
    assert {result["image_id"] for result in results} == {
        r.image_id for r in trained.val_set.records
    }
    # The model tells images apart: it gives different boxes, and more than one class.
    assert len({json.dumps(result["bbox"]) for result in results}) > 100
    assert len({result["category_id"] for result in results}) > 1


def test_the_engine_of_the_configuration_computes_ap(trained, predictor, monkeypatch):
    used = []
    real = coco_engines.pycocotools_evaluation
    monkeypatch.setattr(
        coco_engines, "pycocotools_evaluation", lambda columns: used.append(1) or real(columns)
    )
    changes = {"evaluation.engine": "pycocotools"}

    by_pycocotools = Predictor.from_checkpoint(trained.checkpoint, changes=changes)
    found = by_pycocotools.evaluate(trained.val_set)

    assert used == [1]
    expected = predictor.evaluate(trained.val_set).metrics
    assert found.metrics.as_dict() == pytest.approx(expected.as_dict(), abs=1e-12)


def test_a_model_finds_the_boxes_that_it_has_drawn_itself(tmp_path, trained, predictor):
    """Were ids, sizes, classes or coordinates confused on the way, AP would fall."""
    evaluation = predictor.evaluate(trained.val_set)
    truth = trained.val_set.ground_truth
    truth["annotations"] = [
        result | {"id": i, "area": result["bbox"][2] * result["bbox"][3], "iscrowd": 0}
        for i, result in enumerate(evaluation.results, start=1)
    ]
    annotations = tmp_path / "own.json"
    annotations.write_text(json.dumps(truth))

    own = CocoDataset.open(trained.shapes.val_images, annotations)

    ap = predictor.evaluate(own).metrics.AP
    assert ap == pytest.approx(1.0)


def test_no_images_give_no_predictions(predictor):
    assert predictor.predict([]) == [*predictor.predict_files([])] == []


@pytest.mark.parametrize("batch_size", [None, 1, 3, 100])
def test_detections_do_not_depend_on_the_batch_size(tmp_path, predictor, paths, batch_size):
    """The images have several sizes, so padding would change their detections."""
    files = []
    for number, path in enumerate(paths):
        files.append(tmp_path / f"{path.stem}.png")
        decode(path).resize([(64, 64), (64, 48), (50, 64)][number % 3]).save(files[-1])
    alone = list(predictor.predict_files(files))

    together = list(predictor.predict_files(files, batch_size=batch_size))
    in_memory = predictor.predict([decode(file) for file in files], batch_size=batch_size)

    assert [path for path, _ in together] == files
    for (_, one), (_, other), third in zip(alone, together, in_memory, strict=True):
        assert_same(third, other)
        # Convolutions of several images add up in another order.
        torch.testing.assert_close(one.scores, other.scores, atol=1e-5, rtol=0)
        torch.testing.assert_close(one.boxes_px, other.boxes_px, atol=1e-3, rtol=0)
    assert not torch.allclose(alone[0][1].boxes_px, alone[1][1].boxes_px, atol=1)


def test_the_exif_orientation_is_ignored(tmp_path, predictor, paths):
    image = decode(next(path for path in paths if Image.open(path).size[0] != 64))
    exif = Image.Exif()
    exif[0x0112] = 6  # "turn me by 90 degrees"
    image.save(tmp_path / "turned.png", exif=exif)
    image.save(tmp_path / "plain.png")
    assert Image.open(tmp_path / "turned.png").getexif()[0x0112] == 6

    turned, plain = predictor.predict_files(
        [tmp_path / "turned.png", tmp_path / "plain.png"], batch_size=1
    )

    assert_same(turned[1], plain[1])
    (opened,) = predictor.predict([Image.open(tmp_path / "turned.png")])
    assert_same(opened, plain[1])


@pytest.mark.parametrize("orientation", [3, 6])
def test_a_model_of_upright_pictures_turns_them_in_every_place(
    orientation, tmp_path, trained, predictor, paths
):
    """Training reads pixels as the evaluation does, by `dataset[i]`."""
    upright = decode(next(path for path in paths if Image.open(path).size[0] != 64))
    back = {3: Image.Transpose.ROTATE_180, 6: Image.Transpose.ROTATE_90}[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    upright.transpose(back).save(tmp_path / "turned.png", exif=exif)
    upright.save(tmp_path / "plain.png")
    categories = [{"id": c.id, "name": c.name} for c in predictor.categories]
    content = {
        "images": [
            {"id": n, "file_name": name, "width": upright.width, "height": upright.height}
            for n, name in enumerate(("plain.png", "turned.png"))
        ],
        "annotations": [],
        "categories": categories,
    }
    (tmp_path / "a.json").write_text(json.dumps(content))
    changes = {"data.exif": "apply"}
    turning = Predictor.from_checkpoint(trained.checkpoint, "cpu", changes)
    rules = turning.config.data.pixel_rules

    plain, turned = turning.predict_files(
        [tmp_path / "plain.png", tmp_path / "turned.png"], batch_size=1
    )
    dataset = CocoDataset.open(tmp_path, tmp_path / "a.json", rules=rules)
    evaluated = turning.evaluate(dataset).results
    (decoded,) = {
        decode(tmp_path / name, rules=rules).tobytes() for name in ("plain.png", "turned.png")
    }

    assert_same(turned[1], plain[1])
    halves = [[r["bbox"] for r in evaluated if r["image_id"] == n] for n in range(2)]
    assert halves[0] == halves[1] != []
    assert decoded == upright.tobytes()


def test_images_of_other_modes_become_rgb_or_are_refused(predictor, paths):
    grey = decode(paths[0]).convert("L")
    with_alpha = grey.convert("RGBA")

    one, other, third = predictor.predict([grey, with_alpha, grey.convert("RGB")], batch_size=1)

    assert_same(one, third)
    assert_same(other, third)
    with pytest.raises(ValueError, match="mode F"):
        predictor.predict([grey.convert("F")])


def test_bad_headers_are_all_reported_before_anything_is_predicted(tmp_path, predictor, paths):
    (tmp_path / "text.jpg").write_text("no image")
    (tmp_path / "empty.png").touch()

    with pytest.raises(ImageError) as caught:  # on the call, before the first result is read
        predictor.predict_files([tmp_path / "text.jpg", *paths, tmp_path / "empty.png"])

    assert str(tmp_path / "text.jpg") in str(caught.value)
    assert str(tmp_path / "empty.png") in str(caught.value)
    assert str(paths[0]) not in str(caught.value)


def test_a_bad_image_among_others_raises_or_is_reported_and_none_is_lost(
    tmp_path, predictor, paths
):
    """The images before and after it are of other shapes, so some wait for it."""
    damaged = tmp_path / "cut.jpg"
    decode(paths[0]).resize((96, 64)).save(damaged)
    damaged.write_bytes(damaged.read_bytes()[:-200])
    no_image = tmp_path / "text.jpg"
    no_image.write_text("no image")
    files = [*paths[:3], damaged, *paths[3:]]

    with pytest.raises(ImageError, match=r"cut\.jpg"):
        list(predictor.predict_files(files))

    unreadable = []
    found = list(
        predictor.predict_files(
            [*files, no_image],
            batch_size=2,
            on_unreadable=lambda path, error: unreadable.append((path, error)),
        )
    )
    assert [path for path, _ in found] == paths
    assert [path for path, _ in unreadable] == [no_image, damaged]  # headers are read first
    assert all(str(path) in str(error) for path, error in unreadable)


def test_a_run_means_its_best_checkpoint(tmp_path, trained):
    checkpoints = tmp_path / "run" / "checkpoints"
    for step, ap in ((10, 5.0), (20, 7.0), (30, 6.0)):
        folder = checkpoints / f"step-{step:08d}"
        folder.mkdir(parents=True)
        (folder / "state.json").write_text(json.dumps({"metrics": {"AP": ap}}))
        (folder / "MANIFEST.json").write_text("{}")
    best, newest = checkpoints / "step-00000020", checkpoints / "step-00000030"

    assert find_checkpoint(tmp_path / "run") == best
    assert find_checkpoint(tmp_path / "run" / "best") == best
    assert find_checkpoint(checkpoints) == best
    assert find_checkpoint(newest) == newest
    for folder in checkpoints.iterdir():  # as after validation on images without boxes
        (folder / "state.json").write_text(json.dumps({"metrics": {}}))
    assert find_checkpoint(tmp_path / "run") == newest


def test_what_is_no_checkpoint_is_refused_with_its_name(tmp_path, trained):
    with pytest.raises(ValueError, match=r"absent: there is no such"):
        Predictor.from_checkpoint(tmp_path / "absent")
    with pytest.raises(ValueError, match="neither a checkpoint"):
        Predictor.from_checkpoint(tmp_path)
    with pytest.raises(ValueError, match="give its folder"):
        Predictor.from_published(trained.checkpoint / "model.safetensors", trained.config)


def test_an_iterator_that_is_closed_early_waits_for_no_thread(predictor, paths):
    before = threading.active_count()
    found = predictor.predict_files([*paths] * 8)
    next(found)
    go, done = threading.Event(), threading.Event()

    def give_up():
        go.wait()
        found.close()
        done.set()

    closer = threading.Thread(target=give_up)
    closer.start()
    # The collector may end it where a thread is just being started, with this lock held.
    with threading._shutdown_locks_lock:
        go.set()
        assert done.wait(30)
    closer.join()
    deadline_s = time.monotonic() + 60
    while threading.active_count() > before and time.monotonic() < deadline_s:
        time.sleep(0.05)
    assert threading.active_count() <= before  # readers of tests before may have ended, too


def test_changes_take_effect_and_wrong_ones_are_refused(trained, predictor, paths):
    image = decode(paths[0])
    fewer = Predictor.from_checkpoint(trained.folder, changes={"postprocess.max_detections": "3"})

    (found,) = fewer.predict([image])
    assert torch.equal(found.scores, predictor.predict([image])[0].scores[:3])
    with pytest.raises(ValueError, match=r"postprocess\.max_detections"):
        Predictor.from_checkpoint(trained.folder, changes={"max_detections": "3"})
    with pytest.raises(ValueError, match="do not fit"):
        Predictor.from_checkpoint(trained.folder, changes={"model.ffn_dim": "64"})


def test_other_categories_are_refused_with_their_difference(predictor):
    predictor.check_categories(CATEGORIES, "here.json")
    renamed = (*CATEGORIES[:4], Category(5, "torus"))
    with pytest.raises(ValueError, match=r"here\.json.*id 5 is 'ring' there and 'torus' here"):
        predictor.check_categories(renamed, "here.json")
    with pytest.raises(ValueError, match="only there: 5 'ring'; only here: 6 'ring'"):
        predictor.check_categories((*CATEGORIES[:4], Category(6, "ring")), "here.json")


@pytest.mark.parametrize("format_", ["official", "detrex", "huggingface"])
def test_published_files_predict_as_our_own_weights_do(tmp_path, paths, format_):
    """Most sizes are found in the tensors; what cannot be seen in them must be named."""
    config = small_config(logit_eps=published_logit_eps(format_), width=1)
    model = small_model(config)
    path = tmp_path / "published.safetensors"
    write_weights(path, to_published(model.state_dict(), config.model, format_))
    backbone = replace(config.model.backbone, pretrained=True)  # which must not be fetched
    unaware = ModelConfig(backbone=backbone, num_heads=4, num_points=2, num_queries=20)
    ours = Predictor(model, config, CATEGORIES)

    published = Predictor.from_published(path, replace(config, model=unaware), CATEGORIES)

    assert format_ in published.description
    for path in paths[:2]:
        (expected,), (found,) = ours.predict([decode(path)]), published.predict([decode(path)])
        assert_same(found, expected)


def test_classes_of_a_published_file_are_found_by_name_and_never_by_id(tmp_path, paths):
    config = small_config(num_classes=91)
    model = small_model(config)
    path = tmp_path / "published.safetensors"
    write_weights(path, to_published(model.state_dict(), config.model, "official"))
    wanted = (Category(1, "Dog"), Category(2, "person"))

    everything = Predictor.from_published(path, config)
    some = Predictor.from_published(path, config, wanted)

    assert everything.names[:2] == ["person", "bicycle"]
    assert len(everything.names) == 80  # rows that stand for nothing are left out
    assert some.categories == wanted

    def scores_of(predictor: Predictor) -> set[tuple[str, float]]:
        (found,) = predictor.predict([decode(paths[0])])
        pairs = zip(found.labels.tolist(), found.scores.tolist(), strict=True)
        return {(predictor.names[label].lower(), round(score, 6)) for label, score in pairs}

    theirs = {entry for entry in scores_of(everything) if entry[0] in ("dog", "person")}
    assert theirs <= scores_of(some)
    # The first five of COCO's rows are no shapes, whatever their ids say.
    with pytest.raises(ValueError, match="among them are no disc, square, triangle"):
        Predictor.from_published(path, config, CATEGORIES)


def test_rows_without_names_are_numbered_or_taken_in_order(tmp_path):
    config = small_config(num_classes=11)
    path = tmp_path / "published.safetensors"
    model = small_model(config)
    write_weights(path, to_published(model.state_dict(), config.model, "official"))

    assert Predictor.from_published(path, config).names == [str(row) for row in range(11)]
    with pytest.raises(ValueError, match=r"11 rows, whose classes the file does not name.*5 are"):
        Predictor.from_published(path, config, CATEGORIES)


def test_photographs_are_predicted_in_their_own_pixels(predictor):
    photographs = sorted((SHARED / "data" / "coco_mini" / "val").glob("*.jpg"))[:4]
    if not photographs:
        pytest.skip("no shared photographs")

    for path, found in predictor.predict_files(photographs):
        width, height = Image.open(path).size
        boxes = found.boxes_px.numpy()
        assert boxes.shape == (len(found.scores), 4)
        assert np.isfinite(boxes).all()
        # Relative boxes are of side 1 at most, so none is larger than the image.
        assert ((boxes[:, 2:] - boxes[:, :2]) <= [width + 1e-3, height + 1e-3]).all()
        assert boxes[:, 2].max() > 100  # not in the pixels of the 80 px image the model saw
