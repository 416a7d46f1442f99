"""One cell as it was measured, raw samples and facts, and every figure derived from them."""

from collections.abc import Callable, Iterable
from dataclasses import field
from datetime import datetime, timezone
from functools import cached_property, partial
from math import nan
from statistics import fmean, median
from typing import Annotated, Literal

from pydantic import Field
from pydantic.dataclasses import dataclass

from quantbench.fields import (
    STRICT, Amount, Audit, Conditions, Count, Machine, Many, Name, Seconds, Size, Text, Trace, Versions, Weights, Whole)
from quantbench.intervals import median_interval
from quantbench.settings import PROMPT, SETTINGS, expect
from quantbench.wording import EMPTY, as_html, plain, span

SCHEMA = 2
BUSY = 0.2  # share of a device that others may use before a row says so
NOISY = 0.1  # half-width of a median's interval, of the median
ENERGY_S = 1.0  # a GPU's energy counter moves some 10 times a second: what a sample misses is in the next one
PER_SAMPLE = ("tokens_per_s", "decode_tokens_per_s", "prefill_tokens_per_s")  # rates that each sample has
STATUSES = ("ok", "unavailable", "out_of_memory", "crashed", "timeout", "failed")
NOT_HERE = ("unavailable", "failed")  # shown as a line of text, in place of an empty bar

FIGURES: dict[str, str] = {}  # derived figure -> its one label everywhere
DECIMALS: dict[str, int] = {}  # derived figure -> its decimals, where it is a column in tables


class Figure(cached_property):
    """A figure of a measurement: computed when read, never stored, None where its samples are missing."""

    def __init__(self, label: str, method: Callable, decimals: int | None = None) -> None:
        super().__init__(method)
        self.label, self.decimals = label, decimals

    def __set_name__(self, owner: type, name: str) -> None:
        super().__set_name__(owner, name)
        FIGURES[name] = self.label
        DECIMALS.update({} if self.decimals is None else {name: self.decimals})


def figure(label: str, decimals: int | None = None) -> Callable[[Callable], Figure]:
    """Make a method of `Measurement` a figure under this label; with `decimals` it is a column in tables."""
    return partial(Figure, label, decimals=decimals)


class Subject:
    """What measurements and qualities share: whose they are."""

    @property
    def machine_name(self) -> str:
        """GPU and CPU in words, a CPU alone with its threads where they are not all of its cores; rows of two machines
        are never mixed in one table or chart."""
        gpu, cpu, cores, threads = map(self.machine.get, ("gpu", "cpu", "cores", "torch_threads"))
        some = f" ({threads} of {cores} cores)" if cpu and not gpu and threads and cores and threads < cores else ""
        return " · ".join(part for part in (gpu, cpu and cpu + some) if part)

    @property
    def subject(self) -> tuple:
        """What the rows of a setting share, whatever the workload: their quality is one and the same."""
        versions = tuple(sorted((name, v) for name, v in self.versions.items() if name != "commit"))
        return self.model, self.revision, self.weights, self.setting, self.machine_name, versions

    @property
    def setting_label(self) -> str:
        label = SETTINGS[self.setting].label if self.setting in SETTINGS else self.setting
        gpus = getattr(self, "gpus", 1)
        return label + f" on {gpus} GPUs" * (gpus > 1)

    def __repr__(self) -> str:
        told = ", ".join(f"{label}: {plain(text)}" for label, text in self.summary().items())
        return f"{type(self).__name__}({told})"

    def _repr_html_(self) -> str:
        return as_html([self.summary()])


def records_in(run: object) -> list[Subject]:
    """The records of a run, or of a list of them. Raises ValueError for anything else."""
    found = list(run) if isinstance(run, Iterable) else [None]
    right = all(isinstance(one, Subject) for one in found)
    return found if right else expect(run, (), "this takes a qb.Run (qb.Run.read reads a file) or a list of its rows")


def now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


