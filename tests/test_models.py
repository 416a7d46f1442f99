"""Every architecture is right or refused: under every CPU setting and engine the text is transformers' own, or a
sentence says why not. A spread of eight here; all of them, before a release, with `make test-models`."""

from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

import quantbench as qb
from quantbench.inspection import CACHED_IN, cache_bytes, held_in
from tests.conftest import CPU_SETTINGS

NEW = 6  # tokens
TEXT = "A ship came in with the tide, and nobody had seen her before. "
WORDS = {"vocab_size": 512, "bos_token_id": 0, "eos_token_id": 1}
SIZES = WORDS | {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
                 "num_key_value_heads": 2, "max_position_embeddings": 256, "pad_token_id": 2}
HEADS = SIZES | {"head_dim": 16}
GPT = WORDS | {"n_layer": 2, "n_head": 4, "n_embd": 64, "n_positions": 256}
EXPERTS = SIZES | {"num_local_experts": 4, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64,
                   "shared_expert_intermediate_size": 64}
LATENT = HEADS | {"q_lora_rank": 32, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 16,
                  "v_head_dim": 16, "n_routed_experts": 4, "n_group": 2, "topk_group": 1, "num_experts_per_tok": 2,
                  "moe_intermediate_size": 64, "first_k_dense_replace": 1, "num_key_value_heads": 4, "head_dim": 8}
WINDOW = HEADS | {"sliding_window": 16}
STATES = WORDS | {"hidden_size": 64, "num_hidden_layers": 2, "state_size": 8}
MAMBA = HEADS | {"mamba_n_heads": 8, "mamba_d_head": 16, "mamba_n_groups": 1, "mamba_d_state": 8}
VISION = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2,
          "image_size": 28, "patch_size": 14}
KINDS = {
    "gpt2": GPT, "gptj": GPT | {"rotary_dim": 8}, "gpt_bigcode": GPT, "codegen": GPT | {"rotary_dim": 8},
    "ctrl": GPT | {"dff": 128}, "openai-gpt": GPT, "gpt_neox": SIZES, "opt": SIZES | {"ffn_dim": 128},
    "gpt_neo": WORDS | {"hidden_size": 64, "num_layers": 2, "num_heads": 4, "window_size": 16,
                "attention_types": [[["global", "local"], 1]], "max_position_embeddings": 256},
    "bloom": WORDS | {"hidden_size": 64, "n_layer": 2, "n_head": 4},
    "falcon": SIZES | {"multi_query": True, "new_decoder_architecture": False},
    "mpt": WORDS | {"d_model": 64, "n_heads": 4, "n_layers": 2, "max_seq_len": 256},
    "xglm": WORDS | {"d_model": 64, "ffn_dim": 128, "num_layers": 2, "attention_heads": 4},
    "llama": SIZES, "qwen2": SIZES, "qwen3": HEADS, "gemma": HEADS, "phi": SIZES, "phi3": SIZES, "stablelm": SIZES,
    "starcoder2": SIZES, "olmo": SIZES, "olmo2": SIZES, "cohere": SIZES, "granite": SIZES, "persimmon": SIZES,
    "biogpt": SIZES, "smollm3": SIZES, "nemotron": HEADS,
    "mistral": WINDOW, "gemma2": WINDOW, "gemma3_text": WINDOW, "cohere2": WINDOW,
    "gemma3": {"text_config": WINDOW, "vision_config": VISION},
    "mixtral": EXPERTS, "qwen2_moe": EXPERTS, "qwen3_moe": EXPERTS | {"head_dim": 16}, "olmoe": EXPERTS,
    "granitemoe": EXPERTS, "gpt_oss": WINDOW | EXPERTS | {"head_dim": 16}, "deepseek_v2": LATENT, "deepseek_v3": LATENT,
    "mamba": STATES, "falcon_mamba": STATES, "mamba2": STATES | {"head_dim": 16, "num_heads": 8, "n_groups": 1},
    "rwkv": WORDS | {"hidden_size": 64, "num_hidden_layers": 2, "context_length": 256},
    "jamba": EXPERTS | {"mamba_d_state": 8, "attn_layer_period": 2, "attn_layer_offset": 1, "use_mamba_kernels": False},
    "bamba": MAMBA | {"attn_layer_indices": [1]}, "lfm2": SIZES | {"layer_types": ["conv", "full_attention"]},
    "zamba2": MAMBA | {"num_hidden_layers": 4, "layers_block_type": ["mamba", "hybrid"] * 2, "n_mamba_heads": 8,
                       "mamba_ngroups": 1, "num_mem_blocks": 1, "mamba_headdim": 16},
    "qwen3_next": EXPERTS | {"head_dim": 16, "layer_types": ["linear_attention", "full_attention"],
                             "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 16,
                             "linear_value_head_dim": 16},
    "recurrent_gemma": HEADS | {"lru_width": 64, "attention_window_size": 16, "num_hidden_layers": 3}}
