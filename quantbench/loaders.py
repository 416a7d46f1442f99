"""Load a model under a setting, and prove it: the only module that knows transformers and bitsandbytes."""

from __future__ import annotations

import contextlib
import gc
import hashlib
import importlib.util
import json
import logging
import os
import shutil
import tempfile
import time
import warnings
from collections.abc import Iterator
from pathlib import Path

import torch
import transformers
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, GenerationConfig, StaticCache
from transformers.pytorch_utils import Conv1D

from quantbench import machine
from quantbench.audit import audit, check
from quantbench.estimate import need_memory, weights_estimate
from quantbench.loaded import LoadedModel, StandInTokenizer, check_length
from quantbench.record import Workload
from quantbench.settings import SETTINGS, Setting, find_setting, unavailable_reason
from quantbench.weights import SEED, UNFINISHED, Source, cache_folder, check_name, find, remove_unfinished

logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # else: a missing optional CPU kernel, at every load


def load(model: str, setting: str, weights: str | None = None) -> LoadedModel:
    """Load `model` (a row of MODELS, a Hub id or a local folder) under `setting`, and audit it.

    `weights="random"` takes seeded random weights where real ones could be had. Raises ValueError for an unknown
    model or setting, AuditError for a model that is not quantised as its setting says. What the machine cannot do
    (no GPU, no memory) does not raise: it is the `status` and `reason` of what is returned, and `generate` makes
    a row of it.
    """
    row = find_setting(setting)
    check_name(model, weights)
    if reason := why_not(row):
        lm = LoadedModel(model, row)
        lm.status, lm.reason = "unavailable", reason
        return lm
    return load_source(find(model, weights), row)


def why_not(setting: Setting) -> str | None:
    """Why this machine cannot run `setting`, with the packages that are installed; None when it can."""
    return unavailable_reason(setting, machine.facts(), importlib.util.find_spec("bitsandbytes") is not None)


def load_source(source: Source, setting: Setting) -> LoadedModel:
    """`load` for weights that were found already; the setting must be one that this machine can run."""
    lm = LoadedModel(source.name, setting)
    lm.weights, lm.revision = source.weights, source.revision
    try:
        check_fits(source, setting)
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
    lm.tokenizer = _tokenizer(folder, lm.model.config.vocab_size)
    lm.audit = audit(lm.model)
    lm.weights_bytes = sum(lm.audit["bytes"].values())
    check(lm.audit, setting)
    return lm


def check_context(source: Source, workload: Workload) -> None:
    """Raise ValueError, before anything is loaded, if the workload is over the model's context length."""
    if (config := _config(source)) is None:
        return
    folder = source.folder or Path((source.config or {}).get("folder", ""))
    check_length(source.name, len(_tokenizer(folder, config.vocab_size).encode(workload.prompt)), workload,
                 getattr(config, "max_position_embeddings", None))


def check_fits(source: Source, setting: Setting) -> None:
    """Raise MemoryError, before anything is loaded, if the weights cannot fit into what is free."""
    if (config := _config(source)) is None:
        return
    with torch.device("meta"), quiet():
        shapes = AutoModelForCausalLM.from_config(config)
    need_memory(weights_estimate(shapes, setting), machine.free_bytes(setting.device), "its weights")
    if source.weights == "random" and not _made(source).is_dir():
        need_memory(weights_estimate(shapes, SETTINGS["cpu-fp32"]), machine.free_bytes("cpu"), "making random weights")


def checkpoint(source: Source) -> Path:
    """The folder with the safetensors of `source`; random and GGUF weights are made into one once, and kept."""
    if source.folder is not None:
        return source.folder
    folder = _made(source)
    if not (folder / "config.json").is_file():
        folder.parent.mkdir(parents=True, exist_ok=True)
        remove_unfinished()
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f"{UNFINISHED}{os.getpid()}-") as aside, quiet():
            whole = Path(aside) / "checkpoint"
            (_write_random if source.gguf is None else _write_from_gguf)(source, whole)
            with contextlib.suppress(OSError):  # another process was faster: its folder is as good
                whole.rename(folder)
    return folder


def _recipe(source: Source) -> dict:
    """What a checkpoint is made from: a configuration, or the name of a GGUF file."""
    if source.gguf is not None:
        return {"gguf": source.gguf.name}
    if "folder" in source.config:
        return json.loads((Path(source.config["folder"]) / "config.json").read_text())
    return source.config


