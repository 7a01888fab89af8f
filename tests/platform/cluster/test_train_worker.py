"""A worker writes why it failed, and whether a retry would fail again."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

pytest.importorskip("ray")

import torch

from deta.platform.cluster import train_worker


@pytest.mark.parametrize(
    ("error", "world_size", "repeats"),
    [
        (ValueError("no such column"), 1, True),
        (ValueError("of a group that Ray has ended"), 2, False),
        (RuntimeError("connection closed"), 1, False),
    ],
)
def test_a_failure_is_permanent_if_it_is_of_the_input(tmp_path: Path, error, world_size, repeats):
    train_worker._write_failure(tmp_path, 3, world_size, error)
    (path,) = (tmp_path / train_worker.FAILURES).iterdir()
    assert path.name == "rank-3.json"
    failure = json.loads(path.read_text())
    assert failure["comes_again"] is repeats
    assert failure["message"] == str(error)


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB"),
        RuntimeError("CUDA error: out of memory"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("NCCL error: unhandled cuda error. Cuda failure 2 'out of memory'"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:121] . DefaultCPUAllocator: can't allocate "
                     "memory: you tried to allocate 4096000000000 bytes"),
        MemoryError(),
    ],
)  # fmt: skip
def test_too_little_memory_of_any_kind_ends_once_with_advice(tmp_path: Path, error: Exception):
    train_worker._write_failure(tmp_path, 1, 2, error)
    (path,) = (tmp_path / train_worker.FAILURES).iterdir()
    failure = json.loads(path.read_text())
    assert failure["comes_again"]
    assert "Lower micro_batch_size" in failure["message"]


def test_the_real_error_of_this_machine_is_known():
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**50)
    assert train_worker.is_out_of_memory(caught.value)


@pytest.mark.skipif(torch.cuda.is_available(), reason="PyTorch finds a GPU here")
def test_a_gpu_that_only_ray_counts_is_refused_with_the_reason():
    with pytest.raises(ValueError, match=r"Ray gives this .*PyTorch finds none: .+"):
        train_worker.require_gpu()
