"""All the numbers of a run, their dotted names, and the flat form that MLflow records.

The same dotted key, such as `optim.lr`, is the override on the command line, the sample of a
sweep and the parameter in MLflow. Every part checks itself when it is made.
"""

from __future__ import annotations

import difflib
import json
import re
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, is_dataclass, replace
from typing import Any, Literal, TypeVar

from deta.model.anchor_detr import AnchorDETRConfig
from deta.model.criterion import CriterionConfig
from deta.model.detector import ModelConfig
from deta.model.postprocess import PostprocessConfig
from deta.platform.data.transforms import AugmentationConfig, EvaluationSize
from deta.platform.learning.optimizer import OptimConfig, ScheduleConfig

Config = TypeVar("Config")

MAX_JSON_CHARACTERS = 1_000_000  # of a configuration: the largest here has 4,000
RUN_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """A COCO-format data set: a folder of images and a file of annotations for each split."""

    train_images: str = ""
    train_annotations: str = ""
    val_images: str = ""
    val_annotations: str = ""
    lenient: bool = False  # skip records that cannot be used, with counts, instead of refusing
    max_pixels: int = 50_000_000  # of one image; a larger one is refused from its header
    train_first: int | None = None  # use the first so many images only; also to overfit a few
    val_first: int | None = None
    loader_workers: int = 2  # processes for each training worker; changes the speed alone
    # Pictures that turn out broken while training are replaced by others, counted and listed. The
    # run stops where they are more than this share of the training images (one is always borne).
    max_broken_share: float = 0.01
    augmentation: AugmentationConfig = field(default_factory=AugmentationConfig)
    evaluation_size: EvaluationSize = field(default_factory=EvaluationSize)

    def __post_init__(self) -> None:
        for key in ("train_first", "val_first"):
            if getattr(self, key) is not None and getattr(self, key) < 1:
                raise ValueError(f"data.{key}={getattr(self, key)} must be at least 1, or none")
        if self.loader_workers < 0:
            raise ValueError(f"data.loader_workers={self.loader_workers} must be at least 0")
        if not 0 <= self.max_broken_share <= 1:
            raise ValueError(f"data.max_broken_share={self.max_broken_share} is not in 0 .. 1")