def _made(source: Source) -> Path:
    """Where the checkpoint of a recipe is kept."""
    digest = hashlib.sha256(json.dumps(_recipe(source), sort_keys=True).encode()).hexdigest()[:12]
    return cache_folder() / f"{Path(source.name).name}-{source.revision}-{digest}".replace(" ", "-")


def _config(source: Source):
    """The model's configuration; None for a GGUF file, which tells it once it is converted."""
    if source.folder is not None:
        return AutoConfig.from_pretrained(source.folder)
    return None if source.gguf is not None else AutoConfig.for_model(**_recipe(source))


def _write_random(source: Source, folder: Path) -> None:
    config = _config(source)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        AutoModelForCausalLM.from_config(config, dtype=config.dtype or torch.float32).save_pretrained(folder)
    if "folder" in (source.config or {}):
        for name in ("tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt", "tokenizer.model"):
            if (file := Path(source.config["folder"]) / name).is_file():
                shutil.copy(file, folder)


def _write_from_gguf(source: Source, folder: Path) -> None:
    where = {"pretrained_model_name_or_path": source.gguf.parent, "gguf_file": source.gguf.name}
    model = AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32)
    model.hf_quantizer = None  # the weights are plain float32 by now, and may be saved
    vars(model.config).pop("quantization_config", None)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(**where).save_pretrained(folder)


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
    config, how = quantisation_config(setting), {"dtype": getattr(torch, setting.dtype)}
    if config is not None:
        how["quantization_config"] = config
    if config is not None or setting.device == "cuda":
        how["device_map"] = {"": setting.device}
    with quiet():
        model = AutoModelForCausalLM.from_pretrained(folder, use_safetensors=True, local_files_only=True, **how)
        if setting.linear:
            conv1d_to_linear(model)
        if setting.quantisation == "dynamic-int8":
            quantise_dynamically(model)
    model.eval().requires_grad_(False)
    stop = model.generation_config.eos_token_id
    pad = stop[0] if isinstance(stop, list) else stop
    # the checkpoint's own sampling and repetition penalties would change what is timed
    model.generation_config = GenerationConfig(eos_token_id=stop, pad_token_id=pad or 0, do_sample=False)
    return model


def quantisation_config(setting: Setting) -> BitsAndBytesConfig | None:
    """bitsandbytes' configuration for `setting`; None where it is not bitsandbytes that quantises."""
    if setting.quantisation == "bnb-int8":
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=setting.threshold)
    if setting.quantisation in ("bnb-nf4", "bnb-fp4"):  # both defaults (fp4, float32 compute) are slow and less exact
        return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type=setting.quantisation.removeprefix("bnb-"),
                                  bnb_4bit_compute_dtype=getattr(torch, setting.dtype),
                                  bnb_4bit_use_double_quant=setting.double_quant)
    return None


def static_cache(model: nn.Module, tokens: int) -> StaticCache:
    """A KV cache with room for `tokens` tokens that never moves, as compiled and captured decoding need it."""
    return StaticCache(config=model.config, max_cache_len=-(-tokens // 64) * 64)


def conv1d_to_linear(model: nn.Module) -> None:
    """Replace GPT-2's Conv1D by the Linear that computes the same, in place: weight [in, out] -> [out, in]."""
    for parent in list(model.modules()):
        for name, child in parent.named_children():
            if isinstance(child, Conv1D):
                linear = nn.Linear(child.nx, child.nf, device="meta")
                linear.weight = nn.Parameter(child.weight.detach().t().contiguous(), requires_grad=False)
                linear.bias = child.bias
                setattr(parent, name, linear)


def quantise_dynamically(model: nn.Module) -> None:
    """torch's dynamic INT8 of every Linear, the output head too, one scale per output channel, in place."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.ao is deprecated in favour of torchao, which leaves GPT-2 unquantised
        per_channel = {nn.Linear: torch.ao.quantization.per_channel_dynamic_qconfig}
        torch.ao.quantization.quantize_dynamic(model, per_channel, dtype=torch.qint8, inplace=True)


def _tokenizer(folder: Path, vocab_size: int):
    if not any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "vocab.json")):
        return StandInTokenizer(vocab_size)
    return AutoTokenizer.from_pretrained(folder, local_files_only=True)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """No progress bar per weight file, no advice: the notebook shows one line per load."""
    bars, level = transformers.utils.logging.is_progress_bar_enabled(), transformers.logging.get_verbosity()
    transformers.utils.logging.disable_progress_bar()
    transformers.logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers.logging.set_verbosity(level)
        if bars:
            transformers.utils.logging.enable_progress_bar()
