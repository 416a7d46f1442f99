"""A model's logits over a text, reduced at once to a few values per token."""

from __future__ import annotations

import inspect
from collections.abc import Callable

import torch
from torch import nn
from tqdm.auto import tqdm

from quantbench.loaded import LoadedModel, stepwise_logits
from quantbench.windows import Batch, Plan

ROWS_BYTES = 32 * 2**20  # float32 log-probabilities that are worked on at a time; a handful of such tensors is held


class NonFiniteLogits(RuntimeError):
    """NaN or infinite logits: whatever came of them would be no number."""


@torch.inference_mode()
def evaluate(lm: LoadedModel, plan: Plan, stepwise: bool, base: Callable[[Batch], torch.Tensor] | None = None,
             keep: Callable[[int, torch.Tensor], None] | None = None,
             progress: bool = True) -> dict[str, torch.Tensor]:
    """One value per scored token, on the CPU: `nll` (negative log-likelihood, nats) and `top` (the first choice).

    `stepwise` as in `forward`. `base` gives the reference's logits or log-probabilities of a batch
    [windows x scored, vocabulary]: then also `kl` (KL(reference || this), nats), `base_nll` and `base_top`. `keep`
    is given each batch's number and its log-probabilities, float32 [rows, vocabulary], some rows at a time. Raises
    NonFiniteLogits, and ValueError where it is the reference's logits that are not finite.
    """
    parts = []
    with tqdm(total=plan.tokens, desc=f"{lm.name} · {lm.setting.label} · quality", unit="token", leave=False,
              disable=not progress) as bar:
        for batch in plan.batches(lm.model.config.vocab_size):
            logits = forward(lm, batch, stepwise)
            parts.append(_reduce(logits, base and base(batch), batch, keep))
            _check_finite(lm, batch, parts[-1])
            bar.update(len(batch.targets))
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def forward(lm: LoadedModel, batch: Batch, stepwise: bool) -> torch.Tensor:
    """The logits that predict the scored tokens of `batch` [windows x scored, vocabulary], in the model's dtype.

    All windows in one pass; or, `stepwise`, each window as generation runs: what comes before its scored tokens in
    one pass, as a prompt, and these one by one with a KV cache.
    """
    ids, last = batch.ids.to(lm.model.device), batch.scored + 1
    if stepwise:
        return torch.cat([stepwise_logits(lm.model, window[None], batch.scored)[0] for window in ids])
    asked = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "use_cache": False}
    if "logits_to_keep" in inspect.signature(lm.model.forward).parameters:
        asked["logits_to_keep"] = last
    return lm.model(**asked).logits[:, -last:-1].flatten(0, 1)


def _reduce(logits: torch.Tensor, other: torch.Tensor | None, batch: Batch,
            keep: Callable[[int, torch.Tensor], None] | None) -> dict[str, torch.Tensor]:
    targets = batch.targets.to(logits.device)
    rows, parts = max(1, ROWS_BYTES // (4 * logits.shape[1])), []
    for start in range(0, len(targets), rows):
        some = slice(start, start + rows)
        part = _score(ours := logits[some].float().log_softmax(-1), targets[some])
        if other is not None:
            theirs = other[some].to(logits.device).float().log_softmax(-1)
            part |= {f"base_{name}": values for name, values in _score(theirs, targets[some]).items()}
            part["kl"] = divergence(theirs, ours)
        if keep is not None:
            keep(batch.number, ours)
        parts.append({name: values.cpu() for name, values in part.items()})
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def _score(log_probs: torch.Tensor, targets: torch.Tensor) -> dict[str, torch.Tensor]:
    return {"nll": -log_probs.gather(1, targets[:, None])[:, 0].double(), "top": log_probs.argmax(-1)}


def _check_finite(lm: LoadedModel, batch: Batch, part: dict[str, torch.Tensor]) -> None:
    if not part["nll"].isfinite().all() or not part.get("kl", part["nll"]).isfinite().all():
        if not part.get("base_nll", part["nll"]).isfinite().all() and part["nll"].isfinite().all():
            raise ValueError(f"the logits of the reference of {lm.name} are not finite")
        where = first_non_finite(lm.model, batch.ids.to(lm.model.device))
        where = f", first in {where}" if where else ""
        raise NonFiniteLogits(f"{lm.setting.label}: the logits are not finite{where}")


def divergence(p: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    """KL(p || q) of each row of log-probabilities, nats; a token that p rules out (-inf) adds nothing."""
    return (p.exp() * (p - q)).masked_fill_(p == -torch.inf, 0).sum(-1).double()


@torch.inference_mode()
def first_non_finite(model: nn.Module, ids: torch.Tensor) -> str | None:
    """The first module whose output is not finite in a forward pass over `ids`, as "name (class)"."""
    found: list[str] = []

    def look(name: str, module: nn.Module, output: object) -> None:
        tensor = output[0] if isinstance(output, tuple) else output
        if not found and isinstance(tensor, torch.Tensor) and not tensor.isfinite().all():
            found.append(f"{name} ({type(module).__name__})")

    hooks = [module.register_forward_hook(lambda module, _, output, name=name: look(name, module, output))
             for name, module in model.named_modules() if name]
    try:
        model(input_ids=ids, use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    return found[0] if found else None
