"""The machine: its facts, its package versions, and the meters that a measurement reads."""

import contextlib
import ctypes
import functools
import gc
import importlib.metadata
import json
import math
import os
import platform
import subprocess
from collections.abc import Iterator
from pathlib import Path

import psutil
import pynvml
import torch

PACKAGES = ("quantbench", "torch", "transformers", "accelerate", "bitsandbytes", "torchao", "llama-cpp-python")
IDLE_S = {"cpu": 0.25, "cuda": 1.0}  # how long it is watched before it is measured: NVML looks back up to a second
THROTTLE = {  # nvmlClocksEventReasons: why a GPU runs below its clocks; the ones that make a number unfair
    0x04: "power cap", 0x08: "hardware slowdown", 0x20: "thermal, software", 0x40: "thermal, hardware",
    0x80: "power brake"}


def facts() -> dict:
    """What this machine is: CPU, cores, RAM and, where there is one, the GPU. Plain JSON, no changing readings."""
    return _hardware() | {"torch_threads": torch.get_num_threads()}  # which a person may set at any time


@functools.cache
def _hardware() -> dict:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    allowed = group_limits()
    found = {"cpu": _cpu_name(), "cores": math.ceil(min(cores, allowed["cores"])),
             "ram_bytes": min(psutil.virtual_memory().total, allowed["bytes"]),
             "os": f"{platform.system()} {platform.machine()}",
             "gpu_visible": os.environ.get("CUDA_VISIBLE_DEVICES"),  # where set: which GPUs, or parts (MIG)
             "dynamic_int8": bool({"x86", "fbgemm", "qnnpack"} & set(torch.backends.quantized.supported_engines))}
    if not torch.cuda.is_available():
        return found
    gpu, limit = torch.cuda.get_device_properties(0), _nvml(pynvml.nvmlDeviceGetEnforcedPowerLimit)
    return found | {
        "gpu": gpu.name, "gpu_count": torch.cuda.device_count(), "gpu_bytes": gpu.total_memory,
        "gpu_capability": [gpu.major, gpu.minor], "gpu_multiprocessors": gpu.multi_processor_count,
        "cuda": torch.version.cuda, "gpu_power_limit_w": limit and limit / 1000,
        "driver": _nvml(lambda _: pynvml.nvmlSystemGetDriverVersion())}


@functools.cache
def versions() -> dict[str, str | None]:
    """Python, the packages that a number depends on and this package's commit; a missing package is left out."""
    found = {"python": platform.python_version(), "commit": _commit()}
    for package in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return found | {"torch": torch.__version__}  # with its build: +cpu, +cu128


def synchronize(device: str) -> None:
    """Wait until everything queued on `device` has run, so that a clock read after it is true."""
    for gpu in used_gpus() if device == "cuda" else ():
        torch.cuda.synchronize(gpu)


def used_gpus() -> list[int]:
    """The GPUs that this process holds memory on, and the first."""
    return [gpu for gpu in range(torch.cuda.device_count()) if gpu == 0 or torch.cuda.memory_reserved(gpu)]


def held_bytes(device: str) -> int:
    """Bytes this process holds now: allocated by torch on a GPU, resident on a CPU."""
    if device == "cuda":
        return sum(map(torch.cuda.memory_allocated, used_gpus()))
    return psutil.Process().memory_info().rss


def device_bytes(gpus: int = 1) -> int | None:
    """Bytes in use on the whole of so many GPUs, by every process and CUDA's contexts; None without a GPU."""
    if not torch.cuda.is_available():
        return None
    return sum(total - free for free, total in map(torch.cuda.mem_get_info, range(gpus)))


def free_bytes(device: str, gpus: int = 1) -> int:
    """Bytes that this process can still allocate: on so many GPUs, or of RAM within its container's limit."""
    if device == "cuda":
        return sum(torch.cuda.mem_get_info(gpu)[0] + torch.cuda.memory_reserved(gpu) - torch.cuda.memory_allocated(gpu)
                   for gpu in range(gpus))
    return min(psutil.virtual_memory().available, group_limits()["free"])


