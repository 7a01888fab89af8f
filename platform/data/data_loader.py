"""Load batches in the order of `sample_order.py` with stateless loader workers.

A loader worker gets a key (epoch, image index) and returns the same sample for it at any time and
in any process, so the number of loader workers changes only the speed. Loaders draw nothing from
the global random generators.

A broken image is replaced during training by another one of the data set, drawn from (seed, epoch,
image index), with the augmentation of the broken one. So batches stay a function of the data and
the position. `LoadedBatch.replaced` lists replaced images. In evaluation a broken image is an
error.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import islice
from typing import Literal, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, get_worker_info

from deta.model.batch import Batch, Target, pad_batch
from deta.platform.data.coco_dataset import ImageRecord, Sample
from deta.platform.data.image_decoding import ImageError
from deta.platform.data.image_sizes import AugmentationConfig, EvaluationSize
from deta.platform.data.loader_errors import explain_worker_errors, restore_signal_handler
from deta.platform.data.sample_order import (
    Draws,
    SampleKey,
    TrainingOrder,
    evaluation_batches,
    replacement_index,
    sample_seed,
)
from deta.platform.data.transforms import augment, resize_for_evaluation, to_model_input

MAX_REPLACEMENTS = 8  # tries; if half of all images are broken, all fail for one in 256
MOST_LOADER_WORKERS = 8  # chosen by ourselves: about 600 images/s at COCO's sizes


def choose_loader_workers(
    wanted: int | Literal["auto"], *, on_gpu: bool, num_cpus: float | None = None
) -> int:
    """Return the number of loader workers of a training worker.

    Beside a GPU, one CPU launches kernels and the others load. Without one, computing takes so much
    longer than loading that one loader worker is enough, and two where CPUs are many.

    Args:
        wanted: "auto", or the number itself.
        num_cpus: that the worker may use; None: all that this process may.
    """
    if wanted != "auto":
        return wanted
    if num_cpus is None:
        num_cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1
    if not on_gpu:
        return 1 if num_cpus < 4 else 2
    return max(1, min(MOST_LOADER_WORKERS, int(num_cpus) - 1))


class ImageDataset(Protocol):
    """The data set interface of a loader, such as `CocoDataset`."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Sample: ...

    @property
    def records(self) -> Sequence[ImageRecord]: ...  # read only to report a broken image


class ReplacedImage(NamedTuple):
    """A broken image, and the one that replaced it."""

    image_id: int
    path: str
    reason: str  # names the file
    by_image_id: int


@dataclass(frozen=True)
class LoadedBatch:
    """A micro-batch and the origin of its images."""

    batch: Batch  # its seeds are `sample_seed`; 0 in evaluation, where nothing is random
    image_ids: list[int]
    original_sizes_px: list[tuple[int, int]]  # (height, width) as in the annotation file
    replaced: list[ReplacedImage] = field(default_factory=list)  # none in evaluation
    # In training: the number of samples before the first one, over all ranks. The other samples of
    # the batch follow without a gap.
    first_position: int = 0

    def __len__(self) -> int:
        return len(self.image_ids)

    def pin_memory(self) -> LoadedBatch:
        """Pin the tensors, so that copies to a GPU need not wait. Called by the data loader."""
        return replace(self, batch=self.batch.pin_memory())


class _ModelInput(NamedTuple):
    """One image as a batch needs it."""

    image: Tensor  # 3 H W uint8
    target: Target
    image_id: int
    original_size_px: tuple[int, int]
    seed: int
    replaced: ReplacedImage | None = None


@dataclass
class _TrainingInputs(Dataset[_ModelInput]):
    """Augmented images, by (epoch, image index)."""

    dataset: ImageDataset
    config: AugmentationConfig
    seed: int
    replace_broken: bool

    def __getitem__(self, key: SampleKey) -> _ModelInput:
        sample, replaced = self._sample(key)
        own_seed = sample_seed(self.seed, *key)
        sample = augment(sample, self.config, Draws(own_seed))
        return _model_input(sample, own_seed, replaced)

    def _sample(self, key: SampleKey) -> tuple[Sample, ReplacedImage | None]:
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
            return sample, ReplacedImage(
                record.image_id, str(record.path), str(fault), by_image_id=sample.image_id
            )
        raise ImageError(
            f"{fault}; the {MAX_REPLACEMENTS} images drawn to replace it are broken too: is the "
            "storage of the images still reachable?"
        ) from fault


@dataclass
class _EvaluationInputs(Dataset[_ModelInput]):
    """Images at their evaluation size, by index."""

    dataset: ImageDataset
    size: EvaluationSize

    def __getitem__(self, index: int) -> _ModelInput:
        return _model_input(resize_for_evaluation(self.dataset[index], self.size))


