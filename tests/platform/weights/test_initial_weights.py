"""Test `initial_weights.py`: classes are matched, and unsuitable files refused before a run."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from deta.model.detector import DETA, PRIOR_PROBABILITY
from deta.model.pretrained import to_published
from deta.platform.checkpoint.local import take_snapshot, write_checkpoint
from deta.platform.data.coco_dataset import Category
from deta.platform.run.config import RunConfig, override
from deta.platform.run.run_state import RunState
from deta.platform.weights.class_mapping import published_classes
from deta.platform.weights.converted_file import write_converted
from deta.platform.weights.initial_weights import (
    check_initial_weights,
    load_initial_weights,
)
from deta.platform.weights.weight_files import write_weights
from tests.platform.weights.small_detector import DATA, SMALL, randomised

ROOT = Path(__file__).resolve().parents[3]
PRIOR = -math.log((1 - PRIOR_PROBABILITY) / PRIOR_PROBABILITY)


@pytest.fixture(scope="module")
def trained() -> DETA:
    return randomised(SMALL)


@pytest.fixture(params=["official", "detrex", "huggingface", "converted", "checkpoint"])
def source(request: pytest.FixtureRequest, trained: DETA, tmp_path: Path) -> Path:
    """The same weights in every form, with COCO's 91 rows; a checkpoint has a class for each."""
    state, config = trained.state_dict(), RunConfig(model=SMALL)
    path = tmp_path / "weights.safetensors"
    if request.param == "checkpoint":
        names = {row: one.name for row, one in published_classes(91).by_row.items()}
        everything = tuple(Category(i, names.get(i, f"none {i}")) for i in range(91))
        run_state = RunState(step=1, samples_seen=1, epoch=1.0)
        return write_checkpoint(tmp_path, take_snapshot(run_state, config, everything, state, {}))
    if request.param == "converted":
        write_converted(path, state, config, published_classes(91), {"file": "x"})
    else:
        write_weights(path, to_published(state, SMALL, request.param))
    return path


def test_class_names_decide_in_every_form_of_weights(source, trained):
    model = randomised(replace(SMALL, num_classes=3), seed=1)
    fresh = {name: tensor.clone() for name, tensor in model.state_dict().items()}

    lines = load_initial_weights(model, source, DATA)

    before, after = trained.state_dict(), model.state_dict()
    for name, tensor in after.items():
        if name.startswith("class_heads.0."):
            assert torch.equal(tensor[[0, 2]], before[name][[18, 1]]), name  # dog and person
            assert torch.equal(tensor[1], fresh[name][1]), name
        elif name.startswith("class_heads.1."):  # of the first stage, which ranks by row 0
            assert torch.equal(tensor[0], before[name][0]), name
        else:
            assert torch.equal(tensor, before[name]), name
    told = "\n".join(lines)
    assert "2 of 3 by name: dog, Person (there person)" in told
    assert "1 new, which start untrained: resistor" in told


def test_new_classes_start_at_the_prior(source):
    torch.manual_seed(1)
    model = DETA(replace(SMALL, num_classes=3))

    load_initial_weights(model, source, DATA)

    assert model.class_heads[0].bias[1].item() == pytest.approx(PRIOR)
    assert model.class_heads[0].bias[0].item() != pytest.approx(PRIOR)


def test_dropped_heads_start_as_new_and_the_rest_is_kept(source, trained):
    torch.manual_seed(1)
    model = DETA(replace(SMALL, num_classes=3))
    fresh = {name: tensor.clone() for name, tensor in model.state_dict().items()}

    lines = load_initial_weights(model, source, DATA, "drop")

    for name, tensor in model.state_dict().items():
        expected = fresh if name.startswith("class_heads.") else trained.state_dict()
        assert torch.equal(tensor, expected[name]), name
    assert "all 3 start untrained" in lines[0]


def test_the_same_classes_are_taken_as_they_are(tmp_path):
    config = replace(SMALL, num_classes=3)
    trained, model = randomised(config), randomised(config, seed=1)
    state = RunState(step=1, samples_seen=1, epoch=1.0)
    snapshot = take_snapshot(state, RunConfig(model=config), DATA, trained.state_dict(), {})
    checkpoint = write_checkpoint(tmp_path, snapshot)

    assert load_initial_weights(model, checkpoint, DATA) == []

    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, trained.state_dict()[name]), name


def test_rows_without_names_are_refused_and_the_ways_out_are_told(tmp_path):
    config = replace(SMALL, num_classes=12)
    path = tmp_path / "a.safetensors"
    write_weights(path, to_published(randomised(config).state_dict(), config, "official"))
    model = DETA(replace(SMALL, num_classes=3))

    with pytest.raises(ValueError, match=r"a\.safetensors: .*init_classes=drop.*in_order"):
        load_initial_weights(model, path, DATA)
    load_initial_weights(model, path, DATA, "drop")


def test_another_image_size_of_the_weights_is_told(tmp_path, trained):
    state = RunState(step=1, samples_seen=1, epoch=1.0)
    theirs = override(
        RunConfig(model=trained.config),
        {"data.evaluation_size.short_edge": 112, "data.evaluation_size.max_long_edge": 200},
    )
    categories = tuple(Category(i, f"c{i}") for i in range(trained.config.num_classes))
    snapshot = take_snapshot(state, theirs, categories, trained.state_dict(), {})
    path = write_checkpoint(tmp_path, snapshot)
    config = RunConfig(model=trained.config, init_checkpoint=str(path), init_classes="drop")

    said = check_initial_weights(config, DATA)[-1]

    assert said.startswith("! ")
    assert "short edge of 112 px (at most 200), those of this run to 800 px (at most 1333)" in said


def test_all_that_can_be_refused_is_refused_before_a_run(tmp_path, trained):
    path = tmp_path / "a.safetensors"
    write_weights(path, to_published(trained.state_dict(), SMALL, "official"))
    config = RunConfig(model=SMALL, init_checkpoint=str(path))

    told = "\n".join(check_initial_weights(config, DATA))
    assert "a.safetensors (official layout)" in told
    assert "1 new, which start untrained: resistor" in told
    deeper = replace(config, model=replace(SMALL, decoder_layers=2))
    with pytest.raises(ValueError, match=r"decoder\.layers\.1.* missing"):
        check_initial_weights(deeper, DATA)
    with pytest.raises(ValueError, match="no such file"):
        check_initial_weights(replace(config, init_checkpoint=str(tmp_path / "b.pth")), DATA)
    assert check_initial_weights(RunConfig(), DATA) == []
    with pytest.raises(ValueError, match="holds a backbone already"):
        replace(config, init_backbone="R-50.pkl")
    with pytest.raises(ValueError, match="'by_name', 'in_order' or 'drop'"):
        override(config, {"init_classes": "by_id"})


def test_timms_weights_without_a_network_are_an_error_that_says_what_to_do(tmp_path):
    code = (
        "from deta.model.backbone import Backbone, BackboneConfig\n"
        "Backbone(BackboneConfig(name='resnet18.tv_in1k'))"
    )
    env = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", code]

    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=env)

    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    for part in (
        "RuntimeError: ",
        "resnet18.tv_in1k",
        "init_backbone=FILE",
        "init_checkpoint=FILE",
    ):
        assert part in last
