"""The limits of a device as plain data, and the least time that a decode step or a prefill can take under them.

The roofline of Williams, Waterman and Patterson (2009), over rates that `limits` measured on the same machine.
"""

from __future__ import annotations

import dataclasses
from dataclasses import field
from typing import Annotated, Literal

from pydantic import Field
from pydantic.dataclasses import dataclass

from quantbench.quantisers import ITEMSIZE, QUANTISERS
from quantbench.records import STRICT, Machine, Many, Measurement, Name, Subject, Versions, now
from quantbench.results import Run
from quantbench.settings import SETTINGS


@dataclass(frozen=True, kw_only=True, repr=False, config=STRICT)
class Limits:
    """The most that one device can do, measured (see `limits`): bytes that it reads and operations per second."""

    device: Literal["cpu", "cuda"]
    name: Name
    read_bytes_per_s: Annotated[float, Field(gt=0)]
    matrix_flops_per_s: Annotated[dict[Name, Annotated[float, Field(gt=0)]], Many]
    measured_at: Name = field(default_factory=now)
    machine: Machine = field(default_factory=dict)
    versions: Versions = field(default_factory=dict)

    machine_name = Subject.machine_name

    @property
    def key(self) -> tuple:
        return self.device, self.machine_name

    def summary(self) -> dict[str, str]:
        rates = {f"{dtype} products (TFLOP/s)": f"{rate / 1e12:.3g}" for dtype, rate in self.matrix_flops_per_s.items()}
        return {"Device": self.name, "Reads (GB/s)": f"{self.read_bytes_per_s / 1e9:.4g}"} | rates

    __repr__, _repr_html_ = Subject.__repr__, Subject._repr_html_


@dataclasses.dataclass(frozen=True)
class Floor:
    """What a decode step or a prefill must read, and the seconds that this and its products take at least."""

    bytes: float
    read_s: float
    compute_s: float  # 0 where no rate was measured for the products' dtype

    @property
    def seconds(self) -> float:
        return max(self.read_s, self.compute_s)


def floor(row: Measurement, limits: Limits | None, part: str = "step") -> Floor | None:
    """The floor of one decode step ("step") or of the whole prompt ("prefill") of `row`; None where its audit or the
    limits do not tell."""
    count, operations = (step_bytes(row), step_flops(row)) if part == "step" else _prompt(row)
    if None in (count, operations, limits):
        return None
    setting = SETTINGS.get(row.setting)
    int8 = setting is not None and QUANTISERS[setting.quantisation].family(setting) == "int8"
    rate = limits.matrix_flops_per_s.get("int8" if int8 else row.audit.get("compute_dtype"))
    return Floor(count, count / limits.read_bytes_per_s, operations / rate if rate else 0.0)


def mbu(row: Measurement, limits: Limits | None) -> float | None:
    """Model bandwidth utilisation of decoding, as gpt-fast and Databricks ("LLM Inference Performance Engineering",
    2023) define it, over the measured rate of reading instead of the data sheet's."""
    least = floor(row, limits)
    return 1000 * least.read_s / row.step_ms if least and row.step_ms else None


def step_bytes(row: Measurement) -> float | None:
    """What one decode step must read: the weights once for the whole batch, every sequence's KV cache at its mean
    length."""
    weights, cache = ((row.audit or {}).get(name) for name in ("step_bytes", "kv_bytes_per_token"))
    if None in (weights, cache, row.prompt_tokens, row.new_tokens):
        return None
    return weights + row.batch_size * (row.prompt_tokens + row.new_tokens / 2) * cache


def step_flops(row: Measurement) -> float | None:
    """Operations of one decode step's products with weights: 2 for each of them and sequence."""
    products = (row.audit or {}).get("step_products")
    return None if products is None else 2 * products * row.batch_size


def _prompt(row: Measurement) -> tuple[float | None, float | None]:
    """Bytes and operations of a prefill at least: the weights once; every token's products, the head's for the last one
    alone. The size of embeddings and head says how many weights the head has at most."""
    audit, step = row.audit or {}, step_flops(row)
    if None in (step, row.prompt_tokens, audit.get("embedding_bytes")):
        return None, None
    itemsize = ITEMSIZE[SETTINGS[row.setting].dtype] if row.setting in SETTINGS else 2
    layers = max(step - 2 * row.batch_size * audit["embedding_bytes"] / itemsize, 0)
    return audit.get("step_bytes"), layers * (row.prompt_tokens - 1) + step


def limits_of(row: Measurement, run: Run, limits: Limits | None = None) -> Limits | None:
    """The limits of the machine and device of `row` that a run holds, or `limits` where they are of its device."""
    device = "cpu" if row.vram_peak_bytes is None else "cuda"
    return next((one for one in ([limits] if limits else run.limits)
                 if one.device == device and (one is limits or one.machine_name == row.machine_name)), None)
