"""What a model is under a setting: proved on a loaded one, estimated from shapes before anything is loaded."""

import copy
import dataclasses
from collections import Counter
from collections.abc import Iterator

import torch
from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from transformers import AutoModelForCausalLM, PretrainedConfig
from transformers.pytorch_utils import Conv1D

from quantbench.quantisers import ITEMSIZE, QUANTISERS, find_quantiser, name_of
from quantbench.settings import Setting
from quantbench.weights import quiet
from quantbench.wording import listed

LOOK = (2, 3)  # tokens that a model on the meta device reads, to see what its cache holds of each
CACHED_IN = "past_key_values", "cache_params", "state"  # of a model's output; the last two of states alone
KEPT = 4  # models on the meta device
MOST_LAYERS = 1000  # no model has as many, and to build 10,000 as shapes takes minutes


class AuditError(RuntimeError):
    """A model that is not what its setting says: its numbers would be another setting's numbers."""


def audit(model: nn.Module) -> dict:
    """What is quantised and what is not, as plain JSON (`records.Audit`).

    `quantised` modules of `class` hold `quantised_bytes` as `details` say; `left` counts Linear layers that are still
    unquantised, the output head apart, `kept` every other module with a matrix that no way quantises (convolutions,
    experts in one tensor, routers); `bytes` is the size of every distinct tensor by dtype, quantisation state included,
    which `get_memory_footprint` misses. `embedding_bytes` is what embeddings and an unquantised head hold of it;
    `step_bytes` what one decode step of one sequence must read: all but tables of which it reads a row, and of experts
    those that a token uses; `step_products` how many weights it multiplies by. To be called right after load:
    bitsandbytes repacks weights in its first forward."""
    owners, classes, left, kept, total, gpus, sizes, details = _looked_through(model)
    told = details[0] if details else {}
    return {
        "quantiser": ", ".join(sorted(owners)) or "none", "quantised": owners.total(),
        "class": ", ".join(sorted(classes)) or None, "quantised_bytes": sizes["quantised"],
        "embedding_bytes": sizes["embedding"], "step_bytes": total.total() - sizes["unread"],
        "step_products": sizes["products"], "left": dict(left), "kept": dict(kept),
        **{name: told.get(name, name_of(model.dtype)) for name in ("storage_dtype", "compute_dtype")},
        "bytes": dict(total), "gpu_bytes": [gpus[number] for number in sorted(gpus)] if len(gpus) > 1 else None,
        "details": told if len(details) < 2 else {"mixed": str(details)[:500]},
    }


def _looked_through(model: nn.Module) -> tuple:
    """Of all modules: quantised ones by way and by class, left and kept ones by class; bytes by dtype, by GPU and
    by use; and the different details of the quantised ones."""
    head, share = model.get_output_embeddings(), _experts_used(model.config)
    owners, classes, left, kept, total, gpus, sizes = (Counter() for _ in range(7))
    seen, details, ways = set(), [], sorted(QUANTISERS, key=lambda key: key == "stored")  # it owns what no other does
    for module in model.modules():
        owner = next((key for key in ways if QUANTISERS[key].owns(module)), None)
        tensors = [one for one in _tensors(module, owner) if _new(one, seen)]
        size = sum(one.nbytes for one in tensors)
        for one in tensors:
            total[name_of(one.dtype)] += one.nbytes
            gpus[one.device.index or 0] += one.nbytes
        sizes["products"] += _products(module, share)
        sizes["unread"] += sum(int(one.nbytes * (1 - share)) for one in tensors if _is_experts(module, one))
        if owner is not None:
            owners[owner] += 1
            classes[module._get_name()] += 1
            sizes["quantised"] += size
            sizes["unread"] += size if isinstance(module, nn.Embedding) else 0
            details += [found for found in [QUANTISERS[owner].details(module)] if found not in details]
        elif module is head or isinstance(module, nn.Embedding):
            sizes["embedding"] += size
            sizes["unread"] += 0 if module is head or module.weight is getattr(head, "weight", None) else size
        elif _is_linear(module):
            left[module._get_name()] += 1
        elif any(parameter.dim() >= 2 for parameter in module.parameters(recurse=False)):
            kept[module._get_name()] += 1
    return owners, classes, left, kept, total, gpus, sizes, details


