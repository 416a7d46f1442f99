"""What transformers spells out in many kernels, in fewer: the same functions, for the captured decode step."""

from __future__ import annotations

import contextlib
import functools
import sys
from collections.abc import Callable, Iterator

import torch
from torch import nn
from torch.nn import functional
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask


@functools.cache
def kernel(source: str) -> Callable[..., torch.Tensor]:
    """An elementwise C++ function of a dtype T as one CUDA kernel, compiled by torch's jiterator at its first call."""
    return torch.cuda.jiterator._create_jit_fn(f"template <typename T> {source}")


def silu_times(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """SiLU(gate) · up."""
    if not gate.is_cuda:
        return functional.silu(gate) * up
    return kernel("T silu_times(T gate, T up) { float g = gate; return g / (1.0f + exp(-g)) * float(up); }")(gate, up)


def two_products(a: torch.Tensor, b: torch.Tensor, c: torch.Tensor, d: torch.Tensor) -> torch.Tensor:
    """a · b + c · d, broadcast."""
    if not a.is_cuda:
        return torch.addcmul(a * b, c, d)
    return kernel("T two_products(T a, T b, T c, T d) { return float(a) * float(b) + float(c) * float(d); }")(a, b, c, d)


class FusedRMSNorm(nn.Module):
    """Llama's RMSNorm (x / rms(x) · weight) in torch's one kernel."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.weight, self.epsilon = norm.weight, norm.variance_epsilon

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return functional.rms_norm(hidden, self.weight.shape, self.weight, self.epsilon)


class FusedMLP(nn.Module):
    """Llama's gated MLP with its activation and its product of gate and up in one kernel."""

    def __init__(self, mlp: nn.Module) -> None:
        super().__init__()
        self.mlp = mlp

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.mlp.down_proj(silu_times(self.mlp.gate_proj(hidden), self.mlp.up_proj(hidden)))


class RotaryTables(nn.Module):
    """Llama's cos and sin, once per step, as `rotary` multiplies by them: [batch, tokens, 2, head size / 2] each."""

    def __init__(self, tables: nn.Module) -> None:
        super().__init__()
        self.tables = tables

    def forward(self, hidden: torch.Tensor, position_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        cos, sin = (table[..., : table.shape[-1] // 2] for table in self.tables(hidden, position_ids))
        return torch.stack([cos, sin], dim=-2), torch.stack([-sin, cos], dim=-2)


def rotary(query, key, by_first, by_second, unsqueeze_dim=1):
    """Llama's rotary embedding of queries and keys together, both halves of every head at once: 2 kernels, not 10."""
    both = torch.cat([query, key], dim=1)
    first, second = both.unflatten(-1, (2, 1, -1)).unbind(-3)
    turned = two_products(first, by_first.unsqueeze(unsqueeze_dim), second, by_second.unsqueeze(unsqueeze_dim))
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


def additive_mask(*args, dtype: torch.dtype = torch.float32, **kwargs) -> torch.Tensor | None:
    """transformers' mask as numbers, once per step: of booleans, torch's attention makes them in every layer anew."""
    allowed = sdpa_mask(*args, dtype=dtype, **kwargs)
    if allowed is None:
        return None
    return torch.zeros(allowed.shape, dtype=dtype, device=allowed.device).masked_fill(~allowed, torch.finfo(dtype).min)


LIKE_LLAMA = ("Llama", "Mistral", "Qwen2", "Qwen3")
FUSED = {"NewGELUActivation": lambda _: nn.GELU(approximate="tanh")} | {
    f"{family}{part}": quick for family in LIKE_LLAMA
    for part, quick in {"RMSNorm": FusedRMSNorm, "MLP": FusedMLP, "RotaryEmbedding": RotaryTables}.items()}
ROTARY = {f"{family}Attention" for family in LIKE_LLAMA}
TOGETHER = [("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")]  # layers of one input, called in this order


@contextlib.contextmanager
def fused(model: nn.Module) -> Iterator[None]:
    """Within the block, fewer kernels run in place of FUSED, ROTARY, TOGETHER and the mask; all is as it was after it."""
    swapped = [(parent, name, child, FUSED[type(child).__name__](child)) for parent in model.modules()
               for name, child in parent.named_children() if _known(child)]
    homes = {sys.modules[type(module).__module__] for module in model.modules() if type(module).__name__ in ROTARY}
    swapped += [(home, "apply_rotary_pos_emb", home.apply_rotary_pos_emb, rotary) for home in homes]
    swapped += [swap for parent in model.modules() for names in TOGETHER for swap in _together(parent, names)]
    try:
        for parent, name, _, quick in swapped:
            setattr(parent, name, quick)
        ALL_MASK_ATTENTION_FUNCTIONS["sdpa"] = additive_mask
        yield
    finally:
        del ALL_MASK_ATTENTION_FUNCTIONS["sdpa"]
        for parent, name, slow, _ in swapped:
            setattr(parent, name, slow)


def _known(module: nn.Module) -> bool:
    """Whether a class of FUSED is what its name says: an MLP may have another activation than SiLU."""
    activation = getattr(module, "act_fn", None)
    return type(module).__name__ in FUSED and (activation is None or type(activation).__name__ in ("SiLU", "SiLUActivation"))


def _together(parent: nn.Module, names: tuple[str, ...]) -> list[tuple[nn.Module, str, nn.Module, nn.Module]]:
    layers = [getattr(parent, name, None) for name in names]
    if {type(layer) for layer in layers} != {nn.Linear}:  # quantised weights have their own products
        return []
    shared, parts = Shared(layers), {}
    return [(parent, name, layer, SharedPart(shared, index, parts))
            for index, (name, layer) in enumerate(zip(names, layers))]
