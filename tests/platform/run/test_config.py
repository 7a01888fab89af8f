"""Dotted keys, their types, and the way to JSON and back."""

from __future__ import annotations

import json

import pytest

from deta.model.config import AnchorDETRConfig
from deta.platform.run.config import RunConfig, flatten, from_json, override, to_json


def test_every_key_can_be_overridden_with_its_own_printed_value():
    config = RunConfig()
    for key, value in flatten(config).items():
        assert override(config, {key: str(value)}) == config, key


@pytest.mark.parametrize(
    ("key", "text", "value"),
    [
        ("optim.lr", "1e-4", 1e-4),
        ("schedule.lr_drop_epochs", "8,11", (8.0, 11.0)),
        ("schedule.lr_drop_epochs", "", ()),
        ("data.augmentation.short_edges", "[480, 512]", (480, 512)),
        ("model.backbone.norm", "group", "group"),
        ("model.backbone.frozen_parts", "[]", ()),
        ("ema_decay", "0.99", 0.99),
        ("optim.max_grad_norm", "none", None),
        ("cluster.gpu", "false", False),
        ("total_batch_size", "8", 8),
    ],
)
def test_text_becomes_the_type_of_its_field(key: str, text: str, value: object):
    assert flatten(override(RunConfig(), {key: text}))[key] == value


@pytest.mark.parametrize(
    ("key", "text", "message"),
    [
        ("lr", "1", "did you mean optim.lr"),
        ("optim.learning_rate", "1", "did you mean optim.lr or"),
        ("optim.learning_rate", "1", "there is no configuration key"),
        ("optim", "1", "there is no configuration key"),
        ("total_batch_size", "eight", "total_batch_size='eight': Input should be a valid integer"),
        ("total_batch_size", "8.5", "total_batch_size='8.5': Input should be a valid integer"),
        ("total_batch_size", "4", "without an image"),
        ("precision", "fp16", "precision='fp16': Input should be 'fp32', 'tf32' or 'bf16'"),
        ("optim.lr", "-1", "must be positive"),
        ("schedule.epochs", "5", "lie outside the 5 epochs"),
        ("name", "../x", "is not a run name"),
        ("evaluation.engine", "coco", "should be 'hotcoco' or 'pycocotools'"),
        ("cluster.gpu", "maybe", "should be a valid boolean"),
        ("model.dim", "100", "multiple"),
    ],
)
def test_a_wrong_key_or_value_is_refused_by_name(key: str, text: str, message: str):
    with pytest.raises(ValueError, match=message):
        override(RunConfig(), {key: text})


def test_two_values_that_only_fit_together_can_be_changed_together():
    config = override(RunConfig(), {"schedule.epochs": "5", "schedule.lr_drop_epochs": "4"})
    assert (config.schedule.epochs, config.schedule.lr_drop_epochs) == (5, (4.0,))


def test_json_gives_back_the_same_configuration():
    config = override(RunConfig(), {"optim.lr": "3e-5", "ema_decay": "0.9", "seed": "7"})
    assert from_json(RunConfig, to_json(config)) == config


@pytest.mark.parametrize(
    ("part", "key", "value"),
    [
        ("", "seed", "abc"),
        ("", "seed", 1.5),
        ("", "log_every_steps", "5"),
        ("", "ema_decay", "none"),
        ("", "precision", "fp16"),
        ("data", "lenient", "false"),
        ("cluster", "num_workers", True),
        ("optim", "lr", None),
        ("optim", "betas", [0.9]),
        ("optim", "freeze", "backbone"),
        ("model", "num_queries", "900"),
    ],
)
def test_json_with_a_value_of_the_wrong_type_is_refused_by_name(part: str, key: str, value: object):
    values = json.loads(to_json(RunConfig()))
    (values[part] if part else values)[key] = value
    with pytest.raises(ValueError, match=rf"^{part}\.?{key}.*(should be|required)"):
        from_json(RunConfig, json.dumps(values))


def test_json_of_each_architecture_is_checked_by_its_own_keys():
    text = '{"model": {"architecture": "anchor_detr", "num_patterns": 2}}'
    assert from_json(RunConfig, text).model == AnchorDETRConfig(num_patterns=2)
    with pytest.raises(ValueError, match="did you mean"):
        from_json(RunConfig, text.replace("num_patterns", "num_querys"))
    with pytest.raises(ValueError, match=r"model\.dim='3': Input should be a valid integer"):
        from_json(RunConfig, text.replace('"num_patterns": 2', '"dim": "3"'))


def test_json_from_before_the_choice_of_an_engine_means_hotcoco():
    values = json.loads(to_json(RunConfig()))
    assert values.pop("evaluation") == {"engine": "hotcoco"}
    assert from_json(RunConfig, json.dumps(values)) == RunConfig()


def test_json_with_a_key_of_another_version_is_refused_by_name():
    text = to_json(RunConfig()).replace('"weight_decay"', '"weight_decoy"')
    with pytest.raises(ValueError, match=r"optim\.weight_decoy"):
        from_json(RunConfig, text)
