"""Tiny real models (a GPT-2 with Conv1D, a Llama with Linear), a cache folder of the tests' own, and who measures."""

import json
import os
from pathlib import Path

import psutil
import pytest
from tqdm import tqdm

os.environ["QUANTBENCH_CACHE"] = os.environ.get("QUANTBENCH_TEST_CACHE", str(Path(__file__).parent.parent / "build/cache"))
os.environ.setdefault("HF_HUB_OFFLINE", "1")
if "PYTEST_XDIST_WORKER" in os.environ:  # workers, on few cores
    os.environ["OMP_NUM_THREADS"] = "1"

TINY = {
    "gpt2": {"model_type": "gpt2", "n_layer": 2, "n_head": 4, "n_embd": 64, "n_positions": 64, "vocab_size": 500,
             "bos_token_id": 0, "eos_token_id": 0},
    "llama": {"model_type": "llama", "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
              "hidden_size": 64, "intermediate_size": 128, "vocab_size": 500, "max_position_embeddings": 64,
              "tie_word_embeddings": True, "bos_token_id": 1, "eos_token_id": 2},
}
CPU_SETTINGS = ("cpu-fp32", "cpu-bf16", "cpu-int8", "cpu-int4", "cpu-int8-dynamic")
BOTH = ["cpu-fp32", "cpu-int4"]  # settings of a sweep of two
SHORT = {"repeats": 1, "progress": False}


@pytest.fixture(scope="session", params=sorted(TINY))
def tiny(request, tmp_path_factory) -> str:
    """The folder of a tiny model that holds a config.json alone, so that its weights are random."""
    return _folder(tmp_path_factory, request.param)


@pytest.fixture(scope="session")
def tiny_gpt2(tmp_path_factory) -> str:
    return _folder(tmp_path_factory, "gpt2")


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory) -> str:
    return _folder(tmp_path_factory, "llama")


def _folder(tmp_path_factory, name: str) -> str:
    folder = tmp_path_factory.mktemp(f"tiny-{name}-")
    (folder / "config.json").write_text(json.dumps(TINY[name]))
    return str(folder)


def statuses(rows) -> dict[str, str]:
    return {row.setting: row.status for row in rows}


def pretrained(folder: Path, **config) -> str:
    """A tiny Llama with weights in a file and a tokenizer of its own: "pretrained", with uneven predictions."""
    import tokenizers
    import torch
    import transformers

    from quantbench.evaluation.passes import find_text
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(**TINY["llama"] | config))
    model.model.embed_tokens.weight.data *= 6  # else every next token is nearly as likely as any other
    model.save_pretrained(folder)
    bpe = tokenizers.ByteLevelBPETokenizer()
    bpe.train_from_iterator([find_text()[1]], vocab_size=500, show_progress=False)
    transformers.PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer).save_pretrained(folder)
    return str(folder)


def children() -> list[psutil.Process]:
    """The measuring processes: the fork server's children, not the server itself nor a compiler's workers."""
    servers = [child for child in psutil.Process().children() if "forkserver" in " ".join(child.cmdline())]
    found = [p for server in servers for p in server.children(recursive=True)]
    return [p for p in found if p.status() != psutil.STATUS_ZOMBIE]


def eldest() -> psutil.Process:
    """The measuring process of a sweep's first setting."""
    return min(children(), key=lambda child: child.create_time())


class Bar(tqdm):
    """A sweep's progress bar that calls `act`, once, when it is told something that ends in `words`."""

    def __init__(self, words: str, act) -> None:
        self.words, self.act = words, act
        super().__init__(total=1, file=open(os.devnull, "w"))

    def set_description(self, desc=None, refresh=True):
        if desc and self.act and desc.endswith(self.words):
            act, self.act = self.act, None
            act()
