"""The configuration of a run, its dotted keys, and the flat form that MLflow records.

A dotted key, such as `optim.lr`, is the same on the command line, in the search space of a sweep
and as a parameter in MLflow. Every part validates itself when it is made.
"""

from __future__ import annotations

import difflib
import functools
import json
import re
import typing
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, is_dataclass, replace
from typing import Any, Literal, TypeVar

from deta.model.config import AnchorDETRConfig, CriterionConfig, ModelConfig, PostprocessConfig
from deta.platform.data.image_sizes import AugmentationConfig, EvaluationSize, PixelRules
from deta.platform.learning.schedule import OptimConfig, ScheduleConfig

Config = TypeVar("Config")
Engine = Literal["hotcoco", "pycocotools"]

MAX_JSON_CHARACTERS = 1_000_000  # of a configuration; the largest one here has 4,000
RUN_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")


def _require_at_least(part: Any, prefix: str, **minima: int) -> None:
    for key, minimum in minima.items():
        value = getattr(part, key)
        if not isinstance(value, str | None) and value < minimum:
            raise ValueError(f"{prefix}{key}={value} must be at least {minimum}")


def _require_positive(part: Any, prefix: str, *keys: str) -> None:
    for key in keys:
        if (value := getattr(part, key)) is not None and value <= 0:
            raise ValueError(f"{prefix}{key}={value} must be positive")


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """A COCO-format data set: a folder of images and a file of annotations for each split."""

    train_images: str = ""
    train_annotations: str = ""
    val_images: str = ""
    val_annotations: str = ""
    lenient: bool = False  # skip and count unusable records instead of refusing the data set
    max_pixels: int = 50_000_000  # per image; the header of a larger one is enough to refuse it
    # Boxes are of the stored pixels (ignore) or of the picture as its EXIF orientation shows it.
    exif: Literal["ignore", "apply"] = "ignore"
    # 16-bit grey images: 0 to 65535 become 0 to 255 (full), or the range that the training images
    # use does (stretch). The range is measured, if it is not given, and stored with the model.
    sixteen_bit: Literal["full", "stretch"] = "full"
    sixteen_bit_range: tuple[int, int] | None = None
    train_first: int | None = None  # use only this many images, for example to overfit a few
    val_first: int | None = None
    # Processes that load for each training worker; affects speed only. auto: by the worker's CPUs.
    loader_workers: int | Literal["auto"] = "auto"
    # An image that proves broken during training is replaced by another, counted and listed. The
    # run stops if more than this share of the training images is broken (one is always tolerated).
    max_broken_share: float = 0.01
    augmentation: AugmentationConfig = field(default_factory=AugmentationConfig)
    evaluation_size: EvaluationSize = field(default_factory=EvaluationSize)

    def __post_init__(self) -> None:
        _require_at_least(self, "data.", train_first=1, val_first=1, loader_workers=0)
        if not 0 <= self.max_broken_share <= 1:
            raise ValueError(f"data.max_broken_share={self.max_broken_share} is not in 0 .. 1")
        if self.sixteen_bit_range is not None:
            object.__setattr__(self, "sixteen_bit_range", tuple(self.sixteen_bit_range))
        try:
            self.pixel_rules  # noqa: B018  checks the values
        except ValueError as error:
            raise ValueError(f"data.{error}") from None

    @property
    def pixel_rules(self) -> PixelRules:
        """How pixels are read, in training and wherever else the model is used."""
        return PixelRules(
            exif=self.exif,
            sixteen_bit=self.sixteen_bit,
            sixteen_bit_range=self.sixteen_bit_range,
        )


