"""A text as overlapping windows of tokens, in batches of bounded size."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby

import torch

from quantbench.loaded import LoadedModel
from quantbench.texts import BUNDLED, WIKITEXT, Text, find_text

CONTEXT = 512
BATCH_BYTES = 256 * 2**20  # float32 logits of one batch, unless a single window needs more
LEAST = 32  # tokens of a text that is worth a number


@dataclass(frozen=True)
class Batch:
    """Windows of one length: `ids` [windows, tokens], of which each window's last `scored` tokens are scored."""

    number: int
    ids: torch.Tensor
    scored: int

    @property
    def targets(self) -> torch.Tensor:
        """The scored tokens of all its windows [windows x scored]."""
        return self.ids[:, -self.scored:].flatten()


@dataclass(frozen=True)
class Plan:
    """Which tokens are scored, and what the model sees before each.

    Windows of `context` tokens begin every `stride` tokens; the first scores all its tokens but the first, every
    other its last `stride`, so that each token of the text is scored once, with at least context - stride tokens
    before it (transformers' guide to the perplexity of fixed-length models; with stride = context / 2 the same
    work as llama.cpp's perplexity tool, which scores the second half of each window). Where the tokenizer starts a
    text with a BOS token (`bos`), every window starts with it in place of its first token, as llama.cpp has it.
    """

    text: Text
    ids: torch.Tensor
    context: int
    stride: int
    bos: int | None

    @cached_property
    def windows(self) -> list[tuple[int, int, int]]:
        """Each window's start, end, and how many of its last tokens it scores."""
        found, done = [], 1
        while done < len(self.ids):
            start = len(found) * self.stride
            end = min(start + self.context, len(self.ids))
            found.append((start, end, end - done))
            done = end
        return found

    @property
    def tokens(self) -> int:
        return len(self.ids) - 1

    def window_of_token(self) -> torch.Tensor:
        """The number of the window that scores each token [tokens]."""
        scored = torch.tensor([scored for _, _, scored in self.windows])
        return torch.repeat_interleave(torch.arange(len(scored)), scored)

    def batches(self, vocab_size: int) -> Iterator[Batch]:
        """The windows in order; always the same batches for the same vocabulary."""
        number = 0
        for (_, scored), group in groupby(self.windows, key=lambda window: (window[1] - window[0], window[2])):
            same, most = list(group), max(1, BATCH_BYTES // (4 * scored * vocab_size))
            for place in range(0, len(same), most):
                ids = torch.stack([self.ids[start:end] for start, end, _ in same[place:place + most]])
                if self.bos is not None:
                    ids[:, 0] = self.bos
                yield Batch(number, ids, scored)
                number += 1


def make_plan(lm: LoadedModel, text: str | None, tokens: int | None, context: int, stride: int | None) -> Plan:
    """The plan for the first `tokens` tokens of `text`. Raises ValueError for what cannot be evaluated."""
    stride = max(context // 2, 1) if stride is None else stride
    for name, value, least in (("context", context, 2), ("stride", stride, 1), ("tokens", tokens, LEAST)):
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < least):
            raise ValueError(f"{name} must be a whole number of at least {least}, not {value!r}")
    if stride >= context:
        raise ValueError(f"stride must be below the context of {context}, not {stride}: tokens would go unscored")
    if lm.context_length and context > lm.context_length:
        raise ValueError(f"a context of {context} is over the {lm.context_length} tokens that {lm.name} has positions "
                         "for")
    found = find_text(text)
    ids = lm.tokenizer.encode(found.body)
    if len(ids) < LEAST:
        raise ValueError(f"a text of {len(ids)} tokens says nothing about quality: give at least {LEAST} tokens, "
                         f"or {BUNDLED!r} or {WIKITEXT!r}")
    bos = getattr(lm.tokenizer, "bos_token_id", None)
    return Plan(found, torch.tensor(ids[:tokens]), context, stride, bos if ids[0] == bos else None)
