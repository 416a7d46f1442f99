"""Where the time of a generation goes: which kernels or operators, how many, and how long the device had none."""

import contextlib
import dataclasses
import itertools
import os
import re
from collections.abc import Iterable

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # else the profiler tells a notebook when it starts and stops

from torch.autograd import DeviceType
from torch.autograd.profiler_util import FunctionEvent
from torch.profiler import ProfilerActivity, profile

from quantbench import machine
from quantbench.decode import Eager, find_engine, inputs_of
from quantbench.loading import LoadedModel
from quantbench.records import Measurement
from quantbench.settings import Workload, expect

STEPS, PREFILLS = 16, 3  # traced at most
# by name, the first that fits: kernels of cuBLAS, CUTLASS, Triton and bitsandbytes, operators of torch and bitsandbytes
KINDS = {
    "attention": re.compile(r"attention|flash|fmha|softmax", re.IGNORECASE),
    "products": re.compile(r"gemm|gemv|matmul|cutlass|nvjet|xmma|splitK|dot_kernel|triton_tem|"
                           r"::(linear|addmm|bmm|mm)\b|linear_dynamic|_scaled_mm|_int_mm"),
    "quantisation": re.compile(r"quant", re.IGNORECASE),
}


def trace(lm: LoadedModel, row: Measurement) -> Measurement:
    """`row`, which `generate` measured of `lm`, with its `trace`, per call of the prefill and per decode step, each by
    itself: three prefills, and up to 16 steps in the middle, where the KV cache has its mean length, run again under
    torch's profiler. A row that is not ok comes back as it is.

    `device_s` is the time in which the device worked: the union of a GPU's kernels, or the time inside torch's
    operators on a CPU. `kinds` divides it into "products" with weights, "quantised" ones by the quantiser's own
    kernels, "attention", "quantisation" outside a product, and "other". `kernels` counts kernels, or operators."""
    expect(lm, LoadedModel, "trace takes what qb.load returns")
    if (expect(row, Measurement, "trace takes a row").model, row.setting) != (lm.name, lm.setting.key):
        raise ValueError(f"trace takes a row of {lm!r}, not of {row.model} · {row.setting_label}")
    if row.status != "ok" or not lm.way.by_torch:
        return row
    asked = Workload(row.prompt, row.max_new_tokens, row.batch_size, prompt_tokens=row.prompt_length, depth=row.depth,
                     cache=row.cache)
    engine = find_engine(row.engine)(lm, inputs_of(lm, asked), row.max_new_tokens, row.depth)
    steps = min(STEPS, row.max_new_tokens - 1)
    prompts = [_profiler(lm) for _ in range(PREFILLS)]
    for watching in (contextlib.nullcontext(), *prompts):
        engine.rewind()
        machine.synchronize(lm.device)
        with watching:
            engine(1)
    parts = {"prefill": _part(lm, prompts, PREFILLS)}
    if steps:
        parts["step"] = _part(lm, [_decode(engine, lm, (row.max_new_tokens - 1 - steps) // 2, steps)], steps)
    return dataclasses.replace(row, trace=parts)


def _profiler(lm: LoadedModel) -> profile:
    """To be entered when the device is idle; leaving waits for it."""
    return profile(activities=[ProfilerActivity.CUDA if lm.device == "cuda" else ProfilerActivity.CPU], acc_events=True)


def _decode(engine: Eager, lm: LoadedModel, before: int, steps: int) -> profile:
    """What is seen of `steps` after a prefill and the steps `before`. An engine without a `step` of its own calls the
    model: what it does until the next call belongs to a step too."""
    profiler, calls = _profiler(lm), itertools.count(-1)  # the first is the prefill

    def call_begins(*_: object) -> None:
        if next(calls) == before:
            machine.synchronize(lm.device)
            done.enter_context(profiler)

    engine.rewind()
    with contextlib.ExitStack() as done:
        if hasattr(engine, "step"):
            for work in [engine.prefill] + [engine.step] * (before + steps):
                call_begins()
                work()
        else:
            done.enter_context(lm.model.register_forward_pre_hook(call_begins, prepend=True))
            engine(1 + before + steps)
    if (made := next(calls)) != before + steps:
        raise RuntimeError(f"{made} steps where {before + steps} were asked for: they cannot be traced")
    return profiler


def _part(lm: LoadedModel, profilers: list[profile], calls: int) -> dict:
    """What was seen, per call of the model: a `Part` of the records."""
    read, quantised = _on_gpu if lm.device == "cuda" else _on_cpu, lm.way.kernels
    seen = [one for profiler in profilers for one in read(profiler.events(), quantised)]
    kinds = dict.fromkeys((*KINDS, "quantised", "other"), 0.0)
    for kind, microseconds in seen:
        kinds[kind] += microseconds * 1e-6 / calls
    return {"calls": calls, "device_s": sum(kinds.values()), "kernels": len(seen) / calls, "kinds": kinds}


def _on_gpu(events: Iterable[FunctionEvent], quantised: re.Pattern | None) -> list[tuple[str, float]]:
    """Kind and microseconds of every kernel and copy: of two that overlap the later has what is left."""
    seen, reached = [], float("-inf")
    kernels = [event for event in events if event.device_type == DeviceType.CUDA and not event.is_user_annotation]
    for event in sorted(kernels, key=lambda event: event.time_range.start):
        alone = max(event.time_range.end - max(event.time_range.start, reached), 0.0)
        reached = max(reached, event.time_range.end)
        seen.append((kind_of(event.name, quantised), alone))
    return seen


def _on_cpu(events: Iterable[FunctionEvent], quantised: re.Pattern | None) -> list[tuple[str, float]]:
    """The same of operators: one of a kind counts with all that it calls; of the others each counts for itself."""
    waiting, seen = [event for event in events if event.cpu_parent is None], []
    while waiting:
        event = waiting.pop()
        kind = kind_of(event.name, quantised)
        seen.append((kind, event.self_cpu_time_total if kind == "other" else event.cpu_time_total))
        waiting += event.cpu_children if kind == "other" else []
    return seen


def kind_of(name: str, quantised: re.Pattern | None = None) -> str:
    """The kind of a kernel or operator, by its name; `quantised`: a quantiser's own products."""
    if quantised is not None and quantised.search(name):
        return "quantised"
    return next((kind for kind, pattern in KINDS.items() if pattern.search(name)), "other")
