"""Who makes the tokens: an engine generates greedily from one prompt, as often and as far as it is asked."""

import copy
from pathlib import Path
from typing import Protocol

import torch
from torch import nn

from quantbench.loading import LoadedModel
from quantbench.settings import Registry, Workload

TEXT = Path(__file__).parent / "data" / "evaluation.txt"  # what long prompts are made of


class Unavailable(RuntimeError):
    """What an engine raises when it turns out, while it is made, that it cannot run this model."""


class Engine(Protocol):
    """What an entry of `ENGINES` is: a class, made for one model and prompt."""

    @staticmethod
    def why_not(lm: LoadedModel) -> str | None:
        """Why it cannot run this model here, in a sentence; None when it can."""

    def __init__(self, lm: LoadedModel, inputs: dict[str, torch.Tensor], tokens: int, depth: int = 0) -> None:
        """Do what is needed once, for up to `tokens` new tokens after `inputs` (of `inputs_of`), of which the first
        `depth` are read now and stay in the KV cache."""

    def rewind(self) -> None:
        """Bring the cache back to those `depth` tokens; called before every generation, outside the timed region."""

    def __call__(self, new: int) -> torch.Tensor:
        """Read the prompt after them and generate `new` tokens; return all ids [batch, depth + prompt + new]."""

    def differs(self, output: torch.Tensor) -> tuple[str | None, bool]:
        """Where `output` leaves eager's text, in words (None: nowhere), and whether that is wrong."""


class Eager:
    """transformers' generate as it is: the published method, and what every other engine's text is held against."""

    @staticmethod
    def why_not(lm: LoadedModel) -> str | None:
        return None

    def __init__(self, lm: LoadedModel, inputs: dict[str, torch.Tensor], tokens: int, depth: int = 0) -> None:
        self.model, self.inputs, self.filled = lm.model, inputs, None
        if depth:
            with torch.no_grad():
                self.filled = lm.model(input_ids=inputs["input_ids"][:, :depth], use_cache=True).past_key_values

    def rewind(self) -> None:
        if self.filled is not None:
            self.inputs.pop("past_key_values", None)  # never two copies at a time
            self.inputs["past_key_values"] = copy.deepcopy(self.filled)

    def __call__(self, new: int) -> torch.Tensor:
        return self.model.generate(**self.inputs, min_new_tokens=new, max_new_tokens=new, do_sample=False)

    def differs(self, output: torch.Tensor) -> tuple[str | None, bool]:
        return None, False


ENGINES = Registry("engine", {"eager": Eager, "graph": "quantbench.engines.captured:Graph",
                              "compile": "quantbench.engines.captured:Compiled"})
find_engine = ENGINES.find


def inputs_of(lm: LoadedModel, workload: Workload) -> dict[str, torch.Tensor]:
    """`input_ids` and `attention_mask` of a workload on the device, each [batch, depth + prompt tokens]."""
    ids = lm.encode(workload.prompt)["input_ids"]
    if wanted := workload.depth + (workload.prompt_tokens or 0):
        text = lm.encode(TEXT.read_text(encoding="utf-8"))["input_ids"]
        long = text.repeat(1, -(-wanted // text.shape[1]))[:, :wanted]
        ids = long if workload.prompt_tokens else torch.cat([long, ids], dim=1)
    ids = ids.repeat(workload.batch_size, 1)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def stepwise_logits(model: nn.Module, ids: torch.Tensor, scored: int) -> torch.Tensor:
    """The logits [batch, scored, vocabulary] that predict the last `scored` tokens of `ids` [batch, tokens], taken as
    generation takes them: what comes before in one pass, these one by one with a KV cache."""
    cache, logits = None, []
    for part in (ids[:, :-scored], *ids[:, -scored:-1].split(1, dim=1)):
        step = model(input_ids=part, past_key_values=cache, use_cache=True)
        cache = step.past_key_values
        logits.append(step.logits[:, -1:])
    return torch.cat(logits, dim=1)
