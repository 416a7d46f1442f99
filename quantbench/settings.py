"""One frozen row per setting: where and how a model runs."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from dataclasses import dataclass

from quantbench.plain import html_table


@dataclass(frozen=True)
class Setting:
    """Device + dtype + quantisation, one row of `SETTINGS`.

    `device` is "cpu" or "cuda"; `dtype` the torch dtype of everything that is not quantised, and of the
    arithmetic in bitsandbytes' layers; `quantisation` is "none", "bnb-int8" (LLM.int8, Dettmers et al. 2022),
    "bnb-nf4" or "bnb-fp4" (QLoRA, Dettmers et al. 2023) or "dynamic-int8" (torch's dynamic quantisation).
    `threshold` is LLM.int8's outlier threshold (0.0: no outlier split); `linear` asks for Conv1D -> Linear.
    """

    key: str
    label: str
    device: str
    dtype: str
    quantisation: str = "none"
    threshold: float = 6.0
    double_quant: bool = False
    linear: bool = False

    @property
    def storage(self) -> str:
        """How the weights are stored, whatever the device: rows that share it hold the same bytes."""
        width = "32" if self.dtype == "float32" else "16"
        return f"{self.quantisation}-{width}" + ("-dq" if self.double_quant else "")

    @property
    def needs_bitsandbytes(self) -> bool:
        return self.quantisation.startswith("bnb-")


_ROWS = (
    # the published experiment
    Setting("cpu-fp32", "CPU FP32", "cpu", "float32"),
    Setting("gpu-fp16", "GPU FP16", "cuda", "float16"),
    Setting("gpu-int8", "GPU INT8", "cuda", "float16", "bnb-int8"),
    Setting("gpu-int4", "GPU INT4", "cuda", "float16", "bnb-nf4"),
    # variants of it
    Setting("gpu-fp32", "GPU FP32", "cuda", "float32"),
    Setting("gpu-bf16", "GPU BF16", "cuda", "bfloat16"),
    Setting("gpu-int8-nosplit", "GPU INT8 no split", "cuda", "float16", "bnb-int8", threshold=0.0),
    Setting("gpu-int4-dq", "GPU INT4 double quant", "cuda", "float16", "bnb-nf4", double_quant=True),
    Setting("gpu-int4-fp4", "GPU INT4 FP4", "cuda", "float16", "bnb-fp4"),
    # what a machine without a GPU can do. Conv1D in BF16 and under dynamic INT8 is slow or skipped: Linear instead
    Setting("cpu-bf16", "CPU BF16", "cpu", "bfloat16", linear=True),
    Setting("cpu-int8", "CPU INT8", "cpu", "float16", "bnb-int8"),
    Setting("cpu-int4", "CPU INT4", "cpu", "float16", "bnb-nf4"),
    Setting("cpu-int8-dynamic", "CPU INT8 dynamic", "cpu", "float32", "dynamic-int8", linear=True),
)


class Settings(dict[str, Setting]):
    """The rows by key; a notebook shows them as a table, a terminal as lines."""

    def _rows(self) -> list[dict[str, str]]:
        return [{"Key": row.key, "Setting": row.label, "Device": row.device, "Dtype": row.dtype,
                 "Quantisation": row.quantisation + (" + double quantisation" if row.double_quant else "")
                 + (" without the outlier split" if not row.threshold else "")} for row in self.values()]

    def _repr_html_(self) -> str:
        return html_table(self._rows())

    def __repr__(self) -> str:
        return "\n".join(f"{row['Key']:18}{row['Setting']:24}{row['Dtype']:10}{row['Quantisation']}"
                         for row in self._rows())


SETTINGS = Settings((row.key, row) for row in _ROWS)
PUBLISHED: tuple[str, ...] = tuple(SETTINGS)[:4]


def find_setting(key: str) -> Setting:
    """The row for `key`; raises ValueError naming the nearest keys."""
    if key not in SETTINGS:
        raise ValueError(unknown("setting", key, SETTINGS))
    return SETTINGS[key]


def more_settings(facts: dict) -> tuple[str, ...]:
    """What to measure besides the published four: without a GPU, the CPU's own; with one, nothing that is not asked."""
    return () if facts.get("gpu") else tuple(key for key, row in SETTINGS.items()
                                             if row.device == "cpu" and key not in PUBLISHED)


def unavailable_reason(setting: Setting, facts: dict, bitsandbytes: bool = True) -> str | None:
    """Why a machine with these `facts` (see `machine.facts`) cannot run `setting`, or None when it can."""
    if setting.device == "cuda" and not facts.get("gpu"):
        return "no NVIDIA GPU that this PyTorch can use"
    if setting.device == "cuda" and setting.dtype == "bfloat16" and facts["gpu_capability"] < [8, 0]:
        major, minor = facts["gpu_capability"]
        return f"compute capability {major}.{minor} only emulates bfloat16 (8.0 or later has it)"
    if setting.needs_bitsandbytes and not bitsandbytes:
        return "bitsandbytes is not installed: pip install bitsandbytes"
    if setting.quantisation == "dynamic-int8" and not facts.get("dynamic_int8"):
        return "this PyTorch has no quantised engine for this CPU"
    return None


def unknown(kind: str, name: object, known: Iterable[str]) -> str:
    """The message for a name that is not there, with the nearest ones that are."""
    names = list(known)
    near = difflib.get_close_matches(str(name).lower(), names, n=3, cutoff=0.4) or names
    return f"unknown {kind} {name!r}; did you mean {' or '.join(repr(n) for n in near)}?"
