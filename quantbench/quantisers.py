"""The ways of quantising: one entry each. What loads, audits, estimates, captures, traces and draws asks the entry.

Nothing here imports torch before a model is at hand, so that what shows results can ask too."""

from __future__ import annotations

import importlib.util
import re
import sys
import warnings
from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING

from quantbench.settings import Registry, Setting

if TYPE_CHECKING:
    import torch
    from torch import nn
    from transformers import PretrainedConfig

    from quantbench.weights import Source

ITEMSIZE = {"float32": 4, "float16": 2, "bfloat16": 2, "auto": 2}


class Quantiser:
    """The entry that leaves a model as it is; every other one says how it differs. Add an instance to `QUANTISERS`.

    `package` must be installed; `promise` is what `details` of each of its modules must be under a setting."""

    package: str | None = None
    hue: str | None = None  # of its settings in charts, "int8" or "int4"; None: the dtype's
    starts_on: str | None = None  # the device that the weights are read to; None: the setting's
    takes = ""  # in words which matrices alone, where not all
    takes_head = False  # the output head is quantised too
    stepwise = False  # a token's logits depend on what else is in the pass
    takes_folder = True  # of weights as safetensors
    by_torch = True  # whose profiler sees what it computes, and whose allocator what it holds
    bits: float | None = None  # of a quantised weight; None: the dtype's
    row_bytes = 0  # of the scales and zero points that a row of them shares
    rounding: float | None = None  # the step in which activations are rounded, of the largest; None: the dtype's
    kernels: re.Pattern | None = None  # of its products, in a trace
    compile_options: Mapping = MappingProxyType({})  # of torch.compile's, that its step needs

    def family(self, setting: Setting) -> str:
        """Which hue a setting has in charts: "fp32", "16", "int8" or "int4"."""
        return self.hue or ("fp32" if setting.dtype == "float32" else "16")

    def why_not(self, setting: Setting, facts: dict) -> str | None:
        """Why a machine with these `facts` (see `machine.facts`) cannot run it; None when it can."""
        if self.package and importlib.util.find_spec(self.package) is None:
            return f"{self.package} is not installed: pip install {self.package}"
        return None

    def not_captured(self, setting: Setting) -> str | None:
        """Why its decode step cannot be captured; None when it can."""
        return None

    def why_not_checkpoint(self, own: object, setting: Setting, source: Source) -> str | None:
        """Why a checkpoint whose configuration has this quantisation (None: none) cannot be loaded here; None when it
        can. Raises ValueError for one that needs another setting."""
        if own:
            stored = "gpu-stored" if setting.device == "cuda" else "cpu-stored"
            raise ValueError(f"the checkpoint itself is quantised ({quantised_as(own)}), it cannot be measured as "
                             f"{setting.label}: ask for {stored}, or for weights='random'")
        return None

    def config(self, setting: Setting) -> object | None:
        """transformers' quantisation config, for those that quantise while the weights are loaded."""
        return None

    def apply(self, model: nn.Module, setting: Setting) -> None:
        """Quantise a loaded model in place, for those that quantise afterwards."""

    def read(self, source: Source, config: PretrainedConfig, setting: Setting, room: int | None) -> nn.Module | None:
        """A model that others than transformers run, for up to `room` tokens; None: transformers does."""
        return None

    def owns(self, module: nn.Module) -> bool:
        """Whether this module's weight is stored quantised by this way."""
        return False

    def details(self, module: nn.Module) -> dict:
        """How one of its modules is quantised: what `promise` promises, and "storage_dtype" and "compute_dtype"."""
        return {}

    def promise(self, setting: Setting) -> dict:
        return {}

    def tensors(self, module: nn.Module) -> Iterator[torch.Tensor]:
        """The tensors of one of its modules besides parameters and buffers: quantisation state."""
        yield from ()

    def matrix_bytes(self, numel: int, outputs: int, setting: Setting) -> int:
        """What a matrix of `numel` weights for `outputs` outputs will take."""
        return int(numel * (self.bits or 8 * ITEMSIZE[setting.dtype]) // 8) + self.row_bytes * outputs


class Int8Bitsandbytes(Quantiser):
    """LLM.int8 (Dettmers et al. 2022): rows in 8 bits, outlier features above `threshold` apart in the dtype."""

    package, hue, rounding = "bitsandbytes", "int8", 1 / 127
    bits, row_bytes = 8, 4  # a float32 scale
    kernels = re.compile(r"int8_\w*(_mm|matmul)\b|igemm|tensorop_i\d|_s8|_int_mm")

    def not_captured(self, setting: Setting) -> str | None:
        why = "INT8 with the outlier split decides in every layer, on the host: no split can"
        return why if setting.threshold else None

    def config(self, setting: Setting) -> object:
        from transformers import BitsAndBytesConfig
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=setting.threshold)

    def owns(self, module: nn.Module) -> bool:
        return _is(module, "bitsandbytes.nn", "Linear8bitLt") and not module.weight.is_floating_point()

    def details(self, module: nn.Module) -> dict:
        return {"threshold": float(module.state.threshold), "storage_dtype": "int8"}  # computes in its inputs' dtype

    def promise(self, setting: Setting) -> dict:
        return {"threshold": setting.threshold}

    def tensors(self, module: nn.Module) -> Iterator[torch.Tensor]:
        scales = (getattr(module.weight, "SCB", None), module.state.SCB)  # on the weight until the first forward pass
        yield from [one for one in scales if one is not None][:1]