def check(found: dict, setting: Setting) -> None:
    """Raise AuditError unless the audit `found` is what `setting` promises. What a checkpoint stores is as it is."""
    expected, way, wrong = setting.quantisation, find_quantiser(setting.quantisation), None
    left = listed([f"{n} {kind}" for kind, n in found["left"].items()] or ["none"])
    if expected == "none":
        if found["quantised"]:
            wrong = f"{found['quantised']} modules are quantised ({found['class']}), which the setting does not say"
    elif not found["quantised"]:
        wrong = f"no module was quantised (left as they were: {left})" + way.takes
    elif expected != "stored" and found["quantiser"] != expected:
        wrong = f"modules are quantised as {found['quantiser']}, not as {expected}"
    elif expected != "stored" and found["left"]:
        wrong = f"{found['quantised']} modules were quantised, but {left} were left" + way.takes
    for name, value in {} if wrong else way.promise(setting).items():
        if (is_now := found["details"].get(name)) != value:
            wrong = f"{name} is {is_now!r} in the model, and {value!r} in the setting"
    if wrong:
        raise AuditError(f"{setting.label}: {wrong}")


def on_meta(config: PretrainedConfig) -> nn.Module:
    """The model as shapes alone, kept for the next who asks. Raises ValueError for more than MOST_LAYERS layers."""
    if (layers := getattr(config.get_text_config(), "num_hidden_layers", None) or 0) > MOST_LAYERS:
        raise ValueError(f"a model of {layers:,} layers: over {MOST_LAYERS:,} are not tried")
    if (key := config.to_json_string(use_diff=False)) not in _built:
        if len(_built) >= KEPT:
            _built.clear()
        with torch.device("meta"), quiet():  # bfloat16: torch's grouped product of experts takes no other there
            _built[key] = AutoModelForCausalLM.from_config(copy.deepcopy(config), dtype=torch.bfloat16).eval()
    return _built[key]


_built: dict[str, nn.Module] = {}  # by their configurations


def weights_estimate(model: nn.Module, setting: Setting) -> int:
    """Bytes that `model`, of `on_meta`, will hold under `setting`, quantisation state included: every Linear quantised
    but the output head, as the audit demands; where the head is quantised too, what it was tied to stays."""
    way, head, seen, size = find_quantiser(setting.quantisation), model.get_output_embeddings(), set(), 0
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            if _is_linear(module) and parameter.dim() == 2 and (module is not head or way.takes_head):
                outputs = parameter.shape[1 if isinstance(module, Conv1D) else 0]
                size += way.matrix_bytes(parameter.numel(), outputs, setting)
            elif id(parameter) not in seen:
                seen.add(id(parameter))
                size += parameter.numel() * ITEMSIZE[setting.dtype]
    return size


def load_estimate(model: nn.Module, setting: Setting) -> int:
    """The most bytes that `model`, of `on_meta`, holds while it loads: what is quantised later is there before."""
    held, plain = weights_estimate(model, setting), dataclasses.replace(setting, quantisation="none")
    after = setting.quantisation != "stored" and find_quantiser(setting.quantisation).config(setting) is None
    return max(held, weights_estimate(model, plain)) if after else held


@torch.no_grad()
def cache_sizes(model: nn.Module, itemsize: int) -> dict:
    """What transformers' own cache holds of a sequence, for `cache_bytes`: told by the shapes of a model of `on_meta`,
    whatever its attention. Raises RuntimeError for the few that read values on their way: a loaded one can be asked."""
    caches, windows = [], Counter()
    for tokens in LOOK:
        out = model(input_ids=torch.zeros(1, tokens, dtype=torch.long, device=model.device), use_cache=True)
        caches.append(next((out[name] for name in CACHED_IN if out.get(name) is not None), None))
    two, three = (held_in(cache, itemsize) for cache in caches)
    for before, after in zip(*(getattr(cache, "layers", ()) for cache in caches)):
        if width := getattr(after, "sliding_window", None):  # the last token is not among those that are kept
            windows[str(width - 1)] += held_in(after, itemsize) - held_in(before, itemsize)
    return {"kv_bytes_per_token": three - two, "kv_windows": dict(windows),
            "kv_state_bytes": two - LOOK[0] * (three - two)}


