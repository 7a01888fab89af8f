"""Measures the memory that training needs at most, before the cluster is used.

The worst micro-batch follows from the sizes of the images and the largest sizes that augmentation
makes of them. A separate process runs forward, backward and an update on it once, and reports its
peak memory: PyTorch's counter on a GPU, the resident set on a CPU. Two batch sizes give a line. The
line predicts the largest micro-batch that fits, which is then measured before it is suggested.
"""

# H W height and width   B images   N boxes in one image

from __future__ import annotations

import multiprocessing
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import NamedTuple

import torch
from torch.optim.swa_utils import AveragedModel

from deta.model.architectures import make_criterion, make_detector, without_download
from deta.model.batch import Batch, Target, pad_batch
from deta.platform.data.coco_dataset import CocoDataset
from deta.platform.data.image_sizes import AugmentationConfig
from deta.platform.data.transforms import MAX_LONG_EDGE_BEFORE_CROP, resized_size
from deta.platform.learning.gradient_sum import GradientSum
from deta.platform.learning.numerics import AUTOCAST
from deta.platform.learning.optimizer import freeze, make_optimizer, trainable
from deta.platform.learning.train_step import train_step
from deta.platform.run.config import RunConfig
from deta.platform.run.run import Run

GIB = 2**30
WARM_UP_PX = 128  # a first small update creates the optimizer's state before the measured one
# Share of the free memory. The rest is for what the probe does not have: on a GPU the CUDA context
# and fragmentation, on a CPU Ray's processes and the data loader.
USABLE = {"cuda": 0.9, "cpu": 0.8}
MAX_TRIES = 3  # to confirm the prediction, each try smaller than the last
MAX_MEASURE_S = 120  # sizes that would take longer, as on a CPU, are not measured


class WorstBatch(NamedTuple):
    """The size of the largest padded micro-batch; an upper bound within a few pixels."""

    height_px: int
    width_px: int
    num_boxes: int  # of the fullest image
    tallest: str  # file name of the image that decides the height
    widest: str

    def __str__(self) -> str:
        text = f"{self.width_px}x{self.height_px} px, {self.num_boxes} boxes an image"
        return f"{text} (width from {self.widest}, height from {self.tallest})"


class ProbeResult(NamedTuple):
    """The measurement of one size of the worst micro-batch."""

    num_images: int
    peak_bytes: int | None  # None: it did not fit
    seconds: float = 0.0


@dataclass(frozen=True)
class Suggestion:
    """The measurements, and the micro-batch that they suggest."""

    device: str
    worst: WorstBatch
    configured: int
    usable_bytes: int  # for one worker
    measured: list[ProbeResult]  # in the order of their sizes
    largest: int  # micro-batch that was measured and fits; 0 if not even one image does
    share: int  # images of a worker per update; a larger micro-batch has no use

    @property
    def fits(self) -> bool:
        """Return whether the configured micro-batch fits."""
        return self.configured <= self.largest

    def lines(self) -> list[str]:
        """Return a table for a terminal, and the advice that follows from it."""
        on = "this machine's CPU" if self.device == "cpu" else "the GPU"
        lines = [
            f"memory of one worker on {on}, padded to {self.worst.width_px}x"
            f"{self.worst.height_px} px, forward, backward and update; "
            f"{self.usable_bytes / GIB:.1f} GiB can be used",
            "images at a time     memory       time    an image",
        ]
        for row in self.measured:
            if row.peak_bytes is None:
                lines.append(f"{row.num_images:>11}     does not fit")
                continue
            lines.append(
                f"{row.num_images:>11}      {row.peak_bytes / GIB:7.2f} GiB   {row.seconds:6.1f} s"
                f"   {row.seconds / row.num_images:6.2f} s"
                + "   <- micro_batch_size" * (row.num_images == self.configured)
                + "   too much" * (row.peak_bytes > self.usable_bytes)
            )
        if self.largest == 0:
            lines.append(
                "! not even one image fits; smaller data.augmentation.short_edges and "
                "max_long_edge, precision=bf16, model.backbone.checkpoint_activations=true or "
                "optim.freeze=backbone help"
            )
        elif not self.fits:
            lines.append(
                f"! micro_batch_size={self.configured} does not fit; "
                f"micro_batch_size={self.largest} does, with the same result: workers accumulate"
            )
        else:
            limit = " (all of a worker's share)" if self.largest == self.share else ""
            lines.append(f"largest micro-batch that fits: micro_batch_size={self.largest}{limit}")
        return lines


