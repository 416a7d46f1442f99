"""Where the time of one generation goes: which kernels or operators, how many, and how long the device had none."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterable

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # else the profiler tells a notebook when it starts and stops

from torch.autograd import DeviceType
from torch.autograd.profiler_util import FunctionEvent
from torch.profiler import ProfilerActivity, profile

from quantbench import machine
from quantbench.engines import Generate

TOKENS = 16
TOP = 6
# by name, the first that fits: kernels of cuBLAS, CUTLASS and bitsandbytes, operators of torch and bitsandbytes
KINDS = (
    ("attention", re.compile(r"attention|flash|fmha|softmax", re.IGNORECASE)),
    ("products", re.compile(r"gemm|gemv|matmul|cutlass|nvjet|xmma|splitK|dot_kernel|::(linear|addmm|bmm|mm)\b|"
                            r"linear_dynamic|_scaled_mm|_int_mm")),
    ("quantisation", re.compile(r"quant", re.IGNORECASE)),
)


def traced(make: Generate, device: str, max_new_tokens: int) -> dict:
    """One generation of up to 16 tokens under torch's profiler, as plain JSON; seconds and counts are per token.

    `device_s` is the time in which the device worked: on a GPU the union of its kernels' times, on a CPU the time
    inside torch's operators. `kinds` divides it into products with weights, attention, quantising and dequantising
    outside a product, and the rest. `kernels` counts a GPU's kernels and copies, or the operators that were called
    from outside torch. `wall_s` is the time of the traced generation: longer than without a profiler.
    """
    tokens = min(max_new_tokens, TOKENS)
    make(tokens)
    activities = [ProfilerActivity.CUDA if device == "cuda" else ProfilerActivity.CPU]
    with profile(activities=activities, acc_events=True) as profiler:
        machine.synchronize(device)
        make(tokens)
        machine.synchronize(device)
    events = profiler.events()
    found = _of_gpu(events) if device == "cuda" else _of_cpu(events)
    wall = max(event.time_range.end for event in events) - min(event.time_range.start for event in events)
    per_token = 1e-6 / tokens  # events are in microseconds
    seconds, calls = found["named"], found["calls"]
    return {
        "tokens": tokens,
        "wall_s": wall * per_token,
        "device_s": found["busy"] * per_token,
        "kernels": found["kernels"] / tokens,
        "kinds": {kind: found["kinds"][kind] * per_token for kind in (*(name for name, _ in KINDS), "other")},
        "top": [{"name": name[:100], "seconds": spent * per_token, "calls": calls[name] / tokens}
                for name, spent in seconds.most_common(TOP)],
    }


def kind_of(name: str) -> str | None:
    """The kind of a kernel or operator; None for one that is of none."""
    return next((kind for kind, pattern in KINDS if pattern.search(name)), None)


def _of_gpu(events: Iterable[FunctionEvent]) -> dict:
    kernels = [event for event in events if event.device_type == DeviceType.CUDA]
    kinds, named, calls = Counter(), Counter(), Counter()
    for event in kernels:
        spent = event.time_range.elapsed_us()
        kinds[kind_of(event.name) or "other"] += spent
        named[event.name] += spent
        calls[event.name] += 1
    busy, reached = 0.0, float("-inf")
    for event in sorted(kernels, key=lambda event: event.time_range.start):
        busy += max(event.time_range.end - max(event.time_range.start, reached), 0)
        reached = max(reached, event.time_range.end)
    return {"busy": busy, "kernels": len(kernels), "kinds": kinds, "named": named, "calls": calls}


def _of_cpu(events: Iterable[FunctionEvent]) -> dict:
    """An operator of a kind counts with all that it calls; of the others each counts for itself."""
    kinds, named, calls = Counter(), Counter(), Counter()
    outer = [event for event in events if event.cpu_parent is None]
    waiting = list(outer)
    while waiting:
        event = waiting.pop()
        kind = kind_of(event.name)
        spent = event.cpu_time_total if kind else event.self_cpu_time_total
        kinds[kind or "other"] += spent
        named[event.name] += spent
        calls[event.name] += 1
        waiting += [] if kind else event.cpu_children
    return {"busy": sum(event.cpu_time_total for event in outer), "kernels": len(outer), "kinds": kinds,
            "named": named, "calls": calls}
