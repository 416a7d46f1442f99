"""What a model takes under each setting, told from its configuration alone: no weights are read."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterable
from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple

import torch

from quantbench import machine
from quantbench.inspection import audit, cache_bytes_per_token, load_estimate, on_meta, weights_estimate
from quantbench.loading import context_length
from quantbench.quantisers import ITEMSIZE, find_quantiser, why_not
from quantbench.results import Run
from quantbench.settings import MODELS, SETTINGS, Setting, unknown
from quantbench.weights import check_name, config_for

if TYPE_CHECKING:
    from quantbench.tables import Tables

DEVICES = {  # bytes as torch reports them; bytes read per second and compute capability as NVIDIA lists them
    name: {"bytes": size, "bandwidth": rate, "capability": capability} for name, size, rate, capability in (
        ("T4", 15.8e9, 320e9, [7, 5]), ("L4", 23.6e9, 300e9, [8, 9]), ("A100-40", 42.4e9, 1555e9, [8, 0]),
        ("A100-80", 85.0e9, 2039e9, [8, 0]), ("H100", 85.0e9, 3350e9, [9, 0]), ("H200", 150.1e9, 4800e9, [9, 0]))}
CONTEXT = 6e8  # bytes of a GPU that CUDA takes for itself
SHARED = 1024  # tokens of each sequence of the largest batch
_DECIMALS = {"Weights (GB)": 3, "Measured (GB)": 3, "Left unquantised (GB)": 3, "Cache (MB/1,000 tokens)": 2,
             "Longest context": 0, f"Batch at {SHARED:,}": 0, "Decode floor (ms)": 3}
_NOTE = ("Estimated from shapes. Context and batch are what is free beside the weights over the cache's bytes, without "
         "what a pass works with; a context is at most the model's positions. The floor: a step's weights, read once.")


class Estimate(NamedTuple):
    """Bytes of a model under a setting; `why` it cannot run there (None: it can)."""

    setting: Setting
    weights: int
    left: int  # of the weights, not quantised
    step: int  # that a decode step reads
    cache: float  # a token; NaN: not known
    free: float  # NaN: no such device
    floor_s: float  # NaN: no bandwidth is known
    positions: float  # tokens that the model has positions for; infinite: no end is said
    why: str | None


def fit(model: str | os.PathLike, on: str | dict | None = None, run: Run | None = None) -> Tables:
    """What `model` (see `load`) takes under every setting, and whether that fits: a row each, estimated from its
    configuration alone, beside what `run` measured. GB are 1e9 bytes.

    `on`: None for this machine and what is free on it now, a key of DEVICES ("T4", "L4", "A100-40", "A100-80", "H100",
    "H200"), or a dict of "bytes", "bandwidth" (bytes/s) and "capability" ([8, 0]). The floor needs a bandwidth: the one
    `qb.limits` measured in `run`, or a GPU's listed one. Raises ValueError for an unknown model or device.
    """
    import pandas as pd  # what measures meets what shows in this function alone

    from quantbench.tables import Table, Tables
    name, rows = check_name(model), estimates(model, on, run)
    measured = {row.setting: row.weights_gb for row in run or () if row.model == name and row.weights_gb}
    frame = pd.DataFrame([{
        "Setting": one.setting.label, "Weights (GB)": one.weights / 1e9,
        "Measured (GB)": measured.get(one.setting.key, math.nan), "Left unquantised (GB)": one.left / 1e9,
        "Cache (MB/1,000 tokens)": one.cache / 1e3, "Fits": "no" if one.why else "yes",
        "Longest context": min(tokens_beside(one), one.positions), f"Batch at {SHARED:,}": tokens_beside(one) // SHARED,
        "Decode floor (ms)": 1000 * one.floor_s, "Note": one.why or ""} for one in rows])
    frame = frame.replace([math.inf], math.nan).drop(columns=[] if measured else "Measured (GB)")
    where = on if isinstance(on, str) else "this machine" if on is None else "the machine described"
    caption = [MODELS[name].label if name in MODELS else name, where]
    return Tables([Table(frame, caption, _NOTE, _DECIMALS, [place for place, one in enumerate(rows) if one.why])])


def tokens_beside(one: Estimate) -> float:
    """How many tokens of cache fit beside the weights; infinite where none is kept, NaN where it is not known."""
    room = max(one.free - one.weights, 0.0) if one.free == one.free else math.nan
    return room // one.cache if one.cache else math.inf


def estimates(model: str | os.PathLike, on: str | dict | None = None, run: Iterable | None = None) -> list[Estimate]:
    """An estimate for each setting; of a checkpoint that is quantised itself, for those that take it as it is."""
    facts, free, rates = _where(on, Run.of(run or ()))
    shapes = on_meta(config := config_for(model))
    own = getattr(config, "quantization_config", None) or getattr(config, "compression_config", None)
    found = audit(shapes, 0)
    unread = (sum(found["bytes"].values()) - found["step_bytes"]) // torch.bfloat16.itemsize  # tables, idle experts
    table, head = shapes.get_input_embeddings().weight, shapes.get_output_embeddings()
    tied = table.numel() if head is not None and head.weight is table else 0
    try:
        cache = cache_bytes_per_token(shapes, 1)
    except RuntimeError:
        cache = math.nan
    made = []
    for row in SETTINGS.values():
        if (row.quantisation == "stored") != bool(own) or (on is not None and row.device == "cpu"):
            continue
        size, weights, room = ITEMSIZE[row.dtype], weights_estimate(shapes, row), free.get(row.device, math.nan)
        # what is quantised takes the same in any dtype: the difference of two is what is not
        wide, narrow = (weights_estimate(shapes, replace(row, dtype=dtype)) for dtype in ("float32", "float16"))
        step = weights - size * (unread + tied * find_quantiser(row.quantisation).takes_head)
        needed = load_estimate(shapes, row)
        why = why_not(row, facts) or (
            f"{needed / 1e9:.2f} GB to load it, {room / 1e9:.2f} GB are free" if needed > room else None)
        made.append(Estimate(row, weights, (wide - narrow) // 2 * size, step, cache * size, room,
                             step / rates.get(row.device, math.nan), context_length(config) or math.inf, why))
    return made


def _where(on: str | dict | None, run: Run) -> tuple[dict, dict, dict]:
    """The facts of a machine, and by device the bytes that are free and the bytes read per second."""
    if on is None:
        facts = machine.facts()
        gpu, size = facts.get("gpu") or "", facts.get("gpu_bytes", 0)
        rates = {"cuda": one["bandwidth"] for name, one in DEVICES.items()
                 if re.search(rf"\b{name.partition('-')[0]}\b", gpu) and abs(size / one["bytes"] - 1) < 0.1}
        rates |= {one.device: one.read_bytes_per_s for one in run.limits
                  if (one.machine.get("cpu"), one.machine.get("gpu")) == (facts["cpu"], facts.get("gpu"))}
        return facts, {device: machine.free_bytes(device) for device in ("cpu", "cuda")[:1 + bool(gpu)]}, rates
    if isinstance(on, str) and on not in DEVICES:
        raise ValueError(unknown("device", on, DEVICES))
    one = DEVICES[on] if isinstance(on, str) else on
    if set(one) != {"bytes", "bandwidth", "capability"}:
        raise ValueError(f"a device is a dict of 'bytes', 'bandwidth' and 'capability', not {sorted(one)}")
    facts = {"gpu": on if isinstance(on, str) else "described", "gpu_capability": list(one["capability"])}
    return facts, {"cuda": one["bytes"] - CONTEXT}, {"cuda": one["bandwidth"]}
