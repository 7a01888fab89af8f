"""The order of training samples, a pure function of the seed and the position.

Training is one endless stream of samples: all images in the order of epoch 0, then all images in
the order of epoch 1, and so on. The number of samples taken from it, `samples_seen`, is the only
state: samplers have none. So a run resumed at a position sees what the uninterrupted run would have
seen, on any number of ranks and loader workers.

The global batch of step s has the positions s * T .. (s + 1) * T - 1, with T = total_batch_size.
Consequences:

* No image is dropped. T need not divide the number of images n, which may even be smaller than T.
* One batch per epoch may contain the last images of one epoch and the first of the next. An image
  may then occur twice in it, with two augmentations.
* An epoch is n / T steps, not necessarily an integer. Epoch e starts with the first step without
  samples of earlier epochs, step ceil(e * n / T). For COCO and T = 16, 12 epochs end after
  88,716 steps, as in the released code (7,393 per epoch, with a padded last batch).

All random numbers come from splitmix64, which is implemented here because numpy and torch guarantee
the streams of their generators only within a version.
"""

# E samples of one epoch   T samples of one global batch   n images of the data set

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

Choice = TypeVar("Choice")

# Steele, Lea & Flood 2014, "Fast splittable pseudorandom number generators", and Vigna's
# public-domain splitmix64.c: the increment is 2**64 over the golden ratio.
INCREMENT = 0x9E3779B97F4A7C15
MULTIPLIERS = (0xBF58476D1CE4E5B9, 0x94D049BB133111EB)
UINT64 = (1 << 64) - 1

# The streams of different purposes are independent.
PURPOSE_ORDER = 1
PURPOSE_SAMPLE = 2
PURPOSE_REPLACEMENT = 3


def splitmix64(seed: int, position: int) -> int:
    """Return the number at `position` (from 0) of the splitmix64 stream of `seed`, in [0, 2**64).

    For a fixed seed it is one-to-one in the position (both modulo 2**64).
    """
    z = (seed + (position + 1) * INCREMENT) & UINT64
    z = ((z ^ (z >> 30)) * MULTIPLIERS[0]) & UINT64
    z = ((z ^ (z >> 27)) * MULTIPLIERS[1]) & UINT64
    return z ^ (z >> 31)


def splitmix64_table(seed: int, length: int) -> NDArray[np.uint64]:
    """Return the first `length` numbers of the stream of `seed`: `splitmix64` of every position."""
    z = np.arange(1, length + 1, dtype=np.uint64)  # arithmetic on uint64 arrays wraps silently
    z = z * np.uint64(INCREMENT) + np.uint64(seed & UINT64)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(MULTIPLIERS[0])
    z = (z ^ (z >> np.uint64(27))) * np.uint64(MULTIPLIERS[1])
    return z ^ (z >> np.uint64(31))


def _stream_seed(seed: int, purpose: int, epoch: int) -> int:
    # Each value selects a number of the stream that the values before it have selected.
    return splitmix64(splitmix64(splitmix64(0, seed), purpose), epoch)


def sample_seed(seed: int, epoch: int, image_index: int) -> int:
    """Return the seed of all randomness of one sample in one epoch, in [0, 2**63).

    It seeds the augmentation (`Draws`), and the batch carries it for the random subsampling in
    the assigners. It has 63 bits to fit a torch int64; the probability of a collision within an
    epoch of COCO is 1e-9.
    """
    return splitmix64(_stream_seed(seed, PURPOSE_SAMPLE, epoch), image_index) >> 1


def replacement_index(
    seed: int, epoch: int, image_index: int, attempt: int, num_images: int
) -> int:
    """Return the index of the image that replaces a broken one in one epoch; never its own.

    Args:
        attempt: from 0; the next one if the replacement is broken too.
        num_images: size of the data set, at least 2.
    """
    own_seed = splitmix64(_stream_seed(seed, PURPOSE_REPLACEMENT, epoch), image_index)
    offset = 1 + (splitmix64(own_seed, attempt) * (num_images - 1) >> 64)
    return (image_index + offset) % num_images


class Draws:
    """Random numbers for one sample, drawn one after the other from its seed.

    Two objects with the same seed draw the same numbers, on every machine and in every version.
    """

    def __init__(self, seed: int) -> None:
        self._seed = seed
        self._num_drawn = 0

    def _next(self) -> int:
        number = splitmix64(self._seed, self._num_drawn)
        self._num_drawn += 1
        return number

    def fraction(self) -> float:
        """Draw uniformly from [0, 1), in multiples of 2**-53."""
        return (self._next() >> 11) * 2.0**-53

    def integer(self, low: int, high: int) -> int:
        """Draw uniformly from [low, high], inclusive, to within 2**-64 for each value."""
        if low > high:
            raise ValueError(f"no integer lies in [{low}, {high}]; low must not exceed high")
        return low + (self._next() * (high - low + 1) >> 64)

    def choice(self, values: Sequence[Choice]) -> Choice:
        """Draw one of the values with equal probability."""
        return values[self.integer(0, len(values) - 1)]


