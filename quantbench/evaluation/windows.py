"""The text that quality is measured on, as overlapping windows of tokens."""

from __future__ import annotations

import hashlib
import warnings
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import torch

from quantbench.loading import LoadedModel
from quantbench.settings import whole
from quantbench.weights import hub_answers

BUNDLED, WIKITEXT = "quantbench-eval", "wikitext-2"
CONTEXT = 512
LEAST_TOKENS = 32  # of a text that is worth a number
_FILE = Path(__file__).parents[1] / "data" / "evaluation.txt"


def find_text(text: str | None = None) -> tuple[str, str]:
    """A text's name and the text. None or "quantbench-eval": prose written for this project (about 3,000 tokens:
    narrative, encyclopaedic, dialogue, technical, news), so that no model has seen it. "wikitext-2": the raw test set
    of WikiText-2 (Merity et al. 2016) from the Hub, its lines joined as the published GPT-2 figures join them; where
    it cannot be had, the bundled text with a warning. Any other string is the text itself.
    """
    if text in (None, BUNDLED):
        return BUNDLED, _FILE.read_text(encoding="utf-8").strip()
    if text != WIKITEXT:
        return "own text", text
    try:
        return WIKITEXT, _wikitext()
    except (OSError, ImportError) as error:  # the Hub's errors are OSErrors
        warnings.warn(f"{WIKITEXT} cannot be had ({error}): measuring on {BUNDLED} instead", stacklevel=3)
        return find_text()


def _wikitext() -> str:
    from huggingface_hub import hf_hub_download
    from pyarrow import parquet

    path = hf_hub_download("Salesforce/wikitext", "wikitext-2-raw-v1/test-00000-of-00001.parquet", repo_type="dataset",
                           local_files_only=not hub_answers())
    # as in transformers' guide to the perplexity of fixed-length models, which has GPT-2's figures
    return "\n\n".join(parquet.read_table(path)["text"].to_pylist())


class Window(NamedTuple):
    """The tokens from `start` to `end`, of which the last `scored` are scored."""

    start: int
    end: int
    scored: int


@dataclass(frozen=True)
class Plan:
    """Which tokens of a text are scored, and what the model sees before each.

    Windows of `context` tokens begin every `stride` tokens; the first scores all its tokens but the first, every
    other its last `stride`, so that each token of the text is scored once, with at least context - stride tokens
    before it (transformers' guide to the perplexity of fixed-length models; with stride = context / 2 the same
    work as llama.cpp's perplexity tool, which scores the second half of each window). Where the tokenizer starts a
    text with a BOS token (`bos`), every window starts with it in place of its first token, as llama.cpp has it.
    """

    text: str  # its name
    sha256: str
    ids: torch.Tensor
    context: int
    stride: int
    bos: int | None

    @cached_property
    def windows(self) -> list[Window]:
        found, done = [], 1
        while done < len(self.ids):
            start = len(found) * self.stride
            end = min(start + self.context, len(self.ids))
            found.append(Window(start, end, end - done))
            done = end
        return found

    @property
    def tokens(self) -> int:
        return len(self.ids) - 1

    def seen(self, window: Window) -> torch.Tensor:
        """What the model is given [1, tokens]."""
        ids = self.ids[None, window.start:window.end].clone()
        if self.bos is not None:
            ids[:, 0] = self.bos
        return ids

    def window_of_token(self) -> torch.Tensor:
        """The number of the window that scores each token [tokens]."""
        scored = torch.tensor([window.scored for window in self.windows])
        return torch.repeat_interleave(torch.arange(len(scored)), scored)


def make_plan(lm: LoadedModel, text: str | None, tokens: int | None, context: int, stride: int | None) -> Plan:
    """The plan for the first `tokens` tokens of `text`. Raises ValueError for what cannot be evaluated."""
    context = whole("context", context, 2)
    stride = max(context // 2, 1) if stride is None else whole("stride", stride)
    tokens = None if tokens is None else whole("tokens", tokens, LEAST_TOKENS)
    if stride >= context:
        raise ValueError(f"stride must be below the context of {context}, not {stride}: tokens would go unscored")
    if lm.context_length and context > lm.context_length:
        raise ValueError(f"a context of {context} is over the {lm.context_length} tokens {lm.name} has positions for")
    name, body = find_text(text)
    ids = lm.tokenizer.encode(body)
    if len(ids) < LEAST_TOKENS:
        raise ValueError(f"a text of {len(ids)} tokens says nothing about quality: give at least {LEAST_TOKENS} tokens"
                         f", or {BUNDLED!r} or {WIKITEXT!r}")
    bos = getattr(lm.tokenizer, "bos_token_id", None)
    sha256 = hashlib.sha256(body.encode(errors="replace")).hexdigest()
    return Plan(name, sha256, torch.tensor(ids[:tokens]), context, stride, bos if ids[0] == bos else None)
