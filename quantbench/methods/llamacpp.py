"""A GGUF file behind the face that transformers' models have: `generate`, and a call that gives the next logits."""

from pathlib import Path

import llama_cpp
import numpy as np
import torch
from gguf import GGUFReader
from torch import nn
from transformers import GenerationConfig, PretrainedConfig
from transformers.modeling_outputs import CausalLMOutputWithPast

from quantbench.decode import Unavailable
from quantbench.inspection import cache_sizes, on_meta

ROOM = 4096  # tokens of KV cache at most: llama.cpp takes them all at once


class Matrix(nn.Module):
    """A matrix of the file, as it lies there: it is counted, not computed with."""

    def __init__(self, codes: torch.Tensor, inputs: int, outputs: int) -> None:
        super().__init__()
        self.in_features, self.out_features = inputs, outputs
        self.register_buffer("codes", codes)


class LlamaCpp(nn.Module):
    """llama.cpp with a float16 KV cache, one sequence at a time. `past_key_values` is a tensor on the meta device with
    a row for each cached token, as large as in the cache: what was read stays inside of llama.cpp. On a GPU it holds
    every layer and the cache there, and torch a copy of the file's tensors in RAM, for the audit."""

    device, dtype = torch.device("cpu"), torch.float16  # the cache's

    def __init__(self, file: Path, config: PretrainedConfig, on_gpu: bool, room: int) -> None:
        super().__init__()
        threads = torch.get_num_threads()
        self.config, self.generation_config = config, GenerationConfig.from_model_config(config)
        self.room, self.width = min(room, ROOM), cache_sizes(on_meta(config), 1)["kv_bytes_per_token"]
        self.llama = llama_cpp.Llama(str(file), n_ctx=self.room, n_threads=threads, n_threads_batch=threads,
                                     use_mmap=False, verbose=False, n_gpu_layers=-1 if on_gpu else 0,
                                     offload_kqv=on_gpu, op_offload=on_gpu)  # by default it takes a GPU that is there
        found = {one.name.removesuffix(".weight"): one for one in GGUFReader(file, "c").tensors}  # as pages of the file
        self.head = "output" if "output" in found else "token_embd"
        for name, one in found.items():
            codes = torch.from_numpy(np.array(one.data, copy=False))
            if name == "token_embd" != self.head:
                module = nn.Embedding(1, 1)
                module.weight = nn.Parameter(codes, requires_grad=False)
            elif len(one.shape) == 2:
                module = Matrix(codes, *map(int, one.shape))
            else:
                module = nn.Module()
                module.register_buffer("values", codes)
            if len(one.shape) == 2:
                module.gguf_type = one.tensor_type.name
            self.add_module(name.replace(".", "_"), module)

    def get_output_embeddings(self) -> Matrix:
        return getattr(self, self.head)

    def forward(self, input_ids: torch.Tensor, past_key_values: torch.Tensor | None = None,
                **_: object) -> CausalLMOutputWithPast:
        """The logits [1, 1, vocabulary] after `input_ids` [1, tokens], which follow what is cached."""
        logits = self._read(input_ids, 0 if past_key_values is None else len(past_key_values)).to(input_ids.device)
        cached = torch.empty(self.llama.n_tokens, self.width, dtype=self.dtype, device="meta")
        return CausalLMOutputWithPast(logits=logits[None, None], past_key_values=cached)

    def _read(self, ids: torch.Tensor, start: int) -> torch.Tensor:
        """The logits [vocabulary], in RAM, after `ids` [1, tokens], which follow the first `start` that are cached."""
        if len(ids) > 1 or start + ids.shape[1] > self.room:
            raise Unavailable(f"llama.cpp has one sequence at a time here, of {self.room} tokens at most")
        self.llama.n_tokens = start  # what came after is written over
        self.llama.eval(ids[0].tolist())
        last = llama_cpp.llama_get_logits_ith(self.llama.ctx, -1)
        return torch.from_numpy(np.ctypeslib.as_array(last, (self.llama.n_vocab(),)).copy())

    def generate(self, input_ids: torch.Tensor, past_key_values: torch.Tensor | None = None, max_new_tokens: int = 1,
                 **_: object) -> torch.Tensor:
        """Exactly so many greedy tokens after `input_ids` [1, tokens], of which some may be cached: all of them."""
        cached, stop = 0 if past_key_values is None else len(past_key_values), self.generation_config.eos_token_id or []
        logits, new = self._read(input_ids[:, cached:], cached), []
        while True:
            logits[stop] = -torch.inf
            new.append(logits.argmax().view(1, 1))
            if len(new) == max_new_tokens:
                return torch.cat([input_ids, torch.cat(new, dim=1).to(input_ids.device)], dim=1)
            logits = self._read(new[-1], self.llama.n_tokens)