def worst_batch(
    dataset: CocoDataset, augmentation: AugmentationConfig, num_images: int
) -> WorstBatch:
    """Return the largest micro-batch that augmentation can make of these images.

    Images are padded to the height of the tallest and the width of the widest of them, which may be
    two different images. A single image cannot be both.
    """
    files = {(record.height, record.width): record.path.name for record in dataset.records}
    sizes = [
        (*size, name)
        for (height, width), name in files.items()
        for size in _largest_sizes(height, width, augmentation)
    ]
    tallest, widest = max(sizes), max(sizes, key=lambda size: size[1])
    if num_images == 1:
        tallest = widest = max(sizes, key=lambda size: size[0] * size[1])
    num_boxes = max(len(record.labels) for record in dataset.records)
    return WorstBatch(tallest[0], widest[1], num_boxes, tallest[2], widest[2])


def _largest_sizes(height: int, width: int, config: AugmentationConfig) -> list[tuple[int, int]]:
    """Return (height, width) pairs that bound all augmentations of an image closely.

    No augmented size exceeds all of them in both dimensions.
    """
    sizes = [resized_size(height, width, e, config.max_long_edge) for e in config.short_edges]
    edge = max(config.short_edges)
    for pre_edge in config.crop_pre_short_edges if config.crop else ():
        whole = resized_size(height, width, pre_edge, MAX_LONG_EDGE_BEFORE_CROP)
        (low_h, high_h), (low_w, high_w) = (
            (min(config.crop_min, side), min(config.crop_max, side)) for side in whole
        )
        for long, short, is_tall in ((high_h, low_w, True), (high_w, low_h, False)):
            ratio = long / short
            if ratio < 1:  # no crop has this orientation
                continue
            # Where the long edge would be too long, the short one is rounded. So the long edge can
            # exceed its limit by half a pixel times the ratio; see `resized_size`.
            longest = min(int(edge * ratio), int(config.max_long_edge + 0.5 * ratio))
            sizes.append((longest, edge) if is_tall else (edge, longest))
    return sizes


