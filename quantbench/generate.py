"""Timed generation: one cell's samples, taken the way docs and README say they are."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from functools import partial

import torch
from tqdm.auto import tqdm

from quantbench import machine, meters
from quantbench.engines import ENGINES, Generate, difference, generator, refusal
from quantbench.estimate import need_memory
from quantbench.limits import known_limits
from quantbench.loaded import LoadedModel, check_length
from quantbench.record import PROMPT, Measurement, Workload
from quantbench.settings import unknown
from quantbench.stats import median_ci
from quantbench.trace import traced

REPEATS = (3, 10)  # at least, at most
CLOSE_ENOUGH = 0.03  # stop repeating when the interval's half-width is within this share of the median
CPU_WARM_UP_TOKENS = 16  # on a GPU the warm-up has full length: kernels are chosen and memory is grown by then


def generate(lm: LoadedModel, prompt: str = PROMPT, max_new_tokens: int = 128, *, batch_size: int = 1,
             repeats: int | None = None, budget_s: float = 30.0, engine: str = "eager",
             trace: bool = False, clock: Callable[[], float] = time.perf_counter, progress: bool = True) -> Measurement:
    """Greedy generation of exactly `max_new_tokens` tokens for `batch_size` copies of `prompt`, timed.

    After a warm-up, at least 3 and at most 10 repeats: until the 95% interval of the median latency is within 3%
    or `budget_s` seconds are spent; `repeats` fixes their number. Each repeat also times a `generate` of one token,
    the time to first token. `clock` returns seconds. Nothing but generation runs between two readings of the clock.

    `engine` is "eager" (transformers' generate), "compile" (its compiled static cache) or "graph" (one captured
    decode step); the text of the last two is held against eager's. `trace` adds where the time goes, by one more
    generation under a profiler after all that is timed.

    A model that could not be loaded, or that runs out of memory, gives a row that says so. Raises ValueError for
    a workload that cannot run (see `Workload`) or is over the model's context length, RuntimeError for a closed
    model or a wrong token count.
    """
    workload = Workload(prompt, max_new_tokens, batch_size, repeats, budget_s)
    if engine not in ENGINES:
        raise ValueError(unknown("engine", engine, ENGINES))
    asked = _asked(lm, workload, engine)
    if lm.status != "ok":
        return Measurement(**asked, status=lm.status, reason=lm.reason)
    if lm.model is None:
        raise RuntimeError(f"{lm!r}: load it again to generate")
    if reason := refusal(lm, engine, machine.facts()):
        return Measurement(**asked, status="unavailable", reason=reason)
    asked["prompt_tokens"] = lm.encode(workload.prompt)["input_ids"].shape[1]
    check_length(lm.name, asked["prompt_tokens"], workload, lm.context_length)
    try:
        return Measurement(**asked, **_measure(lm, workload, engine, asked["prompt_tokens"], trace, clock, progress))
    except (RuntimeError, MemoryError) as error:
        if (reason := machine.out_of_memory(error)) is None:
            raise
    gc.collect()  # not in the except clause: the traceback holds what was allocated
    machine.release(lm.device)
    return Measurement(**asked, status="out_of_memory", reason=reason)


def _measure(lm: LoadedModel, workload: Workload, engine: str, prompt_tokens: int, trace: bool, clock: Callable,
             progress: bool) -> dict:
    tokens = workload.max_new_tokens
    cache_bytes = lm.audit["kv_bytes_per_token"] * (prompt_tokens + tokens) * workload.batch_size
    need_memory(cache_bytes, machine.free_bytes(lm.device), "the KV cache")
    inputs = lm.encode(workload.prompt, workload.batch_size)
    gc.collect()
    machine.release(lm.device)  # an engine of the call before may still hold its graph
    held = machine.held_bytes(lm.device)
    before = meters.readings(lm.device, meters.IDLE_S)
    make = generator(lm, engine, inputs, tokens)
    timed = partial(_timed, lm.device, make, prompt_tokens, clock)
    timed(tokens if lm.device == "cuda" else min(tokens, CPU_WARM_UP_TOKENS))
    has_peak = machine.reset_peak(lm.device)
    samples, output = _repeat(timed, lm, workload, progress)
    conditions = {"before": before, "after": meters.readings(lm.device),
                  "no_energy": meters.no_energy_reason(lm.device)}
    measured = samples | _memory(lm, held, has_peak) | {
        "new_tokens": tokens, "text": lm.decode(output[0, -tokens:]), "conditions": conditions,
        "trace": traced(make, lm.device, tokens) if trace else None}
    return measured if engine == "eager" else measured | _held_against_eager(lm, inputs, output, tokens)


def _repeat(timed: Callable, lm: LoadedModel, workload: Workload, progress: bool) -> tuple[dict, torch.Tensor]:
    """The samples of all repeats, and the last output."""
    tokens, latencies, first_token, joules = workload.max_new_tokens, [], [], []
    title = f"{lm.name} · {lm.setting.label} · {tokens} tokens"
    with tqdm(total=workload.repeats or REPEATS[1], desc=title, unit="repeat", leave=False,
              disable=not progress) as bar:
        while not _enough(latencies, sum(latencies) + sum(first_token), workload):
            start_j = meters.energy_j(lm.device)
            seconds, output = timed(tokens)
            joules.append(_difference(start_j, meters.energy_j(lm.device)))
            latencies.append(seconds)
            first_token.append(timed(1)[0])
            bar.update()
        bar.total = bar.n  # fewer than 10 were enough: a notebook would paint the bar red
    return {"latencies_s": latencies, "first_token_s": first_token,
            "energy_j": None if None in joules else joules}, output


def _timed(device: str, make: Generate, prompt_tokens: int, clock: Callable, tokens: int) -> tuple[float, torch.Tensor]:
    """Seconds of one generation of exactly `tokens` tokens, and its output [batch, prompt + tokens]."""
    machine.synchronize(device)
    start = clock()
    output = make(tokens)
    machine.synchronize(device)
    seconds = clock() - start
    new = output.shape[1] - prompt_tokens
    if new != tokens:
        raise RuntimeError(f"the model generated {new} tokens where {tokens} were asked for")
    return seconds, output


def _held_against_eager(lm: LoadedModel, inputs: dict, output: torch.Tensor, tokens: int) -> dict:
    """Outside every timed region: does the engine's text stand beside eager's?"""
    eager = generator(lm, "eager", inputs, tokens)(tokens)
    reason, wrong = difference(lm, output, eager, inputs["input_ids"].shape[1])
    return {"reason": reason, "status": "failed" if wrong else "ok"}


def _difference(start_j: float | None, end_j: float | None) -> float | None:
    """Joules between two readings; None where there are none, or where the counter has started anew."""
    return None if start_j is None or end_j is None or end_j < start_j else end_j - start_j


def _enough(latencies: list[float], spent_s: float, workload: Workload) -> bool:
    if workload.repeats is not None:
        return len(latencies) >= workload.repeats
    least, most = REPEATS
    if len(latencies) < least or len(latencies) >= most:
        return len(latencies) >= most
    low, high = median_ci(latencies)
    return (high - low) / (high + low) <= CLOSE_ENOUGH or spent_s >= workload.budget_s


def _asked(lm: LoadedModel, workload: Workload, engine: str) -> dict:
    """What is known before anything runs."""
    return {
        "model": lm.name, "revision": lm.revision, "weights": lm.weights, "setting": lm.setting.key,
        "engine": engine, "prompt": workload.prompt, "batch_size": workload.batch_size,
        "max_new_tokens": workload.max_new_tokens, "load_s": lm.load_s, "weights_bytes": lm.weights_bytes,
        "held_before_bytes": lm.held_before_bytes, "load_peak_bytes": lm.load_peak_bytes, "audit": lm.audit,
        "limits": known_limits(lm.device), "machine": machine.facts(), "versions": machine.versions(),
    }


def _memory(lm: LoadedModel, held: int, has_peak: bool) -> dict:
    """The peak since the warm-up, of this model alone: what it allocated at load, and what `generate` added."""
    peak = machine.peak_bytes(lm.device) if has_peak else None
    if lm.device == "cpu":
        return {"ram_peak_bytes": None if peak is None else max(peak - lm.held_before_bytes, 0)}
    return {
        "vram_peak_bytes": lm.held_after_bytes - lm.held_before_bytes + peak - held,
        "vram_reserved_bytes": torch.cuda.memory_reserved(),
        "vram_device_bytes": machine.device_bytes() - lm.device_before_bytes,
    }
