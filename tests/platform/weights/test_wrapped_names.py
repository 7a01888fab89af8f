"""Test `wrapped_names.py`: weights are found as other training code saves them."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

from deta.platform.weights.weight_files import read_weights
from deta.platform.weights.wrapped_names import select_weights

RAW = {"stem.weight": torch.ones(2), "head.bias": torch.ones(3), "head.steps": torch.tensor(5)}
MEAN = {name: tensor * 2 for name, tensor in RAW.items()}


def under(prefix: str, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {prefix + name: tensor for name, tensor in state.items()}


def assert_selected(content: object, expected: dict[str, torch.Tensor]) -> list[str]:
    found, notes = select_weights(content)
    assert isinstance(found, dict)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name
    return notes


COUNTER = {"n_averaged": torch.tensor(9)}
AVERAGES = {
    "torchvision": {"model": RAW, "model_ema": {**under("module.", MEAN), **COUNTER}},
    "timm": {"state_dict": RAW, "state_dict_ema": under("module.", MEAN), "epoch": 3},
    "rt-detr": {"model": RAW, "ema": {"module": MEAN, "updates": 100, "warmups": 10}},
    "dino": {"model": under("module.", RAW), "ema_model": MEAN, "optimizer": {"state": {}}},
    "detectron2": {"model": RAW, "ema_state": MEAN, "iteration": 7},
    "swa": {"state_dict": under("model.", RAW), "swa_model": under("model.", MEAN)},
    "shadow": {"model": RAW, "ema": {"shadow": MEAN, "decay": 0.99}},
    "deep": {"weights": {"model": RAW}, "ema_weights": {"state_dict": under("net.", MEAN)}},
    "lightning": {
        "state_dict": {
            **under("model.", RAW),
            **under("ema_model.module.", MEAN),
            "ema_model.n_averaged": torch.tensor(9),
            "criterion.weight": torch.ones(1),
        },
        "pytorch-lightning_version": "2.4.0",
    },
    "ema-pytorch": {
        **under("online_model.", RAW), **under("ema_model.", MEAN),
        "initted": torch.tensor(True), "step": torch.tensor(4),
    },
}  # fmt: skip


@pytest.mark.parametrize("name", AVERAGES)
def test_averaged_weights_come_before_raw_ones_and_a_note_says_so(name: str) -> None:
    notes = assert_selected(AVERAGES[name], MEAN)

    assert any("took the averaged" in note for note in notes)


def test_tensors_that_an_average_lacks_are_those_of_the_model() -> None:
    mean = {name: tensor for name, tensor in MEAN.items() if "steps" not in name}

    notes = assert_selected({"model": RAW, "ema": mean}, mean | {"head.steps": torch.tensor(5)})

    assert "1 tensors that these lack are raw" in notes[-1]


def test_an_average_of_another_model_is_left_alone() -> None:
    notes = assert_selected({"model": RAW, "ema": {"teacher.weight": torch.ones(1)}}, RAW)

    assert "other names" in notes[-1]


@pytest.mark.parametrize(
    "prefix",
    ["module.", "_orig_mod.", "model.", "net.", "model._orig_mod.", "module.model.", "ema.module.",
     "_fsdp_wrapped_module.", "network.module._orig_mod."],
)  # fmt: skip
def test_a_prefix_of_all_names_is_taken_off(prefix: str) -> None:
    notes = assert_selected(under(prefix, RAW), RAW)

    assert bool(notes) == prefix.startswith("ema")


def test_parts_of_a_training_module_beside_the_model_are_left_out_by_name() -> None:
    beside = {"criterion.empty_weight": torch.ones(1), "val_map.count": torch.ones(1)}

    notes = assert_selected(under("model.", RAW) | beside, RAW)

    assert "criterion.empty_weight, val_map.count" in notes[-1]


def test_parts_of_compiled_and_distributed_models_are_taken_out_of_names() -> None:
    content = {
        "backbone._orig_mod.0.weight": torch.ones(1),
        "head.module.bias": torch.ones(2),
        "level": torch.ones(3),
    }
    assert_selected(content, {
        "backbone.0.weight": torch.ones(1), "head.bias": torch.ones(2), "level": torch.ones(3),
    })  # fmt: skip


@pytest.mark.parametrize(
    "content",
    [
        {"model.a": torch.ones(1), "class_embed.b": torch.ones(2)},  # Hugging Face
        {"net.a": torch.ones(1), "conv.weight": torch.ones(2)},
        {"module.a": torch.ones(1), "a": torch.ones(2)},  # two names would become one
        {"a": torch.ones(1), "steps": torch.tensor(3)},
    ],
)
def test_names_that_only_some_share_stay(content: dict[str, torch.Tensor]) -> None:
    assert_selected(content, content)


@pytest.mark.parametrize("compiled", [False, True])
def test_files_of_torch_itself_are_read(tmp_path: Path, compiled: bool) -> None:
    model = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
    mean = AveragedModel(torch.compile(model) if compiled else model, use_buffers=True)
    mean.update_parameters(model)
    for parameter in model.parameters():
        parameter.data.add_(1)
    mean.update_parameters(model)
    path = tmp_path / "checkpoint.pth"
    torch.save({"model": model.state_dict(), "model_ema": mean.state_dict(), "epoch": 3}, path)
    said: list[str] = []

    found = read_weights(path, said.append)

    expected = {
        name.removeprefix("_orig_mod."): tensor for name, tensor in mean.module.state_dict().items()
    }
    assert found.keys() == expected.keys() == model.state_dict().keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert not torch.equal(found["0.weight"], model.state_dict()["0.weight"])
    assert "`model_ema`" in said[-1]


def test_a_state_dict_of_its_own_stays_as_it_is() -> None:
    state = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3)).state_dict()

    assert_selected(copy.deepcopy(state), dict(state))
