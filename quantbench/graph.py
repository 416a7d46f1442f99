"""A greedy decode step captured once and replayed: no Python between two tokens, so precision is what is measured."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from types import SimpleNamespace

import torch
from torch import nn

from quantbench.fuse import fused
from quantbench.loaded import LoadedModel
from quantbench.loaders import quiet, static_cache


def capture(graph: Graph, work: Callable[[], None]) -> Callable[[], None]:
    """`work`, a step of `graph`, recorded: a CUDA graph on a GPU, a TorchScript trace on a CPU."""
    return cuda_graph(work) if graph.prompt.is_cuda else traced(graph, work)


def cuda_graph(work: Callable[[], None]) -> Callable[[], None]:
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


class _Traceable(nn.Module):
    """`work` as a function of the graph's tensors: a trace drops what is written to a tensor it was not given."""

    def __init__(self, graph: Graph, work: Callable[[], None]) -> None:
        super().__init__()
        self.model, self.graph, self.work = graph.model, graph, work

    def forward(self, *tensors: torch.Tensor) -> torch.Tensor:
        self.graph.tensors = tensors
        self.work()
        return self.graph.token


def traced(graph: Graph, work: Callable[[], None]) -> Callable[[], None]:
    """`work` as a TorchScript trace: torch runs its operators one after the other without Python."""
    tensors = graph.tensors
    with warnings.catch_warnings(), quiet():
        warnings.simplefilter("ignore")  # of values that the trace takes as constant: the text is held against eager's
        script = torch.jit.trace(_Traceable(graph, work), tensors, check_trace=False)
    graph.tensors = tensors

    @torch.no_grad()
    def replay() -> None:
        script(*tensors)

    for _ in range(2):  # the first calls profile and optimise
        replay()
    return replay


class Graph:
    """Prefill and one decode step with its argmax, each captured once and replayed; the KV cache is static.

    Between two tokens the host does nothing but start one replay. What transformers spells out in many kernels is
    captured as fewer (`fuse`): the same functions, rounded once instead of several times. `capture` is a parameter so
    that the control flow can be tested without it.
    """

    def __init__(self, lm: LoadedModel, prompt: torch.Tensor, tokens: int,
                 capture: Callable[[Graph, Callable[[], None]], Callable[[], None]]) -> None:
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
            self.prefill, self.step = capture(self, self._prefill), capture(self, self._step)

    @property
    def tensors(self) -> tuple[torch.Tensor, ...]:
        """Everything that a step writes to."""
        return (self.token, self.position, self.slot, self.new,
                *(tensor for layer in self.cache.layers for tensor in (layer.keys, layer.values)))

    @tensors.setter
    def tensors(self, tensors: tuple[torch.Tensor, ...]) -> None:
        self.token, self.position, self.slot, self.new, *cached = tensors
        for layer, keys, values in zip(self.cache.layers, cached[::2], cached[1::2]):
            layer.keys, layer.values, layer.cumulative_length = keys, values, self.position

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
