"""A checkpoint's tokenizer, whatever it is, or a stand-in where there is none."""

import re
import zlib
from pathlib import Path

from transformers import AutoTokenizer, PretrainedConfig

from quantbench.inspection import quiet
from quantbench.weights import VOCABULARIES, files_of
from quantbench.wording import cut

FEW_WORDS = 100  # a tokenizer that has no vocabulary file and fewer tokens than this has special tokens alone


def read_tokenizer(folder: Path | None, words: int) -> object:
    """Whatever AutoTokenizer reads there; a stand-in where there is none. Raises ValueError for one that is broken, or
    that has more tokens than the model has `words`."""
    found, has = None, folder and files_of(folder)
    if has:
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
