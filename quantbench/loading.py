"""Load a model under a setting, prove it, and let it go again."""

from __future__ import annotations

import gc
import logging
import os
import re
import time
import warnings
import weakref
import zlib
from pathlib import Path

import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig
from transformers.pytorch_utils import Conv1D

from quantbench import machine, quantisers
from quantbench.inspection import audit, cache_bytes_per_token, check, need_memory, on_meta, quiet, weights_estimate
from quantbench.settings import Setting, Workload, find_setting
from quantbench.weights import Source, check_name, checkpoint, config_of, find

LEFT_BEHIND = 2**20  # bytes that may stay allocated after close before it is worth a warning
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # else: a missing optional CPU kernel, at every load


class LoadedModel:
    """What `load` returns: a model in memory, or the reason why it is not there (`status`, `reason`).

    `model` is transformers' module, `audit` what was really quantised, `weights_bytes` its size with the
    quantisation state, `load_s` the seconds from local files to memory (downloads are not counted),
    `held_before_bytes` what the process held on the device before, `load_peak_bytes` the most above that while
    loading. A context manager: leaving it calls `close`.
    """

    def __init__(self, name: str, setting: Setting) -> None:
        self.name, self.setting, self.device = name, setting, setting.device
        self.status, self.reason = "ok", None
        self.weights = self.revision = None
        self.model = self.tokenizer = self.audit = self.weights_bytes = None
        self.load_s = self.load_peak_bytes = None
        self.held_before_bytes = self.held_after_bytes = self.device_before_bytes = None

    def encode(self, prompt: str, batch_size: int = 1) -> dict[str, torch.Tensor]:
        """`input_ids` and `attention_mask` on the device, each of shape [batch_size, prompt tokens]."""
        ids = torch.tensor([self.tokenizer.encode(prompt)], device=self.model.device).repeat(batch_size, 1)
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}

    def decode(self, ids: torch.Tensor) -> str | None:
        """The text of a 1-D tensor of token ids; None where there is no tokenizer, or random weights."""
        if self.weights == "random" or isinstance(self.tokenizer, StandInTokenizer):
            return None
        return self.tokenizer.decode(ids.tolist(), skip_special_tokens=True)

    @property
    def context_length(self) -> int | None:
        """The most tokens, prompt included, that the model has positions for."""
        return context_length(self.model.config)

    def close(self) -> None:
        """Free the memory, and warn where it could not be freed because something else still holds the model."""
        if self.model is None:
            return
        before, alive = machine.held_bytes(self.device), weakref.ref(self.model)
        self.model = self.tokenizer = None
        gc.collect()
        machine.release(self.device)
        own = self.held_after_bytes - self.held_before_bytes
        stays = self.device == "cuda" and before - machine.held_bytes(self.device) < own - LEFT_BEHIND
        if alive() is not None or stays:
            warnings.warn(f"{self.name} · {self.setting.label} was closed, but something else still holds its memory: "
                          "the next model will not start on a clean device", stacklevel=2)

    def __enter__(self) -> LoadedModel:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def __repr__(self) -> str:
        title = f"{self.name} · {self.setting.label}: "
        if self.status != "ok":
            return title + f"{self.status} ({self.reason})"
        audited = f", {self.audit['quantised']} × {self.audit['class']}" if self.audit["quantised"] else ""
        return (title + f"{self.weights} weights, {self.weights_bytes / 1e6:.0f} MB{audited}, "
                f"loaded in {self.load_s:.1f} s" + ("" if self.model is not None else ", closed"))


def load(model: str | os.PathLike, setting: str, weights: str | None = None) -> LoadedModel:
    """Load `model` (a row of MODELS, a Hub id or a local folder) under `setting`, and audit it.

    `weights="random"` takes seeded random weights where real ones could be had. Raises ValueError for an unknown
    model or setting, AuditError for a model that is not quantised as its setting says. What the machine cannot do
    (no GPU, no memory) does not raise: it is the `status` and `reason` of what is returned, and `generate` makes
    a row of it.
    """
    row, model = find_setting(setting), os.fspath(model)
    check_name(model, weights)
    if reason := why_not(row):
        lm = LoadedModel(model, row)
        lm.status, lm.reason = "unavailable", reason
        return lm
    return load_source(find(model, weights), row)


def why_not(setting: Setting) -> str | None:
    """Why this machine cannot run `setting`, with the packages that are installed; None when it can."""
    return quantisers.why_not(setting, machine.facts())


