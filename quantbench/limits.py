"""What this machine can do at most: how fast it reads memory, and how fast it multiplies matrices, per dtype."""

from __future__ import annotations

import contextlib
import hashlib
import json
import time
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path

import torch
from torch.ao.nn.quantized.dynamic import Linear as DynamicLinear

from quantbench import machine
from quantbench.plain import html_table
from quantbench.weights import cache_folder

READ_BYTES = {"cpu": 2**30, "cuda": 2**32}  # far more than any cache holds
SIZE = {"cpu": 1024, "cuda": 8192}  # rows and columns of the matrices
SPEND_S = 0.3  # on each rate, after its warm-up
ROUNDS = 3  # of the reads, in turn: another program's burst passes meanwhile
DTYPES = ("float32", "float16", "bfloat16", "int8")


class Limits(dict):
    """The measured rates of one device; a notebook shows them as a table."""

    def summary(self) -> dict[str, str]:
        rates = {f"{dtype} products (TFLOP/s)": f"{rate / 1e12:.3g}" for dtype, rate in self["matrix_flops_per_s"].items()}
        return {"Device": self["name"], "Reads (GB/s)": f"{self['read_bytes_per_s'] / 1e9:.4g}"} | rates

    def __repr__(self) -> str:
        return ", ".join(f"{label}: {text}" for label, text in self.summary().items())

    def _repr_html_(self) -> str:
        return html_table([self.summary()])


def limits(device: str | None = None, again: bool = False) -> Limits:
    """The rates of `device` ("cuda" or "cpu"; None: the GPU where there is one), measured once per machine and kept.

    `read_bytes_per_s` is the best rate of reading some GiB, by a sum and by a matrix-vector product: as in STREAM
    (McCalpin 1995) the best of several is taken, because it is a limit. `matrix_flops_per_s` is per dtype the best
    rate of a square product, 2 n³ operations. Takes a few seconds; `again=True` measures anew. Every later `generate`
    on this machine keeps them in its row. Raises ValueError for a device that is not here.
    """
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device not in READ_BYTES or (device == "cuda" and not torch.cuda.is_available()):
        raise ValueError(f"no device {device!r} here: limits are of 'cpu'" + " or 'cuda'" * torch.cuda.is_available())
    if not again and (found := known_limits(device)) is not None:
        return found
    facts = machine.facts()
    found = Limits(device=device, name=facts["gpu"] if device == "cuda" else facts["cpu"],
                   measured_at=datetime.now(timezone.utc).isoformat(timespec="seconds"),
                   read_bytes_per_s=_read_rate(device), matrix_flops_per_s=_matrix_rates(device))
    machine.release(device)
    path = _kept(device)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(found))
    return found


def known_limits(device: str) -> Limits | None:
    """What `limits` has measured on this machine with this PyTorch; None where it has not."""
    with contextlib.suppress(OSError, ValueError, TypeError):
        found = Limits(json.loads(_kept(device).read_text()))
        if {"read_bytes_per_s", "matrix_flops_per_s", "name"} <= found.keys():
            return found
    return None


def _kept(device: str) -> Path:
    """One file per machine, number of threads and PyTorch: each has rates of its own."""
    facts = machine.facts()
    same = [facts.get(name) for name in ("gpu", "cpu", "cores", "torch_threads", "driver")] + [torch.__version__]
    return cache_folder() / f"limits-{device}-{hashlib.sha256(json.dumps(same).encode()).hexdigest()[:12]}.json"


def _read_rate(device: str) -> float:
    """Bytes per second, reading an array that no cache holds."""
    width = 2**14
    rows = min(READ_BYTES[device], machine.free_bytes(device) // 4) // (4 * width)
    matrix = torch.ones(rows, width, device=device)
    vector = torch.ones(1, width, device=device)
    product = lambda: torch.nn.functional.linear(vector, matrix)  # noqa: E731: what a decode step does
    return matrix.nbytes / min(_best_s(read, device) for read in ROUNDS * (matrix.sum, product))


def _matrix_rates(device: str) -> dict[str, float]:
    """Operations per second of a square product, for every dtype that this device multiplies in."""
    size, rates = SIZE[device], {}
    for dtype in DTYPES:
        with contextlib.suppress(RuntimeError, NotImplementedError):
            rates[dtype] = 2 * size**3 / _best_s(_product(dtype, size, device), device)
    return rates


def _product(dtype: str, size: int, device: str) -> Callable[[], torch.Tensor]:
    if dtype == "int8" and device == "cpu":  # the product of the CPU's dynamic INT8
        layer, matrix = DynamicLinear(size, size), torch.randn(size, size)
        return lambda: layer(matrix)
    if dtype == "int8":
        matrix = torch.ones(size, size, dtype=torch.int8, device=device)
        return lambda: torch._int_mm(matrix, matrix)  # no public call
    matrix = torch.randn(size, size, device=device).to(getattr(torch, dtype))
    return lambda: matrix @ matrix


@torch.no_grad()
def _best_s(work: Callable[[], object], device: str) -> float:
    """The least seconds of `work`, after two that warm up: at least 3 more, and as many as SPEND_S allows."""
    samples: list[float] = []
    while len(samples) < 5 or (sum(samples) < SPEND_S and len(samples) < 100):
        machine.synchronize(device)
        start = time.perf_counter()
        work()
        machine.synchronize(device)
        samples.append(time.perf_counter() - start)
    return min(samples[2:])