class Int4Bitsandbytes(Quantiser):
    """4-bit blocks of bitsandbytes (QLoRA, Dettmers et al. 2023): NF4, or FP4; its defaults (fp4, float32 compute) are
    slow and less exact, so both are always said."""

    package, hue, kernels = "bitsandbytes", "int4", re.compile(r"gem[mv]_4bit")
    block = 64  # weights that share an absmax

    def __init__(self, kind: str) -> None:
        self.kind = kind

    def config(self, setting: Setting) -> object:
        import torch
        from transformers import BitsAndBytesConfig
        return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type=self.kind,
                                  bnb_4bit_compute_dtype=getattr(torch, setting.dtype),
                                  bnb_4bit_use_double_quant=setting.double_quant)

    def owns(self, module: nn.Module) -> bool:
        return (_is(module, "bitsandbytes.nn", "Linear4bit")
                and getattr(getattr(module.weight, "quant_state", None), "quant_type", None) == self.kind)

    def details(self, module: nn.Module) -> dict:
        state = module.weight.quant_state
        return {"block": state.blocksize, "double": state.state2 is not None, "storage_dtype": state.quant_type,
                "compute_dtype": name_of(module.compute_dtype)}

    def promise(self, setting: Setting) -> dict:
        return {"block": self.block, "double": setting.double_quant, "compute_dtype": setting.dtype}

    def tensors(self, module: nn.Module) -> Iterator[torch.Tensor]:
        state = module.weight.quant_state
        while state is not None:  # double quantisation: the absmax is quantised too, with a state of its own
            yield from (tensor for tensor in (state.absmax, state.code, state.offset) if tensor is not None)
            state = state.state2

    def matrix_bytes(self, numel: int, outputs: int, setting: Setting) -> int:
        absmax = numel // self.block
        return numel // 2 + (absmax + absmax // 64 if setting.double_quant else 4 * absmax)


