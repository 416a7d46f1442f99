"""A model's logits over a text, reduced at once to a few values per token."""

from __future__ import annotations

import inspect
from collections.abc import Callable

import torch
from torch import nn
from tqdm.auto import tqdm

from quantbench.decode import stepwise_logits
from quantbench.evaluation.windows import Plan, Window
from quantbench.loading import LoadedModel

ROWS_BYTES = 32 * 2**20  # float32 log-probabilities that are worked on at a time; a handful of such tensors is held
Values = dict[str, torch.Tensor]  # name -> one value per scored token


class NonFiniteLogits(RuntimeError):
    """NaN or infinite logits: whatever came of them would be no number."""


@torch.inference_mode()
def evaluate(lm: LoadedModel, plan: Plan, stepwise: bool, base: Callable[[Window], torch.Tensor] | None = None,
             keep: Callable[[torch.Tensor], None] | None = None, progress: bool = True) -> Values:
    """One value per scored token, on the CPU: `nll` (negative log-likelihood, nats) and `top` (the first choice).

    `stepwise` as in `forward`. `base` gives the reference's logits or log-probabilities of a window
    [scored, vocabulary]: then also `kl` (KL(reference || this), nats), `base_nll` and `base_top`. `keep` is given
    the log-probabilities, float32 [rows, vocabulary], some rows at a time and in order. Raises NonFiniteLogits, and
    ValueError where it is the reference's logits that are not finite.
    """
    parts = []
    with tqdm(total=plan.tokens, desc=f"{lm.name} · {lm.setting.label} · quality", unit="token", leave=False,
              disable=not progress) as bar:
        for window in plan.windows:
            logits = forward(lm, window, plan, stepwise)
            targets = plan.ids[window.end - window.scored:window.end].to(logits.device)
            parts.append(_reduced(logits, base and base(window), targets, keep))
            _check_finite(lm, plan.seen(window), parts[-1])
            bar.update(window.scored)
    return _joined(parts)


def forward(lm: LoadedModel, window: Window, plan: Plan, stepwise: bool) -> torch.Tensor:
    """The logits that predict the scored tokens of `window` [scored, vocabulary], in the model's dtype: in one pass;
    or, `stepwise`, as generation runs: what comes before them in one pass, as a prompt, and they one by one."""
    ids, last = plan.seen(window).to(lm.model.device), window.scored + 1
    if stepwise:
        return stepwise_logits(lm.model, ids, window.scored)[0]
    asked = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "use_cache": False}
    if "logits_to_keep" in inspect.signature(lm.model.forward).parameters:
        asked["logits_to_keep"] = last
    return lm.model(**asked).logits[0, -last:-1]


def _reduced(logits: torch.Tensor, other: torch.Tensor | None, targets: torch.Tensor,
             keep: Callable[[torch.Tensor], None] | None) -> Values:
    rows, parts = max(1, ROWS_BYTES // (4 * logits.shape[1])), []
    for start in range(0, len(targets), rows):
        some = slice(start, start + rows)
        part = _scored(ours := logits[some].float().log_softmax(-1), targets[some])
        if other is not None:
            theirs = other[some].to(logits.device).float().log_softmax(-1)
            part |= {f"base_{name}": values for name, values in _scored(theirs, targets[some]).items()}
            part["kl"] = _divergence(theirs, ours)
        if keep is not None:
            keep(ours)
        parts.append({name: values.cpu() for name, values in part.items()})
    return _joined(parts)


def _joined(parts: list[Values]) -> Values:
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def _scored(log_probs: torch.Tensor, targets: torch.Tensor) -> Values:
    return {"nll": -log_probs.gather(1, targets[:, None])[:, 0].double(), "top": log_probs.argmax(-1)}


def _divergence(p: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    """KL(p || q) of each row of log-probabilities, nats; a token that p rules out (-inf) adds nothing."""
    return (p.exp() * (p - q)).masked_fill_(p == -torch.inf, 0).sum(-1).double()


def _check_finite(lm: LoadedModel, ids: torch.Tensor, part: Values) -> None:
    ours, theirs = (part.get(name, part["nll"]).isfinite().all() for name in ("nll", "base_nll"))
    if ours and theirs and part.get("kl", part["nll"]).isfinite().all():
        return
    if ours and not theirs:
        raise ValueError(f"the logits of the reference of {lm.name} are not finite")
    where = _first_non_finite(lm.model, ids.to(lm.model.device))
    raise NonFiniteLogits(f"{lm.setting.label}: the logits are not finite" + (f", first in {where}" if where else ""))


def _first_non_finite(model: nn.Module, ids: torch.Tensor) -> str | None:
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