@dataclass(frozen=True, kw_only=True, repr=False, config=STRICT)
class Measurement(Subject):
    """Raw samples and facts of one cell. Seconds, bytes and joules; everything else is derived on read.

    Sample i has `latencies_s[i]`, `first_token_s[i]`, in a sweep its round's name `rounds[i]`, and `sampled_at[i]`
    (seconds since 1970). Raises ValueError for what is no measurement."""

    model: Name
    setting: Name
    max_new_tokens: Whole
    schema: Annotated[int, Field(ge=1)] = SCHEMA
    created_at: Name = field(default_factory=now)
    revision: Name | None = None
    weights: Weights | None = None  # None where nothing was loaded
    engine: Name = "eager"
    gpus: Whole = 1  # that share the layers
    prompt: Text = PROMPT
    prompt_length: Whole | None = None  # asked for: the prompt is so many tokens of a bundled text
    prompt_tokens: Count | None = None  # that were read
    depth: Count = 0  # tokens in the KV cache before the timed part
    cache: Name = "default"  # what holds keys and values
    batch_size: Whole = 1
    new_tokens: Whole | None = None
    status: Literal[STATUSES] = "ok"
    reason: Text | None = None
    load_s: Amount | None = None
    prepare_s: Amount | None = None  # what the engine needed once: compiling, capturing
    latencies_s: Annotated[list[Seconds], Many] = field(default_factory=list)
    first_token_s: Annotated[list[Seconds], Many] = field(default_factory=list)
    energy_j: Annotated[list[Amount], Many] | None = None
    rounds: Annotated[list[Name], Many] = field(default_factory=list)
    sampled_at: Annotated[list[Amount], Many] = field(default_factory=list)
    others_busy: Annotated[list[Amount], Many] | None = None  # in rows of 2026-11
    text: Text | None = None  # the continuation; None where the weights are random
    weights_bytes: Count | None = None
    held_before_bytes: Count | None = None  # what the process held before load: VRAM on a GPU, resident on a CPU
    load_peak_bytes: Size | None = None
    vram_peak_bytes: Size | None = None
    vram_reserved_bytes: Size | None = None
    vram_device_bytes: Size | None = None
    ram_peak_bytes: Size | None = None
    gpu_peak_bytes: Annotated[list[Count], Many] | None = None  # of each, where there are several: of this process
    gpu_busy: Annotated[list[Amount | None], Many] | None = None  # share of the last sample's last moments
    cache_bytes: Count | None = None  # after a generation; where generate made and dropped the cache, by the audit
    audit: Audit | None = None
    conditions: Conditions | None = None  # clocks, temperature, load, before and after the timed region
    trace: Trace | None = None  # where the time of one traced generation went
    machine: Machine = field(default_factory=dict)
    versions: Versions = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("rounds", "sampled_at"):
            if getattr(self, name) and len(getattr(self, name)) != len(self.latencies_s):
                raise ValueError(f"{name} must be as many as latencies_s")

    @property
    def key(self) -> tuple:
        """What makes two rows the same cell: a later one replaces the earlier."""
        return (*self.subject, self.gpus, self.engine, *self.work)

    @property
    def work(self) -> tuple:
        """The workload: what rows that are compared share."""
        return self.prompt, self.cache, self.prompt_length or 0, self.depth, self.batch_size, self.max_new_tokens

    @property
    def cell(self) -> tuple:
        """The key without the workload: what a re-run notebook cell replaces."""
        return self.model, self.setting, self.gpus, self.engine, self.machine_name

    def rates(self, figure: str = "tokens_per_s") -> list[float]:
        """Each sample's rate, one of PER_SAMPLE: of all tokens, of those after the first, or of the prompt (in the time
        to first token); a sample without it, such as of one token, is NaN."""
        tokens = dict(zip(PER_SAMPLE, (self.new_tokens, (self.new_tokens or 0) - 1, self.prompt_tokens)))[figure] or 0
        seconds = {"tokens_per_s": self.latencies_s, "prefill_tokens_per_s": self.first_token_s}.get(figure) or \
            [whole - first for whole, first in zip(self.latencies_s, self.first_token_s)]
        return [self.batch_size * tokens / one if tokens > 0 and one > 0 else nan for one in seconds]

    def rate_by_round(self, figure: str = "tokens_per_s") -> dict[str, float]:
        """Round -> the rate of the sample taken in it: two rows compare by the rounds that they share."""
        return {name: rate for name, rate in zip(self.rounds, self.rates(figure)) if rate == rate}

    # median of a whole `generate`, prompt included, and its interval by order statistics
    latency_s = Figure("Latency (s)", lambda row: median(row.latencies_s) if row.latencies_s else None, 3)
    latency_ci = Figure("Latency 95% (s)", lambda row: median_interval(row.latencies_s))
    # batch_size x new_tokens / latency: the prompt is never counted. The range is what was seen, not what to expect
    tokens_per_s = Figure("Tokens/sec", lambda row: row.new_tokens and row.latency_s and
                          row.batch_size * row.new_tokens / row.latency_s, 1)
    tokens_per_s_ci = Figure("Tokens/sec 95%", lambda row: row.new_tokens and median_interval(row.rates()), 1)
    tokens_per_s_range = Figure("Range", lambda row: (min(row.rates()), max(row.rates())) if row.tokens_per_s else None)
    # time to first token: median of a separate `generate` of one token
    ttft_s = Figure("TTFT (s)", lambda row: median(row.first_token_s) if row.first_token_s else None, 3)
    # a step gives every sequence of the batch one token
    decode_tokens_per_s = Figure("Decode tokens/sec", lambda row: row.step_ms and 1000 * row.batch_size / row.step_ms)
    prefill_tokens_per_s = Figure("Prefill tokens/sec", lambda row: row.prompt_tokens and row.ttft_s and
                                  row.batch_size * row.prompt_tokens / row.ttft_s)
    # 1e9 bytes: peak allocated in generate; peak resident above the level before load; quantisation state included
    vram_gb = Figure("VRAM (GB)", lambda row: row.vram_peak_bytes and row.vram_peak_bytes / 1e9, 3)
    ram_peak_gb = Figure("RAM peak (GB)", lambda row: row.ram_peak_bytes and row.ram_peak_bytes / 1e9, 3)
    weights_gb = Figure("Weights (GB)", lambda row: row.weights_bytes and row.weights_bytes / 1e9, 3)
    # over the tokens that were read: the last one never is
    cache_per_token = Figure("Cache (bytes/token)", lambda row: row.cache_bytes and row.cache_bytes / (
        row.batch_size * (row.depth + (row.prompt_tokens or 0) + (row.new_tokens or row.max_new_tokens) - 1) or 1))

    @figure("Step (ms)")
    def step_ms(self) -> float | None:
        """Milliseconds of one decode step: (latency - TTFT) / (new_tokens - 1)."""
        if not (self.latency_s and self.ttft_s and (self.new_tokens or 0) > 1) or self.latency_s <= self.ttft_s:
            return None
        return 1000 * (self.latency_s - self.ttft_s) / (self.new_tokens - 1)

    @figure("Energy (J/token)", 2)
    def energy_per_token_j(self) -> float | None:
        """Mean joules of a whole `generate` over its tokens, idle power included; None if under ENERGY_S was timed."""
        enough = self.energy_j and self.new_tokens and sum(self.latencies_s) >= ENERGY_S
        return fmean(self.energy_j) / (self.batch_size * self.new_tokens) if enough else None

    # before the first answer can start: loading, quantising, compiling, capturing
    once_s = Figure("Once (s)", lambda row: None if row.load_s is None else row.load_s + (row.prepare_s or 0), 1)

    @figure("Busy")
    def busy(self) -> str | None:
        """Who else used the device just before the timed region, in words; None where nobody did."""
        before = (self.conditions or {}).get("before") or {}
        shares = {"GPU": before.get("gpu_busy"), "CPU": before.get("cpu_busy")}
        return ", ".join(f"{name} {share:.0%} busy" for name, share in shares.items() if (share or 0) > BUSY) or None

    @figure("Noisy")
    def noisy(self) -> bool:
        """The median's interval (the samples' range, where they are too few for one) is wider than ±10%."""
        low, high = self.latency_ci or (min(self.latencies_s, default=0), max(self.latencies_s, default=0))
        return (high - low) / 2 > NOISY * (self.latency_s or 1)

    def summary(self) -> dict[str, str]:
        """The row as a person reads it: label -> text."""
        row = {"Model": self.model, "Setting": self.setting_label + f" · {self.engine}" * (self.engine != "eager"),
               "Max New Tokens": self.max_new_tokens, "Batch": self.batch_size if self.batch_size > 1 else None,
               "Prompt": self.prompt_length, "Depth": self.depth or None,
               "Cache": None if self.cache == "default" else self.cache}
        if self.status != "ok":
            row |= {"Status": self.status, "Reason": plain(self.reason or "")[:200]}
            return {label: str(value) for label, value in row.items() if value is not None}
        for name in ("latency_s", "tokens_per_s", "ttft_s", "weights_gb" if self.vram_gb is None else "vram_gb"):
            row[FIGURES[name]] = EMPTY if (value := getattr(self, name)) is None else f"{value:.3f}"
        if seen := self.tokens_per_s_ci or self.tokens_per_s_range:
            looks = "95%" if self.tokens_per_s_ci else f"{len(self.latencies_s)} looks"
            told = "1 look" if len(self.latencies_s) == 1 else f"{looks}: {span(seen, '.1f')}"
            row[FIGURES["tokens_per_s"]] = f"{self.tokens_per_s:.1f} ({told})"
        quantised, note = (self.audit or {}).get("quantised"), ["noisy" * self.noisy, self.busy, self.reason]
        row |= {"Weights": self.weights or EMPTY, "Note": plain(", ".join(filter(None, note)))[:200] or None,
                "Quantised": f"{quantised} × {self.audit.get('class')}" if quantised else None}
        return {label: str(value) for label, value in row.items() if value is not None}
