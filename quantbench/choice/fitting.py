"""What a model takes under each setting, told from its configuration alone: no weights are read."""

import bisect
import contextlib
import math
import os
import re
from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple

import torch

from quantbench import machine
from quantbench.inspection import audit, cache_bytes, cache_sizes, load_estimate, on_meta, weights_estimate
from quantbench.quantisers import ITEMSIZE, find_quantiser, why_not
from quantbench.results import Run
from quantbench.settings import MOST, SETTINGS, Registry, Setting, amount, many, whole
from quantbench.tokens import context_length
from quantbench.weights import check_name, config_for

if TYPE_CHECKING:
    from quantbench.tables import Tables

DEVICES = Registry("device", {  # bytes as torch reports them, bytes/s and compute capability as NVIDIA lists them
    name: {"bytes": size, "bandwidth": rate, "capability": capability} for name, size, rate, capability in (
        ("T4", 15.8e9, 320e9, [7, 5]), ("L4", 23.6e9, 300e9, [8, 9]), ("A100-40", 42.4e9, 1555e9, [8, 0]),
        ("A100-80", 85.0e9, 2039e9, [8, 0]), ("H100", 85.0e9, 3350e9, [9, 0]), ("H200", 150.1e9, 4800e9, [9, 0]))})
CONTEXT = 6e8  # bytes of a GPU that CUDA takes for itself
_DECIMALS = {"Weights (GB)": 3, "Measured (GB)": 3, "Left unquantised (GB)": 3, "Cache (MB/1,000 tokens)": 2,
             "Longest context": 0, "Batch at 1,024": 0, "Decode floor (ms)": 3}
_NOTE = ("Estimated from shapes; context and batch by what the cache may take beside the weights, without what a pass "
         "works with. The floor: the weights of a step, read once.")


class Estimate(NamedTuple):
    """Bytes of a model under a setting; `why` it cannot run there (None: it can). NaN: not known."""

    setting: Setting
    weights: int
    left: int  # of the weights, not quantised
    step: int  # that a decode step reads
    cache: float  # of 1,000 tokens
    room: float  # tokens of cache beside the weights; infinite where there is none, or no more is held
    batch: float  # sequences of 1,024 tokens
    positions: float  # tokens that the model has positions for
    floor_s: float  # of a decode step
    why: str | None


def fit(model: str | os.PathLike, on: str | dict | None = None, run: Run | None = None) -> "Tables":
    """What `model` (see `load`) takes under every setting and whether that fits, from its configuration alone, beside
    what `run` measured. GB are 1e9 bytes; rows that do not fit are grey.

    `on`: None for this machine and what is free on it now, a key of DEVICES ("T4", "L4", "A100-40", "A100-80", "H100",
    "H200"), or a dict of "bytes", "bandwidth" (bytes/s) and "capability" ([8, 0]). The floor needs a bandwidth: what
    `qb.limits` measured in `run`, or a GPU's listed one. Raises ValueError for an unknown model or device."""
    import pandas as pd  # what measures meets what shows in this function alone

    from quantbench.tables import Table, Tables
    name, found = check_name(model), estimates(model, on, run)
    measured = {row.setting: row.weights_gb for row in Run.given(run) if row.model == name and row.weights_gb}
    frame = pd.DataFrame([(
        one.setting.label, one.weights / 1e9, measured.get(one.setting.key), one.left / 1e9, one.cache / 1e6,
        "no" if one.why else "yes", min(one.room, one.positions), one.batch, 1000 * one.floor_s, one.why or "")
        for one in found], columns=["Setting", *[*_DECIMALS][:4], "Fits", *[*_DECIMALS][4:], "Note"])
    frame = frame.replace(math.inf, math.nan).drop(columns=[] if measured else ["Measured (GB)"])
    where = on if isinstance(on, str) else "this machine" if on is None else "the GPU described"
    return Tables([Table(frame, [name, where], _NOTE, _DECIMALS, [i for i, one in enumerate(found) if one.why])])