class DynamicInt8(Quantiser):
    """torch's dynamic INT8 on a CPU: every Linear, the head too, a scale per row; activations are rounded to 7 bits."""

    hue, takes_head, stepwise, rounding = "int8", True, True, 2 / 127
    bits, row_bytes = 8, 16  # a scale and a zero point, of 8 bytes each
    kernels = re.compile(r"linear_dynamic")

    def why_not(self, setting: Setting, facts: dict) -> str | None:
        return None if facts.get("dynamic_int8") else "this PyTorch has no quantised engine for this CPU"

    def apply(self, model: nn.Module, setting: Setting) -> None:
        import torch
        with warnings.catch_warnings(action="ignore"):  # torch.ao gives way to torchao, which leaves GPT-2 as it is
            per_channel = {torch.nn.Linear: torch.ao.quantization.per_channel_dynamic_qconfig}
            torch.ao.quantization.quantize_dynamic(model, per_channel, dtype=torch.qint8, inplace=True)

    def owns(self, module: nn.Module) -> bool:
        return _is(module, "torch.ao.nn.quantized.dynamic", "Linear")

    def details(self, module: nn.Module) -> dict:
        return {"storage_dtype": "int8", "compute_dtype": "int8"}

    def tensors(self, module: nn.Module) -> Iterator[torch.Tensor]:
        import torch
        weight, bias = module.weight(), module.bias()  # unpacked anew at every call: only shapes are of use here
        yield torch.empty(weight.shape, dtype=torch.int8, device="meta")
        yield from (weight.q_per_channel_scales().to("meta"), weight.q_per_channel_zero_points().to("meta"))
        yield from () if bias is None else (bias.to("meta"),)


QUANTISERS = Registry("quantiser", {
    "none": Quantiser(),
    "bnb-int8": Int8Bitsandbytes(),
    "bnb-nf4": Int4Bitsandbytes("nf4"),
    "bnb-fp4": Int4Bitsandbytes("fp4"),
    "dynamic-int8": DynamicInt8(),
    "packed-int8": "quantbench.methods.cpu_packed:INT8",
    "packed-int4": "quantbench.methods.cpu_packed:INT4",
    "torchao-int8": "quantbench.methods.torchao:INT8",
    "torchao-int4": "quantbench.methods.torchao:INT4",
    "torchao-int4-g64": "quantbench.methods.torchao:INT4_64",
    "torchao-fp8": "quantbench.methods.torchao:FP8",
    "gguf": "quantbench.methods.files:GGUF",
    "stored": "quantbench.methods.files:STORED",  # last: it owns what no other does
})
find_quantiser = QUANTISERS.find


def why_not(setting: Setting, facts: dict) -> str | None:
    """Why a machine with these `facts` (see `machine.facts`) cannot run `setting`; None when it can."""
    if setting.device == "cuda" and not facts.get("gpu"):
        return "no NVIDIA GPU that this PyTorch can use"
    if setting.gpus > facts.get("gpu_count", 1):
        return f"{setting.gpus} GPUs are asked for, and {facts['gpu_count']} is all there is"
    if setting.gpus > 1 and find_quantiser(setting.quantisation).starts_on:
        return f"{setting.label} is quantised on one GPU only"
    if setting.device == "cuda" and setting.dtype == "bfloat16" and facts["gpu_capability"] < [8, 0]:
        return "compute capability {}.{} only emulates bfloat16 (8.0 or later has it)".format(*facts["gpu_capability"])
    return find_quantiser(setting.quantisation).why_not(setting, facts)


def quantised_as(own: object) -> str:
    """A checkpoint's own quantisation in words: "gptq, 4 bits"."""
    values = own if isinstance(own, dict) else own.to_dict()
    bits = 4 if values.get("load_in_4bit") else 8 if values.get("load_in_8bit") else values.get("bits")
    return str(values.get("quant_method", "by an unnamed method")) + (f", {bits} bits" if bits else "")


def name_of(dtype: torch.dtype) -> str:
    """ "float16" """
    return str(dtype).removeprefix("torch.")


def _is(module: nn.Module, home: str, name: str) -> bool:
    """Whether `module` is an instance of a class of a package that may not be installed, nor imported yet."""
    return home in sys.modules and isinstance(module, getattr(sys.modules[home], name))
