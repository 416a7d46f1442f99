"""Who makes the tokens: an engine generates greedily from one prompt, as often and as far as it is asked."""

import copy
import inspect
import math
from pathlib import Path

import torch
from torch import nn
from transformers import Cache, PretrainedConfig, QuantizedCache, StaticCache
from transformers.utils import ModelOutput, is_hqq_available

from quantbench import machine
from quantbench.loading import LoadedModel
from quantbench.settings import CACHES, Registry, Workload
from quantbench.wording import cut

TEXT = Path(__file__).parent / "data" / "evaluation.txt"  # what long prompts are made of


class Unavailable(RuntimeError):
    """What an engine raises when it turns out, while it is made, that it cannot run this model."""


class Eager:
    """transformers' generate as it is: the published method, and what every other engine's text is held against. With a
    static cache too nothing is compiled: that is another engine.

    Its methods say what each entry of `ENGINES` does: a class, made for one model and prompt. `caches` are those of
    CACHES that it runs with, where not "default" alone; `cache`, where it has one, what the last generation filled."""

    caches = tuple(CACHES)

    @staticmethod
    def why_not(lm: LoadedModel) -> str | None:
        """Why it cannot run this model here, in a sentence; None when it can."""
        return None

    def __init__(self, lm: LoadedModel, inputs: dict[str, torch.Tensor], tokens: int, depth: int = 0) -> None:
        """Do what is needed once, for up to `tokens` new tokens after `inputs` (of `inputs_of`), of which the first
        `depth` are read now and stay in the KV cache."""
        self.model, self.filled = lm.model, inputs.get("past_key_values")
        self.inputs = {name: inputs[name] for name in ("input_ids", "attention_mask")}
        if depth:
            before = read(lm.model, inputs["input_ids"][:, :depth], past_key_values=self.filled)
            self.filled = before.get("past_key_values")
            if self.filled is None:  # states of its own: Mamba
                raise Unavailable(f"{type(lm.model).__name__} gives no KV cache to go on from: depth 0 alone")

    def rewind(self) -> None:
        """Bring the cache back to those `depth` tokens; called before every generation, outside the timed region."""
        if self.filled is not None:
            self.cache = self.inputs["past_key_values"] = None  # never two copies at a time
            self.cache = self.inputs["past_key_values"] = copy.deepcopy(self.filled)

    def __call__(self, new: int) -> torch.Tensor:
        """Read the prompt after them and generate `new` tokens; return all ids [batch, depth + prompt + new]."""
        return self.model.generate(**self.inputs, min_new_tokens=new, max_new_tokens=new, do_sample=False,
                                   disable_compile=True)

    def differs(self, output: torch.Tensor) -> tuple[str | None, bool]:
        """Where `output` leaves eager's text, in words (None: nowhere), and whether that is wrong."""
        return None, False


ENGINES = Registry("engine", {"eager": Eager, "graph": "quantbench.engines.captured:Graph",
                              "compile": "quantbench.engines.captured:Compiled"})
find_engine = ENGINES.find


def inputs_of(lm: LoadedModel, workload: Workload) -> dict[str, torch.Tensor]:
    """A workload's `input_ids` and `attention_mask`, each [batch, depth + prompt], and empty `past_key_values`."""
    ids = lm.encode(workload.prompt)["input_ids"]
    if wanted := workload.depth + (workload.prompt_tokens or 0):
        text = lm.encode(TEXT.read_text(encoding="utf-8"))["input_ids"]
        long = text.repeat(1, -(-wanted // text.shape[1]))[:, :wanted]
        ids = long if workload.prompt_tokens else torch.cat([long, ids], dim=1)
    ids = ids.repeat(workload.batch_size, 1)
    cache = new_cache(workload.cache, lm.model.config, ids.shape[1] + workload.max_new_tokens - 1)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "past_key_values": cache}


def new_cache(name: str, config: PretrainedConfig, tokens: int) -> Cache | None:
    """An empty cache of CACHES for `tokens` tokens of each sequence; None for "default": the model makes its own.

    A quantised one is hqq's, along a token's heads (axis 1, as transformers advises for it), in groups of 32: it packs
    two into one. What is read first, and then every 128 tokens, is quantised; those in between are as they are."""
    if (bits := CACHES[name]) is None:
        return None if name == "default" else StaticCache(config=config, max_cache_len=tokens)
    text = config.get_text_config(decoder=True)
    head = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    return QuantizedCache("hqq", config, nbits=bits, axis_key=1, axis_value=1, q_group_size=math.gcd(32, head))


def why_no_cache(name: str, model: nn.Module) -> str | None:
    """Why a model cannot generate with a cache of CACHES, in a sentence; None where it keeps three tokens in one."""
    if name == "default":
        return None
    if CACHES[name] and not is_hqq_available():
        return "a quantised cache needs hqq: pip install quantbench[cache]"
    try:  # what says that it can may be unable to: Falcon with ALiBi
        cache, ids = new_cache(name, model.config, 64), torch.zeros(1, 3, dtype=torch.long, device=model.device)
        for some in ids.split([1, 2], dim=1):
            read(model, some, past_key_values=cache)
        return None if int(cache.get_seq_length()) == 3 else f"the model keeps nothing in a {name} cache"
    except Exception as error:  # each model's own code may raise anything
        if machine.out_of_memory(error) is not None:
            raise
        return f"transformers cannot run it with a {name} cache: {cut(error, 80)}"


@torch.no_grad()
def read(model: nn.Module, ids: torch.Tensor, last: int = 1, use_cache: bool = True, **how: object) -> ModelOutput:
    """One pass over `ids` [batch, tokens], with the logits of their `last` tokens alone where the model can leave the
    others out (xLSTM cannot): of a whole depth they would be gigabytes."""
    kept = {"logits_to_keep": last} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}
    return model(input_ids=ids, use_cache=use_cache, **kept, **how)


def stepwise_logits(model: nn.Module, ids: torch.Tensor, scored: int, cache: str = "default") -> torch.Tensor:
    """The logits [batch, scored, vocabulary] that predict the last `scored` tokens of `ids` [batch, tokens], taken as
    generation takes them: what comes before in one pass, these one by one with a KV cache, of CACHES."""
    held, logits = new_cache(cache, model.config, ids.shape[1]), []
    for part in (ids[:, :-scored], *ids[:, -scored:-1].split(1, dim=1)):
        step = read(model, part, past_key_values=held)
        held = step.past_key_values
        logits.append(step.logits[:, -1:])
    return torch.cat(logits, dim=1)