class SampleKey(NamedTuple):
    """The image and epoch of one sample, which also determine its augmentation."""

    epoch: int
    image_index: int  # into the data set


@lru_cache(maxsize=4)  # a batch may straddle two epochs; 1 MB each for COCO
def epoch_order(seed: int, epoch: int, num_images: int) -> NDArray[np.int64]:
    """Return the order of the images in one epoch: a read-only permutation of 0 .. num_images - 1.

    Images are sorted by their numbers in the stream of (seed, epoch). These are all different
    (`splitmix64` is one-to-one), so there are no ties.
    """
    numbers = splitmix64_table(_stream_seed(seed, PURPOSE_ORDER, epoch), num_images)
    order = np.argsort(numbers, kind="stable")  # E
    order.setflags(write=False)
    return order


def even_parts(length: int, num_parts: int) -> list[range]:
    """Cut 0 .. length - 1 into consecutive ranges whose lengths differ by at most one."""
    ends = [part * length // num_parts for part in range(num_parts + 1)]
    return [range(begin, end) for begin, end in pairwise(ends)]


@dataclass(frozen=True)
class TrainingOrder:
    """The order of all samples of a training run, and the share of each rank."""

    seed: int
    num_images: int  # n
    total_batch_size: int  # T, images per step over all ranks

    def __post_init__(self) -> None:
        if self.num_images < 1:
            raise ValueError("the training data set has no images; check its path and annotations")
        if self.total_batch_size < 1:
            raise ValueError(f"total_batch_size={self.total_batch_size} must be at least 1")

    def sample_at(self, position: int) -> SampleKey:
        """Return the sample at a position of the stream, after `position` other samples."""
        epoch, place = divmod(position, self.num_images)
        return SampleKey(epoch, int(epoch_order(self.seed, epoch, self.num_images)[place]))

    def first_step_of_epoch(self, epoch: int) -> int:
        """Return the first step without samples of earlier epochs."""
        return -(-epoch * self.num_images // self.total_batch_size)  # rounded up

    def micro_batch_positions(
        self, step: int, rank: int, world_size: int, micro_batch_size: int
    ) -> list[range]:
        """Return the stream positions of one rank's micro-batches in a step; none is empty.

        The global batch is cut into the fewest micro-batches of at most `micro_batch_size`
        samples (but at least one per rank), and each rank takes consecutive ones. Both cuts are as
        even as possible. So for any number of ranks

        * the micro-batches of all ranks, in rank order, are the global batch in its order;
        * if there are at most as many ranks as micro-batches, the micro-batches themselves are the
          same: the same images are padded together, and a step computes the same numbers up to the
          order of summation, on 4 ranks, on 3 or on 1.

        Ranks may differ by one micro-batch, so communicate once per step, not per micro-batch.

        Raises:
            ValueError: `rank` is not below `world_size`, `micro_batch_size` is below 1, or there
                are more ranks than samples in a global batch.
        """
        check_rank(rank, world_size)
        if micro_batch_size < 1:
            raise ValueError(f"micro_batch_size={micro_batch_size} must be at least 1")
        if world_size > self.total_batch_size:
            raise ValueError(
                f"total_batch_size={self.total_batch_size} leaves some of {world_size} ranks "
                "without images; use fewer ranks, or a larger total_batch_size"
            )
        fewest = -(-self.total_batch_size // micro_batch_size)  # rounded up
        parts = even_parts(self.total_batch_size, max(fewest, world_size))
        own = even_parts(len(parts), world_size)[rank]
        begin = step * self.total_batch_size
        return [range(begin + parts[part].start, begin + parts[part].stop) for part in own]


def evaluation_batches(
    num_images: int, batch_size: int, rank: int, world_size: int
) -> list[list[int]]:
    """Return the batches of images that one rank evaluates: numbers rank, rank + world_size, …

    Ranks share batches, not images, so the same images are padded together for any number of
    ranks, and detections are the same. Every image occurs exactly once. Nothing is padded or
    repeated, so the last batch may be smaller, and a rank may have no batch.
    """
    check_rank(rank, world_size)
    if batch_size < 1:
        raise ValueError(f"batch_size={batch_size} must be at least 1")
    begins = range(0, num_images, batch_size)[rank::world_size]
    return [list(range(begin, min(begin + batch_size, num_images))) for begin in begins]


def check_rank(rank: int, world_size: int) -> None:
    """Raises ValueError unless 0 <= rank < world_size."""
    if not 0 <= rank < world_size:
        raise ValueError(f"rank={rank} is not one of the {world_size} ranks 0 .. {world_size - 1}")
