"""Why a loader worker died, in words a person can act on."""

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

SEEN_DEAD_WITHIN_S = 3.0
SHARED_MEMORY = Path("/dev/shm")
# How PyTorch begins its errors about workers, and how it and the kernel call a lack of memory.
WORKER_ERRORS = ("DataLoader worker", "Pin memory thread")
NO_SHARED_MEMORY = ("No space left on device", "shared memory", "unable to write to file </torch")

FEWER_WORKERS = "use fewer of them (data.loader_workers), or a smaller micro_batch_size"
CAUSES: dict[int, str] = {
    signal.SIGKILL: (
        "was killed (SIGKILL), mostly by the kernel for lack of memory: "
        f"see `dmesg`; {FEWER_WORKERS}"
    ),
    signal.SIGBUS: (
        f"found no space in {SHARED_MEMORY} for its batch (SIGBUS): enlarge it "
        "(docker run --shm-size=8g; in Kubernetes an emptyDir of medium Memory), or "
        f"{FEWER_WORKERS}"
    ),
    signal.SIGSEGV: (
        "crashed (SIGSEGV), perhaps while decoding a picture: data.loader_workers=0 shows where"
    ),
    signal.SIGTERM: "was told to end (SIGTERM) by something outside the training",
}


class LoaderWorkerError(RuntimeError):
    """A loader worker died or could not hand over its batch; the message says why."""


@contextmanager
def undisturbed_by_the_dead() -> Iterator[None]:
    """Making a `DataLoader`'s iterator in here leaves no signal handler behind.

    PyTorch's own handler, which it sets where a loader is made in the main thread, raises in
    whatever that thread is doing when a loader worker dies: in the middle of a checkpoint, say.
    Without it the error comes where the next batch is asked for.
    """
    in_main_thread = threading.current_thread() is threading.main_thread()
    before = signal.getsignal(signal.SIGCHLD) if in_main_thread else None
    try:
        yield
    finally:
        if before is not None:  # none: set by something that is not Python
            signal.signal(signal.SIGCHLD, before)


def naming_the_dead(batches: Iterator[Any]) -> Iterator[Any]:
    """The same batches; an error about the loader workers comes with its cause and a remedy.

    PyTorch notices within five seconds of waiting, and says "exited unexpectedly".

    Raises:
        LoaderWorkerError: a loader worker died, or has no memory to hand over its batches.
    """
    try:
        yield from batches
    except (RuntimeError, OSError, EOFError) as error:
        text = str(error)
        if text.startswith("Caught "):  # by a loader worker, while it made a batch
            died = False
        else:  # what arrives from one that dies on the way ends early
            broken_off = isinstance(error, EOFError | ConnectionError | FileNotFoundError)
            died = broken_off or text.startswith(WORKER_ERRORS)
        what = _how_they_ended(batches) if died else None
        if what is None and any(part in text for part in NO_SHARED_MEMORY):
            what = (
                f"a loader worker cannot hand over its batch ({text.splitlines()[-1]}): "
                f"{SHARED_MEMORY} is too small; enlarge it, or {FEWER_WORKERS}"
            )
        if what is None:
            raise
        raise LoaderWorkerError(f"{what}. {_memory()}") from error


def _how_they_ended(batches: Iterator[Any]) -> str | None:
    """Of the first loader worker that did not end well, if any did not."""
    workers = getattr(batches, "_workers", ())  # PyTorch has no public name for them
    deadline_s = time.monotonic() + SEEN_DEAD_WITHIN_S
    while not any(worker.exitcode for worker in workers) and time.monotonic() < deadline_s:
        time.sleep(0.05)  # its pipe closes before its exit code is known
    for worker in workers:
        code = worker.exitcode
        if code is not None and code < 0:
            cause = CAUSES.get(-code, f"was ended by signal {-code}")
            return f"loader worker {worker.pid} {cause}"
        if code:
            return f"loader worker {worker.pid} exited with code {code}; its output says why"
    return None


def _memory() -> str:
    """What is free here now, for it is gone when somebody looks."""
    parts = []
    if SHARED_MEMORY.is_dir():
        usage = shutil.disk_usage(SHARED_MEMORY)
        parts.append(f"{usage.free >> 20} of {usage.total >> 20} MB in {SHARED_MEMORY}")
    if hasattr(os, "sysconf") and "SC_AVPHYS_PAGES" in os.sysconf_names:
        free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        parts.append(f"{free >> 20} MB of memory")
    return f"Free now: {', '.join(parts)}." if parts else ""
