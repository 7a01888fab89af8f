"""The function that each Ray Train worker runs.

The driver imports this file too, and nothing of torch, so what the training needs is imported where
it is used.
"""

from __future__ import annotations

import logging
import math
import socket
import time
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ray
import ray.train

from deta.platform.run.fence import FencedOffError
from deta.platform.run.run import FAILURES
from deta.platform.system.atomic_write import write_json

if TYPE_CHECKING:
    from deta.platform.run.run import Run

LOOK_EVERY_S = 0.05


def train_worker(settings: dict[str, Any]) -> None:
    """Train as one worker of a Ray Train group, from the run's newest checkpoint on.

    Args:
        settings: `cpus` of this worker, and `run`, a reference to the run. Or `folder_file`, of
            workers that start while the data are still checked: a file that appears once the run
            may begin, with its folder.
    """
    context = ray.train.get_context()
    rank, world_size = context.get_world_rank(), context.get_world_size()
    try:
        _train(settings, rank, world_size)
    except FencedOffError:  # another worker group has taken over the run
        raise
    except Exception as error:
        _write_failure(_folder(settings), rank, world_size, error)
        raise


def _train(settings: dict[str, Any], rank: int, world_size: int) -> None:
    # The slow part of the start, before the run is waited for.
    import torch

    from deta.platform.cluster.metrics_export import RayExport
    from deta.platform.learning.distributed import Worker, control_group
    from deta.platform.learning.numerics import configure_numerics
    from deta.platform.run.dataset_snapshot import read_run_snapshot
    from deta.platform.training.loop import train
    from deta.platform.training.run_metrics import WorkerMeter

    logging.basicConfig(level=logging.WARNING)
    folder = _folder(settings)
    run: Run = ray.get(settings["run"]) if "run" in settings else read_run_snapshot(folder)
    configure_numerics(run.config.precision, deterministic=run.config.deterministic)
    device = torch.device("cpu")
    if run.config.cluster.gpu:
        from ray.train.torch import get_device  # slow: it imports torch's sharding

        require_gpu()
        device = get_device()
        torch.cuda.set_device(device)
    control = control_group(world_size, device)
    worker = Worker(rank, world_size, device, control, num_cpus=settings["cpus"])
    meter = WorkerMeter(RayExport(run.config.name), rank, on_gpu=device.type == "cuda")
    train(
        run,
        worker,
        on_evaluation=_report,
        is_preemption_announced=lambda: ray.train.get_preemption_info() is not None,
        on_step=meter,
    )


def _folder(settings: dict[str, Any]) -> Path:
    """Return the folder of the run; wait until it may begin."""
    if "run" in settings:
        run: Run = ray.get(settings["run"])
        return run.folder
    path = Path(settings["folder_file"])
    while not path.exists():
        time.sleep(LOOK_EVERY_S)
    return Path(path.read_text(encoding="utf-8"))


def _report(metrics: dict[str, float]) -> None:
    # Ray ranks by these and stores them as JSON: a value that is not finite breaks its restart.
    ray.train.report({name: value for name, value in metrics.items() if math.isfinite(value)})


def require_gpu() -> None:
    """Refuse to train on the CPU of a node whose GPUs Ray counts and PyTorch cannot use.

    Raises:
        ValueError: says why, as far as PyTorch knows.
    """
    import torch

    if torch.cuda.is_available():
        return
    if torch.version.cuda is None:
        why = f"PyTorch {torch.__version__} was built without CUDA; install a build with it"
    else:
        try:
            torch.cuda.init()
            why = "no device is visible; look at nvidia-smi and CUDA_VISIBLE_DEVICES"
        except (RuntimeError, AssertionError) as error:  # such as a driver that is too old
            why = str(error)
    raise ValueError(
        f"Ray gives this worker a GPU of {socket.gethostname()}, but PyTorch finds none: {why}. To "
        "train on CPUs, set cluster.gpu=false"
    )


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether a GPU or the host had too little memory, whoever says so."""
    import torch

    text = str(error).lower()
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or any(
        words in text for words in ("out of memory", "alloc_failed", "can't allocate memory")
    )


def _write_failure(folder: Path, rank: int, world_size: int, error: Exception) -> None:
    """Write the error for the supervisor, which may be on another machine and not see it."""
    import torch.distributed as dist

    # Errors of the input, the configuration or the code repeat with every retry. An error of any
    # type that a worker raises after Ray has ended its group (for example a lost node) does not.
    kinds = (ValueError, FloatingPointError, TypeError, KeyError)
    is_alone = world_size > 1 and not dist.is_initialized()
    message = str(error)
    needs_memory = is_out_of_memory(error)
    if needs_memory:
        message += "\nLower micro_batch_size; the total batch stays the same. --probe finds a size."
    failure = {
        "rank": rank,
        "type": type(error).__name__,
        "message": message,
        "comes_again": needs_memory or (isinstance(error, kinds) and not is_alone),
        "traceback": traceback.format_exc(),
    }
    try:
        (folder / FAILURES).mkdir(exist_ok=True)
        write_json(folder / FAILURES / f"rank-{rank}.json", failure)
    except OSError:  # a full disk; Ray has the error too
        logging.getLogger(__name__).exception("the failure could not be written")
