"""The texts that quality is measured on."""

from __future__ import annotations

import hashlib
import importlib.util
import warnings
from dataclasses import dataclass
from pathlib import Path

from quantbench.weights import hub_answers

BUNDLED = "quantbench-eval"
WIKITEXT = "wikitext-2"
_FILE = Path(__file__).parent / "data" / "evaluation.txt"
_WIKITEXT = ("Salesforce/wikitext", "wikitext-2-raw-v1/test-00000-of-00001.parquet")


@dataclass(frozen=True)
class Text:
    """A text and the name it goes by in a row."""

    name: str
    body: str

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.body.encode()).hexdigest()


def find_text(text: str | None = None) -> Text:
    """None or "quantbench-eval": prose written for this project (about 3,000 tokens: narrative, encyclopaedic,
    dialogue, technical, news), so that no model has seen it. "wikitext-2": the raw test set of WikiText-2 (Merity
    et al. 2016) from the Hub, its lines joined as the published GPT-2 figures join them; where it cannot be had, the
    bundled text with a warning. Any other string is the text itself.
    """
    if text in (None, BUNDLED):
        return Text(BUNDLED, _FILE.read_text(encoding="utf-8").strip())
    if text != WIKITEXT:
        return Text("own text", text)
    try:
        return Text(WIKITEXT, _wikitext())
    except (OSError, ImportError) as error:  # the Hub's errors are OSErrors
        warnings.warn(f"{WIKITEXT} cannot be had ({error}): measuring on {BUNDLED} instead", stacklevel=3)
        return find_text()


def _wikitext() -> str:
    if importlib.util.find_spec("pyarrow") is None:
        raise ImportError("reading it needs pyarrow: pip install pyarrow")
    import pandas
    from huggingface_hub import hf_hub_download

    path = hf_hub_download(*_WIKITEXT, repo_type="dataset", local_files_only=not hub_answers())
    # as in transformers' guide to the perplexity of fixed-length models, which has GPT-2's figures
    return "\n\n".join(pandas.read_parquet(path)["text"])
