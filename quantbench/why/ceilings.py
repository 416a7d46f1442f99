"""What this machine can do at most: how fast it reads memory, and how fast it multiplies matrices, per dtype."""

import contextlib
import itertools
import warnings
from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch.nn.functional import linear
from torch.utils.benchmark import Timer

from quantbench import machine
from quantbench.why.floors import Limits

READ_BYTES = {"cpu": 2**30, "cuda": 2**32}  # far more than any cache holds
SIZE = {"cpu": 1024, "cuda": 8192}  # rows and columns of the matrices
ROUNDS, SPEND_S = 3, 0.1  # all rates in turn, and seconds on each: another program's burst passes meanwhile


@torch.no_grad()
def limits(device: str | None = None) -> Limits:
    """The rates of `device` ("cuda" or "cpu"; None: the GPU where there is one), measured now, in a few seconds: the
    best of several, as in STREAM (McCalpin 1995), of reading some GiB by a sum and by a matrix-vector product, and per
    dtype of a product, 2 operations per weight and row. `run.add` it, and the views of notebook 03 hold the rows of
    this machine and device against it. Raises ValueError for a device that is not here."""
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device not in [*READ_BYTES] or (device == "cuda" and not torch.cuda.is_available()):
        raise ValueError(f"no device {device!r} here: limits are of 'cpu'" + " or 'cuda'" * torch.cuda.is_available())
    wide = torch.ones(min(READ_BYTES[device], machine.free_bytes(device) // 4) // 2**16, 2**14, device=device)
    reads = (wide.sum, partial(linear, torch.ones(1, 2**14, device=device), wide))
    works = [("read", wide.nbytes, work) for work in reads] + list(_products(device))
    if device == "cuda":
        host = torch.ones(2**28, dtype=torch.uint8, pin_memory=True)
        works.append(("bus", host.nbytes, lambda: (host.cuda(non_blocking=True), torch.cuda.synchronize())))
    rates: dict[str, float] = {}
    for name, amount, work in ROUNDS * works:
        timer = Timer("work()", globals={"work": work}, num_threads=torch.get_num_threads())
        best = min(timer.adaptive_autorange(threshold=0.01, max_run_time=SPEND_S).times)
        rates[name] = max(rates.get(name, 0.0), amount / best)
    del wide, reads, works, work, timer
    machine.release(device)
    facts = machine.facts()
    return Limits(device=device, name=facts["gpu" if device == "cuda" else "cpu"], machine=facts,
                  versions=machine.versions(), read_bytes_per_s=rates.pop("read"),
                  bus_bytes_per_s=rates.pop("bus", None), matrix_flops_per_s=rates)


def _products(device: str) -> Iterator[tuple[str, int, Callable[[], object]]]:
    """Dtype, operations and work of every product that this device knows: with as many rows as columns, and with one,
    which on a CPU may have a better kernel in half precision."""
    size = SIZE[device]
    for dtype, rows in itertools.product(("float32", "float16", "bfloat16", "int8"), (size, 1)):
        with contextlib.suppress(RuntimeError, NotImplementedError), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch.ao is deprecated: it is the CPU's dynamic INT8
            if dtype != "int8":
                square = torch.randn(size, size, device=device).to(getattr(torch, dtype))
                work = partial(linear, square[:rows], square)
            elif device == "cuda":
                square = torch.ones(size, size, dtype=torch.int8, device=device)
                work = partial(torch._int_mm, square[:rows], square.t())  # no public call
            else:
                work = partial(torch.ao.nn.quantized.dynamic.Linear(size, size), torch.randn(rows, size))
            work()
            yield dtype, 2 * rows * size**2, work
