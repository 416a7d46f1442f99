"""The engines' text against eager's, with the capture left out and with it, and their refusals."""

import json
import weakref

import pytest
import torch

import quantbench as qb
from quantbench import machine
from quantbench.decode import Eager, find_engine
from quantbench.engines.agreement import difference
from quantbench.engines.captured import Graph

T4 = {"gpu": "Tesla T4", "gpu_capability": [7, 5]}
H200 = {"gpu": "NVIDIA H200", "gpu_capability": [9, 0]}


def eager(lm, inputs, tokens):
    return Eager(lm, inputs, tokens)(tokens)


def read(lm, ids):
    with torch.no_grad():
        return lm.model(input_ids=ids).logits


@pytest.mark.parametrize("stop", [lambda first: first, lambda first: [first, 3], lambda first: 50256, lambda first: []])
def test_stop_tokens_are_suppressed_as_min_new_tokens_does(tiny_gpt2, stop):
    with qb.load(tiny_gpt2, "cpu-fp32") as lm:
        inputs = lm.encode(qb.PROMPT)
        lm.model.generation_config.eos_token_id = stop(int(eager(lm, inputs, 1)[0, -1]))
        graph = Graph(lm, inputs, 20)
        assert torch.equal(graph(20), eager(lm, inputs, 20))
        del graph


def test_a_wrong_token_is_told_from_a_near_tie(tiny_gpt2):
    with qb.load(tiny_gpt2, "cpu-fp32") as lm:
        inputs = lm.encode(qb.PROMPT)
        right, start = eager(lm, inputs, 12), inputs["input_ids"].shape[1]
        assert difference(lm, right, right, start) == (None, False)
        wrong = right.clone()
        wrong[0, start + 4] = int(read(lm, right)[0, start + 3].argmin())
        reason, is_wrong = difference(lm, wrong, right, start)
        assert is_wrong and "from token 5 on" in reason and not lm.model.get_input_embeddings()._forward_hooks
        with torch.no_grad():  # two words alike: a tie that may fall either way
            lm.model.lm_head.weight[7] = lm.model.lm_head.weight[int(right[0, start])]
        tied = right.clone()
        tied[0, start] = 7
        follow = eager(lm, {"input_ids": tied[:, :start + 1], "attention_mask": torch.ones_like(tied[:, :start + 1])}, 11)
        reason, is_wrong = difference(lm, follow, eager(lm, inputs, 12), start)
        assert reason is None or not is_wrong


@pytest.mark.parametrize("engine, setting, facts, reason", [
    ("eager", "gpu-int8", T4, None),
    ("graph", "gpu-fp16", T4, None),
    ("graph", "gpu-int4", T4, None),
    ("graph", "gpu-int8-nosplit", H200, None),
    ("graph", "gpu-int8", H200, "outlier split decides"),
    ("graph", "cpu-int8", H200, "outlier split decides"),
    ("compile", "cpu-fp32", H200, "needs an NVIDIA GPU"),
    ("compile", "gpu-fp16", H200, None),
    ("compile", "gpu-fp16", T4, "Triton does not support compute capability 7.5"),
])
def test_an_engine_that_cannot_run_says_why(tiny_gpt2, monkeypatch, engine, setting, facts, reason):
    monkeypatch.setattr(machine, "facts", lambda: facts)
    with qb.load(tiny_gpt2, "cpu-fp32") as lm:
        lm.setting, lm.way = qb.SETTINGS[setting], qb.QUANTISERS[qb.SETTINGS[setting].quantisation]
        lm.device = lm.setting.device
        said = find_engine(engine).why_not(lm)
        lm.device = "cpu"
    assert said is reason if reason is None else reason in said


def test_a_refused_engine_is_a_row(tiny):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with qb.load(tiny, "cpu-fp32") as lm:
        row = qb.generate(lm, max_new_tokens=2, engine="compile")
    assert (row.status, row.engine) == ("unavailable", "compile") and "GPU" in row.reason


@pytest.mark.parametrize("setting", ["cpu-fp32", "cpu-bf16", "cpu-int4", "cpu-int8-dynamic"])
@pytest.mark.parametrize("batch", [1, 3])
def test_a_traced_step_gives_eagers_tokens_at_every_length_and_leaves_nothing(tiny, setting, batch):
    with qb.load(tiny, setting) as lm:
        graph = Graph(lm, lm.encode(qb.PROMPT, batch), 40)
        for tokens in (40, 1, 17, 40):
            reason, wrong = graph.differs(graph(tokens))
            assert not wrong, reason
        del graph
        alive = weakref.ref(lm.model)
    assert alive() is None