def group_limits(root: Path = Path("/")) -> dict[str, float]:
    """What this process's control groups (cgroups(7), both versions) allow: `bytes` of memory, those that are `free`,
    and `cores`; infinite where nothing is limited. The smallest limit up the tree holds. `root` is the root folder."""
    found = dict.fromkeys(("bytes", "free", "cores"), math.inf)
    for group in _groups(root):
        for limit, used in ("memory.max", "memory.current"), ("memory.limit_in_bytes", "memory.usage_in_bytes"):
            with contextlib.suppress(OSError, ValueError):  # not there, or "max"
                found["bytes"] = min(found["bytes"], most := int((group / limit).read_text()))
                cache = int((group / "memory.stat").read_text().split("inactive_file ")[-1].split()[0])
                found["free"] = min(found["free"], max(most - int((group / used).read_text()) + cache, 0))
        for names in ("cpu.max",), ("cpu.cfs_quota_us", "cpu.cfs_period_us"):
            with contextlib.suppress(OSError, ValueError):
                quota, period = map(int, " ".join((group / name).read_text() for name in names).split())
                found["cores"] = min(found["cores"], quota / period if quota > 0 else math.inf)
    return found


def _groups(root: Path) -> Iterator[Path]:
    """The folders of this process's groups and all above; to a container, its own is the top."""
    with contextlib.suppress(OSError):
        for line in (root / "proc/self/cgroup").read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            for name in controllers.split(",") if controllers else ("", "unified"):
                top = root / "sys/fs/cgroup" / name
                own = top / path.strip("/")
                yield from (one for one in (own, *own.parents) if one.is_relative_to(top))


def reset_peak(device: str) -> bool:
    """Start a new peak from what is held now. False where the system cannot (then there is no peak to read)."""
    for gpu in used_gpus() if device == "cuda" else ():
        torch.cuda.reset_peak_memory_stats(gpu)
    with contextlib.suppress(OSError):
        if device == "cpu":
            Path("/proc/self/clear_refs").write_text("5")  # Linux: the peak resident size; see proc(5)
        return True
    return False


def peak_bytes(device: str) -> int:
    """Most bytes held since `reset_peak`: allocated by torch, each GPU at its own peak; resident on a CPU (Linux)."""
    if device == "cuda":
        return sum(map(torch.cuda.max_memory_allocated, used_gpus()))
    return 1024 * int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0])


def release(device: str) -> None:
    """Free what nothing holds and give it back, cuBLAS's workspaces included, so that the next model starts clean. Not
    in an except clause: the traceback holds what was allocated."""
    gc.collect()
    if device == "cuda":
        synchronize(device)
        torch._C._cuda_clearCublasWorkspaces()  # no public call; they are allocated through torch and stay counted
        torch.cuda.empty_cache()
    elif platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).malloc_trim(0)  # glibc keeps what was freed, and the next peak would start above it


def out_of_memory(error: BaseException) -> str | None:
    """The reason for a row if `error` says that memory ran out, on a GPU or a CPU; None for any other error."""
    said = str(error).split("\n")[0]
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return said or "out of memory"
    told = ("DefaultCPUAllocator", "CUDA out of memory", "unable to mmap", "Cannot allocate memory")
    return said if any(words in said for words in told) else None


def need_memory(needed: int, free: int, what: str) -> None:
    """Raise MemoryError, with both figures, if `needed` bytes are more than are `free`."""
    if needed > free:
        raise MemoryError(f"{what} would need about {needed:,} bytes, and {free:,} are free: not tried")


