"""Where the time of a generation goes: which kernels or operators, how many, and how long the device had none."""

from __future__ import annotations

import dataclasses
import itertools
import os
import re
import time
from collections import Counter
from collections.abc import Callable, Iterable

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # else the profiler tells a notebook when it starts and stops

from torch.autograd import DeviceType
from torch.autograd.profiler_util import FunctionEvent
from torch.profiler import ProfilerActivity, profile

from quantbench import machine
from quantbench.decode import Engine, find_engine
from quantbench.loading import LoadedModel
from quantbench.quantisers import find_quantiser
from quantbench.records import Measurement

STEPS, PREFILLS = 16, 3  # traced at most
TOP = 6
# by name, the first that fits: kernels of cuBLAS, CUTLASS, Triton and bitsandbytes, operators of torch and bitsandbytes
KINDS = {
    "attention": re.compile(r"attention|flash|fmha|softmax", re.IGNORECASE),
    "products": re.compile(r"gemm|gemv|matmul|cutlass|nvjet|xmma|splitK|dot_kernel|triton_tem|"
                           r"::(linear|addmm|bmm|mm)\b|linear_dynamic|_scaled_mm|_int_mm"),
    "quantisation": re.compile(r"quant", re.IGNORECASE),
}


def trace(lm: LoadedModel, row: Measurement) -> Measurement:
    """`row`, which `generate` measured of `lm`, with its `trace` (`shapes.Trace`): where the time goes, per call of the
    prefill and per decode step, each by itself. A row that is not ok comes back as it is.

    The prompt is read three times, and one more text is begun, under torch's profiler: of its steps up to 16 in the
    middle are traced, where the KV cache has its mean length. `device_s` is the time in which the device worked: on a
    GPU the union of its kernels' times, on a CPU the time inside torch's operators. `kinds` divides it into "products"
    with weights, "quantised" ones by the quantiser's own kernels, "attention", "quantisation" outside a product, and
    "other". `kernels` counts a GPU's kernels and copies, or the operators that were called from outside torch.
    """
    if row.status != "ok":
        return row
    engine = find_engine(row.engine)(lm, lm.encode(row.prompt, row.batch_size), row.max_new_tokens)
    steps = min(STEPS, row.max_new_tokens - 1)
    quantised, parts = find_quantiser(lm.setting.quantisation).kernels, {}
    engine(1)
    with _Recording(lm.device) as prompt:
        prompt.begin()
        for _ in range(PREFILLS):
            engine(1)
    parts["prefill"] = prompt.part(PREFILLS, quantised)
    if steps:
        with _Recording(lm.device) as middle:
            _generate(engine, lm, (row.max_new_tokens - 1 - steps) // 2, steps, middle.begin)
        parts["step"] = middle.part(steps, quantised)
    return dataclasses.replace(row, trace=parts)


def _generate(engine: Engine, lm: LoadedModel, before: int, steps: int, begin: Callable[[], None]) -> None:
    """A prefill, `before` steps, then `begin` and the `steps` to be traced. An engine without a `step` of its own calls
    the model: what it does until the next call belongs to a step too."""
    made = itertools.count()

    def step_starts(*_: object) -> None:
        if next(made) == before:
            begin()

    if hasattr(engine, "step"):
        engine.prefill()
        for _ in range(before + steps):
            step_starts()
            engine.step()
        return
    made = itertools.count(-1)  # the first call is the prefill
    hook = lm.model.register_forward_pre_hook(step_starts, prepend=True)
    try:
        engine(1 + before + steps)
    finally:
        hook.remove()
    if (calls := next(made)) != before + steps:
        raise RuntimeError(f"{calls} steps where {before + steps} were asked for: they cannot be traced")


class _Recording:
    """torch's profiler from `begin` to the end of the block, the device idle at both."""

    def __init__(self, device: str) -> None:
        self.device, self.began, self.wall_s = device, None, 0.0
        activity = ProfilerActivity.CUDA if device == "cuda" else ProfilerActivity.CPU
        self.profiler = profile(activities=[activity], acc_events=True)

    def __enter__(self) -> _Recording:
        return self

    def begin(self) -> None:
        machine.synchronize(self.device)
        self.profiler.start()
        self.began = time.perf_counter()

    def __exit__(self, *error: object) -> None:
        if self.began is not None:
            machine.synchronize(self.device)
            self.wall_s = time.perf_counter() - self.began
            self.profiler.stop()

    def part(self, calls: int, quantised: re.Pattern | None) -> dict:
        """What was seen, per call: a `shapes.Part`."""
        count, work = (_on_gpu if self.device == "cuda" else _on_cpu)(self.profiler.events(), quantised)
        kinds, named, times = Counter(dict.fromkeys((*KINDS, "quantised", "other"), 0.0)), Counter(), Counter()
        for name, kind, microseconds in work:
            kinds[kind] += microseconds * 1e-6 / calls
            named[name[:100]] += microseconds * 1e-6 / calls
            times[name[:100]] += 1 / calls
        return {"calls": calls, "wall_s": self.wall_s / calls, "device_s": kinds.total(), "kernels": count / calls,
                "kinds": dict(kinds), "top": [{"name": name, "seconds": seconds, "calls": times[name]}
                                              for name, seconds in named.most_common(TOP)]}


def _on_gpu(events: Iterable[FunctionEvent], quantised: re.Pattern | None) -> tuple[int, list[tuple[str, str, float]]]:
    """How many kernels, and of each its name, kind and microseconds: of two that overlap the later has what is left."""
    work, reached = [], float("-inf")
    kernels = [event for event in events if event.device_type == DeviceType.CUDA and not event.is_user_annotation]
    for event in sorted(kernels, key=lambda event: event.time_range.start):
        alone = max(event.time_range.end - max(event.time_range.start, reached), 0.0)
        reached = max(reached, event.time_range.end)
        work.append((event.name, kind_of(event.name, quantised), alone))
    return len(work), work


def _on_cpu(events: Iterable[FunctionEvent], quantised: re.Pattern | None) -> tuple[int, list[tuple[str, str, float]]]:
    """The same for operators: one of a kind counts with all that it calls; of the others each counts for itself."""
    waiting = [event for event in events if event.cpu_parent is None]
    count, work = len(waiting), []
    while waiting:
        event = waiting.pop()
        kind = kind_of(event.name, quantised)
        work.append((event.name, kind, event.self_cpu_time_total if kind == "other" else event.cpu_time_total))
        waiting += event.cpu_children if kind == "other" else []
    return count, work


def kind_of(name: str, quantised: re.Pattern | None = None) -> str:
    """The kind of a kernel or operator, by its name; `quantised`: a quantiser's own products."""
    if quantised is not None and quantised.search(name):
        return "quantised"
    return next((kind for kind, pattern in KINDS.items() if pattern.search(name)), "other")
