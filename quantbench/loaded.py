"""A model in memory under one setting: what it holds, how text goes in and out, and how it is let go."""

from __future__ import annotations

import gc
import re
import warnings
import weakref
import zlib

import torch
from torch import nn

from quantbench import machine
from quantbench.record import Workload
from quantbench.settings import Setting

LEFT_BEHIND = 2**20  # bytes that may stay allocated after close before it is worth a warning


class LoadedModel:
    """What `load` returns: a model in memory, or the reason why it is not there (`status`, `reason`).

    `model` is transformers' module, `audit` what was really quantised, `weights_bytes` its size with the
    quantisation state, `load_s` the seconds from local files to memory (downloads are not counted),
    `held_before_bytes` what the process held on the device before, `load_peak_bytes` the most above that while
    loading. A context manager: leaving it calls `close`.
    """

    def __init__(self, name: str, setting: Setting) -> None:
        self.name, self.setting, self.device = name, setting, setting.device
        self.status, self.reason = "ok", None
        self.weights = self.revision = None
        self.model = self.tokenizer = self.audit = self.weights_bytes = None
        self.load_s = self.load_peak_bytes = None
        self.held_before_bytes = self.held_after_bytes = self.device_before_bytes = None

    def encode(self, prompt: str, batch_size: int = 1) -> dict[str, torch.Tensor]:
        """`input_ids` and `attention_mask` on the device, each of shape [batch_size, prompt tokens]."""
        ids = torch.tensor([self.tokenizer.encode(prompt)], device=self.model.device).repeat(batch_size, 1)
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}

    def decode(self, ids: torch.Tensor) -> str | None:
        """The text of a 1-D tensor of token ids; None where there is no tokenizer, or random weights."""
        if self.weights == "random" or isinstance(self.tokenizer, StandInTokenizer):
            return None
        return self.tokenizer.decode(ids.tolist(), skip_special_tokens=True)

    @property
    def context_length(self) -> int | None:
        """The most tokens, prompt included, that the model has positions for."""
        return getattr(self.model.config, "max_position_embeddings", None)

    def close(self) -> None:
        """Free the memory, and warn where it could not be freed because something else still holds the model."""
        if self.model is None:
            return
        before, alive = machine.held_bytes(self.device), weakref.ref(self.model)
        self.model = self.tokenizer = None
        gc.collect()
        machine.release(self.device)
        own = self.held_after_bytes - self.held_before_bytes
        stays = self.device == "cuda" and before - machine.held_bytes(self.device) < own - LEFT_BEHIND
        if alive() is not None or stays:
            warnings.warn(f"{self.name} · {self.setting.label} was closed, but something else still holds its memory: "
                          "the next model will not start on a clean device", stacklevel=2)

    def __enter__(self) -> LoadedModel:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def __repr__(self) -> str:
        title = f"{self.name} · {self.setting.label}: "
        if self.status != "ok":
            return title + f"{self.status} ({self.reason})"
        audited = f", {self.audit['quantised']} × {self.audit['class']}" if self.audit["quantised"] else ""
        return (title + f"{self.weights} weights, {self.weights_bytes / 1e6:.0f} MB{audited}, "
                f"loaded in {self.load_s:.1f} s" + ("" if self.model is not None else ", closed"))


def check_length(name: str, prompt_tokens: int, workload: Workload, context_length: int | None) -> None:
    """Raise ValueError if prompt and new tokens are more than the model has positions for."""
    if context_length and prompt_tokens + workload.max_new_tokens > context_length:
        raise ValueError(f"{prompt_tokens} prompt tokens + {workload.max_new_tokens} new ones are over the "
                         f"{context_length} tokens that {name} has positions for")


def stepwise_logits(model: nn.Module, ids: torch.Tensor, scored: int) -> torch.Tensor:
    """The logits [batch, scored, vocabulary] that predict the last `scored` tokens of `ids` [batch, tokens], taken as
    generation takes them: what comes before in one pass, these one by one with a KV cache."""
    cache, logits = None, []
    for part in (ids[:, :-scored], *ids[:, -scored:-1].split(1, dim=1)):
        step = model(input_ids=part, past_key_values=cache, use_cache=True)
        cache = step.past_key_values
        logits.append(step.logits[:, -1:])
    return torch.cat(logits, dim=1)


class StandInTokenizer:
    """For a model whose tokenizer is not there: words to ids, the right number of them, always the same.

    It splits as GPT-2's first step does (a word with its leading space, punctuation, blanks) and hashes each piece,
    so a prompt of common words has as many tokens as it would have. There is no way back to text.
    """

    def __init__(self, vocab_size: int) -> None:
        self.vocab_size = vocab_size

    def encode(self, text: str) -> list[int]:
        pieces = re.findall(r" ?\w+| ?[^\w\s]+|\s+", text)
        return [zlib.crc32(piece.encode()) % self.vocab_size for piece in pieces]
