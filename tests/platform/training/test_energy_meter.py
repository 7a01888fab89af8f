"""The energy of GPUs, as their driver measures it."""

from __future__ import annotations

import time

import pytest
import torch

from deta.platform.training.energy_meter import EnergyMeter


def test_energy_is_none_without_a_driver():
    for uuids in ([], ["GPU-00000000-0000-0000-0000-000000000000"]):
        with EnergyMeter(uuids) as meter:
            assert meter.kwh() is None
        assert meter.kwh() is None


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_busy_gpu_uses_energy():
    uuid = f"GPU-{torch.cuda.get_device_properties(0).uuid}"
    with EnergyMeter([uuid]) as meter:
        end_s = time.monotonic() + 2
        while time.monotonic() < end_s:
            x = torch.randn(4096, 4096, device="cuda")
            (x @ x).sum().item()
    kwh = meter.kwh()
    assert kwh is not None
    assert 1e-5 < kwh < 1e-2  # 2 s at 18 W to 18 kW
