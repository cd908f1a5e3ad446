"""The energy counter of an NVIDIA GPU, through NVML (package nvidia-ml-py, optional).

Volta and later count joules since the driver was loaded; older GPUs have no counter, and their
momentary power is not integrated here.
"""

from __future__ import annotations

import importlib
from typing import Any

from offramp.controller.costs.readings import EnergyMethod, EnergyReading


class NvmlSource:
    """The energy counter of one GPU.

    Args:
        nvml: The module ``pynvml``, initialised.
        index: Number of the GPU.
    """

    def __init__(self, nvml: Any, index: int) -> None:
        self.nvml = nvml
        self.index = index
        self.handle = nvml.nvmlDeviceGetHandleByIndex(index)
        self.start()  # refuses now, if at all

    def start(self) -> int:
        """Millijoules since the driver was loaded."""
        return int(self.nvml.nvmlDeviceGetTotalEnergyConsumption(self.handle))

    def stop(self, before: int, window_s: float) -> EnergyReading:
        """What the GPU took since; shared if other processes compute on it now."""
        users = len(self.nvml.nvmlDeviceGetComputeRunningProcesses(self.handle))
        alone = users <= 1
        return EnergyReading(
            joules=(self.start() - before) * 1e-3,
            method=EnergyMethod.MEASURED_DEVICE if alone else EnergyMethod.MEASURED_SHARED,
            source="NVML total energy",
            scope=f"GPU {self.index}",
            window_s=window_s,
        )


def open_nvml(index: int = 0) -> tuple[NvmlSource | None, str]:
    """A GPU's counter, or None and why there is none."""
    try:
        nvml = importlib.import_module("pynvml")
    except ImportError:
        return None, "nvidia-ml-py is not installed"
    try:
        nvml.nvmlInit()
        return NvmlSource(nvml, index), ""
    except nvml.NVMLError as error:
        return None, f"NVML has no energy counter of GPU {index} ({error})"
