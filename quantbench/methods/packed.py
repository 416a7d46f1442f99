"""Linear layers whose weights alone are quantised, on torch's own CPU kernels."""

import torch
from torch import nn


class PackedLinear(nn.Module):
    """What both have in common: `product` takes and gives bfloat16, in which alone the kernels are fast. `group`
    inputs of a row share a scale; None: all."""

    def __init__(self, linear: nn.Linear, group: int | None = None) -> None:
        super().__init__()
        self.group = group
        self.in_features, self.out_features, self.bias = linear.in_features, linear.out_features, linear.bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = self.product(x.reshape(-1, self.in_features).to(torch.bfloat16).contiguous())
        out = out.reshape(*x.shape[:-1], self.out_features).to(x.dtype)
        return out if self.bias is None else out + self.bias


class Int8Rows(PackedLinear):
    """A row of the matrix shares a scale."""

    most = 32  # inputs at a time for which the kernel is the faster way

    def __init__(self, linear: nn.Linear, group: int | None = None) -> None:
        super().__init__(linear, group)
        weight = linear.weight.float()
        scales = (weight.abs().amax(1) / 127).clamp(min=1e-12).to(torch.bfloat16)  # rounded before it divides
        rows = (weight / scales[:, None].float()).round().clamp(-127, 127)
        self.register_buffer("rows", rows.to(torch.int8))
        self.register_buffer("scales", scales)

    def product(self, x: torch.Tensor) -> torch.Tensor:
        if len(x) > self.most:
            return nn.functional.linear(x.float(), self.rows * self.scales[:, None].float()).to(x.dtype)
        return torch._weight_int8pack_mm(x, self.rows, self.scales)


class Int4Groups(PackedLinear):
    """`group` inputs of a row share a scale and the value of their middle code, 8."""

    def __init__(self, linear: nn.Linear, group: int) -> None:
        super().__init__(linear, group)
        weight = linear.weight.float().unflatten(1, (-1, group))  # [outputs, groups, group]
        least, most = weight.amin(2), weight.amax(2)
        scales = ((most - least) / 15).clamp(min=1e-12).to(torch.bfloat16)
        middles = (least + 8 * scales.float()).to(torch.bfloat16)
        codes = (weight - middles[..., None].float()) / scales[..., None].float() + 8
        codes = codes.round().clamp(0, 15).to(torch.int32).flatten(1)
        self.register_buffer("codes", torch._convert_weight_to_int4pack_for_cpu(codes, 1))
        self.register_buffer("scales", torch.stack([scales, middles], -1).transpose(0, 1).contiguous())

    def product(self, x: torch.Tensor) -> torch.Tensor:
        return torch._weight_int4pack_mm_for_cpu(x, self.codes, self.group, self.scales)
