"""How pixels are read, the sizes of images, and the other options of augmentation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class PixelRules:
    """How the pixels of a file become an 8-bit image; the same for training and prediction."""

    exif: Literal["ignore", "apply"] = "ignore"  # apply: turn images upright
    # full: 0 to 65535 become 0 to 255. stretch: the values of sixteen_bit_range do.
    sixteen_bit: Literal["full", "stretch"] = "full"
    sixteen_bit_range: tuple[int, int] | None = None  # (least, most) of a data set

    def __post_init__(self) -> None:
        if self.sixteen_bit_range is None:
            return
        object.__setattr__(self, "sixteen_bit_range", tuple(self.sixteen_bit_range))
        if self.sixteen_bit != "stretch":
            raise ValueError("sixteen_bit_range has no effect without sixteen_bit=stretch")
        least, most = self.sixteen_bit_range
        if not 0 <= least < most <= 65535:
            raise ValueError(f"sixteen_bit_range={least}, {most} is no rising range in 0 .. 65535")


@dataclass(frozen=True, kw_only=True)
class AugmentationConfig:
    """Augmentation of training images, drawn anew each epoch. The defaults are DETA's."""

    short_edges: Sequence[int] = tuple(range(480, 801, 32))  # equally likely
    max_long_edge: int = 1333
    flip_probability: float = 0.5
    crop: bool = True  # half of the images, at random, are cropped before the final resize
    crop_pre_short_edges: Sequence[int] = (400, 500, 600)  # of the image before the crop
    crop_min: int = 384  # width and height of the crop are drawn independently
    crop_max: int = 600

    def __post_init__(self) -> None:
        # A configuration read from JSON has lists; tuples make it hashable.
        object.__setattr__(self, "short_edges", tuple(self.short_edges))
        object.__setattr__(self, "crop_pre_short_edges", tuple(self.crop_pre_short_edges))
        for name in ("short_edges", "crop_pre_short_edges"):
            edges = getattr(self, name)
            if not edges or min(edges) < 1:
                raise ValueError(f"{name}={edges} needs at least one size, all of 1 px or more")
        if self.max_long_edge < max(self.short_edges):
            raise ValueError(
                f"max_long_edge={self.max_long_edge} is smaller than the largest of "
                f"short_edges={self.short_edges}; the short edge cannot be the longer one"
            )
        if not 0 <= self.flip_probability <= 1:
            raise ValueError(f"flip_probability={self.flip_probability} is not in [0, 1]")
        if not 1 <= self.crop_min <= self.crop_max:
            raise ValueError(
                f"crop_min={self.crop_min} and crop_max={self.crop_max}: "
                "they must be at least 1 px, and crop_min the smaller one"
            )


@dataclass(frozen=True, kw_only=True)
class EvaluationSize:
    """The size at which images are evaluated. The default is DETA's."""

    short_edge: int = 800
    max_long_edge: int = 1333

    def __post_init__(self) -> None:
        if not 1 <= self.short_edge <= self.max_long_edge:
            raise ValueError(
                f"short_edge={self.short_edge} and max_long_edge={self.max_long_edge}: "
                "they must be at least 1 px, and short_edge the smaller one"
            )


def larger_augmentation() -> AugmentationConfig:
    """Return the augmentation of DETA with Swin-L (`--bigger`): 1.5 times the final sizes."""
    edges = [edge * 3 // 2 for edge in AugmentationConfig().short_edges]
    return AugmentationConfig(short_edges=edges, max_long_edge=2000)


def larger_evaluation_size() -> EvaluationSize:
    """Return the evaluation size of DETA with Swin-L (`--bigger`)."""
    return EvaluationSize(short_edge=1200, max_long_edge=2000)


def tiny_augmentation() -> AugmentationConfig:
    """Return DETA's augmentation at about a sixth of its size, for demos and tests on a CPU."""
    return AugmentationConfig(
        short_edges=(96, 112, 128),
        max_long_edge=160,
        crop_pre_short_edges=(80, 96, 112),
        crop_min=72,
        crop_max=112,
    )


def tiny_evaluation_size() -> EvaluationSize:
    """Return the evaluation size that belongs to `tiny_augmentation`."""
    return EvaluationSize(short_edge=128, max_long_edge=160)
