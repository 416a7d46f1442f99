"""Every CPU setting for real, on GPT-2's Conv1D and on Llama's Linear; the audit; bytes by hand."""

import gc
import json

import pytest
import torch
import transformers

import quantbench as qb
from quantbench import loaders
from quantbench.audit import audit, check
from quantbench.estimate import weights_estimate
from tests.conftest import CPU_SETTINGS

QUANTISED = {"cpu-int8": "Linear8bitLt", "cpu-int4": "Linear4bit", "cpu-int8-dynamic": "DynamicQuantizedLinear"}


@pytest.mark.parametrize("setting", CPU_SETTINGS)
def test_every_cpu_setting_loads_and_generates_on_conv1d_and_linear(tiny, setting):
    with qb.load(tiny, setting) as lm:
        row = qb.generate(lm, max_new_tokens=4, repeats=1, progress=False)
    assert (row.status, row.new_tokens, row.weights) == ("ok", 4, "random")
    assert row.audit["class"] == QUANTISED.get(setting)
    assert row.audit["quantised"] == 0 or row.audit["left"] == {}


@pytest.mark.parametrize("model, layers", [("distilgpt2", 24), ("gpt2", 48)])
@pytest.mark.parametrize("setting", ["cpu-int8", "cpu-int4"])
def test_gpt2_has_all_its_layers_quantised(model, layers, setting):
    with qb.load(model, setting, weights="random") as lm:
        assert lm.audit["quantised"] == layers
        assert lm.audit["class"] == QUANTISED[setting]
        assert lm.audit["left"] == {}


def test_dynamic_int8_takes_the_head_too():
    with qb.load("distilgpt2", "cpu-int8-dynamic", weights="random") as lm:
        assert lm.audit["quantised"] == 25


def test_bytes_agree_with_a_sum_by_hand():
    """distilgpt2, untied: 6 layers of 768, 50,257 words, 1,024 positions; the embedding is the head."""
    width, layers = 768, 6
    matrices = layers * 12 * width * width  # attention 3 + 1, MLP 4 + 4
    outputs = layers * (3 + 1 + 4 + 1) * width  # rows of those matrices: one bias, and in INT8 one scale, each
    rest = (50257 + 1024) * width + outputs + (2 * layers + 1) * 2 * width  # embeddings, biases, layer norms
    by_hand = {
        "cpu-fp32": 4 * (matrices + rest),
        "cpu-bf16": 2 * (matrices + rest),
        "cpu-int8": matrices + 4 * outputs + 2 * rest,
        "cpu-int4": matrices // 2 + 4 * matrices // 64 + 2 * rest,  # one float32 absmax per block of 64
    }
    codes = {"cpu-int4": 4 * 16 * 24}  # NF4's 16 code points, float32, one table a layer
    for setting, size in by_hand.items():
        with qb.load("distilgpt2", setting, weights="random") as lm:
            assert lm.weights_bytes == size + codes.get(setting, 0), setting


def test_a_model_left_unquantised_makes_load_raise(tiny, monkeypatch):
    monkeypatch.setattr(loaders, "quantisation_config", lambda setting: None)  # a library that silently skips it
    with pytest.raises(qb.AuditError, match="no module was quantised"):
        qb.load(tiny, "cpu-int8")


def test_a_model_half_quantised_is_named(tiny_gpt2):
    with qb.load(tiny_gpt2, "cpu-int4") as lm:
        block = lm.model.transformer.h[0].mlp
        block.c_fc = torch.nn.Linear(64, 256)
        with pytest.raises(qb.AuditError, match="7 modules were quantised, but 1 Linear were left"):
            check(audit(lm.model), lm.setting)


def test_greedy_text_of_cpu_fp32_is_plain_transformers(tiny):
    with qb.load(tiny, "cpu-fp32") as lm:
        inputs = lm.encode(qb.PROMPT)
        ours = lm.model.generate(**inputs, min_new_tokens=20, max_new_tokens=20, do_sample=False)
        plain = transformers.AutoModelForCausalLM.from_pretrained(loaders.checkpoint(loaders.find(tiny)))
        theirs = plain.generate(**inputs, min_new_tokens=20, max_new_tokens=20, do_sample=False)
    assert torch.equal(ours, theirs)


def test_linear_computes_what_conv1d_computed(tiny_gpt2):
    with qb.load(tiny_gpt2, "cpu-fp32") as lm:
        inputs = lm.encode(qb.PROMPT)
        before = lm.model(**inputs).logits
        loaders.conv1d_to_linear(lm.model)
        assert lm.audit["left"] == {"Conv1D": 8} and audit(lm.model)["left"] == {"Linear": 8}
        assert torch.allclose(lm.model(**inputs).logits, before, atol=1e-5)


