"""The engines' control flow on the CPU, where only the capture is left out, and their refusals."""

import weakref

import pytest
import torch

import quantbench as qb
from quantbench.engines import _nudged, _read, difference, refusal
from quantbench.fuse import fused
from quantbench.graph import Graph, capture

T4 = {"gpu": "Tesla T4", "gpu_capability": [7, 5]}
H200 = {"gpu": "NVIDIA H200", "gpu_capability": [9, 0]}


def at_once(graph, work):
    """In place of the capture: the work itself."""
    return work


def eager(lm, prompt, tokens):
    return lm.model.generate(input_ids=prompt, attention_mask=torch.ones_like(prompt), min_new_tokens=tokens,
                             max_new_tokens=tokens, do_sample=False)


@pytest.mark.parametrize("setting", ["cpu-fp32", "cpu-int4"])
@pytest.mark.parametrize("batch", [1, 3])
def test_the_graphs_step_gives_eagers_tokens_at_every_length_and_again(tiny, setting, batch):
    with qb.load(tiny, setting) as lm:
        prompt = lm.encode(qb.PROMPT, batch)["input_ids"]
        graph = Graph(lm, prompt, 40, at_once)
        for tokens in (40, 1, 17, 40):
            assert torch.equal(graph(tokens), eager(lm, prompt, tokens))
        del graph


def test_a_stop_token_is_suppressed_as_min_new_tokens_does(tiny_gpt2):
    with qb.load(tiny_gpt2, "cpu-fp32") as lm:
        prompt = lm.encode(qb.PROMPT)["input_ids"]
        lm.model.generation_config.eos_token_id = int(eager(lm, prompt, 1)[0, -1])
        graph = Graph(lm, prompt, 20, at_once)
        assert torch.equal(graph(20), eager(lm, prompt, 20))
        del graph


def test_the_model_is_as_it_was_after_fusing(tiny):
    with qb.load(tiny, "cpu-fp32") as lm:
        before = [type(module) for module in lm.model.modules()]
        logits = lm.model(**lm.encode(qb.PROMPT)).logits
        with fused(lm.model):
            assert [type(module) for module in lm.model.modules()] != before
            assert torch.allclose(lm.model(**lm.encode(qb.PROMPT)).logits, logits, atol=1e-5)
        assert [type(module) for module in lm.model.modules()] == before


def test_a_nudge_moves_what_rounds_more_by_more_and_leaves_no_hook(tiny):
    moved = {}
    for setting in ("cpu-fp32", "cpu-bf16"):
        with qb.load(tiny, setting) as lm:
            ids = lm.encode("one two three four five six")["input_ids"]
            moved[setting] = _nudged(lm, ids, 3, _read(lm, ids, 3))
            assert torch.equal(_read(lm, ids, 3), _read(lm, ids, 3))
    assert 0 <= moved["cpu-fp32"] < 1e-4 < moved["cpu-bf16"] < 0.5


def test_a_wrong_token_is_told_from_a_near_tie(tiny_gpt2):
    with qb.load(tiny_gpt2, "cpu-fp32") as lm:
        prompt = lm.encode(qb.PROMPT)["input_ids"]
        right, start = eager(lm, prompt, 12), prompt.shape[1]
        assert difference(lm, right, right, start) == (None, False)
        wrong = right.clone()
        wrong[0, start + 4] = int(lm.model(input_ids=right).logits[0, start + 3].argmin())
        reason, is_wrong = difference(lm, wrong, right, start)
        assert is_wrong and "from token 5 on" in reason
        with torch.no_grad():  # two words alike: a tie that may fall either way
            lm.model.lm_head.weight[7] = lm.model.lm_head.weight[int(right[0, start])]
        tied = right.clone()
        tied[0, start] = 7
        follow = eager(lm, tied[:, :start + 1], 11)
        reason, is_wrong = difference(lm, follow, eager(lm, prompt, 12), start)
        assert reason is None or not is_wrong


@pytest.mark.parametrize("engine, setting, facts, reason", [
    ("eager", "gpu-int8", T4, None),
    ("graph", "gpu-fp16", T4, None),
    ("graph", "gpu-int4", T4, None),
    ("graph", "gpu-int8-nosplit", H200, None),
    ("graph", "gpu-int8", H200, "outlier split decides"),
    ("graph", "cpu-fp32", H200, None),
    ("graph", "cpu-int8", H200, "outlier split decides"),
    ("compile", "cpu-fp32", H200, "needs an NVIDIA GPU"),
    ("compile", "gpu-fp16", H200, None),
    ("compile", "gpu-fp16", T4, "Triton does not support compute capability 7.5"),
    ("compile", "gpu-int4", H200, "does not compile bitsandbytes"),
])
def test_an_engine_that_cannot_run_says_why(tiny_gpt2, engine, setting, facts, reason):
    with qb.load(tiny_gpt2, "cpu-fp32") as lm:
        lm.setting = qb.SETTINGS[setting]
        lm.device = lm.setting.device
        said = refusal(lm, engine, facts)
        lm.device = "cpu"
    assert said is reason if reason is None else reason in said


def test_a_refused_engine_is_a_row(tiny):
    with qb.load(tiny, "cpu-fp32") as lm:
        row = qb.generate(lm, max_new_tokens=2, engine="compile")
    assert (row.status, row.engine) == ("unavailable", "compile") and "GPU" in row.reason


@pytest.mark.parametrize("setting", ["cpu-fp32", "cpu-bf16", "cpu-int4", "cpu-int8-dynamic"])
@pytest.mark.parametrize("batch", [1, 3])
def test_a_traced_step_gives_eagers_tokens_at_every_length_and_leaves_nothing(tiny, setting, batch):
    with qb.load(tiny, setting) as lm:
        prompt = lm.encode(qb.PROMPT, batch)["input_ids"]
        graph = Graph(lm, prompt, 40, capture)
        for tokens in (40, 1, 17, 40):
            ours, start = graph(tokens), prompt.shape[1]
            assert not difference(lm, ours, eager(lm, prompt, tokens), start)[1]
        row = qb.generate(lm, batch_size=batch, max_new_tokens=40, repeats=2, engine="graph", progress=False)
        assert row.status == "ok" and row.new_tokens == 40, row.reason
        del graph, row
        alive = weakref.ref(lm.model)
    assert alive() is None


gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here: nothing was captured")


@gpu
@pytest.mark.parametrize("setting", ["gpu-fp32", "gpu-fp16", "gpu-bf16", "gpu-int4", "gpu-int4-fp4", "gpu-int4-dq",
                                     "gpu-int8-nosplit"])
def test_a_captured_graph_gives_eagers_tokens(tiny, setting):
    with qb.load(tiny, setting) as lm:
        row = qb.generate(lm, max_new_tokens=40, repeats=2, engine="graph", progress=False)
    assert row.status == "ok" and row.new_tokens == 40, row.reason


@gpu
def test_the_compiled_engine_runs():
    with qb.load("distilgpt2", "gpu-fp16", weights="random") as lm:
        row = qb.generate(lm, max_new_tokens=40, repeats=2, engine="compile", progress=False)
    assert row.status == "ok", row.reason
