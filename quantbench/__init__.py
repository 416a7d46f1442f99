"""quantbench: what CPU FP32, GPU FP16, INT8 and INT4 cost and buy a language model, on the machine in front of you.

Public names are resolved on first use, so that `import quantbench` is instant and reading results needs no torch."""

import importlib
import os

os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")  # what dependencies would send or fetch by themselves
os.environ.setdefault("DISABLE_SAFETENSORS_CONVERSION", "1")
os.environ.setdefault("USE_HUB_KERNELS", "NO")
_HOME = {  # module -> its public names; none has the name of a module
    "settings": ("SETTINGS", "EXPERIMENT", "MODELS", "PROMPT", "Setting", "Model", "Workload", "more_settings"),
    "quantisers": ("QUANTISERS", "Quantiser"),
    "records": ("Measurement",),
    "results": ("Run", "NewerSchema"),
    "machine": ("facts", "versions"),
    "loading": ("load", "LoadedModel"),
    "inspection": ("AuditError",),
    "timing": ("generate",),
    "tables": ("table", "show", "machine_table"),
    "charts": ("plot_throughput", "plot_lengths", "plot_latency", "plot_vram"),
    "conclusions": ("findings", "ratios"),
    "saving": ("save",),
    "sweeps.sweeping": ("sweep",),
    "evaluation.passes": ("quality", "reference"),
    "evaluation.batches": ("batch_effect",),
    "evaluation.scores": ("Quality",),
    "evaluation.judging": ("quality_findings",),
    "evaluation.showing": ("quality_table", "show_quality", "plot_quality", "continuations"),
    "why.floors": ("Limits",),
    "why.ceilings": ("limits",),
    "why.tracing": ("trace",),
    "why.verdicts": ("explain", "verdict", "why_table", "plot_floor"),
    "why.growth": ("plot_scaling",),
    "why.prompts": ("prompt_table", "prompt_findings", "plot_prompts"),
    "why.memory": ("memory_table",),
    "comparison.machines": ("compare", "compare_table", "plot_machines"),
    "comparison.history": ("changes",),
    "comparison.t4": ("reference_table", "shipped"),
    "choice.fitting": ("fit",),
    "choice.choosing": ("choose",),
    "widgets.controls": ("panel",),
}
_MODULE_OF = {name: module for module, names in _HOME.items() for name in names}
__all__ = sorted(_MODULE_OF)


def __getattr__(name: str) -> object:
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'quantbench' has no attribute {name!r}")
    return getattr(importlib.import_module(f"quantbench.{_MODULE_OF[name]}"), name)


def __dir__() -> list[str]:
    return __all__