def _model_input(
    sample: Sample, seed: int = 0, replaced: ReplacedImage | None = None
) -> _ModelInput:
    image, target = to_model_input(sample)
    return _ModelInput(image, target, sample.image_id, sample.original_size_px, seed, replaced)


def _collate(inputs: list[_ModelInput]) -> LoadedBatch:
    images, targets, image_ids, sizes_px, seeds, replaced = map(list, zip(*inputs, strict=True))
    batch = pad_batch(images, targets, seeds)
    if get_worker_info() is not None:
        # Otherwise a thread of the queue does this, which on failure (no space in /dev/shm, no file
        # descriptor) drops the batch, and the trainer would wait for ever.
        for tensor in batch_tensors(batch):
            if tensor is not batch.padding:  # the trainer makes it; see `Batch.__reduce__`
                tensor.share_memory_()
    return LoadedBatch(batch, image_ids, sizes_px, [one for one in replaced if one is not None])


def batch_tensors(batch: Batch) -> list[Tensor]:
    """Return all tensors of a batch."""
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
    """Return a batch for each list of keys, in order; keys are consumed lazily."""
    loader = DataLoader(
        inputs,
        batch_sampler=keys,
        num_workers=num_loader_workers,
        collate_fn=_collate,
        pin_memory=pin_memory,
        # Forked workers start in milliseconds, share the annotations with the trainer and take
        # 160 MB each; with forkserver it was 4.3 s and 480 MB. Each runs torch on one thread
        # (DataLoader's own rule) and does not use the GPU.
        multiprocessing_context="fork" if num_loader_workers > 0 else None,
        # Every iteration draws a seed for its workers. Without this generator it would draw it from
        # torch's global one, and so change the training.
        generator=torch.Generator(),
    )
    with restore_signal_handler():
        batches = iter(loader)
    return explain_worker_errors(batches)


@dataclass(frozen=True)
class TrainLoader:
    """The micro-batches of one rank in some steps. Made by `train_loader`.

    Every iteration starts again at the first step with new loader workers, which exit with it.
    """

    inputs: Dataset[_ModelInput]
    order: TrainingOrder
    positions: Callable[[int], list[range]]  # of this rank's micro-batches in a step
    steps: range
    num_loader_workers: int
    pin_memory: bool

    def __len__(self) -> int:
        return len(self.steps)

    def __iter__(self) -> Iterator[list[LoadedBatch]]:
        """Yield the micro-batches of each step, at least one."""
        sample_at = self.order.sample_at
        keys = (
            [sample_at(p) for p in part] for step in self.steps for part in self.positions(step)
        )
        batches = _batches(self.inputs, keys, self.num_loader_workers, self.pin_memory)
        for step in self.steps:
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
    """Return a loader of one rank's steps start_step .. end_step - 1, each a list of micro-batches.

    The content of a step is a pure function of the data set, `config`, `seed`, `total_batch_size`,
    `micro_batch_size` and the step. `TrainingOrder.micro_batch_positions` distributes it over
    ranks.

    Args:
        replace_broken: replace a broken image by another one and list it in
            `LoadedBatch.replaced`; otherwise a broken image is an error.

    Raises:
        ValueError: the numbers are inconsistent. Raised when the loader is made; the others when
            the batch is reached, also for errors in a loader worker.
        ImageError: an image cannot be decoded, nor (with `replace_broken`) any of those drawn to
            replace it; names the file.
        LoaderWorkerError: a loader worker died, or has no memory to send its batches.
    """
    if not 0 <= start_step <= end_step:
        raise ValueError(
            f"start_step={start_step} and end_step={end_step}: "
            "steps count from 0, and start_step must not exceed end_step"
        )
    if num_loader_workers < 0:
        raise ValueError(
            f"num_loader_workers={num_loader_workers} must be at least 0 (0 loads in this process)"
        )
    order = TrainingOrder(seed, len(dataset), total_batch_size)
    positions = partial(
        order.micro_batch_positions,
        rank=rank,
        world_size=world_size,
        micro_batch_size=micro_batch_size,
    )
    positions(start_step)  # raises for inconsistent ranks and sizes, before the training starts
    inputs = _TrainingInputs(dataset, config, seed, replace_broken)
    steps = range(start_step, end_step)
    return TrainLoader(inputs, order, positions, steps, num_loader_workers, pin_memory)


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
    """Return one pass over this rank's share of the images; each image occurs once over all ranks.

    Raises:
        ValueError: the numbers are inconsistent.
        ImageError: an image cannot be decoded.
        LoaderWorkerError: as in `train_loader`.
    """
    keys = evaluation_batches(len(dataset), batch_size, rank, world_size)
    return _batches(_EvaluationInputs(dataset, size), keys, num_loader_workers, pin_memory)
