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
    best by no more than rounding explains: 4 of the steps in which a setting rounds (ROUNDS) the largest logit.
    """
    if torch.equal(ours, eager):
        return None, False
    with torch.no_grad():
        if lm.setting.quantisation == "dynamic-int8":  # gives all tokens of a pass one scale
            logits = stepwise_logits(lm.model, ours, ours.shape[1] - prompt_tokens).float()
        else:
            logits = lm.model(input_ids=ours[:, :-1]).logits[:, prompt_tokens - 1:].float()
    step = ROUNDS.get(lm.setting.quantisation) or torch.finfo(lm.model.dtype).eps
    rounding = 4 * step * logits.abs().max().item()
    if (stop := lm.model.generation_config.eos_token_id) is not None:
        logits[..., stop] = -torch.inf
    chosen = logits.gather(-1, ours[:, prompt_tokens:, None])[..., 0]
    margin = (logits.max(-1).values - chosen).max().item()
    first = int((ours != eager).any(0).nonzero()[0]) - prompt_tokens + 1
    return (f"differs from eager from token {first} on; no token is short of eager's best by more than {margin:.3g} "
            f"(rounding explains {rounding:.3g})"), not margin <= rounding
