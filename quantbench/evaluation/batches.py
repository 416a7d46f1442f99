"""Whether a sequence's greedy text depends on what else is in its batch. Never inside a timed region."""

from collections.abc import Iterable

import torch

from quantbench.decode import Unavailable, inputs_of
from quantbench.loading import LoadedModel
from quantbench.settings import PROMPT, Workload, expect, many, whole
from quantbench.tokens import check_length, context_length


def batch_effect(lm: LoadedModel, prompt: str = PROMPT, max_new_tokens: int = 64,
                 batch_size: int | Iterable[int] = (4, 16)) -> list[dict]:
    """For each batch size: how many texts of a batch are not what the model writes for each of its sequences alone, the
    first token that differs (from 1), and by how much the best logit led there, alone: kernels go by shapes, and round
    differently. The batch is `prompt` among pieces of a bundled text of as many tokens: none is padded. Raises
    ValueError as `generate` does."""
    expect(lm, LoadedModel, "batch_effect takes what qb.load returns")
    sizes = [whole("batch_size", one, 2) for one in many("batch_size", batch_size)]
    work, whose = Workload(prompt, max_new_tokens), {"Model": lm.name, "Setting": lm.setting.label}
    if lm.status != "ok":
        return [whose | {"Status": lm.status, "Reason": lm.reason}]
    length = (ids := lm.encode(prompt)["input_ids"]).shape[1]
    check_length(lm.name, length, work, context_length(lm.model.config))
    others = inputs_of(lm, Workload(prompt_tokens=length * (max(sizes) - 1)))["input_ids"].view(-1, length)
    every, found = torch.cat([ids, others]), []
    try:
        batches = [(size, _written(lm, every[:size], work.max_new_tokens)[0]) for size in sizes]
    except Unavailable as error:  # llama.cpp has one sequence at a time
        return [whose | {"Status": "unavailable", "Reason": str(error)}]
    alone = [_written(lm, one, work.max_new_tokens) for one in every.split(1)]
    for size, texts in batches:
        parted = [(int(at[0]), margins) for text, (own, margins) in zip(texts, alone)
                  if len(at := (text != own[0]).nonzero())]
        token, margins = min(parted, key=lambda one: one[0], default=(0, [0.0]))
        first = {"From token": token + 1, "Margin there": float(f"{margins[token]:.2g}")} if parted else {}
        found.append(whose | {"Batch": size, "Other texts": len(parted)} | first)
    return found


def _written(lm: LoadedModel, ids: torch.Tensor, new: int) -> tuple[torch.Tensor, list[float]]:
    """The greedy ids [batch, new], and the first sequence's best logits less the second best."""
    made = lm.model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), min_new_tokens=new, max_new_tokens=new,
                             do_sample=False, return_dict_in_generate=True, output_scores=True)
    best = [scores[0].topk(2).values.tolist() for scores in made.scores]
    return made.sequences[:, -new:], [first - second for first, second in best]