SPREAD = ("bloom", "deepseek_v3", "falcon", "gemma3", "gpt_oss", "lfm2", "mamba2", "mixtral")
MAYBE_SLOW = [pytest.param(kind, marks=[] if kind in SPREAD else pytest.mark.models) for kind in sorted(KINDS)]


@pytest.fixture
def saved(tmp_path):
    """A function that writes a tiny checkpoint, with a tokenizer of bytes, and gives its folder."""

    def write(kind: str) -> Path:
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **KINDS[kind])).save_pretrained(tmp_path)
        letters = sorted(pre_tokenizers.ByteLevel.alphabet())
        bytes_alone = Tokenizer(models.BPE({letter: number for number, letter in enumerate(letters)}, []))
        bytes_alone.pre_tokenizer, bytes_alone.decoder = pre_tokenizers.ByteLevel(), decoders.ByteLevel()
        PreTrainedTokenizerFast(tokenizer_object=bytes_alone).save_pretrained(tmp_path)
        return tmp_path

    return write


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", MAYBE_SLOW)
def test_an_architecture_is_measured_as_transformers_runs_it_or_refused_in_a_sentence(saved, kind):
    folder = saved(kind)
    plain = AutoModelForCausalLM.from_pretrained(folder).eval()
    for setting in CPU_SETTINGS:
        try:
            lm = qb.load(folder, setting)
        except (qb.AuditError, ValueError) as error:
            assert setting != "cpu-fp32" and 20 < len(str(error)) < 400, f"{setting}: {error}"
            continue
        with lm:
            if setting == "cpu-fp32":
                agrees_with(plain, lm)
            rows = [qb.generate(lm, max_new_tokens=NEW, repeats=1, progress=False, engine=engine)
                    for engine in ("eager", "graph")]
        for row in rows:  # the graph's text is held against eager's
            said = row.status == "unavailable" and 20 < len(row.reason) < 300
            assert row.status == "ok" or said, (setting, row.engine, row.reason)
        assert rows[0].status == "ok"


def agrees_with(plain: torch.nn.Module, lm: qb.LoadedModel) -> None:
    """The same text, the same perplexity as computed by hand, the same bytes in the cache."""
    how = lm.encode(qb.PROMPT) | {"min_new_tokens": NEW, "max_new_tokens": NEW, "do_sample": False}
    assert torch.equal(lm.model.generate(**how), plain.generate(**how))
    ids = torch.tensor([lm.tokenizer.encode(TEXT)])
    by_hand = plain(input_ids=ids, labels=ids).loss.exp().item()
    assert qb.quality(lm, text=TEXT, context=128, progress=False).perplexity == pytest.approx(by_hand, rel=1e-3)
    for tokens in (1, 8, 15, 16, 17, 40):  # windows are of 16
        out = plain(input_ids=ids[:, :tokens], use_cache=True)
        assert held_in(next(filter(None, map(out.get, CACHED_IN)), None)) == cache_bytes(lm.audit, tokens), tokens
