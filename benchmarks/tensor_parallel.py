"""Tensor parallel, which `gpus=` is not: every GPU holds a part of each layer, by transformers' `tp_plan="auto"`.

One process per GPU, so it is no cell of a sweep: transformers' greedy generate, timed as `qb.generate` does, the median
of several. usage: torchrun --nproc-per-node 2 benchmarks/tensor_parallel.py FOLDER [TOKENS] [REPEATS]
"""

import os
import sys
import time
from statistics import median

import torch
from transformers import AutoModelForCausalLM

folder, tokens, repeats = sys.argv[1], *(int(text) for text in [*sys.argv[2:], "32", "6"][-2:])
torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, tp_plan="auto").eval()


def seconds(ids: torch.Tensor, new: int) -> float:
    torch.cuda.synchronize()
    start = time.perf_counter()
    model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), min_new_tokens=new, max_new_tokens=new,
                   do_sample=False, pad_token_id=0)
    torch.cuda.synchronize()
    return time.perf_counter() - start


for prompt in (12, 1024):
    ids = torch.arange(prompt, device="cuda")[None] % 1000 + 10
    seconds(ids, tokens)
    whole, first = (median(seconds(ids, new) for _ in range(repeats)) for new in (tokens, 1))
    if os.environ["RANK"] == "0":
        print(f"{os.environ['WORLD_SIZE']} GPUs, tensor parallel, prompt of {prompt}: "
              f"{(tokens - 1) / (whole - first):.1f} decode tokens/s, {prompt / first:,.0f} prefill tokens/s, "
              f"{torch.cuda.max_memory_allocated() / 1e9:.1f} GB a GPU", flush=True)
torch.distributed.destroy_process_group()