def readings(device: str, watch_s: float = 0.0) -> dict:
    """What the machine is doing now, as plain JSON; watched for `watch_s` seconds while we do nothing, `cpu_busy` is
    what others take of all cores (0 to 1)."""
    found: dict = {"load_average": os.getloadavg()[0] if hasattr(os, "getloadavg") else None}
    if watch_s:
        found["cpu_busy"] = psutil.cpu_percent(watch_s) / 100
    if device == "cpu":
        return found
    reasons = _nvml(pynvml.nvmlDeviceGetCurrentClocksThrottleReasons)
    return found | {
        "gpu_busy": gpus_busy(1)[0],
        "sm_mhz": _nvml(lambda gpu: pynvml.nvmlDeviceGetClockInfo(gpu, pynvml.NVML_CLOCK_SM)),
        "memory_mhz": _nvml(lambda gpu: pynvml.nvmlDeviceGetClockInfo(gpu, pynvml.NVML_CLOCK_MEM)),
        "celsius": _nvml(lambda gpu: pynvml.nvmlDeviceGetTemperature(gpu, pynvml.NVML_TEMPERATURE_GPU)),
        "throttled": None if reasons is None else [why for bit, why in THROTTLE.items() if reasons & bit]}


def energy_j(device: str, gpus: int = 1) -> float | None:
    """Joules that so many GPUs have used since some start; only differences mean anything. None on a CPU, and on a
    part of a GPU (MIG): the counter is the whole GPU's."""
    if device == "cpu" or any(_nvml(pynvml.nvmlDeviceGetMigMode) or ()):
        return None
    found = [_nvml(pynvml.nvmlDeviceGetTotalEnergyConsumption, gpu) for gpu in range(gpus)]
    return None if None in found else sum(found) / 1000


def gpus_busy(gpus: int) -> list[float | None]:
    """Of each GPU the share of the last moments (NVML: up to a second) in which a kernel ran."""
    return [_nvml(lambda gpu: pynvml.nvmlDeviceGetUtilizationRates(gpu).gpu / 100, gpu) for gpu in range(gpus)]


def _nvml(read, gpu: int = 0):
    """What `read` gives for one of this process's GPUs; None where NVML cannot tell."""
    with contextlib.suppress(pynvml.NVMLError):
        return read(_gpu(gpu))
    return None


@functools.cache
def _gpu(number: int):
    pynvml.nvmlInit()
    uuid = getattr(torch.cuda.get_device_properties(number), "uuid", None)  # CUDA may number the GPUs differently
    for kind in ("GPU", "MIG") if uuid else ():
        with contextlib.suppress(pynvml.NVMLError):
            return pynvml.nvmlDeviceGetHandleByUUID(f"{kind}-{uuid}")
    return pynvml.nvmlDeviceGetHandleByIndex(number)


def _commit() -> str | None:
    """The commit these files were installed from (PEP 610), or their checkout's: not of one where they lie ignored."""
    home = Path(__file__).parent
    with contextlib.suppress(importlib.metadata.PackageNotFoundError, OSError, LookupError):
        found = importlib.metadata.distribution("quantbench")
        if home.samefile(found.locate_file("quantbench")):
            return json.loads(found.read_text("direct_url.json") or "{}")["vcs_info"]["commit_id"]
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        for asked in "git ls-files --error-unmatch machine.py", "git describe --always --dirty --abbrev=40":
            said = subprocess.check_output(asked.split(), cwd=home, stderr=subprocess.DEVNULL, text=True, timeout=10)
        return said.strip() or None
    return None


def _cpu_name() -> str:
    """The processor's name; one without a number ("AMD EPYC" of any year) with its family and model."""
    with contextlib.suppress(OSError, LookupError):
        lines = (line.split(":", 1) for line in Path("/proc/cpuinfo").read_text().split("\n\n")[0].splitlines())
        told = {name.strip(): value.strip() for name, value in lines}
        hidden = not any(map(str.isdigit, told["model name"]))
        return told["model name"] + hidden * f" (family {told.get('cpu family')}, model {told.get('model')})"
    return platform.processor() or platform.machine() or "unknown CPU"
