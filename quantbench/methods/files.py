"""What a checkpoint brings itself, run as it is: its own quantisation by transformers, a GGUF file by llama.cpp."""

from __future__ import annotations

import importlib.util
from typing import TYPE_CHECKING

from quantbench.quantisers import Quantiser, name_of, quantised_as
from quantbench.settings import Setting
from quantbench.wording import cut

if TYPE_CHECKING:
    from torch import nn
    from transformers import PretrainedConfig

    from quantbench.weights import Source


class Gguf(Quantiser):
    """Whatever types the file holds: the audit tells them. One sequence at a time, as generation reads it."""

    hue, stepwise, takes_folder, by_torch = "int4", True, False, False
    bits = 4.5  # of the usual 4-bit types; the file alone knows

    def why_not(self, setting: Setting, facts: dict) -> str | None:
        return None if importlib.util.find_spec("llama_cpp") else \
            "llama-cpp-python is not installed: pip install quantbench[llamacpp]"

    def why_not_checkpoint(self, own: object, setting: Setting, source: Source) -> str | None:
        if source.gguf and setting.device == "cuda":
            import llama_cpp
            if not llama_cpp.llama_supports_gpu_offload():
                return "llama-cpp-python was compiled without CUDA: CMAKE_ARGS=-DGGML_CUDA=on"
        return None if source.gguf else f"there is no GGUF file of {source.name}: give the path of one"

    def read(self, source: Source, config: PretrainedConfig, setting: Setting, room: int | None) -> nn.Module | None:
        from quantbench.methods.llamacpp import ROOM, LlamaCpp
        return LlamaCpp(source.gguf, config, setting.device == "cuda", room or ROOM)

    def owns(self, module: nn.Module) -> bool:
        return hasattr(module, "gguf_type")

    def details(self, module: nn.Module) -> dict:
        return {"storage_dtype": module.gguf_type, "compute_dtype": "llama.cpp"}


class Stored(Quantiser):
    """bitsandbytes, GPTQ, AWQ, compressed-tensors, FP8, torchao: whatever transformers reads. How it is stored is found
    in the modules, not promised. The audit names the way that another entry knows (bitsandbytes), else "stored"."""

    bits = 4  # at least

    def why_not_checkpoint(self, own: object, setting: Setting, source: Source) -> str | None:
        from transformers.quantizers import AutoHfQuantizer

        if not own:
            raise ValueError("the checkpoint is not quantised itself: ask for another setting than *-stored")
        try:
            quantizer = AutoHfQuantizer.from_config(own, pre_quantized=True)
            quantizer.validate_environment(device_map={"": setting.device}, dtype=None)
        except Exception as error:  # no package, no GPU for it, or no such way
            return f"{quantised_as(own)}: {cut(error, 200)}"
        if getattr(quantizer.quantization_config, "dequantize", False):
            return f"{quantised_as(own)}: transformers has no kernel for it here, and would undo it"
        return None

    def owns(self, module: nn.Module) -> bool:
        """Whether a module holds a matrix of codes, or a tensor class of them; positions are int64, masks bool."""
        import torch
        codes = {torch.int8, torch.uint8, torch.int32, torch.float8_e4m3fn, torch.float8_e5m2}
        own = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
        return any(one.dim() >= 2 and (one.dtype in codes or hasattr(one, "__tensor_flatten__")) for one in own)

    def details(self, module: nn.Module) -> dict:
        own = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
        largest = max(own, key=lambda one: one.nbytes)
        kind = type(largest).__name__ if hasattr(largest, "__tensor_flatten__") else name_of(largest.dtype)
        bits = getattr(module, "bits", getattr(module, "w_bit", None))
        return {"storage_dtype": kind} | ({"bits": bits} if isinstance(bits, int) else {})


GGUF, STORED = Gguf(), Stored()