@dataclass(frozen=True, kw_only=True)
class ClusterConfig:
    """Resources that a run requests from the Ray cluster, and limits for hangs and restarts."""

    num_workers: int = 8
    gpu: bool = True  # one GPU per worker and NCCL; otherwise CPUs and gloo
    # Loader workers share them. Must be available; but workers with a GPU take fewer where a node
    # has fewer for each of its GPUs.
    cpus_per_worker: float = 4
    # Continue with as few as this while the cluster has no more; none: wait for num_workers. The
    # total batch, the image order and the learning rate stay the same: fewer workers accumulate.
    min_workers: int | None = None
    # A worker counts as hung if neither it nor a peer has worked for this long in one step: stacks
    # are written and the group restarts. Time in which it computes, or waits for a processor that
    # others use, does not count. Slow steps get more: at least ten times the median step.
    hang_timeout_s: float = 20.0
    # After a failure, the run restarts from the last checkpoint as long as it makes progress. It
    # stops after this many attempts in a row without progress.
    max_fruitless_starts: int = 3

    def __post_init__(self) -> None:
        _require_at_least(self, "cluster.", num_workers=1, min_workers=1, max_fruitless_starts=1)
        _require_positive(self, "cluster.", "cpus_per_worker", "hang_timeout_s")
        if self.min_workers is not None and self.min_workers > self.num_workers:
            raise ValueError(
                f"cluster.min_workers={self.min_workers} is above cluster.num_workers="
                f"{self.num_workers}"
            )


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """When and where to save checkpoints, besides at every evaluation."""

    every_minutes: float | None = 5.0  # written asynchronously, while training continues
    every_steps: int | None = None
    keep: int = 2  # how many of the newest; the best is kept too
    # A second location: a folder, or an address that pyarrow knows, such as s3://bucket/runs. A run
    # can be resumed from it if its own folder is lost.
    store: str | None = None

    def __post_init__(self) -> None:
        _require_positive(self, "checkpoint.", "every_minutes")
        _require_at_least(self, "checkpoint.", every_steps=1, keep=1)


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """The program that computes AP. Both give the same numbers; the tests compare them."""

    engine: Engine = "hotcoco"


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """The configuration of a training run. Defaults: DETA R50 5-scale, 12 epochs, as published."""

    name: str = "deta-r50"
    storage: str = "~/deta-runs"  # folder of all runs; shared by all nodes of the cluster
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
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    # Images per update, over all workers. A worker accumulates micro-batches to reach its share.
    total_batch_size: int = 16
    micro_batch_size: int = 2  # images per forward pass of a worker
    # "fp32": IEEE float32. "tf32": float32 whose products are TF32 on a GPU. "bf16": autocast.
    precision: Literal["fp32", "tf32", "bf16"] = "fp32"
    # The same bits from each run on GPUs of one kind, for some speed. On CPUs that is so anyway.
    deterministic: bool = False
    ema_decay: float | None = None  # decay of the EMA weights, which are evaluated instead
    # Initial weights: a run, a checkpoint, a published file, a file that jobs/convert.py wrote, or
    # the address of a file, https://…#sha256=…
    init_checkpoint: str | None = None
    # How classes map to those weights if their classes differ: by name ("by_name"), row for row
    # ("in_order"), or not at all ("drop": all class heads start anew, as official DETA is
    # fine-tuned from Objects365).
    init_classes: Literal["by_name", "in_order", "drop"] = "by_name"
    # Weights of the backbone alone, instead of timm's: a path or address of detectron2's
    # torchvision R-50.pkl, or of a .pth of torchvision or the Swin repository.
    init_backbone: str | None = None
    # An update whose loss or gradient is not finite is skipped on all workers, and counted. This
    # many in a row end the run.
    max_skipped_steps: int = 10
    compare_weights_every_steps: int = 100  # weights must be equal on all workers
    log_every_steps: int = 50
    evaluate_every_epochs: int = 1  # and always at the end; each saves a checkpoint
    num_pictures: int = 12  # validation images drawn with true and predicted boxes per evaluation

    def __post_init__(self) -> None:
        if not RUN_NAME.fullmatch(self.name):
            raise ValueError(
                f"name={self.name!r} is not a run name: letters, digits, '.', '_' and '-', "
                "beginning with a letter or digit, at most 128"
            )
        if self.init_checkpoint is not None and self.init_backbone is not None:
            raise ValueError(
                "init_checkpoint holds a backbone already; leave one of init_backbone and "
                "init_checkpoint out"
            )
        _require_at_least(
            self, "", micro_batch_size=1, max_skipped_steps=1, compare_weights_every_steps=1,
            log_every_steps=1, evaluate_every_epochs=1, num_pictures=0,
        )  # fmt: skip
        if self.total_batch_size < self.cluster.num_workers:
            raise ValueError(
                f"total_batch_size={self.total_batch_size} leaves some of the "
                f"{self.cluster.num_workers} workers without an image; lower cluster.num_workers"
            )
        if self.ema_decay is not None and not 0 < self.ema_decay < 1:
            raise ValueError(f"ema_decay={self.ema_decay} is not in (0, 1)")


def flatten(config: Any) -> dict[str, Any]:
    """Return every value by its dotted key. Sequences are not split."""
    flat: dict[str, Any] = {}
    for part in fields(config):
        value = getattr(config, part.name)
        if is_dataclass(value):
            flat |= {f"{part.name}.{key}": inner for key, inner in flatten(value).items()}
        else:
            flat[part.name] = value
    return flat


