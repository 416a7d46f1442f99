"""A greedy decode step as a CUDA graph: the host launches one thing per token, so precision is what is measured."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from types import SimpleNamespace

import torch
from torch import nn

from quantbench.loaded import LoadedModel
from quantbench.loaders import static_cache


def capture(work: Callable[[], None]) -> Callable[[], None]:
    """`work` as a CUDA graph: every kernel of it is launched by one call. It must not wait for the host."""
    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):  # libraries choose kernels and take workspaces before the capture, not in it
        for _ in range(2):
            work()
    torch.cuda.current_stream().wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    return graph.replay


class Graph:
    """Prefill and one decode step with its argmax, each captured once and replayed; the KV cache is static.

    Between two tokens the host does nothing but launch one graph. While it is captured, activations and norms that
    transformers spells out in up to 8 kernels run as torch's fused ones: the same function, rounded once instead of
    several times. `capture` is a parameter so that the control flow can be tested without a GPU.
    """

    def __init__(self, lm: LoadedModel, prompt: torch.Tensor, tokens: int,
                 capture: Callable[[Callable[[], None]], Callable[[], None]]) -> None:
        batch, self.start = prompt.shape
        self.model, self.prompt = lm.model, prompt
        stop = lm.model.generation_config.eos_token_id
        self.stop = None if stop is None else torch.tensor(stop, device=prompt.device).reshape(-1)
        room = tokens + 3  # capturing runs the step a few times, past what is asked for
        self.cache = static_cache(lm.model, self.start + room)
        self.position, self.slot = (torch.zeros(1, dtype=torch.long, device=prompt.device) for _ in range(2))
        self.token = torch.zeros(batch, 1, dtype=torch.long, device=prompt.device)
        self.new = torch.zeros(batch, room, dtype=torch.long, device=prompt.device)
        self.writing = SimpleNamespace(at=torch.arange(self.start, device=prompt.device))
        with torch.no_grad(), fused(lm.model):
            self._prefill()  # the cache takes its shape from the first keys
            share_position(self.cache, self.position, self.writing)
            self.prefill, self.step = capture(self._prefill), capture(self._step)

    def __call__(self, tokens: int) -> torch.Tensor:
        self.prefill()
        for _ in range(tokens - 1):
            self.step()
        return torch.cat([self.prompt, self.new[:, :tokens]], dim=1)

    def _prefill(self) -> None:
        self.slot.zero_()
        self.cache.reset()
        self.position.zero_()
        first = torch.arange(self.start, device=self.prompt.device)
        self.writing.at = first
        logits = self.model(input_ids=self.prompt, position_ids=first[None], past_key_values=self.cache,
                            use_cache=True, logits_to_keep=1).logits
        self.position.fill_(self.start)
        self._choose(logits[:, -1])

    def _step(self) -> None:
        self.writing.at = self.position
        logits = self.model(input_ids=self.token, position_ids=self.position[None], past_key_values=self.cache,
                            use_cache=True).logits
        self.position.add_(1)
        self._choose(logits[:, -1])

    def _choose(self, logits: torch.Tensor) -> None:
        if self.stop is not None:  # as min_new_tokens does
            logits = logits.index_fill(1, self.stop, -torch.inf)
        self.token.copy_(logits.argmax(-1, keepdim=True))
        self.new.index_copy_(1, self.slot, self.token)
        self.slot.add_(1)


def share_position(cache, position: torch.Tensor, writing: SimpleNamespace) -> None:
    """Let every full-attention layer write at one shared position, instead of counting with 3 kernels of its own."""
    for layer in cache.layers:
        if type(layer).__name__ == "StaticLayer":
            layer.cumulative_length = position
            layer.update = lambda keys, values, *_, layer=layer, **__: (
                layer.keys.index_copy_(2, writing.at, keys), layer.values.index_copy_(2, writing.at, values))


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
