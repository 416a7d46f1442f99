"""Two engines round differently: is an engine's text one that the eager model could have written?"""

import torch

from quantbench.decode import read, stepwise_logits
from quantbench.loading import LoadedModel
from quantbench.tokens import stop_tokens


def difference(lm: LoadedModel, ours: torch.Tensor, eager: torch.Tensor, prompt_tokens: int) -> tuple[str | None, bool]:
    """Where an engine's ids [batch, prompt + new] leave eager's, in words (None: nowhere), and whether that is wrong: a
    near-tie may fall either way. So the eager model reads the engine's own text: each token must be the best there, or
    short of it by what rounding explains: 4 of a quantiser's steps of the largest logit, or what `_nudged` says."""
    if torch.equal(ours, eager):
        return None, False
    logits = _read(lm, ours, prompt_tokens)
    best, chosen = logits.max(-1).values, logits.gather(-1, ours[:, prompt_tokens:, None])[..., 0]
    margin = (best - chosen).max().item()
    step = lm.way.rounding or torch.finfo(lm.model.dtype).eps
    rounding = 4 * step * logits[logits.isfinite()].abs().max().item()
    if margin > rounding:
        rounding = max(rounding, _nudged(lm, ours, prompt_tokens, logits))
    first = int((ours != eager).any(0).nonzero()[0]) - prompt_tokens + 1
    return (f"differs from eager from token {first} on; no token is short of eager's best by more than {margin:.3g} "
            f"(rounding explains {rounding:.3g})"), not margin <= rounding


def _read(lm: LoadedModel, ids: torch.Tensor, prompt_tokens: int) -> torch.Tensor:
    """The eager model's logits [batch, new, vocabulary] of every new token of `ids`, as greedy generation sees them."""
    new = ids.shape[1] - prompt_tokens
    if lm.way.stepwise:
        logits = stepwise_logits(lm.model, ids, new).float()
    else:
        logits = read(lm.model, ids[:, :-1], new).logits[:, -new:].float()
    logits[..., stop_tokens(lm.model)] = -torch.inf  # generation of exactly n tokens never chooses them
    return logits


def _nudged(lm: LoadedModel, ids: torch.Tensor, prompt_tokens: int, logits: torch.Tensor) -> float:
    """How far two logits can part when every embedding moves by one unit in its last place, up and down in turn."""
    def nudge(module: torch.nn.Module, args: tuple, embedded: torch.Tensor) -> torch.Tensor:
        turns = 1 - 2 * (torch.arange(embedded.shape[-1], device=embedded.device) % 2)
        return embedded * (1 + torch.finfo(embedded.dtype).eps * turns).to(embedded.dtype)

    with lm.model.get_input_embeddings().register_forward_hook(nudge):
        moved = (_read(lm, ids, prompt_tokens) - logits).abs()
    return 2 * moved[moved.isfinite()].max().item()
