"""Explain why a loader worker died, with the cause and a remedy."""

from __future__ import annotations

import os
import shutil
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

EXIT_CODE_WITHIN_S = 3.0
SHARED_MEMORY = Path("/dev/shm")
# How PyTorch's errors about workers begin, and how it and the kernel report a lack of memory.
WORKER_ERRORS = ("DataLoader worker", "Pin memory thread")
NO_SHARED_MEMORY = ("No space left on device", "shared memory", "unable to write to file </torch")

FEWER_WORKERS = "use fewer of them (data.loader_workers), or a smaller micro_batch_size"
CAUSES: dict[int, str] = {
    signal.SIGKILL: (
        "was killed (SIGKILL), usually by the kernel for lack of memory: "
        f"see `dmesg`; {FEWER_WORKERS}"
    ),
    signal.SIGBUS: (
        f"found no space in {SHARED_MEMORY} for its batch (SIGBUS): enlarge it "
        "(docker run --shm-size=8g; in Kubernetes an emptyDir of medium Memory), or "
        f"{FEWER_WORKERS}"
    ),
    signal.SIGSEGV: (
        "crashed (SIGSEGV), perhaps while decoding an image: data.loader_workers=0 shows where"
    ),
    signal.SIGTERM: "was terminated (SIGTERM) by something outside the training",
}


class LoaderWorkerError(RuntimeError):
    """A loader worker died or could not send its batch; the message gives the reason."""


@contextmanager
def restore_signal_handler() -> Iterator[None]:
    """Restore the SIGCHLD handler after creating a `DataLoader`'s iterator.

    PyTorch sets its own handler when a loader is created in the main thread. If a loader worker
    dies, that handler raises in whatever the thread is doing, for example saving a checkpoint.
    Without it, the error is raised when the next batch is requested.
    """
    before = signal.getsignal(signal.SIGCHLD)
    try:
        yield
    finally:
        if threading.current_thread() is threading.main_thread() and before is not None:
            signal.signal(signal.SIGCHLD, before)  # None: the handler was not set by Python


def explain_worker_errors(batches: Iterator[Any]) -> Iterator[Any]:
    """Yield the batches; add cause and remedy to errors about loader workers.

    PyTorch notices a dead worker within five seconds of waiting and reports "exited unexpectedly".

    Raises:
        LoaderWorkerError: a loader worker died, or has no memory to send its batches.
    """
    try:
        yield from batches
    except (RuntimeError, OSError, EOFError) as error:
        text = str(error)
        # A worker that dies while sending leaves a truncated message.
        truncated = isinstance(error, EOFError | ConnectionError | FileNotFoundError)
        # "Caught": raised in a loader worker while it made a batch.
        died = text.startswith(WORKER_ERRORS) or (truncated and not text.startswith("Caught "))
        cause = _describe_exit(batches) if died else None
        if cause is None and any(part in text for part in NO_SHARED_MEMORY):
            cause = (
                f"a loader worker cannot send its batch ({text.splitlines()[-1]}): "
                f"{SHARED_MEMORY} is too small; enlarge it, or {FEWER_WORKERS}"
            )
        if cause is None:
            raise
        raise LoaderWorkerError(f"{cause}. {_free_memory()}") from error


def _describe_exit(batches: Iterator[Any]) -> str | None:
    """Describe the exit of the first loader worker that failed, or return None."""
    workers = getattr(batches, "_workers", ())  # PyTorch has no public name for them
    deadline_s = time.monotonic() + EXIT_CODE_WITHIN_S
    while not any(worker.exitcode for worker in workers) and time.monotonic() < deadline_s:
        time.sleep(0.05)  # the pipe closes before the exit code is known
    for worker in workers:
        code = worker.exitcode
        if code is not None and code < 0:
            how = CAUSES.get(-code, f"was killed by signal {-code}")
            return f"loader worker {worker.pid} {how}"
        if code:
            return (
                f"loader worker {worker.pid} exited with code {code}; its output shows the reason"
            )
    return None


def _free_memory() -> str:
    """Return the free memory now, since it will have changed when somebody reads the message."""
    usage = shutil.disk_usage(SHARED_MEMORY)
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return (
        f"Free now: {usage.free >> 20} of {usage.total >> 20} MB in {SHARED_MEMORY}, "
        f"{free >> 20} MB of memory."
    )
