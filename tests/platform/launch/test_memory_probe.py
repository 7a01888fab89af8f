"""No batch is larger than the worst one, and the largest micro-batch that fits is found."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from deta.platform.data.coco_dataset import CocoDataset, Sample
from deta.platform.data.image_sizes import AugmentationConfig, tiny_augmentation
from deta.platform.data.sample_order import Draws
from deta.platform.data.transforms import augment
from deta.platform.launch import memory_probe
from deta.platform.launch.memory_probe import (
    ProbeResult,
    WorstBatch,
    measure_update,
    suggest_micro_batch,
    worst_batch,
)
from tests.platform.launch.tiny_splits import DATA, make_run, write_split

SHARED = Path(
    os.environ.get("DETA_SHARED", Path(__file__).resolve().parents[3] / "../shared")
).resolve()
DATA_SETS = sorted(
    path.parent.parent for path in (SHARED / "data").glob("*/annotations/instances_train.json")
)


@settings(max_examples=60, deadline=None)
@given(
    size=st.tuples(st.integers(20, 900), st.integers(20, 900)),
    config=st.sampled_from(
        [
            AugmentationConfig(),
            tiny_augmentation(),
            AugmentationConfig(crop=False),
            AugmentationConfig(max_long_edge=800),
        ]
    ),
    seed=st.integers(0, 2**32),
)
def test_no_augmented_image_exceeds_the_worst_batch(size, config, seed):
    height, width = size
    largest = memory_probe._largest_sizes(height, width, config)
    sample = Sample(
        Image.new("1", (width, height)), torch.zeros(0, 4), torch.zeros(0).long(), 0, size
    )
    draws = Draws(seed)
    for _ in range(3):
        image = augment(sample, config, draws).image
        assert image.height <= max(h for h, _ in largest)
        assert image.width <= max(w for _, w in largest)
        assert image.width * image.height <= max(h * w for h, w in largest)


@pytest.mark.parametrize("folder", DATA_SETS, ids=lambda path: path.name)
def test_the_worst_batch_of_real_images_is_nearly_reached(folder: Path):
    dataset = CocoDataset.open(folder / "train", folder / "annotations" / "instances_train.json")
    config = tiny_augmentation()
    worst = worst_batch(dataset, config, 2)
    assert worst.num_boxes == max(len(record.labels) for record in dataset.records)
    blank = [
        Sample(
            Image.new("1", (record.width, record.height)),
            torch.zeros(0, 4),
            torch.zeros(0).long(),
            0,
            (record.height, record.width),
        )
        for record in dataset.records[:100]
    ]
    sizes = [
        augment(one, config, Draws(100 * seed + place)).image.size
        for seed in range(10)
        for place, one in enumerate(blank)
    ]
    heights, widths = [height for _, height in sizes], [width for width, _ in sizes]
    assert 0.85 * worst.height_px <= max(heights) <= worst.height_px
    assert 0.85 * worst.width_px <= max(widths) <= worst.width_px


def test_a_single_image_is_not_tall_and_wide_at_once(tmp_path: Path):
    dataset = write_split(tmp_path / "train", [[], []])  # 2 : 1
    alone = worst_batch(dataset, AugmentationConfig(crop=False), 1)
    assert (alone.height_px, alone.width_px) == (666, 1332)  # as released code resizes 2 : 1
    together = worst_batch(dataset, AugmentationConfig(), 2)
    assert (together.height_px, together.width_px) == (1250, 1332)  # of a crop of 600 x 384


WORST = WorstBatch(96, 128, 5, "a.png", "b.png")


def test_a_probe_measures_its_own_process_and_limits_it(tmp_path: Path):
    run = make_run(write_split(tmp_path / "train", [[]]), tmp_path, DATA)
    one = measure_update(run.config, WORST, 1, "cpu", 8 << 30)
    many = measure_update(run.config, WORST, 24, "cpu", 8 << 30)
    assert one.peak_bytes is not None
    assert many.peak_bytes is not None
    # 23 more images of 96 x 128 px: their pixels alone are 3 MB, with all activations far more.
    assert one.peak_bytes + 3e6 < many.peak_bytes < 8 << 30
    assert many.seconds > 0
    huge = WORST._replace(height_px=2048, width_px=4096)
    limited = measure_update(run.config, huge, 64, "cpu", one.peak_bytes + (256 << 20))
    assert limited.peak_bytes is None


@pytest.mark.parametrize(
    ("configured", "total", "fixed_gib", "gib_an_image", "expected"),
    [
        (2, 16, 1.0, 1.0, 7),  # 8 GiB: 1 + 7 · 1
        (2, 4, 1.0, 1.0, 4),  # a worker's share is all that can help
        (8, 16, 1.0, 1.5, 4),  # what is configured does not fit: 1 + 8 · 1.5
        (1, 16, 1.0, 2.5, 2),
        (2, 16, 1.0, 8.0, 0),  # not even one
    ],
)
def test_the_largest_micro_batch_that_fits_is_found_from_two_sizes(
    tmp_path: Path, monkeypatch, configured, total, fixed_gib, gib_an_image, expected
):
    run = make_run(
        write_split(tmp_path / "train", [[]]),
        tmp_path,
        DATA,
        total_batch_size=total,
        micro_batch_size=configured,
    )
    calls: list[int] = []

    def pretended(config, worst, num_images, device, limit_bytes) -> ProbeResult:
        calls.append(num_images)
        need = int((fixed_gib + gib_an_image * num_images) * 2**30)
        return ProbeResult(num_images, need if need <= limit_bytes * 1.5 else None, 1.0)

    monkeypatch.setattr(memory_probe, "measure_update", pretended)
    monkeypatch.setattr(memory_probe, "free_bytes", lambda *_: int(8 * 2**30 / 0.8) + 1)
    found = suggest_micro_batch(run, "cpu", lambda line: None)
    assert found.largest == expected
    assert found.fits == (min(configured, total) <= expected)
    assert len(calls) == len(set(calls)) <= 4
    text = "\n".join(found.lines())
    if expected == 0:
        assert "not even one image fits" in text
    else:
        assert f"micro_batch_size={expected}" in text


def test_free_memory_is_shared_by_the_workers():
    alone, two = memory_probe.free_bytes("cpu", 1), memory_probe.free_bytes("cpu", 2)
    assert 0 < two < alone < os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
