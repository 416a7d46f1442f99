"""torchao's weight-only INT4 and INT8, and FP8 with dynamic activations, through its own `quantize_`."""

from __future__ import annotations

import functools
import importlib.util
import re
import warnings
from typing import TYPE_CHECKING

from quantbench.quantisers import Quantiser, name_of
from quantbench.settings import Setting
from quantbench.wording import cut

if TYPE_CHECKING:
    from torch import nn


class Torchao(Quantiser):
    """What they have in common: Linear stays the class, its weight becomes a tensor of torchao's; the output head is
    left as it is. `method()` is a configuration of torchao's, `tensor` its class of weights."""

    starts_on = "cpu"  # each layer goes to the GPU and is quantised there by itself: the peak stays low
    tensor, capability = "", [8, 0]

    def why_not(self, setting: Setting, facts: dict) -> str | None:
        if (now := facts.get("gpu_capability", [0, 0])) < self.capability:
            return "compute capability {}.{}: torchao's kernels need {}.{} or later".format(*now, *self.capability)
        return _broken(self)

    def apply(self, model: nn.Module, setting: Setting) -> None:
        from torch import nn
        from torchao.quantization import quantize_
        head = model.get_output_embeddings()
        with warnings.catch_warnings(action="ignore"):  # advice on versions of CUDA, once per layer
            quantize_(model, self.method(), lambda one, _: isinstance(one, nn.Linear) and one is not head,
                      device=setting.device)

    def owns(self, module: nn.Module) -> bool:
        kind = type(getattr(module, "weight", None))
        return kind.__name__ == self.tensor and kind.__module__.startswith("torchao.")

    def details(self, module: nn.Module) -> dict:
        weight = module.weight
        activations = getattr(weight, "act_quant_kwargs", None)
        return {"storage_dtype": name_of(weight.qdata.dtype), "compute_dtype": name_of(weight.dtype),
                "group": "row" if weight.block_size[-1] == weight.shape[-1] else weight.block_size[-1],
                "activations": activations and name_of(activations.float8_dtype)}

    def promise(self, setting: Setting) -> dict:
        return {"storage_dtype": "int8", "compute_dtype": setting.dtype, "group": "row", "activations": None}


class Int8Torchao(Torchao):
    """Weight-only INT8, a scale per row: eager converts the whole matrix in every step, `compile` in the product."""

    hue, tensor = "int8", "Int8Tensor"
    bits, row_bytes = 8, 5  # a float32 scale and an int8 zero point
    kernels = re.compile(r"triton_\w*mm")
    compile_options = {"coordinate_descent_tuning": True}  # inductor then joins conversion and product into one kernel

    def method(self) -> object:
        from torchao.quantization import Int8WeightOnlyConfig
        return Int8WeightOnlyConfig(set_inductor_config=False)  # it would hold for what is compiled after, too


class Int4Torchao(Torchao):
    """Weight-only INT4 in tinygemm's tiles; `group` weights of a row share a scale and a zero point. A matrix whose
    inputs are no multiple of it is left, and the audit says so."""

    hue, tensor, layout = "int4", "Int4TilePackedTo4dTensor", "tile_packed_to_4d"
    kernels = re.compile(r"tinygemm")

    def __init__(self, group: int) -> None:
        self.group, self.takes = group, f": it takes Linear with a multiple of {group} inputs"

    def method(self) -> object:
        from torchao.quantization import Int4WeightOnlyConfig
        return Int4WeightOnlyConfig(group_size=self.group, int4_packing_format=self.layout, set_inductor_config=False)

    def owns(self, module: nn.Module) -> bool:
        return super().owns(module) and module.weight.block_size[-1] == self.group

    def details(self, module: nn.Module) -> dict:
        own = {"storage_dtype": "int4", "group": module.weight.block_size[-1], "layout": self.layout}
        return super().details(module) | own  # the codes lie eight in an int32

    def promise(self, setting: Setting) -> dict:
        return super().promise(setting) | {"storage_dtype": "int4", "group": self.group, "layout": self.layout}

    def matrix_bytes(self, numel: int, outputs: int, setting: Setting) -> int:
        inputs, outputs = -(-(numel // outputs) // 1024) * 1024, -(-outputs // 8) * 8  # what the tiles are padded to
        return outputs * (inputs // 2 + 4 * inputs // self.group)  # a bfloat16 scale and zero point a group


class Float8Torchao(Torchao):
    """FP8 (e4m3): a scale per row of the weights, and one per token for activations, taken as they come."""

    hue, tensor, capability = "int8", "Float8Tensor", [8, 9]
    bits, row_bytes = 8, 4  # a float32 scale
    rounding = 2**-4  # three bits of mantissa
    kernels = re.compile(r"e4m3|fp8|f8f8|nvjet_q")

    def method(self) -> object:
        from torchao.quantization import Float8DynamicActivationFloat8WeightConfig, PerRow
        return Float8DynamicActivationFloat8WeightConfig(granularity=PerRow(), set_inductor_config=False)

    def promise(self, setting: Setting) -> dict:
        return super().promise(setting) | {"storage_dtype": "float8_e4m3fn", "activations": "float8_e4m3fn"}


@functools.cache
def _broken(way: Torchao) -> str | None:
    """Why torchao cannot be used here; None when it can. It is imported to know, and that may raise anything."""
    if importlib.util.find_spec("torchao") is None:
        return "torchao is not installed: pip install quantbench[torchao]"
    try:
        way.method()
    except Exception as error:
        return f"torchao does not work here ({cut(error, 200)}): pip install quantbench[torchao]"
    return None


INT8, INT4, INT4_64, FP8 = Int8Torchao(), Int4Torchao(128), Int4Torchao(64), Float8Torchao()
