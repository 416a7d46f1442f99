"""What transformers spells out in many kernels, in fewer: the same functions, for the captured decode step."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator

import torch
from torch import nn
from torch.nn import functional
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, eager_mask


class FusedRMSNorm(nn.Module):
    """Llama's RMSNorm (x / rms(x) · weight) in torch's one kernel."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.weight, self.epsilon = norm.weight, norm.variance_epsilon

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return functional.rms_norm(hidden, self.weight.shape, self.weight, self.epsilon)


class RotaryTables(nn.Module):
    """Llama's cos and sin, once per step, as `rotary` multiplies by them: [batch, tokens, 2, head size / 2] each."""

    def __init__(self, tables: nn.Module) -> None:
        super().__init__()
        self.tables = tables

    def forward(self, hidden: torch.Tensor, position_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        cos, sin = (table[..., : table.shape[-1] // 2] for table in self.tables(hidden, position_ids))
        return torch.stack([cos, sin], dim=-2), torch.stack([-sin, cos], dim=-2)


def rotary(query, key, by_first, by_second, unsqueeze_dim=1):
    """Llama's rotary embedding of queries and keys together, both halves of every head at once: 3 kernels, not 10."""
    both = torch.cat([query, key], dim=1)
    first, second = both.unflatten(-1, (2, 1, -1)).unbind(-3)
    turned = torch.addcmul(first * by_first.unsqueeze(unsqueeze_dim), second, by_second.unsqueeze(unsqueeze_dim))
    return turned.flatten(-2).split([query.shape[1], key.shape[1]], dim=1)


class Shared:
    """Linear layers of one input, their weights in one tensor, so that one product gives them all."""

    def __init__(self, layers: list[nn.Linear]) -> None:
        self.sizes = [layer.out_features for layer in layers]
        self.weight, self.bias = (self._joined([getattr(layer, name) for layer in layers]) for name in ("weight", "bias"))

    @staticmethod
    def _joined(tensors: list[nn.Parameter | None]) -> torch.Tensor | None:
        """The parameters one below the other; each is a part of the whole from then on, so nothing is held twice."""
        if tensors[0] is None:
            return None
        whole = torch.cat([tensor.data for tensor in tensors])
        for tensor, part in zip(tensors, whole.split([len(tensor) for tensor in tensors])):
            tensor.data = part
        return whole

    def __call__(self, hidden: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return functional.linear(hidden, self.weight, self.bias).split(self.sizes, dim=-1)


class SharedPart(nn.Module):
    """One layer of a `Shared` product, called in the layer's place: the first one computes, the others hand out."""

    def __init__(self, shared: Shared, index: int, parts: dict[int, torch.Tensor]) -> None:
        super().__init__()
        self.shared, self.index, self.parts = shared, index, parts

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        if self.index == 0:
            self.parts.update(enumerate(self.shared(hidden)))
        return self.parts.pop(self.index)


FUSED = {"NewGELUActivation": lambda _: nn.GELU(approximate="tanh"),
         **dict.fromkeys(["LlamaRMSNorm", "MistralRMSNorm", "Qwen2RMSNorm", "Qwen3RMSNorm"], FusedRMSNorm),
         **dict.fromkeys(["LlamaRotaryEmbedding", "MistralRotaryEmbedding", "Qwen2RotaryEmbedding"], RotaryTables)}
ROTARY = {"LlamaAttention", "MistralAttention", "Qwen2Attention"}
TOGETHER = [("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")]  # layers of one input, called in this order


@contextlib.contextmanager
def fused(model: nn.Module) -> Iterator[None]:
    """Within the block, fewer kernels run in place of FUSED, ROTARY and TOGETHER; all is as it was after it.

    The mask is made of numbers once per step: torch's attention would make them of booleans in every layer.
    """
    swapped = [(parent, name, child, FUSED[type(child).__name__](child)) for parent in model.modules()
               for name, child in parent.named_children() if type(child).__name__ in FUSED]
    homes = {sys.modules[type(module).__module__] for module in model.modules() if type(module).__name__ in ROTARY}
    swapped += [(home, "apply_rotary_pos_emb", home.apply_rotary_pos_emb, rotary) for home in homes]
    swapped += [swap for parent in model.modules() for names in TOGETHER for swap in _together(parent, names)]
    try:
        for parent, name, _, quick in swapped:
            setattr(parent, name, quick)
        ALL_MASK_ATTENTION_FUNCTIONS["sdpa"] = eager_mask
        yield
    finally:
        del ALL_MASK_ATTENTION_FUNCTIONS["sdpa"]
        for parent, name, slow, _ in swapped:
            setattr(parent, name, slow)


def _together(parent: nn.Module, names: tuple[str, ...]) -> list[tuple[nn.Module, str, nn.Module, nn.Module]]:
    layers = [getattr(parent, name, None) for name in names]
    if {type(layer) for layer in layers} != {nn.Linear}:  # quantised weights have their own products
        return []
    shared, parts = Shared(layers), {}
    return [(parent, name, layer, SharedPart(shared, index, parts))
            for index, (name, layer) in enumerate(zip(names, layers))]
