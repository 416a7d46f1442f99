"""Weight-only INT8 and INT4 on torch's own CPU kernels: no activation is rounded further than to bfloat16."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from quantbench.quantisers import Quantiser
from quantbench.settings import Setting

if TYPE_CHECKING:
    from torch import nn


class RowInt8(Quantiser):
    """8 bits, a scale per output channel; the output head too, which bounds the step of a small model."""

    hue, takes_head, kind, rounding = "int8", True, "Int8Rows", 2**-7  # bfloat16's, whatever the dtype
    bits, row_bytes, group = 8, 2, None  # a bfloat16 scale
    kernels, takes = re.compile(r"_weight_int8pack_mm"), ": it takes Linear with a multiple of 16 inputs"

    def apply(self, model: nn.Module, setting: Setting) -> None:
        from torch import nn

        from quantbench.methods import packed
        head = model.get_output_embeddings()
        for name, child in list(model.named_modules(remove_duplicate=False)):
            if isinstance(child, nn.Linear) and (self.takes_head or child is not head) and self.fits(child):
                model.set_submodule(name, getattr(packed, self.kind)(child, self.group))

    def fits(self, linear: nn.Linear) -> bool:
        """Whether the kernel takes this shape; what it does not take is left, and the audit says so."""
        return linear.in_features % 16 == 0  # of other rows it reads past the end: wrong numbers, or a dead process

    def owns(self, module: nn.Module) -> bool:
        from quantbench.methods import packed
        return isinstance(module, getattr(packed, self.kind))

    def details(self, module: nn.Module) -> dict:
        return {"storage_dtype": "int8", "compute_dtype": "bfloat16", "per": "row"}

    def promise(self, setting: Setting) -> dict:
        return {"storage_dtype": "int8", "per": "row"}


class GroupInt4(RowInt8):
    """4 bits, a scale and a middle per `group` inputs; the output head stays in the dtype."""

    hue, takes_head, kind = "int4", False, "Int4Groups"
    kernels = re.compile(r"_weight_int4pack_mm")
    group, takes = 32, ": it takes Linear with a multiple of 32 inputs and of 16 outputs"

    def fits(self, linear: nn.Linear) -> bool:
        return linear.in_features % self.group == 0 and linear.out_features % 16 == 0

    def details(self, module: nn.Module) -> dict:
        return {"storage_dtype": "int4", "compute_dtype": "bfloat16", "group": module.group}

    def promise(self, setting: Setting) -> dict:
        return {"storage_dtype": "int4", "group": self.group}

    def matrix_bytes(self, numel: int, outputs: int, setting: Setting) -> int:
        return numel // 2 + 4 * numel // self.group  # a bfloat16 scale and middle each


INT8, INT4 = RowInt8(), GroupInt4()
