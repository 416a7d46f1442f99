"""What a loaded model really is: which modules are quantised, which were left, and where its bytes are."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

import torch
from torch import nn
from torch.ao.nn.quantized.dynamic import Linear as DynamicLinear

from quantbench.estimate import kv_bytes_per_token
from quantbench.settings import Setting


class AuditError(RuntimeError):
    """A model that is not what its setting says: its numbers would be another setting's numbers."""


def audit(model: nn.Module) -> dict:
    """Count what is quantised and what is not, as plain JSON.

    `quantised` modules of `class` hold `quantised_bytes` in `storage_dtype` and compute in `compute_dtype`; `left`
    counts the modules with a weight matrix that are still unquantised, by class, embeddings and output head apart;
    `bytes` is the size of every distinct tensor by dtype, bitsandbytes' absmax and code tables included, which
    `get_memory_footprint` misses. `embedding_bytes` is what embeddings and an unquantised head hold of it;
    `step_bytes` what one decode step must read: all but tables of which it reads a row; `step_products` how many
    weights it multiplies by; `kv_bytes_per_token` what each token of each sequence adds to the KV cache. To be called
    right after load: bitsandbytes repacks weights in its first forward.
    """
    head = model.get_output_embeddings()
    quantised, left, seen, total = Counter(), Counter(), set(), Counter()
    quantised_bytes = embedding_bytes = looked_up_bytes = products = 0
    for module in model.modules():
        tensors = [tensor for tensor in _tensors(module) if _new(tensor, seen)]
        size = sum(tensor.nbytes for tensor in tensors)
        for tensor in tensors:
            total[_name(tensor.dtype)] += tensor.nbytes
        products += _products(module)
        if is_quantised(module):
            quantised[module._get_name()] += 1
            quantised_bytes += size
        elif module is head or isinstance(module, nn.Embedding):
            embedding_bytes += size
            looked_up_bytes += 0 if module is head or module.weight is getattr(head, "weight", None) else size
        elif _has_matrix(module):
            left[module._get_name()] += 1
    example = next((module for module in model.modules() if is_quantised(module)), None)
    return {
        "quantised": quantised.total(),
        "class": ", ".join(sorted(quantised)) or None,
        "quantised_bytes": quantised_bytes,
        "embedding_bytes": embedding_bytes,
        "step_bytes": total.total() - looked_up_bytes,
        "step_products": products,
        "kv_bytes_per_token": kv_bytes_per_token(model.config, model.dtype.itemsize),
        "left": dict(left),
        "storage_dtype": _storage_dtype(example) if example else _name(model.dtype),
        "compute_dtype": _compute_dtype(example, model),
        "bytes": dict(total),
    }


def check(found: dict, setting: Setting) -> None:
    """Raise AuditError unless the audit `found` is what `setting` promises."""
    if setting.quantisation == "none":
        if found["quantised"]:
            raise AuditError(f"{setting.label}: {found['quantised']} modules are quantised ({found['class']}); the "
                             "checkpoint itself is quantised, and would not be what this setting says")
        return
    left = ", ".join(f"{count} {kind}" for kind, count in found["left"].items())
    if not found["quantised"]:
        raise AuditError(f"{setting.label}: no module was quantised (left as they were: {left or 'none'})")
    if left:
        raise AuditError(f"{setting.label}: {found['quantised']} modules were quantised, but {left} were left")


def is_quantised(module: nn.Module) -> bool:
    """Whether a module's weight is stored quantised: by bitsandbytes, or by torch's dynamic quantisation."""
    if isinstance(module, DynamicLinear):
        return True
    weight = getattr(module, "weight", None)
    if not isinstance(weight, torch.Tensor) or weight.is_floating_point():
        return False
    return getattr(weight, "quant_state", None) is not None or _scales(module) is not None


def _tensors(module: nn.Module) -> Iterator[torch.Tensor]:
    """A module's own tensors (not its children's), quantisation state included."""
    yield from module.parameters(recurse=False)
    yield from module.buffers(recurse=False)
    if isinstance(module, DynamicLinear):
        weight = module.weight()  # unpacked anew at every call: only shapes and dtypes are of use here
        yield torch.empty(weight.shape, dtype=torch.int8, device="meta")
        yield from (weight.q_per_channel_scales().to("meta"), weight.q_per_channel_zero_points().to("meta"))
        if module.bias() is not None:
            yield module.bias().to("meta")
        return
    state = getattr(getattr(module, "weight", None), "quant_state", None)
    while state is not None:  # double quantisation: the absmax is quantised too, with a state of its own
        yield from (tensor for tensor in (state.absmax, state.code, state.offset) if tensor is not None)
        state = state.state2
    if (scales := _scales(module)) is not None:
        yield scales


def _scales(module: nn.Module) -> torch.Tensor | None:
    """LLM.int8's row scales: on the weight until the first forward pass, in the module's state after it."""
    state = getattr(module, "state", None)
    return next((found for found in (getattr(getattr(module, "weight", None), "SCB", None),
                                     getattr(state, "SCB", None)) if found is not None), None)


def _has_matrix(module: nn.Module) -> bool:
    """Whether a module owns weights that quantisation is about: a small convolution is not."""
    return not isinstance(module, nn.Conv1d) and any(parameter.dim() >= 2 for parameter in module.parameters(recurse=False))


def _products(module: nn.Module) -> int:
    """How many weights a token is multiplied by in this module alone."""
    if hasattr(module, "in_features"):  # Linear and its quantised kin, whose tensors are packed
        return module.in_features * module.out_features
    return 0 if isinstance(module, nn.Embedding) or not _has_matrix(module) else module.weight.numel()


def _new(tensor: torch.Tensor, seen: set) -> bool:
    """Whether this storage has not been counted yet (GPT-2's head is its embedding)."""
    if tensor.device.type == "meta":
        return True
    address = (tensor.data_ptr(), tensor.numel())
    if tensor.numel() == 0 or address in seen:
        return False
    seen.add(address)
    return True


def _storage_dtype(module: nn.Module) -> str:
    if isinstance(module, DynamicLinear):
        return "int8"
    state = getattr(module.weight, "quant_state", None)
    return state.quant_type if state is not None else _name(module.weight.dtype)


def _compute_dtype(module: nn.Module | None, model: nn.Module) -> str:
    if isinstance(module, DynamicLinear):
        return "int8"
    compute = getattr(module, "compute_dtype", None) or model.dtype  # LLM.int8 takes its inputs' dtype
    return _name(compute)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