def suggest_micro_batch(run: Run, device: str, echo: Callable[[str], None]) -> Suggestion:
    """Measure two sizes of the worst micro-batch, then the largest that should fit.

    Args:
        device: cuda or cpu, of this machine.
        echo: receives a line for each measurement, since one may take minutes on a CPU.

    Raises:
        RuntimeError: a probe failed for another reason than too little memory.
    """
    config = run.config
    share = -(-config.total_batch_size // config.cluster.num_workers)
    configured = min(config.micro_batch_size, share)
    # All batch sizes use the same padded size, that of several images, so that they lie on a line.
    worst = worst_batch(run.train_set, config.data.augmentation, share)
    usable = int(free_bytes(device, config.cluster.num_workers) * USABLE[device])
    measured: dict[int, ProbeResult] = {}

    def measure(num_images: int) -> ProbeResult:
        if num_images not in measured:
            echo(f"  measuring {num_images} image{'s' * (num_images > 1)} at a time …")
            measured[num_images] = measure_update(config, worst, num_images, device, usable)
        return measured[num_images]

    def fits(one: ProbeResult) -> bool:
        return one.peak_bytes is not None and one.peak_bytes <= usable

    first, second = measure(1), None
    if fits(first) and share > 1:
        second = measure(max(2, configured))
        if second.peak_bytes is None:
            second = measure(2)
    candidate = 0
    if second is not None and first.peak_bytes is not None and second.peak_bytes is not None:
        slope = (second.peak_bytes - first.peak_bytes) / (second.num_images - 1)
        room = (usable - first.peak_bytes) / slope if slope > 0 else share
        candidate = max(1, min(share, 1 + int(room)))
        if candidate > second.num_images:
            slowest = int(MAX_MEASURE_S * second.num_images / max(second.seconds, 1e-9))
            candidate = max(second.num_images, min(candidate, slowest))
    elif second is not None:
        candidate = second.num_images - 1
    for _ in range(MAX_TRIES):
        if candidate < 1 or fits(measure(candidate)):
            break
        candidate = min(candidate - 1, int(0.9 * candidate))
    good = [size for size, one in measured.items() if fits(one)]
    return Suggestion(
        device,
        worst,
        configured,
        usable,
        [measured[size] for size in sorted(measured)],
        max(good, default=0),
        share,
    )


def free_bytes(device: str, num_workers: int) -> int:
    """Return the free memory for one worker: that of a GPU, or its share of this machine's."""
    if device == "cuda":
        # In a separate process: the query creates a CUDA context, which holds memory until exit.
        code = "import torch; print(torch.cuda.mem_get_info(0)[0])"
        query = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        if query.returncode != 0:
            raise RuntimeError(
                f"the free memory of the GPU could not be read:\n{query.stderr[-2000:]}"
            )
        return int(query.stdout)
    memory = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    # Linux's own estimate of what is available without swapping.
    free = int(memory["MemAvailable"].split()[0]) * 1024
    limit, used = Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")
    if limit.exists() and used.exists() and (text := limit.read_text().strip()) != "max":
        free = min(free, int(text) - int(used.read_text()))
    return max(0, free) // num_workers


def measure_update(
    config: RunConfig, worst: WorstBatch, num_images: int, device: str, limit_bytes: int
) -> ProbeResult:
    """Measure one update with the worst micro-batch, in a separate process.

    Args:
        limit_bytes: memory limit of the process on a CPU, so that the probe cannot cause other
            processes of the machine to be killed.

    Raises:
        RuntimeError: it failed for another reason than too little memory.
    """
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(
        target=_probe, args=(sender, config, worst, num_images, device, limit_bytes)
    )
    process.start()
    sender.close()
    result: ProbeResult | None = None
    try:
        result = receiver.recv()
    except EOFError:  # it ended without an answer
        pass
    finally:
        process.join()
    if result is None and process.exitcode == -9:  # the kernel's OOM killer
        return ProbeResult(num_images, None)
    if result is None:
        raise RuntimeError(f"the memory probe failed (exit code {process.exitcode}); see above")
    return result


def _probe(
    sender: Connection,
    config: RunConfig,
    worst: WorstBatch,
    num_images: int,
    device: str,
    limit_bytes: int,
) -> None:
    """Send the result for `measure_update`, from the probe's own process."""
    if device == "cpu":
        torch.set_num_threads(max(1, int(config.cluster.cpus_per_worker)))
        resource.setrlimit(resource.RLIMIT_DATA, (limit_bytes, limit_bytes))
    try:
        seconds = _update_once(config, worst, num_images, torch.device(device))
    except (RuntimeError, MemoryError) as error:
        is_memory = isinstance(error, (MemoryError, torch.cuda.OutOfMemoryError))
        if not is_memory and not any(t in str(error) for t in ("allocate memory", "bad_alloc")):
            raise
        sender.send(ProbeResult(num_images, None))
        return
    if device == "cuda":
        peak_bytes = torch.cuda.max_memory_allocated()
    else:  # the peak of this process alone; getrusage includes that of its parent at the fork
        status = dict(
            line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines()
        )
        peak_bytes = int(status["VmHWM"].split()[0]) * 1024
    sender.send(ProbeResult(num_images, peak_bytes, seconds))


def _update_once(
    config: RunConfig, worst: WorstBatch, num_images: int, device: torch.device
) -> float:
    """Run an update with the worst micro-batch as in training; return its seconds."""
    torch.manual_seed(0)
    model = make_detector(without_download(config.model))
    freeze(model, config.optim.freeze)
    model.to(device)
    averaged = AveragedModel(model) if config.ema_decay is not None else None
    optimizer = make_optimizer(model, config.optim)
    gradients = None
    if config.optim.exact_sum:
        gradients = GradientSum(trainable(model.parameters()), 1, accumulates=True)
    criterion = make_criterion(config.criterion, config.model)
    num_classes = config.model.num_classes
    small = _noise(1, WARM_UP_PX, WARM_UP_PX, 1, num_classes)
    batch = _noise(num_images, worst.height_px, worst.width_px, worst.num_boxes, num_classes)

    def update(micro_batches: list[Batch]) -> None:
        train_step(
            model,
            criterion,
            micro_batches,
            optimizer,
            num_boxes=sum(batch.num_boxes for batch in micro_batches),
            seeds=[0] * len(micro_batches),
            max_grad_norm=config.optim.max_grad_norm,
            precision=AUTOCAST[config.precision],
            device=device,
            gradients=gradients,
        )
        if averaged is not None:
            averaged.update_parameters(model)
        if device.type == "cuda":
            torch.cuda.synchronize()

    update([small])
    began_s = time.perf_counter()
    # With gradients of an earlier micro-batch, as when a worker accumulates.
    update([small, batch])
    return time.perf_counter() - began_s


def _noise(num_images: int, height: int, width: int, num_boxes: int, num_classes: int) -> Batch:
    """Return B images of noise, each with `num_boxes` boxes."""
    centres = 0.3 + 0.4 * torch.rand(num_boxes, 2)
    target = Target(
        boxes=torch.cat([centres, 0.1 + 0.4 * torch.rand(num_boxes, 2)], 1),
        labels=torch.randint(num_classes, (num_boxes,)),
    )
    images = [torch.randn(3, height, width) for _ in range(num_images)]
    return pad_batch(images, [target] * num_images)
