"""A greedy decode step captured once and replayed: no Python between two tokens, so precision is what is measured."""

import os
import warnings
from collections.abc import Callable
from types import SimpleNamespace

import torch
from torch import nn
from transformers import StaticCache

from quantbench import machine
from quantbench.decode import Eager, Unavailable, read, why_no_cache
from quantbench.engines.agreement import difference
from quantbench.loading import LoadedModel
from quantbench.tokens import stop_tokens
from quantbench.weights import cache_folder, quiet
from quantbench.wording import cut, listed


class Graph:
    """Prefill and one decode step with its argmax, each captured once and replayed, on a static KV cache: what
    transformers computes, as it is, on a GPU as a CUDA graph, on a CPU as a TorchScript trace."""

    caches = "default", "static"  # one for both: its own

    @staticmethod
    def why_not(lm: LoadedModel) -> str | None:
        if lm.setting.gpus > 1 or lm.setting.offload:
            return "a step that crosses from one device to another is not captured"
        if not getattr(lm.model, "_can_compile_fullgraph", False):
            return f"transformers has no static cache for {type(lm.model).__name__}"
        cache = StaticCache(config=lm.model.config, max_cache_len=64)
        if others := sorted({type(layer).__name__ for layer in cache.layers} - {"StaticLayer"}):
            return f"its cache has {listed(others)} (sliding windows, states): only full attention's step is captured"
        return why_no_cache("static", lm.model) or lm.way.not_captured(lm.setting)

    def __init__(self, lm: LoadedModel, inputs: dict[str, torch.Tensor], tokens: int, depth: int = 0) -> None:
        self.lm, self.inputs, self.prompt, self.depth = lm, inputs, inputs["input_ids"], depth
        batch, self.start = self.prompt.shape
        device, room = self.prompt.device, tokens + 3  # capturing runs the step a few times, past what is asked for
        self.stop = torch.tensor(stop_tokens(lm.model), dtype=torch.long, device=device)
        self.cache = StaticCache(config=lm.model.config, max_cache_len=-(-(self.start + room) // 64) * 64)
        self.position, self.slot = (torch.zeros(1, dtype=torch.long, device=device) for _ in range(2))
        self.token = torch.zeros(batch, 1, dtype=torch.long, device=device)
        self.new = torch.zeros(batch, room, dtype=torch.long, device=device)
        self.writing, self.model = SimpleNamespace(at=torch.arange(self.start, device=device)), self._model()
        with torch.no_grad():
            self._read(0, depth or self.start)  # the cache takes its shape from the first keys
            for layer in self.cache.layers:  # all write at one shared position, in place of 3 kernels each that count
                layer.cumulative_length = self.position
                layer.update = lambda keys, values, *_, to=layer, writing=self.writing, **__: (
                    to.keys.index_copy_(2, writing.at, keys), to.values.index_copy_(2, writing.at, values))
            self.prefill, self.step = self._capture(self._prefill), self._capture(self._step)

    def _model(self) -> Callable:
        return self.lm.model

    def _capture(self, work: Callable[[], None]) -> Callable[[], None]:
        try:
            return cuda_graph(work) if self.prompt.is_cuda else traced(self, work)
        except RuntimeError as error:  # experts that are chosen on the host, a mask that is made there
            if machine.out_of_memory(error) is None:
                raise Unavailable(f"its step cannot be captured: {cut(error, 120)}") from None
            raise

    @property
    def tensors(self) -> tuple[torch.Tensor, ...]:  # everything that a step writes to
        return (self.token, self.position, self.slot, self.new,
                *(tensor for layer in self.cache.layers for tensor in (layer.keys, layer.values)))

    @tensors.setter
    def tensors(self, tensors: tuple[torch.Tensor, ...]) -> None:
        self.token, self.position, self.slot, self.new, *cached = tensors
        for layer, keys, values in zip(self.cache.layers, cached[::2], cached[1::2]):
            layer.keys, layer.values, layer.cumulative_length = keys, values, self.position

    def __call__(self, new: int) -> torch.Tensor:
        self.prefill()
        for _ in range(new - 1):
            self.step()
        return torch.cat([self.prompt, self.new[:, :new]], dim=1)

    def differs(self, output: torch.Tensor) -> tuple[str | None, bool]:
        new = output.shape[1] - self.start
        return difference(self.lm, output, Eager(self.lm, self.inputs, new)(new), self.start)

    def rewind(self) -> None:
        """The prefill writes over what came after the cached tokens."""

    def _read(self, start: int, end: int) -> torch.Tensor:
        self.position.fill_(start)
        self.writing.at = places = torch.arange(start, end, device=self.prompt.device)
        return read(self.lm.model, self.prompt[:, start:end], position_ids=places[None],
                    past_key_values=self.cache).logits

    def _prefill(self) -> None:
        self.slot.zero_()
        logits = self._read(self.depth, self.start)
        self.position.fill_(self.start)
        self._choose(logits[:, -1])

    def _step(self) -> None:
        self.writing.at = self.position
        logits = self.model(input_ids=self.token, position_ids=self.position[None], past_key_values=self.cache,
                            use_cache=True).logits
        self.position.add_(1)
        self._choose(logits[:, -1])

    def _choose(self, logits: torch.Tensor) -> None:
        if len(self.stop):  # as min_new_tokens does
            logits = logits.index_fill(1, self.stop, -torch.inf)
        self.token.copy_(logits.argmax(-1, keepdim=True))
        self.new.index_copy_(1, self.slot, self.token)
        self.slot.add_(1)


class Compiled(Graph):
    """The same step compiled by torch's inductor, which joins small kernels, and then captured."""

    @staticmethod
    def why_not(lm: LoadedModel) -> str | None:
        if lm.device != "cuda":
            return "the compile engine needs an NVIDIA GPU"
        if machine.facts()["gpu_capability"] < [8, 0]:
            return "Triton does not support compute capability 7.5"
        return Graph.why_not(lm)

    def _model(self) -> Callable:
        os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(cache_folder() / "inductor"))  # kept for other processes
        torch._dynamo.reset()  # what was compiled for another cell counts against a limit
        options = dict(self.lm.way.compile_options)
        return torch.compile(self.lm.model, fullgraph=True, dynamic=False, options=options)


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
    """A step as a function of everything that it writes to: a trace drops writes to tensors that it was not given."""

    def __init__(self, graph: Graph, work: Callable[[], None]) -> None:
        super().__init__()
        self.model, self.graph, self.work = graph.lm.model, graph, work

    def forward(self, *tensors: torch.Tensor) -> torch.Tensor:
        self.graph.tensors = tensors
        self.work()
        return self.graph.token


def traced(graph: Graph, work: Callable[[], None]) -> Callable[[], None]:
    """`work` as a TorchScript trace: torch runs its operators one after the other without Python."""
    tensors = graph.tensors
    with warnings.catch_warnings(action="ignore"), quiet():  # values become constant: the text is held against eager's
        script = torch.jit.trace(_Traceable(graph, work), tensors, check_trace=False)
    graph.tensors = tensors
    replay = torch.no_grad()(lambda: script(*tensors))
    for _ in range(2):  # the first calls profile and optimise
        replay()
    return replay
