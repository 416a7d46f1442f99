"""Will it fit? Bytes of weights and KV cache under a setting, worked out from shapes before anything is loaded."""

from __future__ import annotations

from torch import nn

from quantbench.settings import Setting

BLOCK = 64  # bitsandbytes' 4-bit block: one absmax each
ITEMSIZE = {"float32": 4, "float16": 2, "bfloat16": 2}


def weights_estimate(model: nn.Module, setting: Setting) -> int:
    """Bytes that `model`, a module on the meta device, will hold under `setting`, quantisation state included.

    Every matrix is quantised but embeddings and the output head, as the audit demands; dynamic INT8 quantises the
    head too, and keeps the embedding it was tied to.
    """
    head, size, seen = model.get_output_embeddings(), 0, set()
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            matrix = parameter.dim() == 2 and not isinstance(module, nn.Embedding)
            if matrix and (module is not head or setting.quantisation == "dynamic-int8"):
                outputs = parameter.shape[1 if module._get_name() == "Conv1D" else 0]
                size += _matrix_bytes(parameter.numel(), outputs, setting)
            elif id(parameter) not in seen:
                seen.add(id(parameter))
                size += parameter.numel() * ITEMSIZE[setting.dtype]
    return size


def kv_bytes_per_token(config: object, itemsize: int) -> int:
    """Bytes that one token of one sequence takes in the KV cache: keys and values of every layer and KV head."""
    heads = config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    return 2 * config.num_hidden_layers * kv_heads * head_dim * itemsize


def _matrix_bytes(numel: int, outputs: int, setting: Setting) -> int:
    if setting.quantisation == "none":
        return numel * ITEMSIZE[setting.dtype]
    if setting.quantisation == "bnb-int8":
        return numel + 4 * outputs  # one float32 scale each
    if setting.quantisation == "dynamic-int8":
        return numel + 16 * outputs  # a scale and a zero point each, of 8 bytes
    absmax = numel // BLOCK
    return numel // 2 + (absmax + absmax // 64 if setting.double_quant else 4 * absmax)


def need_memory(needed: int, free: int, what: str) -> None:
    """Raise MemoryError, with both figures, if `needed` bytes are more than are `free`."""
    if needed > free:
        raise MemoryError(f"{what} would need about {needed:,} bytes, and {free:,} are free: not tried")