def cache_bytes(audit: dict, tokens: int) -> int:
    """Bytes after so many tokens of one sequence: states, and every token's keys and values that no window left."""
    left = sum(size * max(tokens - int(width), 0) for width, size in audit["kv_windows"].items())
    return audit["kv_state_bytes"] + audit["kv_bytes_per_token"] * tokens - left


def held_in(cache: object, itemsize: int = 0) -> int:
    """Bytes of all tensors inside a cache, counters apart; `itemsize` is that of what has the dtype of `on_meta`."""
    sizes = {torch.bfloat16: itemsize} if itemsize else {}
    return sum(one.numel() * sizes.get(one.dtype, one.itemsize) for one in set(_cached(cache)) if one.dim() > 1)


def _cached(found: object, depth: int = 0) -> Iterator[torch.Tensor]:
    """Every tensor inside a cache."""
    if isinstance(found, torch.Tensor):
        yield found
    elif depth < 6:
        inside = found.values() if isinstance(found, dict) else found if isinstance(found, (list, tuple)) else \
            vars(found).values() if hasattr(found, "__dict__") else ()
        for one in inside:
            yield from _cached(one, depth + 1)


def _tensors(module: nn.Module, owner: str | None) -> Iterator[torch.Tensor]:
    """A module's own tensors (not its children's), quantisation state included; those inside of a tensor subclass."""
    waiting = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
    waiting += [] if owner is None else QUANTISERS[owner].tensors(module)
    while waiting:
        if hasattr(one := waiting.pop(), "__tensor_flatten__"):
            waiting += [getattr(one, name) for name in one.__tensor_flatten__()[0]]
        else:
            yield one


def _is_linear(module: nn.Module) -> bool:
    """Whether a module is what every way is asked to quantise: not the part of torch's attention in a vision tower."""
    return isinstance(module, (nn.Linear, Conv1D)) and not isinstance(module, NonDynamicallyQuantizableLinear)


def _is_experts(module: nn.Module, tensor: torch.Tensor) -> bool:
    """Whether a tensor holds the matrices of several experts."""
    return tensor.dim() == 3 and not isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d))


def _experts_used(config: object) -> float:
    """The share of a mixture's experts that one token uses; 1 where there is no mixture."""
    text = config.get_text_config()
    every = next((found for name in ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
                  if (found := getattr(text, name, None))), None)
    used = next((found for name in ("num_experts_per_tok", "num_experts_per_token", "moe_top_k", "top_k")
                 if isinstance(found := getattr(text, name, None), int)), None)
    every = max(every) if isinstance(every, (list, tuple)) else every  # a number for each kind of expert
    return min(used / every, 1.0) if every and used else 1.0


def _products(module: nn.Module, share: float) -> int:
    """How many weights a token is multiplied by in this module alone."""
    if hasattr(module, "in_features"):  # Linear and its quantised kin, whose tensors are packed
        return module.in_features * module.out_features
    if isinstance(module, nn.Embedding):
        return 0
    return sum(int(one.numel() * (share if _is_experts(module, one) else 1))
               for one in module.parameters(recurse=False) if one.dim() >= 2)


def _new(tensor: torch.Tensor, seen: set) -> bool:
    """Whether this storage has not been counted yet (GPT-2's head is its embedding)."""
    if tensor.device.type == "meta":
        return True
    address = (tensor.data_ptr(), tensor.numel())
    new = tensor.numel() > 0 and address not in seen
    seen.add(address)
    return new