@dataclass(frozen=True, kw_only=True)
class ClusterConfig:
    """What the run asks of the Ray cluster."""

    num_workers: int = 8
    gpu: bool = True  # one GPU a worker and NCCL; otherwise CPUs and gloo
    cpus_per_worker: float = 4  # these must exist; loader workers share them
    # Go on with as few as these while the cluster has no more; none: wait for num_workers. The
    # total batch, the order of images and the rate stay the same, fewer workers accumulate.
    min_workers: int | None = None
    # A worker whose training stands still for so long is taken for hung: stacks are written and
    # the group starts again. Longer where steps are: at least ten times the usual step.
    hang_timeout_s: float = 20.0
    # What is lost is started again, from the last checkpoint, for as long as the run gets further;
    # after so many starts in a row that got no further it stops.
    max_fruitless_starts: int = 3

    def __post_init__(self) -> None:
        if self.num_workers < 1:
            raise ValueError(f"cluster.num_workers={self.num_workers} must be at least 1")
        if self.cpus_per_worker <= 0:
            raise ValueError(f"cluster.cpus_per_worker={self.cpus_per_worker} must be positive")
        if self.min_workers is not None and not 1 <= self.min_workers <= self.num_workers:
            raise ValueError(
                f"cluster.min_workers={self.min_workers} is not in 1 .. cluster.num_workers="
                f"{self.num_workers}"
            )
        if self.hang_timeout_s <= 0:
            raise ValueError(f"cluster.hang_timeout_s={self.hang_timeout_s} must be positive")
        if self.max_fruitless_starts < 1:
            raise ValueError(
                f"cluster.max_fruitless_starts={self.max_fruitless_starts} must be at least 1"
            )


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """When the state of a run is kept, besides at every evaluation, and where."""

    every_minutes: float | None = 5.0  # written beside the training, which goes on
    every_steps: int | None = None
    keep: int = 2  # the newest ones; the best is kept besides
    # A second place for them: a folder, or an address that pyarrow knows, such as s3://bucket/runs.
    # With it a run can be resumed where the folder itself is gone.
    store: str | None = None

    def __post_init__(self) -> None:
        if self.every_minutes is not None and self.every_minutes <= 0:
            raise ValueError(
                f"checkpoint.every_minutes={self.every_minutes} must be positive, or none"
            )
        if self.every_steps is not None and self.every_steps < 1:
            raise ValueError(
                f"checkpoint.every_steps={self.every_steps} must be at least 1, or none"
            )
        if self.keep < 1:
            raise ValueError(f"checkpoint.keep={self.keep} must be at least 1")


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """A training run. Defaults are DETA R50 5-scale, 12 epochs, as published."""

    name: str = "deta-r50"
    storage: str = "~/deta-runs"  # runs are folders in here; shared by all nodes of the cluster
    experiment: str = "deta"  # in MLflow
    seed: int = 42  # official
    model: ModelConfig | AnchorDETRConfig = field(default_factory=ModelConfig)
    criterion: CriterionConfig = field(default_factory=CriterionConfig)
    postprocess: PostprocessConfig = field(default_factory=PostprocessConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    # Images an update, over all workers. What a worker cannot take at once it accumulates.
    total_batch_size: int = 16
    micro_batch_size: int = 2  # images a worker takes at once
    precision: Literal["fp32", "bf16"] = "fp32"
    ema_decay: float | None = None  # of an averaged copy of the weights, evaluated in their place
    # Start from these weights: a run, a checkpoint, a published file or one that jobs/convert.py
    # wrote, or the address of a file, https://…#sha256=…
    init_checkpoint: str | None = None
    # Which classes start from which rows of those weights, if theirs are others: those of the same
    # name ("by_name"), row for row ("in_order"), or none ("drop": all class heads start as new, as
    # official DETA is fine-tuned from Objects365).
    init_classes: Literal["by_name", "in_order", "drop"] = "by_name"
    # Weights of the backbone alone, in place of timm's: a path or address of detectron2's
    # torchvision R-50.pkl, of a .pth of torchvision or of the Swin repository.
    init_backbone: str | None = None
    # Updates whose loss or gradient is not finite are skipped, on all workers alike, and counted;
    # so many in a row end the run.
    max_skipped_steps: int = 10
    compare_weights_every_steps: int = 100  # of all workers with one another; they must be equal
    log_every_steps: int = 50
    evaluate_every_epochs: int = 1  # and always at the end; a checkpoint is kept each time
    num_pictures: int = 12  # validation pictures with true and predicted boxes, each evaluation

    def __post_init__(self) -> None:
        if not RUN_NAME.fullmatch(self.name):
            raise ValueError(
                f"name={self.name!r} is not a run name: letters, digits, '.', '_' and '-', "
                "beginning with a letter or digit, at most 128"
            )
        if self.precision not in ("fp32", "bf16"):
            raise ValueError(f"precision={self.precision!r} is neither fp32 nor bf16")
        if self.init_classes not in ("by_name", "in_order", "drop"):
            raise ValueError(f"init_classes={self.init_classes!r} is not by_name, in_order or drop")
        if self.init_checkpoint is not None and self.init_backbone is not None:
            raise ValueError(
                "init_checkpoint holds a backbone already; leave one of init_backbone and "
                "init_checkpoint out"
            )
        if self.micro_batch_size < 1:
            raise ValueError(f"micro_batch_size={self.micro_batch_size} must be at least 1")
        if self.total_batch_size < self.cluster.num_workers:
            raise ValueError(
                f"total_batch_size={self.total_batch_size} leaves some of the "
                f"{self.cluster.num_workers} workers without an image; lower cluster.num_workers"
            )
        if self.ema_decay is not None and not 0 < self.ema_decay < 1:
            raise ValueError(f"ema_decay={self.ema_decay} is not in (0, 1)")
        if self.max_skipped_steps < 1 or self.compare_weights_every_steps < 1:
            raise ValueError("max_skipped_steps and compare_weights_every_steps must be at least 1")
        if self.log_every_steps < 1 or self.evaluate_every_epochs < 1 or self.num_pictures < 0:
            raise ValueError(
                "log_every_steps and evaluate_every_epochs must be at least 1 and num_pictures at "
                "least 0"
            )


def flatten(config: Any) -> dict[str, Any]:
    """Every value by its dotted key. Sequences stay whole."""
    flat: dict[str, Any] = {}
    for part in fields(config):
        value = getattr(config, part.name)
        if is_dataclass(value):
            flat |= {f"{part.name}.{key}": inner for key, inner in flatten(value).items()}
        else:
            flat[part.name] = value
    return flat


def to_json(config: Any) -> str:
    return json.dumps(asdict(config), indent=2, default=list)


def from_json(kind: type[Config], text: str) -> Config:
    """Read what `to_json` wrote.

    Raises:
        ValueError: a key that this version does not know, or a value that a check refuses.
    """
    if len(text) > MAX_JSON_CHARACTERS:
        raise ValueError(f"a configuration has at most {MAX_JSON_CHARACTERS:,} characters")
    try:
        values = json.loads(text)
    except RecursionError:
        raise ValueError("the configuration is nested too deeply") from None
    if not isinstance(values, dict):
        raise ValueError(f"a configuration is an object of keys, not a {type(values).__name__}")
    return _from_dict(kind, values, "")


def _from_dict(kind: type[Config], values: Mapping[str, Any], prefix: str) -> Config:
    types_by_name = _types(kind)
    arguments: dict[str, Any] = {}
    for name, value in values.items():
        if name not in types_by_name:
            raise _unknown(f"{prefix}{name}", [f"{prefix}{known}" for known in types_by_name])
        part = _part(types_by_name[name], value, f"{prefix}{name}")
        if part is not None:
            arguments[name] = _from_dict(part, value, f"{prefix}{name}.")
        else:
            arguments[name] = tuple(value) if isinstance(value, list) else value
    return kind(**arguments)


def _part(kind: Any, values: Any, key: str) -> type | None:
    """The dataclass that a value is written for, or none if it is not written for one.

    Of several, the one whose `architecture` it names; the first where it names none, as was
    written while there was only one.
    """
    kinds: list[Any] = [one for one in (typing.get_args(kind) or (kind,)) if is_dataclass(one)]
    if len(kinds) <= 1:
        return kinds[0] if kinds else None
    by_name = {one.architecture: one for one in kinds}  # a default, so the class has it
    name = values.get("architecture", kinds[0].architecture)
    if name not in by_name:
        raise ValueError(f"{key}.architecture={name!r} is not one of {', '.join(by_name)}")
    return by_name[name]


def override(config: Config, changes: Mapping[str, Any]) -> Config:
    """The same configuration with some values changed.

    Args:
        changes: dotted key to value. A value that is text is read as its field's type, so what
            comes from a command line needs no quotes: `optim.lr=1e-4`, `model.backbone.norm=group`,
            `data.augmentation.short_edges=[480,512]`, `ema_decay=none`.

    Raises:
        ValueError: an unknown key (with the nearest known ones), a value of another type, or one
            that a check refuses; names the key.
    """
    known = flatten(config)
    for key in changes:
        if key not in known:
            raise _unknown(key, list(known))
    # All at once, so that two values which only fit together can be changed together.
    return _override(config, changes, "")


def _override(config: Config, changes: Mapping[str, Any], prefix: str) -> Config:
    types_by_name = _types(type(config))
    new_values: dict[str, Any] = {}
    for name, value in changes.items():
        head, _, rest = name.partition(".")
        if rest:
            continue
        new_values[head] = _parse(value, types_by_name[head], f"{prefix}{head}")
    for head in {name.partition(".")[0] for name in changes if "." in name}:
        inner = {
            name[len(head) + 1 :]: v for name, v in changes.items() if name.startswith(f"{head}.")
        }
        new_values[head] = _override(getattr(config, head), inner, f"{prefix}{head}.")
    return replace(config, **new_values)  # type: ignore[type-var]


def _types(kind: type) -> dict[str, Any]:
    hints = typing.get_type_hints(kind)
    return {part.name: hints[part.name] for part in fields(kind)}


def _unknown(key: str, known: Sequence[str]) -> ValueError:
    near = difflib.get_close_matches(key, known, n=3, cutoff=0.5)
    same_leaf = [name for name in known if name.rpartition(".")[2] == key.rpartition(".")[2]]
    suggestions = list(dict.fromkeys(same_leaf + near))[:4]
    hint = f"; did you mean {' or '.join(suggestions)}?" if suggestions else ""
    return ValueError(f"there is no configuration key {key!r}{hint}")


def _parse(value: Any, kind: Any, key: str) -> Any:
    """A value of the given type from text or from a value of that type already."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        if value is None or (isinstance(value, str) and value.lower() in ("none", "null")):
            return None
        (inner,) = [argument for argument in arguments if argument is not type(None)]
        return _parse(value, inner, key)
    if origin is Literal:
        if value not in arguments:
            raise ValueError(f"{key}={value!r} is not one of {', '.join(map(str, arguments))}")
        return value
    if origin is not None and issubclass(origin, Sequence):  # tuple[X, ...] or Sequence[X]
        items = value
        if isinstance(value, str):
            parts = [part.strip(" '\"") for part in value.strip("[]() ").split(",")]
            items = [part for part in parts if part]
        return tuple(_parse(item, arguments[0], key) for item in items)
    if kind is bool:
        words = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}
        if isinstance(value, bool):
            return value
        if isinstance(value, str) and value.lower() in words:
            return words[value.lower()]
    elif kind is str:
        if isinstance(value, str):
            return value
    elif kind in (int, float) and not isinstance(value, bool):
        try:
            number = float(value)
            if kind is float:
                return number
            if number.is_integer():
                return int(value) if not isinstance(value, str) else int(number)
        except (TypeError, ValueError, OverflowError):
            pass
    raise ValueError(f"{key}={value!r} is not of type {getattr(kind, '__name__', kind)}")