def test_smollm2_writes_sensible_english():
    pytest.importorskip("gguf")
    with qb.load("smollm2-135m", "cpu-fp32") as lm:
        assert lm.weights == "bundled"
        row = qb.generate(lm, "The capital of France is", 12, repeats=1, progress=False)
    assert "Paris" in row.text


def test_random_weights_are_the_same_every_time(tiny):
    with qb.load(tiny, "cpu-fp32") as one, qb.load(tiny, "cpu-fp32") as two:
        for a, b in zip(one.model.parameters(), two.model.parameters(), strict=True):
            assert torch.equal(a, b)


def test_the_prompt_of_the_published_experiment_has_12_tokens():
    with qb.load("distilgpt2", "cpu-fp32", weights="random") as lm:
        assert lm.encode(qb.PROMPT)["input_ids"].shape == (1, 12)
        assert lm.encode(qb.PROMPT, batch_size=3)["attention_mask"].shape == (3, 12)


def test_leaving_frees_the_model_and_says_so_if_it_cannot(tiny):
    with qb.load(tiny, "cpu-fp32") as lm:
        pass
    assert lm.model is None and "closed" in repr(lm)
    lm = qb.load(tiny, "cpu-fp32")
    kept = lm.model
    with pytest.warns(UserWarning, match="still holds its memory"):
        lm.close()
    del kept
    gc.collect()


def test_a_gpu_setting_without_a_gpu_is_a_reason_not_an_error(tiny):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    lm = qb.load(tiny, "gpu-fp16")
    assert (lm.status, lm.reason) == ("unavailable", "no NVIDIA GPU that this PyTorch can use")
    assert qb.generate(lm).status == "unavailable"


def test_mistakes_get_one_clear_error_before_any_work():
    with pytest.raises(ValueError, match="unknown setting 'gpu-int5'; did you mean .*'gpu-int4'"):
        qb.load("gpt2", "gpu-int5")
    with pytest.raises(ValueError, match="unknown model 'gtp2'; did you mean 'gpt2'"):
        qb.load("gtp2", "gpu-int4")
    with pytest.raises(ValueError, match="unknown weights"):
        qb.load("gpt2", "cpu-fp32", weights="best")


def test_out_of_memory_at_load_is_a_row(tmp_path):
    """An embedding of 144 petabytes: the estimate refuses it before anything is allocated."""
    (tmp_path / "config.json").write_text(json.dumps(
        {"model_type": "gpt2", "n_layer": 1, "n_head": 1, "n_embd": 8, "vocab_size": 2**52}))
    lm = qb.load(str(tmp_path), "cpu-fp32")
    assert lm.status == "out_of_memory" and "144,1" in lm.reason and "not tried" in lm.reason
    assert qb.generate(lm).status == "out_of_memory"


@pytest.mark.parametrize("setting", CPU_SETTINGS)
@pytest.mark.parametrize("model", ["distilgpt2", "smollm2-135m"])
def test_the_estimate_before_load_is_near_the_ledger_after_it(model, setting):
    with qb.load(model, setting) as lm:
        with torch.device("meta"):
            shapes = transformers.AutoModelForCausalLM.from_config(lm.model.config)
        assert weights_estimate(shapes, lm.setting) == pytest.approx(lm.weights_bytes, rel=0.02)


def test_the_kv_cache_is_estimated_to_the_byte(tiny):
    with qb.load(tiny, "cpu-fp32") as lm:
        out = lm.model(**lm.encode(qb.PROMPT, batch_size=3), use_cache=True)
        by_hand = sum(t.nbytes for layer in out.past_key_values.layers for t in (layer.keys, layer.values))
        assert lm.audit["kv_bytes_per_token"] * 12 * 3 == by_hand


def test_what_a_decode_step_reads_leaves_out_tables_that_are_only_looked_up():
    """distilgpt2: the tied embedding is read whole as the head; positions are looked up. Dynamic INT8 copies the head."""
    width, words, positions = 768, 50257, 1024
    with qb.load("distilgpt2", "cpu-fp32", weights="random") as lm:
        assert lm.audit["embedding_bytes"] == 4 * (words + positions) * width
        assert lm.audit["step_bytes"] == lm.weights_bytes - 4 * positions * width
        assert lm.audit["kv_bytes_per_token"] == 2 * 6 * width * 4
    with qb.load("distilgpt2", "cpu-int4", weights="random") as lm:
        assert lm.audit["embedding_bytes"] == 2 * (words + positions) * width
    with qb.load("distilgpt2", "cpu-int8-dynamic", weights="random") as lm:
        assert lm.audit["step_bytes"] == lm.weights_bytes - 4 * (words + positions) * width
