"""Batches in the order of `order.py`, prepared by loader workers that keep no state.

A loader worker is asked for (epoch, image index) and returns the same sample whenever and wherever
it is asked, so the number of loader workers changes the speed and nothing else. Loaders draw
nothing from the global random generators.

A picture that turns out broken while training is replaced by another one of the data set, drawn
from (seed, epoch, image index), with the augmentation that the broken one would have had. So the
batches stay a function of the data and the position. `LoadedBatch.replaced` tells of it. In
evaluation it is an error.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import NamedTuple, Protocol

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, get_worker_info

from deta.model.batch import Batch, Target, pad_batch
from deta.platform.data.coco_dataset import Record, Sample
from deta.platform.data.image_decoding import ImageError
from deta.platform.data.loader_errors import naming_the_dead, undisturbed_by_the_dead
from deta.platform.data.sample_order import (
    Draws,
    SampleKey,
    TrainingOrder,
    evaluation_batches,
    replacement_index,
    sample_seed,
)
from deta.platform.data.transforms import (
    AugmentationConfig,
    EvaluationSize,
    augment,
    resize_for_evaluation,
    to_model_input,
)

MAX_REPLACEMENTS = 8  # tries; where half of all pictures are broken, one of 256 finds none


class ImageDataset(Protocol):
    """What a loader reads, such as `CocoDataset`."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Sample: ...

    @property
    def records(self) -> Sequence[Record]: ...  # read only to tell of a broken picture


class Replaced(NamedTuple):
    """A picture that could not be used, and which one stood in for it."""

    image_id: int
    path: str
    reason: str  # names the file
    by_image_id: int


@dataclass(frozen=True)
class LoadedBatch:
    """A micro-batch, and whose images it holds."""

    batch: Batch  # its seeds are `order.sample_seed`; 0 in evaluation, where nothing is random
    image_ids: list[int]
    original_sizes_px: list[tuple[int, int]]  # (height, width) as in the annotation file
    replaced: list[Replaced] = field(default_factory=list)  # none in evaluation
    # In training, of the first sample: samples seen before it, whatever the number of ranks. The
    # others follow without a gap.
    first_position: int = 0

    def __len__(self) -> int:
        return len(self.image_ids)

    def pin_memory(self) -> LoadedBatch:
        """Called by the data loader, so that copies to a GPU need not wait."""
        return replace(self, batch=self.batch.pin_memory())


@dataclass(frozen=True)
class _ModelInput:
    """One image on its way into a batch."""

    image: Tensor  # 3 H W float32, normalised
    target: Target
    image_id: int
    original_size_px: tuple[int, int]
    seed: int
    replaced: Replaced | None = None


class _TrainingInputs(Dataset[_ModelInput]):
    """Augmented images by (epoch, image index)."""

    def __init__(
        self, dataset: ImageDataset, config: AugmentationConfig, seed: int, replace_broken: bool
    ) -> None:
        self.dataset = dataset
        self.config = config
        self.seed = seed
        self.replace_broken = replace_broken

    def __getitem__(self, key: SampleKey) -> _ModelInput:
        sample, replaced = self._sample(key)
        own_seed = sample_seed(self.seed, key.epoch, key.image_index)
        sample = augment(sample, self.config, Draws(own_seed))
        image, target = to_model_input(sample)
        size_px = sample.original_size_px
        return _ModelInput(image, target, sample.image_id, size_px, own_seed, replaced)

    def _sample(self, key: SampleKey) -> tuple[Sample, Replaced | None]:
        try:
            return self.dataset[key.image_index], None
        except ImageError as error:
            num_images = len(self.dataset)
            if not self.replace_broken or num_images < 2:
                raise
            fault = error
        for attempt in range(MAX_REPLACEMENTS):
            index = replacement_index(self.seed, *key, attempt, num_images)
            try:
                sample = self.dataset[index]
            except ImageError:
                continue
            record = self.dataset.records[key.image_index]
            stood_in = sample.image_id
            return sample, Replaced(record.image_id, str(record.path), str(fault), stood_in)
        raise ImageError(
            f"{fault}; and the {MAX_REPLACEMENTS} pictures drawn to replace it are broken too: is "
            "the storage of the images still there?"
        ) from fault


class _EvaluationInputs(Dataset[_ModelInput]):
    """Images at their evaluation size, by index."""

    def __init__(self, dataset: ImageDataset, size: EvaluationSize) -> None:
        self.dataset = dataset
        self.size = size

    def __getitem__(self, index: int) -> _ModelInput:
        sample = resize_for_evaluation(self.dataset[index], self.size)
        image, target = to_model_input(sample)
        return _ModelInput(image, target, sample.image_id, sample.original_size_px, seed=0)


def _collate(inputs: list[_ModelInput]) -> LoadedBatch:
    batch = pad_batch(
        [one.image for one in inputs],
        [one.target for one in inputs],
        [one.seed for one in inputs],
    )
    if get_worker_info() is not None:
        # Left to the queue, this would be done by a thread of it, which on failure (no space in
        # /dev/shm, no file descriptor) drops the batch, and the trainer would wait for ever.
        for tensor in batch_tensors(batch):
            tensor.share_memory_()
    return LoadedBatch(
        batch,
        image_ids=[one.image_id for one in inputs],
        original_sizes_px=[one.original_size_px for one in inputs],
        replaced=[one.replaced for one in inputs if one.replaced is not None],
    )


