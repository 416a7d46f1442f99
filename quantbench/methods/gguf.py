"""GGUF files as llama.cpp runs them: its own kernels, on the same weights and prompt as everybody else's."""

from __future__ import annotations

import importlib.util
from typing import TYPE_CHECKING

from quantbench.quantisers import Quantiser
from quantbench.settings import Setting

if TYPE_CHECKING:
    from torch import nn
    from transformers import PretrainedConfig

    from quantbench.weights import Source


class Gguf(Quantiser):
    """Whatever types the file holds: the audit tells them. One sequence at a time, as generation reads it."""

    hue, stepwise, takes_folder, traced = "int4", True, False, False

    def why_not(self, setting: Setting, facts: dict) -> str | None:
        return None if importlib.util.find_spec("llama_cpp") else \
            "llama-cpp-python is not installed: pip install quantbench[llamacpp]"

    def why_not_checkpoint(self, own: object, setting: Setting, source: Source) -> str | None:
        return None if source.gguf else f"there is no GGUF file of {source.name}: give the path of one"

    def read(self, source: Source, config: PretrainedConfig, room: int | None) -> nn.Module | None:
        from quantbench.methods.llamacpp import ROOM, LlamaCpp
        return LlamaCpp(source.gguf, config, room or ROOM)

    def owns(self, module: nn.Module) -> bool:
        return hasattr(module, "gguf_type")

    def details(self, module: nn.Module) -> dict:
        return {"storage_dtype": module.gguf_type, "compute_dtype": "llama.cpp"}

    def matrix_bytes(self, numel: int, outputs: int, setting: Setting) -> int:
        return numel * 9 // 16  # of the usual 4-bit types; the file alone knows


GGUF = Gguf()
