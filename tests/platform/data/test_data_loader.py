"""Test `data_loader.py`: batches depend on seed and step, not on workers, ranks or resuming."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Set
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from deta.model.batch import Batch
from deta.platform.data.coco_dataset import CocoDataset, ImageRecord, Sample
from deta.platform.data.data_loader import (
    LoadedBatch,
    TrainLoader,
    choose_loader_workers,
    evaluation_loader,
    train_loader,
)
from deta.platform.data.image_decoding import ImageError
from deta.platform.data.image_sizes import AugmentationConfig, EvaluationSize
from deta.platform.data.loader_errors import LoaderWorkerError
from deta.platform.data.sample_order import TrainingOrder, replacement_index, sample_seed

SMALL = AugmentationConfig(
    short_edges=(24, 32),
    max_long_edge=48,
    crop_pre_short_edges=(24, 28),
    crop_min=16,
    crop_max=24,
)
SMALL_EVALUATION = EvaluationSize(short_edge=32, max_long_edge=48)


class DrawnDataset:
    """Images drawn from their index, ids from 100 on; every fourth without boxes."""

    def __init__(self, num_images: int, broken: Set[int] = frozenset()) -> None:
        self.num_images = num_images
        self.broken = broken

    @property
    def records(self) -> list[ImageRecord]:
        nothing = np.zeros((0, 4), np.float32), np.zeros(0, np.int64)
        paths = [Path(f"images/{index}.jpg") for index in range(self.num_images)]
        return [ImageRecord(100 + index, path, 1, 1, *nothing) for index, path in enumerate(paths)]

    def __len__(self) -> int:
        return self.num_images

    def __getitem__(self, index: int) -> Sample:
        if index in self.broken:
            raise ImageError(f"images/{index}.jpg: cannot be decoded; replace the file")
        generator = np.random.default_rng(index)
        height, width = generator.integers(20, 60, 2).tolist()
        pixels = generator.integers(0, 256, (height, width, 3), dtype=np.uint8)
        boxes_px = torch.tensor([[2.0, 3, 15, 17], [1, 1, width, height]])[
            : 0 if index % 4 == 3 else 2
        ]
        labels = torch.tensor([1, 2])[: len(boxes_px)]
        return Sample(Image.fromarray(pixels), boxes_px, labels, 100 + index, (height, width))


def loader(num_images: int = 11, broken: Set[int] = frozenset(), **changes) -> TrainLoader:
    settings = {
        "seed": 5,
        "total_batch_size": 6,
        "micro_batch_size": 2,
        "end_step": 4,
    } | changes
    return train_loader(DrawnDataset(num_images, broken), SMALL, **settings)


def assert_equal(first: list[LoadedBatch], second: list[LoadedBatch]) -> None:
    """Bit for bit."""
    assert len(first) == len(second)
    for one, other in zip(first, second, strict=True):
        assert one.image_ids == other.image_ids
        assert one.original_sizes_px == other.original_sizes_px
        assert one.replaced == other.replaced
        assert one.first_position == other.first_position
        for a, b in zip(tensors(one.batch), tensors(other.batch), strict=True):
            assert torch.equal(a, b)


def tensors(batch: Batch) -> list[torch.Tensor]:
    targets = batch.targets
    return [
        batch.images, batch.padding, batch.seeds, targets.boxes, targets.labels, targets.present
    ]  # fmt: skip


def flat(steps) -> list[LoadedBatch]:
    return list(chain(*steps))


@pytest.fixture(scope="module")
def undisturbed() -> list[list[LoadedBatch]]:
    """Every step of one rank with no loader workers: what all others must equal."""
    return list(loader())


def test_steps_hold_the_samples_of_the_order(undisturbed):
    order = TrainingOrder(seed=5, num_images=11, total_batch_size=6)
    for step, micro_batches in enumerate(undisturbed):
        keys = [order.sample_at(6 * step + place) for place in range(6)]
        ids = list(chain(*(one.image_ids for one in micro_batches)))
        seeds = torch.cat([one.batch.seeds for one in micro_batches])
        assert ids == [100 + key.image_index for key in keys]
        assert seeds.tolist() == [sample_seed(5, *key) for key in keys]
        assert [len(one) for one in micro_batches] == [2, 2, 2]
    assert len(undisturbed) == len(loader()) == 4


@pytest.mark.parametrize("num_loader_workers", [1, 2, 4])
def test_any_number_of_loader_workers_gives_the_same_batches(undisturbed, num_loader_workers):
    assert_equal(flat(loader(num_loader_workers=num_loader_workers)), flat(undisturbed))


@pytest.mark.parametrize("world_size", [2, 3])
def test_any_number_of_ranks_gives_the_same_micro_batches(undisturbed, world_size):
    ranks = [loader(rank=rank, world_size=world_size) for rank in range(world_size)]
    for together, alone in zip(zip(*ranks, strict=True), undisturbed, strict=True):
        assert_equal(flat(together), alone)


def test_more_ranks_than_micro_batches_still_see_the_same_images(undisturbed):
    ranks = [loader(rank=rank, world_size=4) for rank in range(4)]
    for together, alone in zip(zip(*ranks, strict=True), undisturbed, strict=True):
        ids = [one.image_ids for one in flat(together)]
        assert list(chain(*ids)) == list(chain(*(one.image_ids for one in alone)))
        assert [len(one) for one in ids] == [1, 2, 1, 2]


@pytest.mark.parametrize("start_step", [0, 1, 3, 4])
@pytest.mark.parametrize("num_loader_workers", [0, 2])
def test_a_resumed_run_sees_the_rest(undisturbed, start_step, num_loader_workers):
    resumed = loader(start_step=start_step, num_loader_workers=num_loader_workers)
    assert_equal(flat(resumed), flat(undisturbed[start_step:]))


def test_a_loader_can_be_used_twice(undisturbed):
    again = loader()
    assert_equal(flat(again), flat(again))


def test_epochs_and_seeds_see_other_augmentations():
    first, second = list(loader(num_images=6, end_step=2))
    (other_seed,) = loader(num_images=6, end_step=1, seed=6)

    def shown(step: list[LoadedBatch]) -> dict[int, torch.Tensor]:
        return {
            image_id: one.batch.images[row]
            for one in step
            for row, image_id in enumerate(one.image_ids)
        }

    for other in (shown(second), shown(other_seed)):
        assert shown(first).keys() == other.keys()
        assert any(not torch.equal(image, other[i]) for i, image in shown(first).items())


@pytest.mark.parametrize("num_loader_workers", [0, 2])
def test_loading_draws_nothing_from_the_global_generators(num_loader_workers):
    torch_state, numpy_state = torch.get_rng_state(), str(np.random.get_state())
    for _ in loader(num_loader_workers=num_loader_workers):
        pass
    evaluation = evaluation_loader(
        DrawnDataset(3), SMALL_EVALUATION, batch_size=2, num_loader_workers=num_loader_workers
    )
    assert len(list(evaluation)) == 2
    assert torch.equal(torch.get_rng_state(), torch_state)
    assert str(np.random.get_state()) == numpy_state


@pytest.mark.parametrize("num_loader_workers", [0, 2])
def test_a_broken_image_reaches_the_trainer_with_its_file_name(num_loader_workers):
    with pytest.raises(ImageError, match=r"images/7\.jpg: cannot be decoded"):
        list(loader(broken={7}, num_loader_workers=num_loader_workers, replace_broken=False))


# --- Broken images -------------------------------------------------------------------------------


@pytest.mark.parametrize("broken", [{7}, {0, 3, 9}, {1, 4, 5, 8, 10}], ids=len)
def test_broken_images_are_replaced_alike_everywhere(undisturbed, broken):
    alone = list(loader(broken=broken))
    expected = flat(alone)

    assert_equal(flat(loader(broken=broken, num_loader_workers=2)), expected)
    assert_equal(flat(loader(broken=broken, start_step=2)), flat(alone[2:]))
    ranks = [loader(broken=broken, rank=rank, world_size=3) for rank in range(3)]
    for together, step in zip(zip(*ranks, strict=True), alone, strict=True):
        assert_equal(flat(together), step)

    for one, whole in zip(expected, flat(undisturbed), strict=True):
        ids = {fault.image_id: fault.by_image_id for fault in one.replaced}
        assert one.image_ids == [ids.get(i, i) for i in whole.image_ids]
        assert torch.equal(one.batch.seeds, whole.batch.seeds)  # augmented as it would have been
        assert not {i - 100 for i in one.image_ids} & broken
        for fault in one.replaced:
            assert fault.image_id - 100 in broken
            assert fault.path == f"images/{fault.image_id - 100}.jpg"
            assert fault.path in fault.reason
    assert {fault.image_id - 100 for one in expected for fault in one.replaced} == broken


def test_every_try_draws_another_image_of_the_data_set():
    for num_images in (2, 3, 50):
        drawn = [
            replacement_index(5, epoch, image, attempt, num_images)
            for epoch in range(3)
            for image in range(num_images)
            for attempt in range(8)
            if replacement_index(5, epoch, image, attempt, num_images) != image
        ]
        assert len(drawn) == 3 * num_images * 8
        assert set(drawn) == set(range(num_images))


@pytest.mark.parametrize("num_images", [1, 11])
def test_a_data_set_of_broken_images_alone_is_an_error(num_images):
    with pytest.raises(ImageError, match=r"images/\d+\.jpg: cannot be decoded"):
        list(loader(num_images=num_images, broken=set(range(num_images))))


def test_evaluation_never_replaces():
    evaluation = evaluation_loader(DrawnDataset(5, {3}), SMALL_EVALUATION, batch_size=2)
    with pytest.raises(ImageError, match=r"images/3\.jpg"):
        list(evaluation)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-200])


def swap(path: Path) -> None:
    Image.new("RGB", (7, 5)).save(path, "PNG")


@pytest.mark.parametrize(
    "harm", [Path.unlink, cut, swap, lambda path: path.write_bytes(b""),
             lambda path: path.write_text("<html>")],
    ids=["missing", "truncated", "other size", "empty", "other type"],
)  # fmt: skip
def test_a_file_that_breaks_after_the_data_set_was_opened_is_replaced(tmp_path, harm):
    images = []
    for index in range(6):
        pixels = np.random.default_rng(index).integers(0, 256, (40, 50, 3), np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{index}.png")
        images.append({"id": index, "file_name": f"{index}.png", "width": 50, "height": 40})
    annotations = tmp_path / "annotations.json"
    categories = [{"id": 1, "name": "noise"}]
    coco = {"images": images, "annotations": [], "categories": categories}
    annotations.write_text(json.dumps(coco))
    dataset = CocoDataset.open(tmp_path, annotations)
    harm(tmp_path / "4.png")

    steps = train_loader(dataset, SMALL, seed=1, total_batch_size=6, micro_batch_size=6, end_step=2)
    for (one,) in steps:
        (fault,) = one.replaced
        assert (fault.image_id, fault.path) == (4, str(tmp_path / "4.png"))
        assert fault.path in fault.reason
        assert 4 not in one.image_ids


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_positions_number_the_samples_of_all_ranks_without_a_gap(world_size):
    ranks = [loader(rank=rank, world_size=world_size, start_step=1) for rank in range(world_size)]
    seen = [
        position
        for together in zip(*ranks, strict=True)
        for one in flat(together)
        for position in range(one.first_position, one.first_position + len(one))
    ]
    assert seen == list(range(6, 24))


# --- Loader workers that die ---------------------------------------------------------------------


@pytest.mark.parametrize("thread", [False, True], ids=["main thread", "other thread, as in Ray"])
def test_a_killed_loader_worker_is_named_within_seconds(thread):
    said: list[LoaderWorkerError] = []

    def train() -> None:
        before = set(multiprocessing.active_children())
        steps = iter(loader(num_loader_workers=2, end_step=10**6))
        next(steps)
        own = set(multiprocessing.active_children()) - before
        os.kill(own.pop().pid, signal.SIGKILL)
        with pytest.raises(LoaderWorkerError) as caught:
            list(steps)
        said.append(caught.value)

    began_s = time.monotonic()
    if thread:
        trainer = threading.Thread(target=train, daemon=True)
        trainer.start()
        trainer.join(60)
    else:
        train()
    assert time.monotonic() - began_s < 60
    (error,) = said
    assert "SIGKILL" in str(error)
    assert "lack of memory" in str(error)
    assert "data.loader_workers" in str(error)


LITTLE_SHARED_MEMORY = """
import torch
from PIL import Image
from deta.platform.data.coco_dataset import Sample
from deta.platform.data.data_loader import train_loader
from deta.platform.data.transforms import AugmentationConfig

