"""What one cell was asked and gave, and the figures derived from it: one line of JSON."""

from __future__ import annotations

import dataclasses
import json
import math
import typing
from dataclasses import dataclass, field
from datetime import datetime, timezone
from statistics import fmean, median

from quantbench import roofline
from quantbench.figures import FIGURES, figure
from quantbench.plain import html_table, is_a, refuse_constant
from quantbench.settings import SETTINGS
from quantbench.stats import Interval, median_ci

SCHEMA = 1
BUSY = 0.2  # share of a device that others may use before a row says so
ENERGY_S = 1.0  # a GPU's energy counter moves some 10 times a second: what a sample misses is in the next one
STATUSES = ("ok", "unavailable", "out_of_memory", "crashed", "timeout", "failed")
WEIGHTS = ("pretrained", "bundled", "random")
PROMPT = "Once upon a time, in a small village by the sea"  # 12 GPT-2 tokens, as the published experiment counted


@dataclass(frozen=True)
class Workload:
    """Prompt, batch size, `max_new_tokens`, and how long to repeat. Raises ValueError for one that cannot run."""

    prompt: str = PROMPT
    max_new_tokens: int = 128
    batch_size: int = 1
    repeats: int | None = None  # exactly this many; None: 3 to 10, by interval and budget
    budget_s: float = 30.0  # per cell, for the repeats

    def __post_init__(self) -> None:
        if not isinstance(self.prompt, str) or not self.prompt.strip():
            raise ValueError("the prompt is empty: give at least one word")
        for name in ("max_new_tokens", "batch_size", "repeats"):
            value = getattr(self, name)
            if value is None and name == "repeats":
                continue
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} must be a whole number of at least 1, not {value!r}")
        if not is_a(self.budget_s, float) or not self.budget_s > 0:
            raise ValueError(f"budget_s must be above 0 seconds, not {self.budget_s!r}")


