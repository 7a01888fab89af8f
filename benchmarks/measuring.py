"""Measure time, memory and bandwidth; shared by all benchmarks."""

from __future__ import annotations

import ctypes
import platform
import time
from collections.abc import Callable
from pathlib import Path

import torch


def timed(call: Callable[[], object], device: torch.device) -> float:
    synchronize(device)
    began = time.perf_counter()
    call()
    synchronize(device)
    return time.perf_counter() - began


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def peak_memory(call: Callable[[], object], device: torch.device) -> float:
    """Return the peak bytes of a call: of the GPU, or of this process (on Linux; else NaN)."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        return torch.cuda.max_memory_allocated(device) - before
    reset = Path("/proc/self/clear_refs")
    if not reset.exists():
        call()
        return float("nan")
    ctypes.CDLL(None).malloc_trim(0)  # memory freed by earlier calls would be reused and not count
    reset.write_text("5")  # resets the peak
    before = resident("VmRSS")
    call()
    return resident("VmHWM") - before


def resident(what: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * float(line.split()[1]) for line in lines if line.startswith(what))


def measure_bandwidth(device: torch.device) -> float:
    """Return the bytes per second, read and written, of a copy too large for the caches."""
    source = torch.ones(1 << 26 if device.type == "cpu" else 1 << 29, device=device)
    target = torch.empty_like(source)
    target.copy_(source)
    return 2 * source.nbytes / min(timed(lambda: target.copy_(source), device) for _ in range(5))


def processor() -> str:
    information = Path("/proc/cpuinfo")
    if information.exists():
        for line in information.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
