"""Random and GGUF weights are made into a checkpoint once, kept, and loaded as any other."""

import contextlib
import hashlib
import json
import os
import platform
import re
import shutil
import tempfile
from pathlib import Path

import psutil
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from quantbench.inspection import on_meta, weights_estimate
from quantbench.machine import free_bytes, need_memory
from quantbench.making.folders import damage
from quantbench.settings import SETTINGS
from quantbench.weights import SEED, Source, cache_folder, config_of, files_of, quiet, recipe
from quantbench.wording import cut

UNFINISHED = "making-"  # then the host and the process that makes it
NAME_BYTES = 80  # of a model's name, in its folder's: file systems take 255, and the rest tells two apart


def made(source: Source, weights: bool = True) -> Path:
    """The folder with the safetensors of a source that is a recipe, or without `weights` what a GGUF file says beside
    them. Raises MemoryError where making it needs more, ValueError for a GGUF file that transformers does not read."""
    folder = _kept_at(source, "" if weights else "-no-weights")
    if weights and (folder / "config.json").is_file() and damage(folder):
        shutil.rmtree(folder, ignore_errors=True)
    if not (folder / "config.json").is_file():
        if source.gguf is None:
            needed = weights_estimate(on_meta(config_of(source)), SETTINGS["cpu-fp32"])
            need_memory(needed, free_bytes("cpu"), "making random weights")
        folder.parent.mkdir(parents=True, exist_ok=True)
        _remove_unfinished()
        prefix = f"{UNFINISHED}{platform.node()}-{os.getpid()}-"
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=prefix) as aside, quiet():
            whole = Path(aside) / "checkpoint"
            _write_random(source, whole) if source.gguf is None else _write_from_gguf(source, whole, weights)
            with contextlib.suppress(OSError):  # another process was faster: its folder is as good
                whole.rename(folder)
    return folder


def _kept_at(source: Source, kind: str) -> Path:
    digest = hashlib.sha256(json.dumps(recipe(source), sort_keys=True).encode())
    for file in files_of(source.like):
        digest.update(file.name.encode() + file.read_bytes())
    name = os.fsencode(Path(source.name).name)[:NAME_BYTES].decode(errors="ignore")
    return cache_folder() / f"{name}-{source.revision}-{digest.hexdigest()[:12]}{kind}".replace(" ", "-")


def _remove_unfinished() -> None:
    """Free what processes of this host left that were killed while they made a checkpoint: it may be gigabytes."""
    for left in cache_folder().glob(f"{UNFINISHED}*"):
        made_by = re.match(rf"{UNFINISHED}{re.escape(platform.node())}-(\d+)-", left.name)
        if made_by and not psutil.pid_exists(int(made_by[1])):
            shutil.rmtree(left, ignore_errors=True)


def _write_random(source: Source, folder: Path) -> None:
    config = config_of(source)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        AutoModelForCausalLM.from_config(config, dtype=config.dtype or torch.float32).save_pretrained(folder)
    for file in files_of(source.like):
        shutil.copy(file, folder)


def _write_from_gguf(source: Source, folder: Path, weights: bool) -> None:
    where = {"pretrained_model_name_or_path": source.gguf.parent, "gguf_file": source.gguf.name}
    try:
        if weights:
            model = AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32, trust_remote_code=False)
            model.hf_quantizer = None  # the weights are plain float32 by now, and may be saved
            vars(model.config).pop("quantization_config", None)
        tokenizer = AutoTokenizer.from_pretrained(**where, trust_remote_code=False)
        (model if weights else AutoConfig.from_pretrained(**where, trust_remote_code=False)).save_pretrained(folder)
    except Exception as error:  # of several libraries
        raise ValueError(f"{source.name}: {source.gguf.name} is not read by transformers: {cut(error, 200)}") from None
    tokenizer.save_pretrained(folder)
