"""Readings that change while a cell runs: clocks, temperature, load and energy. Null with a reason where unreadable."""

from __future__ import annotations

import contextlib
import functools
import os
import time
from pathlib import Path

import psutil
import pynvml
import torch

IDLE_S = 0.25
TICK_S = 0.3  # patience for NVML's energy counter, which moves some 10 times a second
THROTTLE = {  # nvmlClocksEventReasons: why a GPU runs below its clocks; the ones that make a number unfair
    0x04: "power cap", 0x08: "hardware slowdown", 0x20: "thermal, software", 0x40: "thermal, hardware",
    0x80: "power brake",
}
RAPL = Path("/sys/class/powercap")


def readings(device: str, idle_s: float = 0.0) -> dict:
    """What the machine is doing now, as plain JSON; with `idle_s`, watched for that long while we do nothing.

    `cpu_busy` is then what others take of all cores (0 to 1), `idle_w` the power in watts without our work, from one
    step of the energy counter to another.
    """
    energy, start = _energy_at_its_step(device) if idle_s else (None, 0.0)
    psutil.cpu_percent()
    time.sleep(idle_s)
    found: dict = {"load_average": os.getloadavg()[0] if hasattr(os, "getloadavg") else None}
    if idle_s:
        found["cpu_busy"] = psutil.cpu_percent() / 100
        after, end = _energy_at_its_step(device)
        found["idle_w"] = None if energy is None or after is None else (after - energy) / (end - start)
    return found | _gpu_readings() if device == "cuda" else found


def energy_j(device: str) -> float | None:
    """Joules that the GPU, or the CPU's packages, have used since some start; only differences mean anything."""
    if device == "cuda":
        return _nvml(lambda gpu: pynvml.nvmlDeviceGetTotalEnergyConsumption(gpu) / 1000)
    try:  # one counter per package; a wrap (hours) shows as a negative difference
        return sum(int((zone / "energy_uj").read_text()) for zone in _packages()) / 1e6 if _packages() else None
    except (OSError, ValueError):
        return None


def _energy_at_its_step(device: str) -> tuple[float | None, float]:
    """`energy_j` and the clock (s) when the counter moves next: read in between, it is up to a step behind."""
    before, until = energy_j(device), time.perf_counter() + TICK_S
    while before is not None and (now := energy_j(device)) == before and time.perf_counter() < until:
        time.sleep(0.002)
    return (None if before is None else now), time.perf_counter()


def no_energy_reason(device: str) -> str | None:
    """Why `energy_j` is None here, or None where it is not."""
    if energy_j(device) is not None:
        return None
    if device == "cuda":
        return "NVML gives no energy counter for this GPU"
    return "RAPL is not readable (it needs root)" if _packages() else "this machine has no RAPL energy counter"


def driver() -> str | None:
    """NVIDIA's driver version."""
    return _nvml(lambda _: pynvml.nvmlSystemGetDriverVersion())


def power_limit_w() -> float | None:
    """The GPU's power limit in watts."""
    return _nvml(lambda gpu: pynvml.nvmlDeviceGetEnforcedPowerLimit(gpu) / 1000)


def _gpu_readings() -> dict:
    reasons = _nvml(pynvml.nvmlDeviceGetCurrentClocksThrottleReasons)
    return {
        "gpu_busy": _nvml(lambda gpu: pynvml.nvmlDeviceGetUtilizationRates(gpu).gpu / 100),
        "sm_mhz": _nvml(lambda gpu: pynvml.nvmlDeviceGetClockInfo(gpu, pynvml.NVML_CLOCK_SM)),
        "memory_mhz": _nvml(lambda gpu: pynvml.nvmlDeviceGetClockInfo(gpu, pynvml.NVML_CLOCK_MEM)),
        "celsius": _nvml(lambda gpu: pynvml.nvmlDeviceGetTemperature(gpu, pynvml.NVML_TEMPERATURE_GPU)),
        "throttled": None if reasons is None else [why for bit, why in THROTTLE.items() if reasons & bit],
    }


def _nvml(read):
    """What `read` gives for this process's GPU; None where NVML cannot tell."""
    with contextlib.suppress(pynvml.NVMLError):
        return read(_gpu())
    return None


@functools.cache
def _gpu():
    pynvml.nvmlInit()
    uuid = getattr(torch.cuda.get_device_properties(0), "uuid", None)  # CUDA may number the GPUs differently
    return pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}") if uuid else pynvml.nvmlDeviceGetHandleByIndex(0)


@functools.cache
def _packages() -> list[Path]:
    return sorted(RAPL.glob("intel-rapl:[0-9]"))