def estimates(model: str | os.PathLike, on: str | dict | None = None, run: Run | None = None) -> list[Estimate]:
    """An estimate for each setting; of a checkpoint that is quantised itself, for those that take it as it is."""
    facts, free, rates = _here(Run.given(run)) if on is None else _there(on)
    shapes, made = on_meta(config := config_for(model)), []
    own = getattr(config, "quantization_config", None) or getattr(config, "compression_config", None)
    found = audit(shapes)
    unread = (sum(found["bytes"].values()) - found["step_bytes"]) // torch.bfloat16.itemsize  # tables, idle experts
    table, head = shapes.get_input_embeddings().weight, shapes.get_output_embeddings()
    tied = table.numel() if head is not None and head.weight is table else 0  # a table apart once the head is quantised
    caches = dict.fromkeys(ITEMSIZE.values())
    with contextlib.suppress(RuntimeError):
        caches = {size: cache_sizes(shapes, size) for size in caches}
    for row in SETTINGS.values():
        if (row.quantisation == "stored") != bool(own) or row.quantisation == "gguf" or on and row.device == "cpu":
            continue
        size, weights = ITEMSIZE[row.dtype], weights_estimate(shapes, row)
        space, there = (free.get(device, math.nan) for device in ("cpu" if row.offload else row.device, row.device))
        # what is quantised takes the same in any dtype: the difference of two is what is not
        wide, narrow = (weights_estimate(shapes, replace(row, dtype=dtype)) for dtype in ("float32", "float16"))
        held = 0 if row.offload else weights  # of the memory that the cache is in
        step = weights - size * (unread + tied * find_quantiser(row.quantisation).takes_head)
        full = (needed := load_estimate(shapes, row)) > space
        why = f"{needed / 1e9:.2f} GB to load it, {space / 1e9:.2f} GB are free" if full else None
        made.append(Estimate(row, weights, (wide - narrow) // 2 * size, step,
                             *_room(caches[size], 0.0 if full else there - held), context_length(config) or math.inf,
                             math.nan if row.offload else step / rates.get(row.device, math.nan),
                             why_not(row, facts) or why))
    return made


def _room(sizes: dict | None, free: float) -> tuple[float, float, float]:
    """Bytes of 1,000 tokens of cache; how many tokens, and how many sequences of 1,024, are in so many bytes."""
    if sizes is None or math.isnan(free):
        return cache_bytes(sizes, 1000) if sizes else math.nan, math.nan, math.nan
    thousand, each = (cache_bytes(sizes, tokens) for tokens in (1000, 1024))
    most = bisect.bisect(range(MOST), free, key=lambda tokens: cache_bytes(sizes, tokens)) - 1
    return thousand, math.inf if most == MOST - 1 else max(most, 0), free // each if each else math.inf


def _here(run: Run) -> tuple[dict, dict, dict]:
    """This machine's facts; by device the bytes that are free, and those read per second: listed, or measured."""
    facts = machine.facts()
    gpu = facts.get("gpu")
    rates = {"cuda": one["bandwidth"] for name, one in DEVICES.items() if gpu
             and re.search(rf"\b{name.partition('-')[0]}\b", gpu) and abs(facts["gpu_bytes"] / one["bytes"] - 1) < 0.1}
    rates |= {one.device: one.read_bytes_per_s for one in run.limits
              if (one.machine.get("cpu"), one.machine.get("gpu")) == (facts["cpu"], gpu)}
    return facts, {device: machine.free_bytes(device) for device in ("cpu", "cuda")[:1 + bool(gpu)]}, rates


def _there(on: str | dict) -> tuple[dict, dict, dict]:
    """The same of another GPU."""
    one = on if isinstance(on, dict) else DEVICES.find(on)
    if {*one} != {"bytes", "bandwidth", "capability"} or len(capability := many("capability", one["capability"])) != 2:
        raise ValueError(f"a device is a dict of 'bytes', 'bandwidth' and 'capability' ([8, 0]), not {one}")
    facts = {"gpu": "another", "gpu_capability": [whole("capability", part, 0) for part in capability]}
    return facts, {"cuda": amount("bytes", one["bytes"]) - CONTEXT}, {"cuda": amount("bandwidth", one["bandwidth"])}
