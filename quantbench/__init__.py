"""quantbench: what CPU FP32, GPU FP16, INT8 and INT4 cost and buy a language model, on the machine in front of you.

The public names are resolved on first use, so that `import quantbench` is instant and reading results needs no torch.
"""

from __future__ import annotations

import importlib
import sys
import types

_HOME = {
    "settings": ("SETTINGS", "PUBLISHED", "Setting", "more_settings"),
    "models": ("MODELS", "Model"),
    "record": ("PROMPT", "Workload", "Measurement", "NewerSchema"),
    "run": ("Run",),
    "machine": ("facts", "versions"),
    "loaders": ("load",),
    "loaded": ("LoadedModel",),
    "audit": ("AuditError",),
    "limits": ("limits",),
    "generate": ("generate",),
    "quality": ("quality", "reference"),
    "sweep": ("sweep",),
    "tables": ("table", "show", "markdown", "machine_table"),
    "published": ("published_table", "show_published"),
    "charts": ("plot_throughput", "plot_lengths", "plot_latency", "plot_vram", "plot_floor"),
    "explain": ("explain", "verdict", "why_table", "show_why"),
    "scaling": ("crossovers", "plot_scaling"),
    "findings": ("findings",),
    "memory": ("memory_table", "show_memory", "plot_memory"),
    "save": ("save",),
    "report": ("report",),
    "compare": ("compare", "compare_table", "plot_machines"),
    "changes": ("changes",),
    "sides": ("shipped",),
    "quality_view": ("quality_table", "show_quality", "quality_findings"),
    "pareto": ("plot_quality",),
    "continuations": ("continuations",),
    "panel": ("panel",),
}
_MODULE_OF = {name: module for module, names in _HOME.items() for name in names}
__all__ = sorted(_MODULE_OF)


def __getattr__(name: str) -> object:
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'quantbench' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"quantbench.{_MODULE_OF[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__


class _Package(types.ModuleType):
    """Keeps `quantbench.generate` the function: importing a submodule would put the module under its name."""

    def __setattr__(self, name: str, value: object) -> None:
        if isinstance(value, types.ModuleType) and name in _MODULE_OF:
            value = getattr(value, name, value)
        super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
