"""Load a model under a setting, prove it, and let it go again."""

import contextlib
import dataclasses
import logging
import mmap
import os
import time
import warnings
import weakref
from pathlib import Path

import accelerate
import torch
from torch import nn
from transformers import AutoModelForCausalLM, GenerationConfig, PretrainedConfig
from transformers.pytorch_utils import Conv1D

from quantbench import machine, quantisers
from quantbench.inspection import AuditError, audit, cache_sizes, check, load_estimate, on_meta
from quantbench.settings import Setting, find_setting, on_gpus
from quantbench.tokens import StandInTokenizer, context_length, read_tokenizer, stop_tokens, tokens_of
from quantbench.weights import Source, check_keys, check_name, checkpoint, config_of, find, quiet
from quantbench.wording import cut

LEFT_BEHIND = 2**20  # bytes that may stay allocated after close before it is worth a warning
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # else: a missing optional CPU kernel, at every load


class LoadedModel(contextlib.AbstractContextManager):
    """What `load` returns: a model in memory, or the reason why it is not there (`status`, `reason`).

    `model` is transformers' module, `audit` what was really quantised, `weights_bytes` its size with the
    quantisation state, `load_s` the seconds from local files to memory (downloads are not counted),
    `held_before_bytes` what the process held on the device before, `load_peak_bytes` the most above that while
    loading (None: it cannot be told). A context manager: leaving it calls `close`."""

    def __init__(self, name: str, setting: Setting, status: str = "ok", reason: str | None = None) -> None:
        self.name, self.setting, self.device = name, setting, setting.device
        self.way = quantisers.find_quantiser(setting.quantisation)  # asked wherever it matters how it quantises
        self.status, self.reason = status, reason
        self.weights = self.revision = self.load_s = self.load_peak_bytes = None
        self.model = self.tokenizer = self.audit = self.weights_bytes = None
        self.held_before_bytes = self.held_after_bytes = self.device_before_bytes = None

    def encode(self, prompt: str, batch_size: int = 1) -> dict[str, torch.Tensor]:
        """`input_ids` and `attention_mask` on the device, each of shape [batch_size, prompt tokens]."""
        if self.model is None:
            raise RuntimeError(f"{self!r}: load it again")
        ids = [tokens_of(self.tokenizer, prompt, self.model.config, self.name)] * batch_size
        ids = torch.tensor(ids, device=self.device)
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}

    def decode(self, ids: torch.Tensor) -> str | None:
        """The text of a 1-D tensor of token ids; None where there is no tokenizer, or random weights."""
        if self.weights == "random" or isinstance(self.tokenizer, StandInTokenizer):
            return None
        known = [one for one in ids.tolist() if one < len(self.tokenizer)]  # an embedding may have more rows
        return self.tokenizer.decode(known, skip_special_tokens=True)

    def close(self) -> None:
        """Free the memory, and warn where it could not be freed because something else still holds the model."""
        if self.model is None:
            return
        before, alive = machine.held_bytes(self.device), weakref.ref(self.model)
        self.model = self.tokenizer = None
        machine.release(self.device)
        own = self.held_after_bytes - self.held_before_bytes
        stays = self.device == "cuda" and before - machine.held_bytes(self.device) < own - LEFT_BEHIND
        if alive() is not None or stays:
            warnings.warn(f"{self.name} · {self.setting.label} was closed, but something else still holds its memory: "
                          "the next model will not start on a clean device", stacklevel=2)

    def __exit__(self, *error: object) -> None:
        self.close()

    def __repr__(self) -> str:
        title = f"{self.name} · {self.setting.label}{f' on {self.setting.gpus} GPUs' * (self.setting.gpus > 1)}: "
        if self.status != "ok":
            return title + f"{self.status} ({self.reason})"
        audited = f", {self.audit['quantised']} × {self.audit['class']}" if self.audit["quantised"] else ""
        return (title + f"{self.weights} weights, {self.weights_bytes / 1e6:.0f} MB{audited}, "
                f"loaded in {self.load_s:.1f} s" + ("" if self.model is not None else ", closed"))


def load(model: str | os.PathLike, setting: str, weights: str | None = None, gpus: int | str = 1) -> LoadedModel:
    """Load `model` (a row of MODELS, a Hub id or a local folder: see `check_name`) under `setting`, and audit it.

    `weights="random"` takes seeded random weights where real ones could be had. `gpus`, a number or "all", share the
    layers, as accelerate's device map "balanced" places them: one works while the others wait. Raises ValueError for an
    unknown model or setting, and for a checkpoint that is damaged, incomplete, quantised itself or no causal language
    model; AuditError for a model that is not quantised as its setting says. What the machine cannot do (no GPU, no
    memory, no package) does not raise: it is the returned `status` and `reason`, of which `generate` makes a row."""
    row, name = on_gpus(find_setting(setting), gpus, facts := machine.facts()), check_name(model, weights)
    if reason := quantisers.why_not(row, facts):
        return LoadedModel(name, row, "unavailable", reason)
    return load_source(find(name, weights), row)