class Large:
    def __len__(self):
        return 8
    def __getitem__(self, index):
        nothing = torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64)
        return Sample(Image.new("RGB", (1200, 900)), *nothing, index, (900, 1200))

steps = train_loader(Large(), AugmentationConfig(), seed=1, total_batch_size=4, micro_batch_size=4,
                     end_step=4, num_loader_workers=1)
list(steps)
"""


@pytest.mark.skipif(
    shutil.which("unshare") is None
    or subprocess.run(
        ["unshare", "-m", "mount", "-t", "tmpfs", "tmpfs", "/dev/shm"], capture_output=True
    ).returncode
    != 0,
    reason="this user may not mount a small /dev/shm",
)
def test_too_little_shared_memory_is_an_error_and_no_hang():
    command = "mount -t tmpfs -o size=4m tmpfs /dev/shm && exec " + f'{sys.executable} -c "$CODE"'
    found = subprocess.run(
        ["unshare", "-m", "sh", "-c", command],
        env=os.environ | {"CODE": LITTLE_SHARED_MEMORY},
        cwd=Path(__file__).resolve().parents[3],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert found.returncode != 0
    assert "/dev/shm is too small" in found.stderr or "no space in /dev/shm" in found.stderr
    assert "of 4 MB in /dev/shm" in found.stderr


def test_loader_workers_end_when_the_trainer_stops_early():
    before = set(multiprocessing.active_children())
    steps = iter(loader(num_loader_workers=2, end_step=100))
    next(steps)
    own = set(multiprocessing.active_children()) - before
    assert len(own) == 2
    del steps
    assert not own & set(multiprocessing.active_children())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="only a GPU can pin memory")
@pytest.mark.parametrize("num_loader_workers", [0, 2])
def test_pinned_batches_hold_the_same(undisturbed, num_loader_workers):
    pinned = flat(loader(pin_memory=True, num_loader_workers=num_loader_workers))
    assert all(tensor.is_pinned() for one in pinned for tensor in tensors(one.batch))
    assert_equal(pinned, flat(undisturbed))


class ThreadCounter(DrawnDataset):
    def __getitem__(self, index: int) -> Sample:
        assert torch.get_num_threads() == 1
        return super().__getitem__(index)


def test_each_loader_worker_computes_on_one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        batches = evaluation_loader(
            ThreadCounter(3), SMALL_EVALUATION, batch_size=1, num_loader_workers=1
        )
        assert len(list(batches)) == 3
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("num_loader_workers", [0, 2])
@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_evaluation_shows_every_image_once_at_its_size(world_size, num_loader_workers):
    ranks = [
        list(
            evaluation_loader(
                DrawnDataset(5),
                SMALL_EVALUATION,
                batch_size=2,
                rank=rank,
                world_size=world_size,
                num_loader_workers=num_loader_workers,
            )
        )
        for rank in range(world_size)
    ]
    loaded = flat(ranks)
    assert sorted(chain(*(one.image_ids for one in loaded))) == [100, 101, 102, 103, 104]
    for one in loaded:
        assert len(one) <= 2
        assert one.batch.seeds.tolist() == [0] * len(one)
        for row, image_id in enumerate(one.image_ids):
            height, width = one.original_sizes_px[row]
            assert DrawnDataset(5)[image_id - 100].original_size_px == (height, width)
            visible = ~one.batch.padding[row]
            assert max(visible.any(0).sum(), visible.any(1).sum()) <= 49
            # Evaluation neither flips nor crops: relative boxes are the annotated ones.
            box = one.batch.targets.boxes[row, -1]
            if one.batch.targets.present[row].all():
                expected = [(1 + width) / 2 / width, (1 + height) / 2 / height]
                torch.testing.assert_close(box[:2], torch.tensor(expected))


def test_more_ranks_than_images_leave_some_without_a_batch():
    loaded = evaluation_loader(
        DrawnDataset(2), SMALL_EVALUATION, batch_size=2, rank=3, world_size=4
    )
    assert list(loaded) == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_images": 0}, "no images"),
        ({"start_step": 5}, "start_step=5"),
        ({"start_step": -1}, "start_step=-1"),
        ({"rank": 1}, "rank=1"),
        ({"world_size": 7}, "fewer ranks"),
        ({"micro_batch_size": 0}, "micro_batch_size=0"),
        ({"num_loader_workers": -1}, "num_loader_workers=-1"),
    ],
)
def test_numbers_that_do_not_fit_are_refused_before_training(changes, message):
    with pytest.raises(ValueError, match=message):
        loader(**changes)


@pytest.mark.parametrize(
    ("num_cpus", "on_gpu", "expected"),
    [
        (2, True, 1),  # 16 cores, 8 GPUs
        (4, True, 3),
        (0.5, True, 1),
        (64, True, 8),
        (1, False, 1),
        (3, False, 1),
        (16, False, 2),
    ],
)
def test_loader_workers_are_chosen_by_the_cpus_and_the_device(num_cpus, on_gpu, expected):
    assert choose_loader_workers("auto", on_gpu=on_gpu, num_cpus=num_cpus) == expected
    assert choose_loader_workers(5, on_gpu=on_gpu, num_cpus=num_cpus) == 5


def test_without_a_cluster_loader_workers_are_chosen_by_the_cpus_of_this_process():
    cpus = len(os.sched_getaffinity(0))
    chosen = choose_loader_workers("auto", on_gpu=True)
    assert chosen == choose_loader_workers("auto", on_gpu=True, num_cpus=cpus)


@pytest.mark.parametrize("num_loader_workers", [0, 2])
def test_batches_hold_eight_bits_until_they_are_on_the_device(num_loader_workers):
    for one in flat(loader(num_loader_workers=num_loader_workers)):
        assert one.batch.images.dtype == torch.uint8
        assert one.batch.images.permute(0, 2, 3, 1).is_contiguous()  # as images are decoded
        assert one.batch.to("cpu").images.dtype == torch.float32
