"""Activations, norms and rotary embeddings in fewer kernels than transformers spells them out in: the same functions."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator

import torch
from torch import nn


class FusedRMSNorm(nn.Module):
    """Llama's RMSNorm (x / rms(x) · weight) in torch's one kernel."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.weight, self.epsilon = norm.weight, norm.variance_epsilon

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return nn.functional.rms_norm(hidden, self.weight.shape, self.weight, self.epsilon)


ROTARY = {"LlamaAttention", "MistralAttention", "Qwen2Attention"}
FUSED = {"NewGELUActivation": lambda _: nn.GELU(approximate="tanh"),
         **dict.fromkeys(["LlamaRMSNorm", "MistralRMSNorm", "Qwen2RMSNorm", "Qwen3RMSNorm"], FusedRMSNorm)}


def rotary(query, key, cos, sin, unsqueeze_dim=1):
    """Llama's rotary embedding of queries and keys together: half the kernels of one after the other."""
    both = torch.cat([query, key], dim=1)
    half = both.shape[-1] // 2
    turned = torch.cat([-both[..., half:], both[..., :half]], dim=-1)
    both = torch.addcmul(both * cos.unsqueeze(unsqueeze_dim), turned, sin.unsqueeze(unsqueeze_dim))
    return both[:, : query.shape[1]], both[:, query.shape[1]:]


@contextlib.contextmanager
def fused(model: nn.Module) -> Iterator[None]:
    """Within the block, FUSED and `rotary` run in place of what they name; all is as it was after it."""
    swapped = [(parent, name, child, FUSED[type(child).__name__](child)) for parent in model.modules()
               for name, child in parent.named_children() if type(child).__name__ in FUSED]
    homes = {sys.modules[type(module).__module__] for module in model.modules() if type(module).__name__ in ROTARY}
    swapped += [(home, "apply_rotary_pos_emb", home.apply_rotary_pos_emb, rotary) for home in homes]
    try:
        for parent, name, _, quick in swapped:
            setattr(parent, name, quick)
        yield
    finally:
        for parent, name, slow, _ in swapped:
            setattr(parent, name, slow)