def load_source(source: Source, setting: Setting) -> LoadedModel:
    """`load` for weights that were found already; the setting must be one that this machine can run."""
    lm = LoadedModel(source.name, setting)
    lm.weights, lm.revision = source.weights, source.revision
    try:
        if (config := config_of(source)) is not None:
            need_memory(weights_estimate(on_meta(config), setting), machine.free_bytes(setting.device), "its weights")
        folder = checkpoint(source)
        _load_timed(lm, folder)
    except (RuntimeError, MemoryError) as error:
        if (reason := machine.out_of_memory(error)) is None:
            raise
        lm.status, lm.reason, lm.model = "out_of_memory", reason, None
    if lm.status != "ok":  # not in the except clause: the traceback holds what was allocated
        gc.collect()
        machine.release(lm.device)
        return lm
    lm.tokenizer = _tokenizer(folder, lm.model.config.get_text_config().vocab_size)
    lm.audit = audit(lm.model, cache_bytes_per_token(on_meta(lm.model.config), lm.model.dtype.itemsize))
    lm.weights_bytes = sum(lm.audit["bytes"].values())
    check(lm.audit, setting)
    return lm


class OverLength(ValueError):
    """More tokens than a model has positions for."""


def check_length(name: str, prompt_tokens: int, workload: Workload, room: int | None) -> None:
    """Raise OverLength if prompt and new tokens are more than the model has positions for."""
    if room and prompt_tokens + workload.max_new_tokens > room:
        raise OverLength(f"{prompt_tokens} prompt tokens + {workload.max_new_tokens} new ones are over the "
                         f"{room} tokens that {name} has positions for")


def check_context(source: Source, workload: Workload) -> None:
    """Raise OverLength, before anything is loaded, if the workload is over the model's context length."""
    if (config := config_of(source)) is None:
        return
    folder = source.folder or Path((source.config or {}).get("folder", ""))
    prompt = _tokenizer(folder, config.get_text_config().vocab_size).encode(workload.prompt)
    check_length(source.name, len(prompt), workload, context_length(config))


def context_length(config: object) -> int | None:
    """Tokens that a model has positions for, by whichever name its configuration has for them; None: no end is said."""
    text = config.get_text_config()
    return next((found for name in ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length")
                 if isinstance(found := getattr(text, name, None), int) and found > 0), None)


def _load_timed(lm: LoadedModel, folder: Path) -> None:
    """Fill `lm` with the model, the seconds it took and what it holds."""
    machine.release(lm.device)
    lm.held_before_bytes, lm.device_before_bytes = machine.held_bytes(lm.device), machine.device_bytes()
    has_peak = machine.reset_peak(lm.device)
    start = time.perf_counter()
    lm.model = _from_folder(folder, lm.setting)
    machine.synchronize(lm.device)
    lm.load_s = time.perf_counter() - start
    lm.held_after_bytes = machine.held_bytes(lm.device)
    lm.load_peak_bytes = machine.peak_bytes(lm.device) - lm.held_before_bytes if has_peak else None


def _from_folder(folder: Path, setting: Setting) -> nn.Module:
    way = quantisers.find_quantiser(setting.quantisation)
    config, how = way.config(setting), {"dtype": getattr(torch, setting.dtype)}
    if config is not None:
        how["quantization_config"] = config
    if config is not None or setting.device == "cuda":
        how["device_map"] = {"": setting.device}
    with quiet():
        model, told = AutoModelForCausalLM.from_pretrained(folder, use_safetensors=True, local_files_only=True,
                                                           trust_remote_code=False, output_loading_info=True, **how)
        if lost := sorted(told["missing_keys"]):  # transformers would make them up
            raise ValueError(f"{len(lost)} of the model's weights are not in the checkpoint, such as {lost[0]}")
        if setting.linear:
            conv1d_to_linear(model)
        way.apply(model, setting)
    model.eval().requires_grad_(False)
    stop = model.generation_config.eos_token_id
    pad = stop[0] if isinstance(stop, list) and stop else stop or 0
    # the checkpoint's own sampling and repetition penalties would change what is timed
    model.generation_config = GenerationConfig(eos_token_id=stop, pad_token_id=pad or 0, do_sample=False)
    return model


def conv1d_to_linear(model: nn.Module) -> None:
    """Replace GPT-2's Conv1D by the Linear that computes the same, in place: weight [in, out] -> [out, in]."""
    for parent in list(model.modules()):
        for name, child in parent.named_children():
            if isinstance(child, Conv1D):
                linear = nn.Linear(child.nx, child.nf, device="meta")
                linear.weight = nn.Parameter(child.weight.detach().t().contiguous(), requires_grad=False)
                linear.bias = child.bias
                setattr(parent, name, linear)


def _tokenizer(folder: Path, vocab_size: int):
    if not any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "vocab.json")):
        return StandInTokenizer(vocab_size)
    return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)


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
