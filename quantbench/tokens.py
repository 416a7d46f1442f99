"""A checkpoint's tokenizer, whatever it is, or a stand-in where there is none; and whether a workload fits a model."""

import re
import zlib
from pathlib import Path

from torch import nn
from transformers import AutoTokenizer, PretrainedConfig

from quantbench.settings import Workload
from quantbench.weights import VOCABULARIES, Source, config_of, files_of, quiet
from quantbench.wording import cut

FEW_WORDS = 100  # a tokenizer that has no vocabulary file and fewer tokens than this has special tokens alone


def read_tokenizer(folder: Path | None, words: int) -> object:
    """Whatever AutoTokenizer reads there; a stand-in where there is none. Raises ValueError for one that is broken, or
    that has more tokens than the model has `words`."""
    found = None
    if files_of(folder):
        try:
            with quiet():
                found = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        except Exception as error:  # of several libraries
            if files_of(folder, VOCABULARIES):
                raise ValueError(f"the tokenizer in {folder.name} cannot be read: {cut(error, 200)}") from None
    if found is None or found.vocab_size < FEW_WORDS and not files_of(folder, VOCABULARIES):
        return StandInTokenizer(words)
    if found.vocab_size > words:
        raise ValueError(f"the tokenizer has {found.vocab_size} tokens and the model {words}: it is another model's")
    return found


def tokens_of(tokenizer: object, prompt: str, config: PretrainedConfig, name: str) -> list[int]:
    """The prompt's ids; raises ValueError for none, and for ids that the model has no embedding for."""
    ids, words = tokenizer.encode(prompt), config.get_text_config().vocab_size
    if not ids or max(ids) >= words:
        said = f"token {max(ids)}, and the model has {words}" if ids else "no tokens"
        raise ValueError(f"{name}: its tokenizer makes {said} of the prompt {cut(prompt, 40)!r}")
    return ids


def stop_tokens(model: nn.Module) -> list[int]:
    """The ids that end a text and are in the vocabulary."""
    found, words = model.generation_config.eos_token_id, model.config.get_text_config().vocab_size
    return [one for one in (found if isinstance(found, list) else [found]) if one is not None and 0 <= one < words]


class OverLength(ValueError):
    """More tokens than a model has positions for."""


def check_length(name: str, prompt_tokens: int, workload: Workload, room: int | None) -> None:
    """Raise OverLength if prompt and new tokens are more than the model has positions for."""
    if room and workload.depth + prompt_tokens + workload.max_new_tokens > room:
        cached = f"{workload.depth} cached + " * bool(workload.depth)
        raise OverLength(f"{cached}{prompt_tokens} prompt tokens + {workload.max_new_tokens} new ones are over the "
                         f"{room} tokens that {name} has positions for")


def check_context(source: Source, workload: Workload) -> None:
    """Raise OverLength, before anything is loaded, if the workload is over the model's context length."""
    if (config := config_of(source)) is None:
        return
    tokenizer = read_tokenizer(source.folder or source.like, config.get_text_config().vocab_size)
    prompt = tokens_of(tokenizer, workload.prompt, config, source.name)
    check_length(source.name, workload.prompt_tokens or len(prompt), workload, context_length(config))


def context_length(config: object) -> int | None:
    """Tokens that a model has positions for, by whichever name its configuration has for them; None: no end is said."""
    text = config.get_text_config()
    return next((found for name in ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length")
                 if isinstance(found := getattr(text, name, None), int) and found > 0), None)


class StandInTokenizer:
    """For a model whose tokenizer is not there: words to ids, the right number of them, always the same.

    It splits as GPT-2's first step does (a word with its leading space, punctuation, blanks) and hashes each piece,
    so a prompt of common words has as many tokens as it would have. There is no way back to text."""

    def __init__(self, vocab_size: int) -> None:
        self.vocab_size = vocab_size

    def encode(self, text: str) -> list[int]:
        pieces = re.findall(r" ?\w+| ?[^\w\s]+|\s+", text)
        return [zlib.crc32(piece.encode()) % self.vocab_size for piece in pieces]
