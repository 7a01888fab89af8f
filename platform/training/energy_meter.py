"""Measures the energy that the GPUs of a node use, with their driver's library (NVML)."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterable
from typing import Any, Self

log = logging.getLogger(__name__)


class EnergyMeter:
    """A meter of the energy that GPUs of this node use.

        with EnergyMeter([uuid]) as meter:
            train()
        meter.kwh()  # None if the driver does not measure it

    Recent NVIDIA GPUs (Volta and later) count millijoules; the power of older ones is sampled every
    few seconds. The value is the energy of the whole board, for all processes that use it. It does
    not include CPUs and cooling. Without a GPU or the package nvidia-ml-py the result is None.
    """

    def __init__(self, device_uuids: Iterable[str], sample_s: float = 2.0) -> None:
        """
        Args:
            device_uuids: names in the driver, "GPU-…"; they do not depend on CUDA's numbering.
        """
        self._wanted = list(device_uuids)
        self._sample_s = sample_s
        self._nvml: Any = None
        self._devices: list[Any] = []
        self._began_mj: list[int] | None = None
        self._sampled_j = 0.0
        self._kwh: float | None = None
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> Self:
        if not self._wanted:
            return self
        try:
            import pynvml  # type: ignore[import-untyped,unused-ignore]

            pynvml.nvmlInit()
        except Exception as error:  # no package or no driver
            log.debug("energy is not measured: %s", error)
            return self
        self._nvml = pynvml
        try:
            self._devices = [pynvml.nvmlDeviceGetHandleByUUID(uuid) for uuid in self._wanted]
            try:
                self._began_mj = self._counters()
            except pynvml.NVMLError:
                self._power_w()  # raises if the driver does not measure power either
                self._thread = threading.Thread(target=self._sample, daemon=True)
                self._thread.start()
        except pynvml.NVMLError as error:
            log.debug("energy is not measured: %s", error)
            self._devices = []
        return self

    def __exit__(self, *_: object) -> None:
        if self._nvml is None:
            return
        self._stop.set()
        if self._thread is not None:
            self._thread.join()
        self._kwh = self.kwh()
        self._devices = []
        self._nvml.nvmlShutdown()
        self._nvml = None

    def kwh(self) -> float | None:
        """Return the energy so far, or the total once the meter is closed; None if unknown."""
        if self._nvml is None or not self._devices:
            return self._kwh
        if self._began_mj is None:
            return self._sampled_j / 3.6e6
        spent_mj = sum(
            now - then for now, then in zip(self._counters(), self._began_mj, strict=True)
        )
        return spent_mj / 3.6e9

    def _counters(self) -> list[int]:
        """Return the millijoules of each device since its driver was loaded."""
        return [self._nvml.nvmlDeviceGetTotalEnergyConsumption(device) for device in self._devices]

    def _power_w(self) -> float:
        return sum(self._nvml.nvmlDeviceGetPowerUsage(device) for device in self._devices) / 1000

    def _sample(self) -> None:
        last_s, last_w = time.monotonic(), self._power_w()
        while True:
            stopped = self._stop.wait(self._sample_s)
            now_s, now_w = time.monotonic(), self._power_w()
            self._sampled_j += (now_s - last_s) * (last_w + now_w) / 2
            last_s, last_w = now_s, now_w
            if stopped:
                return