def to_json(config: Any) -> str:
    """Return a configuration as JSON, for `from_json`."""
    return json.dumps(asdict(config), indent=2, default=list)


def from_json(kind: type[Config], text: str) -> Config:
    """Read a configuration that `to_json` wrote, of this version or an earlier one.

    Raises:
        ValueError: an unknown key, a value of the wrong type, or one that a check refuses. The
            message names the key.
    """
    from pydantic import ValidationError  # here and below, since models train without it

    if len(text) > MAX_JSON_CHARACTERS:
        raise ValueError(f"a configuration has at most {MAX_JSON_CHARACTERS:,} characters")
    try:
        return _adapter(kind).validate_json(text, strict=True, extra="forbid")  # type: ignore[arg-type]
    except ValidationError as error:
        raise _refusal(error, list(flatten(kind()))) from None


def override(config: Config, changes: Mapping[str, Any]) -> Config:
    """Return a copy of a configuration with some values changed.

    Args:
        changes: dotted key to value. Text is parsed as the type of its field, so values from a
            command line need no quotes: `optim.lr=1e-4`, `model.backbone.norm=group`,
            `data.augmentation.short_edges=[480,512]`, `ema_decay=none`.

    Raises:
        ValueError: an unknown key (suggests the nearest known ones), a value of the wrong type,
            or one that a check refuses. The message names the key.
    """
    known = flatten(config)
    for key in changes:
        if key not in known:
            raise _unknown(key, list(known))
    # All at once: two values may only be valid together.
    return _replaced(config, changes, "")


def _replaced(config: Config, changes: Mapping[str, Any], prefix: str) -> Config:
    kinds = typing.get_type_hints(type(config))
    values: dict[str, Any] = {}
    parts: dict[str, dict[str, Any]] = {}
    for name, value in changes.items():
        head, is_inner, rest = name.partition(".")
        if is_inner:
            parts.setdefault(head, {})[rest] = value
        else:
            values[head] = _parsed(value, kinds[head], f"{prefix}{head}")
    for head, inner in parts.items():
        values[head] = _replaced(getattr(config, head), inner, f"{prefix}{head}.")
    return replace(config, **values)  # type: ignore[type-var]


def _parsed(value: Any, kind: Any, key: str) -> Any:
    from pydantic import ValidationError

    # pydantic reads numbers and truth values from text, but neither `none` nor lists.
    read = value
    if isinstance(value, str):
        if value.lower() in ("none", "null") and type(None) in typing.get_args(kind):
            return None
        kinds = (kind, *typing.get_args(kind))  # of a union too
        if any(typing.get_origin(one) in (tuple, Sequence) for one in kinds):
            items = (item.strip(" '\"") for item in value.strip("[]() ").split(","))
            read = tuple(item for item in items if item)
    try:
        return _adapter(kind).validate_python(read)
    except ValidationError as error:
        raise ValueError(f"{key}={value!r}: {error.errors()[0]['msg']}") from None


@functools.cache
def _adapter(kind: Any) -> Any:
    from pydantic import TypeAdapter

    return TypeAdapter(kind)


def _refusal(error: Any, known: Sequence[str]) -> ValueError:
    """Return the first problem that pydantic found, by its dotted key."""
    found = error.errors(include_url=False)
    # Of several architectures, each reports what it misses; those of another name do not count.
    others = {one["loc"][:2] for one in found if one["loc"][2:] == ("architecture",)}
    first = next((one for one in found if one["loc"][:2] not in others), found[0])
    if first["type"] == "value_error":  # of our own check, which names the key
        return ValueError(str(first["ctx"]["error"]))
    # Where there are several architectures, the class is named too.
    key = ".".join(str(part) for part in first["loc"] if not str(part)[:1].isupper())
    if first["type"] == "unexpected_keyword_argument":
        return _unknown(key, known)
    what = f"{key}={first['input']!r}" if key else "the configuration"
    return ValueError(f"{what}: {first['msg']}")


def _unknown(key: str, known: Sequence[str]) -> ValueError:
    near = difflib.get_close_matches(key, known, n=3, cutoff=0.5)
    leaf = key.rpartition(".")[2]
    initials = "".join(word[:1] for word in leaf.split("_"))  # learning_rate: lr
    same_leaf = [name for name in known if name.rpartition(".")[2] in (leaf, initials)]
    suggestions = list(dict.fromkeys(same_leaf + near))[:4]
    hint = f"; did you mean {' or '.join(suggestions)}?" if suggestions else ""
    return ValueError(f"there is no configuration key {key!r}{hint}")
