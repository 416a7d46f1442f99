"""Who makes the tokens: an engine generates greedily from one prompt, as often and as far as it is asked."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import nn

from quantbench.loading import LoadedModel
from quantbench.settings import Registry


class Engine(Protocol):
    """What an entry of `ENGINES` is: a class, made for one model and prompt."""

    @staticmethod
    def why_not(lm: LoadedModel) -> str | None:
        """Why it cannot run this model here, in a sentence; None when it can."""

    def __init__(self, lm: LoadedModel, inputs: dict[str, torch.Tensor], tokens: int) -> None:
        """Do what is needed once, for up to `tokens` new tokens after `inputs` (of `LoadedModel.encode`)."""

    def __call__(self, new: int) -> torch.Tensor:
        """Generate `new` tokens; return the ids [batch, prompt + new]."""

    def differs(self, output: torch.Tensor) -> tuple[str | None, bool]:
        """Where `output` leaves eager's text, in words (None: nowhere), and whether that is wrong."""


class Eager:
    """transformers' generate as it is: the published method, and what every other engine's text is held against."""

    @staticmethod
    def why_not(lm: LoadedModel) -> str | None:
        return None

    def __init__(self, lm: LoadedModel, inputs: dict[str, torch.Tensor], tokens: int) -> None:
        self.model, self.inputs = lm.model, inputs

    def __call__(self, new: int) -> torch.Tensor:
        return self.model.generate(**self.inputs, min_new_tokens=new, max_new_tokens=new, do_sample=False)

    def differs(self, output: torch.Tensor) -> tuple[str | None, bool]:
        return None, False


ENGINES = Registry("engine", {"eager": Eager, "graph": "quantbench.engines.captured:Graph",
                              "compile": "quantbench.engines.captured:Compiled"})
find_engine = ENGINES.find


def stepwise_logits(model: nn.Module, ids: torch.Tensor, scored: int) -> torch.Tensor:
    """The logits [batch, scored, vocabulary] that predict the last `scored` tokens of `ids` [batch, tokens], taken as
    generation takes them: what comes before in one pass, these one by one with a KV cache."""
    cache, logits = None, []
    for part in (ids[:, :-scored], *ids[:, -scored:-1].split(1, dim=1)):
        step = model(input_ids=part, past_key_values=cache, use_cache=True)
        cache = step.past_key_values
        logits.append(step.logits[:, -1:])
    return torch.cat(logits, dim=1)
