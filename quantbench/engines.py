"""How the tokens are made: transformers' generate, its compiled static cache, or our captured decode step."""

from __future__ import annotations

import os
from collections.abc import Callable

import torch

from quantbench.graph import Graph, capture
from quantbench.loaded import LoadedModel, stepwise_logits

ENGINES = ("eager", "compile", "graph")
TURING_OPT_IN = "QUANTBENCH_COMPILE_ON_TURING"
# steps in which activations are rounded, of their largest value: 8 bits, and torch's "reduced range" of 7
ROUNDS = {"bnb-int8": 1 / 127, "dynamic-int8": 2 / 127}
Generate = Callable[[int], torch.Tensor]  # new tokens -> ids [batch, prompt + new]


def refusal(lm: LoadedModel, engine: str, facts: dict) -> str | None:
    """Why `engine` cannot run this model on a machine with these `facts`; None when it can."""
    if engine == "eager":
        return None
    if engine == "compile" and lm.device != "cuda":
        return "the compile engine needs an NVIDIA GPU"
    if not getattr(lm.model, "_can_compile_fullgraph", False):
        return f"transformers has no static cache for {type(lm.model).__name__}"
    if engine == "graph" and lm.setting.quantisation == "bnb-int8" and lm.setting.threshold > 0:
        return "INT8 with the outlier split decides in every layer, on the host: it cannot be captured (no split can)"
    if engine == "compile" and lm.setting.needs_bitsandbytes:
        return "transformers does not compile bitsandbytes models"
    if engine == "compile" and facts["gpu_capability"] < [8, 0] and not os.environ.get(TURING_OPT_IN):
        return f"Triton does not support compute capability 7.5; {TURING_OPT_IN}=1 tries all the same"
    return None


def generator(lm: LoadedModel, engine: str, inputs: dict, tokens: int) -> Generate:
    """A function that generates up to `tokens` new tokens greedily from `inputs`, by `engine`."""
    if engine == "graph":
        return Graph(lm, inputs["input_ids"], tokens, capture)
    how = {"cache_implementation": "static"} if engine == "compile" else {}
    return lambda new: lm.model.generate(**inputs, min_new_tokens=new, max_new_tokens=new, do_sample=False, **how)


def difference(lm: LoadedModel, ours: torch.Tensor, eager: torch.Tensor, prompt_tokens: int) -> tuple[str | None, bool]:
    """Where an engine's ids [batch, prompt + new] leave eager's, in words (None: nowhere), and whether that is wrong.

    Two engines round differently, so a near-tie may fall either way, and every token after it is then another text's.
    So the engine's own text is read by the eager model: each token it chose must be the best there, or short of the
    best by no more than rounding explains: 4 of the steps in which a setting rounds (ROUNDS) the largest logit, or
    what `_nudged` says of this model.
    """
    if torch.equal(ours, eager):
        return None, False
    logits = _read(lm, ours, prompt_tokens)
    best, chosen = logits.max(-1).values, logits.gather(-1, ours[:, prompt_tokens:, None])[..., 0]
    margin = (best - chosen).max().item()
    step = ROUNDS.get(lm.setting.quantisation) or torch.finfo(lm.model.dtype).eps
    rounding = 4 * step * logits[logits.isfinite()].abs().max().item()
    if margin > rounding:
        rounding = max(rounding, _nudged(lm, ours, prompt_tokens, logits))
    first = int((ours != eager).any(0).nonzero()[0]) - prompt_tokens + 1
    return (f"differs from eager from token {first} on; no token is short of eager's best by more than {margin:.3g} "
            f"(rounding explains {rounding:.3g})"), not margin <= rounding


@torch.no_grad()
def _read(lm: LoadedModel, ids: torch.Tensor, prompt_tokens: int) -> torch.Tensor:
    """The eager model's logits [batch, new, vocabulary] of every new token of `ids`, as greedy generation sees them."""
    if lm.setting.quantisation == "dynamic-int8":  # gives all tokens of a pass one scale
        logits = stepwise_logits(lm.model, ids, ids.shape[1] - prompt_tokens).float()
    else:
        logits = lm.model(input_ids=ids[:, :-1]).logits[:, prompt_tokens - 1:].float()
    if (stop := lm.model.generation_config.eos_token_id) is not None:
        logits[..., stop] = -torch.inf
    return logits


def _nudged(lm: LoadedModel, ids: torch.Tensor, prompt_tokens: int, logits: torch.Tensor) -> float:
    """How far two logits can part when every embedding moves by one unit in its last place, up and down in turn.

    A deep model that rounds its activations to 8 bits carries one rounding that flips through all its layers.
    """

    def nudge(module: torch.nn.Module, args: tuple, embedded: torch.Tensor) -> torch.Tensor:
        turns = 1 - 2 * (torch.arange(embedded.shape[-1], device=embedded.device) % 2)
        return embedded * (1 + torch.finfo(embedded.dtype).eps * turns).to(embedded.dtype)

    hook = lm.model.get_input_embeddings().register_forward_hook(nudge)
    try:
        moved = (_read(lm, ids, prompt_tokens) - logits).abs()
    finally:
        hook.remove()
    return 2 * moved[moved.isfinite()].max().item()