@dataclass(frozen=True, kw_only=True, repr=False)
class Measurement:
    """Raw samples and facts of one cell. Seconds, bytes and joules; everything else is derived on read."""

    model: str
    setting: str
    max_new_tokens: int
    schema: int = SCHEMA
    created_at: str = field(default_factory=lambda: datetime.now(timezone.utc).isoformat(timespec="seconds"))
    revision: str | None = None
    weights: str | None = None  # one of WEIGHTS; None where nothing was loaded
    engine: str = "eager"
    prompt: str = PROMPT
    prompt_tokens: int | None = None
    batch_size: int = 1
    new_tokens: int | None = None
    status: str = "ok"
    reason: str | None = None
    load_s: float | None = None
    latencies_s: list[float] = field(default_factory=list)
    first_token_s: list[float] = field(default_factory=list)
    text: str | None = None  # the continuation; None where the weights are random
    weights_bytes: int | None = None
    held_before_bytes: int | None = None  # what the process held before load: VRAM on a GPU, resident on a CPU
    load_peak_bytes: int | None = None
    vram_peak_bytes: int | None = None
    vram_reserved_bytes: int | None = None
    vram_device_bytes: int | None = None
    ram_peak_bytes: int | None = None
    audit: dict | None = None
    energy_j: list[float] | None = None
    conditions: dict | None = None  # clocks, temperature, load, before and after the timed region
    quality: dict | None = None
    limits: dict | None = None  # this device's measured bandwidth and matrix rate, where they are known
    trace: dict | None = None  # where the time of one traced generate went
    machine: dict = field(default_factory=dict)
    versions: dict = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.status not in STATUSES:
            raise ValueError(f"status must be one of {', '.join(STATUSES)}, not {self.status!r}")
        if self.weights is not None and self.weights not in WEIGHTS:
            raise ValueError(f"weights must be one of {', '.join(WEIGHTS)}, not {self.weights!r}")
        for name in ("latencies_s", "first_token_s"):
            if not all(math.isfinite(s) and s > 0 for s in getattr(self, name)):
                raise ValueError(f"{name} must be finite and above 0")

    @property
    def key(self) -> tuple:
        """What makes two rows the same cell: a later one replaces the earlier."""
        return (*self.subject, self.engine, self.prompt, self.batch_size, self.max_new_tokens)

    @property
    def subject(self) -> tuple:
        """What the rows of a setting share, whatever the workload: their quality is one and the same."""
        versions = tuple(sorted((name, v) for name, v in self.versions.items() if name != "commit"))
        return self.model, self.revision, self.weights, self.setting, self.machine_name, versions

    @property
    def machine_name(self) -> str:
        """GPU and CPU in words; rows of two machines are never mixed in one table or chart."""
        return " · ".join(part for part in (self.machine.get("gpu"), self.machine.get("cpu")) if part)

    @property
    def setting_label(self) -> str:
        return SETTINGS[self.setting].label if self.setting in SETTINGS else self.setting

    # ---- derived figures: one entry each, and tables, charts and findings know it by its label ----

    @figure("Latency (s)")
    def latency_s(self) -> float | None:
        """Median seconds of a whole `generate`, prompt included."""
        return median(self.latencies_s) if self.latencies_s else None

    @figure("Latency 95% (s)")
    def latency_ci(self) -> Interval | None:
        """Bootstrap 95% interval of the median latency."""
        return median_ci(self.latencies_s)

    @figure("Tokens/sec")
    def tokens_per_s(self) -> float | None:
        """batch_size x new_tokens / latency: the prompt is never counted."""
        return self._tokens / self.latency_s if self.latency_s and self.new_tokens else None

    @figure("Tokens/sec 95%")
    def tokens_per_s_ci(self) -> Interval | None:
        """The latency's interval, turned over."""
        if not (self.latency_ci and self.new_tokens):
            return None
        return self._tokens / self.latency_ci[1], self._tokens / self.latency_ci[0]

    @figure("TTFT (s)")
    def ttft_s(self) -> float | None:
        """Time to first token: median seconds of a separate `generate` of one token."""
        return median(self.first_token_s) if self.first_token_s else None

    @figure("Decode tokens/sec")
    def decode_tokens_per_s(self) -> float | None:
        """batch_size x (new_tokens - 1) / (latency - TTFT): the rate after the first token."""
        if not (self.latency_s and self.ttft_s and self.new_tokens) or self.latency_s <= self.ttft_s:
            return None
        return self.batch_size * (self.new_tokens - 1) / (self.latency_s - self.ttft_s)

    @figure("VRAM (GB)")
    def vram_gb(self) -> float | None:
        """Peak allocated while generating, in 1e9 bytes; None on a CPU."""
        return None if self.vram_peak_bytes is None else self.vram_peak_bytes / 1e9

    @figure("RAM peak (GB)")
    def ram_peak_gb(self) -> float | None:
        """Peak resident memory above the level before load, in 1e9 bytes; None on a GPU."""
        return None if self.ram_peak_bytes is None else self.ram_peak_bytes / 1e9

    @figure("Weights (GB)")
    def weights_gb(self) -> float | None:
        """Parameters, buffers and quantisation state, in 1e9 bytes."""
        return None if self.weights_bytes is None else self.weights_bytes / 1e9

    @figure("Energy (J/token)")
    def energy_per_token_j(self) -> float | None:
        """Mean joules of a whole `generate` over its tokens, idle power included; None if under ENERGY_S was timed."""
        enough = self.energy_j and self.new_tokens and sum(self.latencies_s) >= ENERGY_S
        return fmean(self.energy_j) / self._tokens if enough else None

    @figure("Step (ms)")
    def step_ms(self) -> float | None:
        """Milliseconds of one decode step, which gives every sequence of the batch one token."""
        return 1000 * self.batch_size / self.decode_tokens_per_s if self.decode_tokens_per_s else None

    @figure("Step reads (MB)")
    def step_mb(self) -> float | None:
        """What one decode step must read, in 1e6 bytes: weights, and the KV cache at its mean length."""
        if self.prompt_tokens is None or self.new_tokens is None:
            return None
        count = roofline.step_bytes(self.audit, self.batch_size, self.prompt_tokens + self.new_tokens / 2)
        return None if count is None else count / 1e6

    @figure("Read floor (ms)")
    def read_ms(self) -> float | None:
        """The least milliseconds in which this device reads a step's bytes, by its measured rate."""
        seconds = None if self.step_mb is None else roofline.read_s(1e6 * self.step_mb, self.limits)
        return None if seconds is None else 1000 * seconds

    @figure("Compute floor (ms)")
    def compute_ms(self) -> float | None:
        """The least milliseconds in which this device computes a step's products with weights, by its measured rate."""
        int8 = self.setting in SETTINGS and "int8" in SETTINGS[self.setting].quantisation
        dtype = "int8" if int8 else (self.audit or {}).get("compute_dtype")
        seconds = roofline.compute_s(roofline.step_flops(self.audit, self.batch_size), dtype, self.limits)
        return None if seconds is None else 1000 * seconds

    @figure("MBU")
    def mbu(self) -> float | None:
        """Model bandwidth utilisation of decoding, as gpt-fast and Databricks ("LLM Inference Performance
        Engineering", 2023) define it, over the measured rate of reading instead of the data sheet's."""
        return self.read_ms / self.step_ms if self.read_ms is not None and self.step_ms else None

    @figure("Busy")
    def busy(self) -> str | None:
        """Who else used the device just before the timed region, in words; None where nobody did."""
        before = found if isinstance(found := (self.conditions or {}).get("before"), dict) else {}
        shares = {"GPU": before.get("gpu_busy"), "CPU": before.get("cpu_busy")}
        told = [f"{name} {share:.0%} busy" for name, share in shares.items() if is_a(share, float) and share > BUSY]
        return ", ".join(told) or None

    @figure("Noisy")
    def noisy(self) -> bool:
        """The interval's half-width is over 10% of the median."""
        if not self.latency_ci:
            return False
        return (self.latency_ci[1] - self.latency_ci[0]) / 2 > 0.10 * self.latency_s

    @figure("Perplexity")
    def perplexity(self) -> float | None:
        """Of the text that `quality` names; see `score.Quality` for this and the next three."""
        return self._quality("perplexity", float)

    @figure("KL vs reference")
    def kl_mean(self) -> float | None:
        """Mean KL divergence from the reference, nats per token."""
        return self._quality("kl_mean", float)

    @figure("KL 95%")
    def kl_ci(self) -> Interval | None:
        """Bootstrap 95% interval of the mean KL divergence."""
        return (found := self._quality("kl_ci", list[float])) and (found[0], found[-1])

    @figure("Top-1 agreement")
    def top1_agreement(self) -> float | None:
        """Share of tokens where this and the reference have the same first choice."""
        return self._quality("top1_agreement", float)

    def _quality(self, name: str, hint: object) -> object:
        """One figure of `quality`; None where there is none, or a file brought something else."""
        value = (self.quality or {}).get(name)
        return value if is_a(value, hint) else None

    @property
    def _tokens(self) -> int:
        return self.batch_size * self.new_tokens

    # ---- in and out ----

    def to_json(self) -> str:
        """One line of JSON; raises ValueError rather than write NaN or infinity."""
        return json.dumps(dataclasses.asdict(self), allow_nan=False)

    @classmethod
    def from_json(cls, line: str | bytes) -> Measurement:
        """The measurement of one line. Raises ValueError for anything else, `NewerSchema` for a later format."""
        data = json.loads(line, parse_constant=refuse_constant, parse_float=_number, parse_int=_number)
        if not isinstance(data, dict):
            raise ValueError("not a JSON object")
        if not is_a(schema := data.get("schema"), int) or schema < 1:
            raise ValueError("no schema number")
        if schema > SCHEMA:
            raise NewerSchema(f"schema {schema}, but this quantbench reads up to {SCHEMA}: upgrade quantbench")
        for name, value in data.items():
            if name not in _FIELD_TYPES:
                raise ValueError(f"unknown field {name!r}")
            if not is_a(value, _FIELD_TYPES[name]):
                raise ValueError(f"{name} is {value!r}")
        if missing := [name for name in ("model", "setting", "max_new_tokens") if name not in data]:
            raise ValueError(f"no {', '.join(missing)}")
        machine, versions = data.get("machine", {}), data.get("versions", {})
        if not all(is_a(name, str | None) for name in (machine.get("gpu"), machine.get("cpu"), *versions.values())):
            raise ValueError("machine or versions has a name that is not text")
        return cls(**data)

    def summary(self) -> dict[str, str]:
        """The row as a person reads it: label -> text."""
        setting = self.setting_label + ("" if self.engine == "eager" else f" · {self.engine}")
        row = {"Model": self.model, "Setting": setting, "Max New Tokens": str(self.max_new_tokens)}
        row |= {"Batch": str(self.batch_size)} if self.batch_size > 1 else {}
        if self.status != "ok":
            return row | {"Status": self.status, "Reason": self.reason or ""}
        memory = "vram_gb" if self.vram_peak_bytes is not None else "weights_gb"
        for name in ("latency_s", "tokens_per_s", "ttft_s", memory):
            row[FIGURES[name].label] = "–" if (value := getattr(self, name)) is None else f"{value:.3f}"
        if rate := self.tokens_per_s:
            low, high = self.tokens_per_s_ci or (rate, rate)
            row[FIGURES["tokens_per_s"].label] = f"{rate:.1f} ({low:.1f}–{high:.1f})"
        row["Weights"] = self.weights or "–"
        for name, digits in (("perplexity", ".2f"), ("kl_mean", ".2g"), ("top1_agreement", ".1%")):
            if (value := getattr(self, name)) is not None:
                row[FIGURES[name].label] = f"{value:{digits}}"
        if self.audit and self.audit.get("quantised"):
            row["Quantised"] = f"{self.audit['quantised']} × {self.audit.get('class')}"
        note = ", ".join(filter(None, ["noisy" if self.noisy else None, self.busy]))
        return row | ({"Note": note} if note else {})

    def __repr__(self) -> str:
        return "Measurement(" + ", ".join(f"{label}: {text}" for label, text in self.summary().items()) + ")"

    def _repr_html_(self) -> str:
        return html_table([self.summary()])


class NewerSchema(ValueError):
    """A results file that a later quantbench wrote."""


_FIELD_TYPES = typing.get_type_hints(Measurement)


def _number(text: str) -> float:
    """For `json.loads`: 1e999, and a whole number too long for a float, are infinity by another name."""
    if math.isinf(float(text)):
        refuse_constant(text)
    return int(text) if text.lstrip("-").isdigit() else float(text)