def test_a_step_that_cannot_be_captured_is_a_row(tiny):
    def refuse(*_: object) -> None:
        if torch.jit.is_tracing():
            raise RuntimeError("Cannot copy between CPU and CUDA tensors")

    with qb.load(tiny, "cpu-fp32") as lm:
        lm.model.register_forward_pre_hook(refuse)
        row = qb.generate(lm, max_new_tokens=4, engine="graph", progress=False)
    assert (row.status, row.reason) == (
        "unavailable", "its step cannot be captured: Cannot copy between CPU and CUDA tensors")


def test_an_engine_with_a_wrong_text_is_a_failed_row_that_keeps_its_samples(tiny, monkeypatch):
    plain = Graph.__call__
    monkeypatch.setattr(Graph, "__call__", lambda graph, new: plain(graph, new).index_fill(1, torch.tensor([12]), 7))
    with qb.load(tiny, "cpu-fp32") as lm:
        row = qb.generate(lm, max_new_tokens=8, repeats=2, engine="graph", progress=False)
    assert row.status == "failed" and "differs from eager from token 1 on" in row.reason and len(row.latencies_s) == 2


gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here: nothing was captured")


@gpu
@pytest.mark.parametrize("setting", ["gpu-fp32", "gpu-fp16", "gpu-bf16", "gpu-int4", "gpu-int4-fp4", "gpu-int4-dq",
                                     "gpu-int8-nosplit"])
def test_a_captured_graph_gives_eagers_tokens(tiny, setting):
    with qb.load(tiny, setting) as lm:
        row = qb.generate(lm, max_new_tokens=40, repeats=2, engine="graph", progress=False)
    assert row.status == "ok" and row.new_tokens == 40, row.reason


@gpu
@pytest.mark.parametrize("setting", ["gpu-fp16", "gpu-int4"])
def test_the_compiled_engine_runs(setting):
    with qb.load("distilgpt2", setting, weights="random") as lm:
        row = qb.generate(lm, max_new_tokens=40, repeats=2, engine="compile", progress=False)
    assert row.status == "ok", row.reason


FULL = {"num_key_value_heads": 2, "intermediate_size": 128, "eos_token_id": [1, 9999]}
ARCHITECTURES = {  # model_type (and what sets it apart) -> its configuration, and why it is not captured, if it is not
    "mistral": ({**FULL, "sliding_window": None}, None), "qwen3": ({**FULL, "head_dim": 16}, None),
    "gpt_neox": ({"intermediate_size": 128, "eos_token_id": []}, None),
    "opt": ({"ffn_dim": 128, "word_embed_proj_dim": 64}, None),
    "falcon": ({"multi_query": True, "eos_token_id": -1}, None),
    "falcon with alibi": ({"multi_query": True, "alibi": True}, "cannot run it with a static cache"),
    "mistral with windows": ({**FULL, "sliding_window": 8}, "StaticSlidingWindowLayer"),
    "gemma3_text": ({**FULL, "head_dim": 16, "sliding_window": 8}, "StaticSlidingWindowLayer"),
    "mamba": ({"state_size": 8}, "no static cache for MambaForCausalLM"),
    "lfm2": ({**FULL, "layer_types": ["conv", "full_attention"]}, "LinearAttentionLayer"),
    "jamba": ({**FULL, "num_experts": 2, "attn_layer_period": 2, "attn_layer_offset": 1, "use_mamba_kernels": False},
              "LinearAttentionLayer")}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_an_architecture_has_eagers_text_or_is_refused_in_a_sentence(tmp_path, name):
    more, refused = ARCHITECTURES[name]
    config = {"model_type": name.split()[0], "vocab_size": 512, "hidden_size": 64, "num_hidden_layers": 2,
              "num_attention_heads": 4, "max_position_embeddings": 64, "eos_token_id": 1, "pad_token_id": 2}
    (tmp_path / "config.json").write_text(json.dumps(config | more))
    with qb.load(tmp_path, "cpu-fp32") as lm:
        row = qb.generate(lm, batch_size=2, max_new_tokens=24, repeats=1, engine="graph", progress=False)
        if refused:
            assert row.status == "unavailable" and refused in row.reason
            assert qb.generate(lm, max_new_tokens=8, repeats=1, progress=False).status == "ok"
        else:  # held against eager's when the row was made
            assert (row.status, row.reason, row.new_tokens) == ("ok", None, 24) and row.prepare_s > 0