def batch_tensors(batch: Batch) -> list[Tensor]:
    """All tensors of a batch."""
    targets = batch.targets
    return [
        batch.images, batch.padding, targets.boxes, targets.labels, targets.present, batch.seeds
    ]  # fmt: skip


def _batches(
    inputs: Dataset[_ModelInput],
    keys: Iterable[list[SampleKey]] | Iterable[list[int]],
    num_loader_workers: int,
    pin_memory: bool,
) -> Iterator[LoadedBatch]:
    """One batch for each list of keys, in their order; consumes the keys as it goes."""
    loader = DataLoader(
        inputs,
        batch_sampler=keys,
        num_workers=num_loader_workers,
        collate_fn=_collate,
        pin_memory=pin_memory,
        # Forked workers start in milliseconds, share the annotations with the trainer and take
        # 160 MB each; with forkserver it was 4.3 s and 480 MB. Each runs torch on one thread
        # (DataLoader's own rule) and touches no GPU.
        multiprocessing_context="fork" if num_loader_workers > 0 else None,
        # Every iteration draws a seed for its workers; without a generator of its own it would
        # draw it from torch's global one, and so change the numbers of the training.
        generator=torch.Generator(),
    )
    with undisturbed_by_the_dead():
        batches = iter(loader)
    return naming_the_dead(batches)


@dataclass(frozen=True)
class TrainLoader:
    """The steps of one rank from `start_step` on; made by `train_loader`.

    Every iteration begins again at `start_step`, with new loader workers; these end with it.
    """

    inputs: Dataset[_ModelInput]
    order: TrainingOrder
    micro_batch_size: int
    rank: int
    world_size: int
    start_step: int
    end_step: int
    num_loader_workers: int
    pin_memory: bool

    def __len__(self) -> int:
        """The number of steps."""
        return self.end_step - self.start_step

    def keys(self, step: int) -> list[list[SampleKey]]:
        """Which samples this rank's micro-batches of a step hold."""
        return [[self.order.sample_at(p) for p in part] for part in self.positions(step)]

    def positions(self, step: int) -> list[range]:
        """The positions of these samples in the stream of all."""
        return self.order.micro_batch_positions(
            step, self.rank, self.world_size, self.micro_batch_size
        )

    def __iter__(self) -> Iterator[list[LoadedBatch]]:
        """The micro-batches of every step, of which there is at least one."""
        steps = range(self.start_step, self.end_step)
        keys = (micro_batch for step in steps for micro_batch in self.keys(step))
        batches = _batches(self.inputs, keys, self.num_loader_workers, self.pin_memory)
        for step in steps:
            positions = self.positions(step)
            loaded = islice(batches, len(positions))
            yield [
                replace(one, first_position=part.start)
                for one, part in zip(loaded, positions, strict=True)
            ]


def train_loader(
    dataset: ImageDataset,
    config: AugmentationConfig,
    *,
    seed: int,
    total_batch_size: int,
    micro_batch_size: int,
    rank: int = 0,
    world_size: int = 1,
    start_step: int = 0,
    end_step: int,
    num_loader_workers: int = 0,
    pin_memory: bool = False,
    replace_broken: bool = True,
) -> TrainLoader:
    """Steps start_step .. end_step - 1 of one rank, each a list of augmented micro-batches.

    What a step holds is a pure function of the data set, `config`, `seed`, `total_batch_size`,
    `micro_batch_size` and the step: see `TrainingOrder.micro_batch_positions` for how ranks share
    it.

    Args:
        replace_broken: let another picture stand in for a broken one, told in
            `LoadedBatch.replaced`; else a broken one is an error.

    Raises:
        ValueError: the numbers do not fit together; on making the loader.
        ImageError: an image cannot be decoded, nor (with `replace_broken`) any of those drawn to
            replace it; names the file; on reaching its batch, also where a loader worker found it.
        LoaderWorkerError: a loader worker died, or has no memory to hand over its batches.
    """
    if not 0 <= start_step <= end_step:
        raise ValueError(
            f"start_step={start_step} and end_step={end_step}: "
            "steps count from 0, and the first must not lie behind the end"
        )
    _check_num_loader_workers(num_loader_workers)
    loader = TrainLoader(
        inputs=_TrainingInputs(dataset, config, seed, replace_broken),
        order=TrainingOrder(seed, len(dataset), total_batch_size),
        micro_batch_size=micro_batch_size,
        rank=rank,
        world_size=world_size,
        start_step=start_step,
        end_step=end_step,
        num_loader_workers=num_loader_workers,
        pin_memory=pin_memory,
    )
    loader.keys(start_step)  # the ranks and sizes that do not fit are told here, not while training
    return loader


def evaluation_loader(
    dataset: ImageDataset,
    size: EvaluationSize,
    *,
    batch_size: int,
    rank: int = 0,
    world_size: int = 1,
    num_loader_workers: int = 0,
    pin_memory: bool = False,
) -> Iterator[LoadedBatch]:
    """One pass over this rank's share of the images, every image once over all ranks.

    Raises:
        ValueError: the numbers do not fit together.
        ImageError: an image cannot be decoded.
        LoaderWorkerError: as in `train_loader`.
    """
    _check_num_loader_workers(num_loader_workers)
    keys = evaluation_batches(len(dataset), batch_size, rank, world_size)
    return _batches(_EvaluationInputs(dataset, size), keys, num_loader_workers, pin_memory)


def _check_num_loader_workers(num_loader_workers: int) -> None:
    if num_loader_workers < 0:
        raise ValueError(
            f"num_loader_workers={num_loader_workers} must be at least 0 (load in this process)"
        )
