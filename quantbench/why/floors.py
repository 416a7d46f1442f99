"""The limits of a device as plain data, and the least time that a decode step or a prefill can take under them.

The roofline of Williams, Waterman and Patterson (2009), over rates that `limits` measured on the same machine."""

from dataclasses import field
from typing import Annotated, Literal, NamedTuple

from pydantic import Field
from pydantic.dataclasses import dataclass

from quantbench.fields import STRICT, Machine, Many, Name, Versions
from quantbench.quantisers import ITEMSIZE
from quantbench.records import Measurement, Subject, now
from quantbench.results import Run


@dataclass(frozen=True, kw_only=True, repr=False, config=STRICT)
class Limits(Subject):
    """The most that one device can do, measured (see `limits`): bytes that it reads and operations per second."""

    device: Literal["cpu", "cuda"]
    name: Name
    read_bytes_per_s: Annotated[float, Field(gt=0)]
    matrix_flops_per_s: Annotated[dict[Name, Annotated[float, Field(gt=0)]], Many]
    bus_bytes_per_s: Annotated[float, Field(gt=0)] | None = None  # from the host's memory to a GPU
    measured_at: Name = field(default_factory=now)
    machine: Machine = field(default_factory=dict)
    versions: Versions = field(default_factory=dict)

    @property
    def key(self) -> tuple:
        return self.device, self.machine_name

    def summary(self) -> dict[str, str]:
        rates = {f"{dtype} products (TFLOP/s)": f"{rate / 1e12:.3g}" for dtype, rate in self.matrix_flops_per_s.items()}
        return {"Device": self.name, "Reads (GB/s)": f"{self.read_bytes_per_s / 1e9:.4g}"} | rates


class Floor(NamedTuple):
    """What a decode step or a prefill must read, and the seconds that this and its products take at least."""

    bytes: float
    read_s: float
    compute_s: float  # 0 where no rate was measured for the dtype

    @property
    def seconds(self) -> float:
        return max(self.read_s, self.compute_s)


def floor(row: Measurement, limits: Limits | None, part: str = "step") -> Floor | None:
    """The floor of a row's decode step ("step") or whole prompt ("prefill"); None where audit or limits do not tell.

    Both read the weights once for the whole batch, and the KV cache: a step at its mean length. Products are 2
    operations per weight and token: in a prefill without the head, which it needs for the last token alone. Their rate
    is the better one of the weights' dtype and the arithmetic's. Offloaded weights cross the bus, all in every pass.
    GPUs that share the layers read one after the other: their number changes nothing."""
    audit, names = row.audit or {}, ("step_bytes", "step_products", "kv_bytes_per_token", "embedding_bytes")
    reads, products, cache, tables = map(audit.get, names)
    if None in (limits, reads, products, cache, tables, row.prompt_tokens, row.new_tokens):
        return None
    cache = min(cache, row.cache_per_token or cache)  # a quantised one is less
    if part == "step":
        reads += row.batch_size * (row.depth + row.prompt_tokens + row.new_tokens / 2) * cache
    else:
        reads += row.batch_size * row.depth * cache
        products = row.prompt_tokens * max(products - tables / ITEMSIZE.get(audit.get("compute_dtype"), 2), 0)
    rates = [limits.matrix_flops_per_s.get(audit.get(name), 0) for name in ("storage_dtype", "compute_dtype")]
    if crossing := audit.get("crossing_bytes"):
        return Floor(crossing, crossing / limits.bus_bytes_per_s, 0.0) if limits.bus_bytes_per_s else None
    compute_s = 2 * row.batch_size * products / max(rates) if any(rates) else 0.0
    return Floor(reads, reads / limits.read_bytes_per_s, compute_s)


def limits_of(row: Measurement, run: Run) -> Limits | None:
    """The limits of the machine and device of `row` that a run holds."""
    device = "cpu" if row.vram_peak_bytes is None else "cuda"
    return next((one for one in run.limits if one.key == (device, row.machine_name)), None)