def load_source(source: Source, setting: Setting) -> LoadedModel:
    """`load` for weights that were found already; the setting must be one that this machine can run."""
    lm = LoadedModel(source.name, setting)
    lm.weights, lm.revision = source.weights, source.revision
    try:
        config = config_of(source)
        own = getattr(config, "quantization_config", None) or getattr(config, "compression_config", None)
        if reason := lm.way.why_not_checkpoint(own, setting, source):
            lm.status, lm.reason = "unavailable", reason
            return lm
        if config is not None:
            _check_room(load_estimate(on_meta(config), setting), setting)
        folder = checkpoint(source, lm.way.takes_folder)
        config = config or config_of(dataclasses.replace(source, folder=folder, gguf=None))
        shapes = on_meta(config)  # before transformers writes into it
        _load_timed(lm, source, folder, config)
        lm.tokenizer = read_tokenizer(folder, config.get_text_config().vocab_size)
        lm.audit = audit(lm.model)
        lm.weights_bytes = sum(lm.audit["bytes"].values())
        check(lm.audit, setting)
        lm.audit |= _cache_sizes(shapes, lm)
        if setting.offload:
            accelerate.cpu_offload(lm.model, torch.device("cuda", 0))
            lm.audit["crossing_bytes"] = sum(one.nbytes for part in lm.model.modules()
                                             for one in part.parameters(recurse=False))  # a tied head crosses twice
    except Exception as error:  # each model's own code may raise anything
        if (reason := machine.out_of_memory(error)) is None:
            if isinstance(error, (ValueError, OSError, AuditError)):
                raise
            raise ValueError(f"{source.name} does not load: {type(error).__name__}: {cut(error, 200)}") from error
        lm.status, lm.reason, lm.model = "out_of_memory", reason, None
    if lm.status != "ok":
        machine.release(lm.device)
    return lm


def _check_room(needed: int, setting: Setting) -> None:
    """Raise MemoryError where the weights do not fit, saying how many such GPUs they would take."""
    device, gpus = "cpu" if setting.offload else setting.device, setting.gpus
    free, what = machine.free_bytes(device, gpus), "its weights"
    if device == "cuda" and free > 0:
        what += f" (on {-(-needed * gpus // free)} such GPUs they would fit)"
    machine.need_memory(needed, free, what)


def _load_timed(lm: LoadedModel, source: Source, folder: Path, config: PretrainedConfig) -> None:
    """Fill `lm` with the model, the seconds it took and what it holds."""
    machine.release(lm.device)
    lm.held_before_bytes = machine.held_bytes(lm.device)
    lm.device_before_bytes = machine.device_bytes(lm.setting.gpus)
    has_peak = machine.reset_peak(lm.device) and (lm.device == "cpu" or lm.way.by_torch)
    start = time.perf_counter()
    others = lm.way.read(source, config, lm.setting, context_length(config))
    lm.model = _greedy(others or _from_folder(folder, config, lm.setting, lm.way))
    machine.synchronize(lm.device)
    lm.load_s = time.perf_counter() - start
    lm.held_after_bytes = machine.held_bytes(lm.device)
    lm.load_peak_bytes = machine.peak_bytes(lm.device) - lm.held_before_bytes if has_peak else None


def _from_folder(folder: Path, config: PretrainedConfig, setting: Setting, way: quantisers.Quantiser) -> nn.Module:
    how = {"dtype": getattr(torch, setting.dtype, setting.dtype), "quantization_config": way.config(setting)}
    if setting.quantisation != "none" or setting.device == "cuda":
        how["device_map"] = {"": "cpu" if setting.offload else way.starts_on or setting.device}
    if setting.gpus > 1:
        free = {gpu: torch.cuda.mem_get_info(gpu)[0] for gpu in range(setting.gpus)}
        how |= {"device_map": "balanced", "max_memory": free}
    with quiet():
        model, told = AutoModelForCausalLM.from_pretrained(
            folder, config=config, use_safetensors=True, local_files_only=True, trust_remote_code=False,
            ignore_mismatched_sizes=True, output_loading_info=True, **how)
        check_keys(model, told, setting.quantisation == "stored")
        if setting.gpus > 1 and not {*model.hf_device_map.values()} <= {*range(setting.gpus)}:
            raise MemoryError(f"accelerate does not place all layers on {setting.gpus} GPUs")
        if setting.linear:
            conv1d_to_linear(model)
        way.apply(model, setting)
    for one in model.parameters():  # else a file's pages come in later, and are missing from what was held at load
        if one.device.type == "cpu" and not hasattr(one, "__tensor_flatten__"):
            torch.empty(0, dtype=torch.uint8).set_(one.untyped_storage())[::mmap.PAGESIZE].sum()
    return model


def _greedy(model: nn.Module) -> nn.Module:
    """Ready to generate, without the checkpoint's own sampling and penalties: they would change what is timed."""
    model.eval().requires_grad_(False)
    stop = stop_tokens(model) or None
    model.generation_config = GenerationConfig(eos_token_id=stop, pad_token_id=stop[0] if stop else 0, do_sample=False)
    return model


def _cache_sizes(shapes: nn.Module, lm: LoadedModel) -> dict:
    """Told by shapes alone; by the model itself where it reads values on its way, or is quantised: other code may read
    a head's weight, a kernel may not take a shape. Raises AuditError for one that does not run."""
    with contextlib.suppress(RuntimeError):
        if lm.setting.quantisation == "none":
            return cache_sizes(shapes, lm.model.dtype.itemsize)
    try:
        return cache_sizes(lm.model, lm.model.dtype.itemsize)
    except Exception as error:
        if machine.out_of_memory(error):
            raise
        raise AuditError(f"{lm.setting.label}: the model does not run so ({cut(error, 200)})") from None


def conv1d_to_linear(model: nn.Module) -> None:
    """Replace GPT-2's Conv1D by the Linear that computes the same, in place: weight [in, out] -> [out, in]."""
    for name, child in list(model.named_modules(remove_duplicate=False)):
        if isinstance(child, Conv1D):
            linear = nn.Linear(child.nx, child.nf, device="meta")
            linear.weight = nn.Parameter(child.weight.detach().t().contiguous(), requires_grad=False)
            linear.bias = child.bias
            model.set_submodule(name, linear)
