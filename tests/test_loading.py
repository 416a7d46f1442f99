"""Every CPU setting for real, on GPT-2's Conv1D and on Llama's Linear; the audit; bytes by hand; what is refused."""

import json
import shutil
import time
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import quantbench as qb
from quantbench import inspection, weights
from quantbench.inspection import audit, check, load_estimate, weights_estimate
from quantbench.loading import conv1d_to_linear
from quantbench.weights import find
from tests.conftest import CPU_SETTINGS, TINY

QUANTISED = {"cpu-int8": "Linear8bitLt", "cpu-int4": "Linear4bit", "cpu-int8-dynamic": "DynamicQuantizedLinear"}
LLAMA = {"vocab_size": 512, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
         "num_key_value_heads": 2, "max_position_embeddings": 256, "bos_token_id": 0, "eos_token_id": 1}


@pytest.fixture
def saved(tmp_path):
    """A function that writes a tiny checkpoint of an architecture, with weights, and gives its folder."""

    def write(kind: str = "llama", **config: object) -> Path:
        config = transformers.AutoConfig.for_model(kind, **LLAMA | config)
        transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / kind)
        return tmp_path / kind

    return write


def measured(model: object, setting: str = "cpu-fp32", **how: object) -> qb.Measurement:
    with qb.load(model, setting) as lm:
        return qb.generate(lm, max_new_tokens=4, repeats=1, progress=False, **how)


@pytest.mark.parametrize("setting", CPU_SETTINGS)
def test_every_cpu_setting_loads_and_generates_on_conv1d_and_linear(tiny, setting):
    row = measured(tiny, setting)
    assert (row.status, row.new_tokens, row.weights) == ("ok", 4, "random")
    assert row.audit["class"] == QUANTISED.get(setting) and row.audit["kept"] == {}
    assert row.audit["quantised"] == 0 or row.audit["left"] == {}
    assert row.audit["quantiser"] == qb.SETTINGS[setting].quantisation


@pytest.mark.parametrize("setting, layers", [("cpu-int8", 48), ("cpu-int4", 48), ("cpu-int8-dynamic", 49)])
def test_gpt2_has_all_its_layers_quantised(setting, layers):
    with qb.load("gpt2", setting, weights="random") as lm:
        assert (lm.audit["quantised"], lm.audit["class"], lm.audit["left"]) == (layers, QUANTISED[setting], {})


def test_bytes_agree_with_a_sum_by_hand():
    """distilgpt2: 6 layers of 768, 50,257 words, 1,024 positions. The tied embedding is read whole as the head, positions
    are looked up; dynamic INT8 copies the head."""
    width, layers, words, positions = 768, 6, 50257, 1024
    matrices = layers * 12 * width * width  # attention 3 + 1, MLP 4 + 4
    outputs = layers * (3 + 1 + 4 + 1) * width  # rows of those matrices: one bias, and in INT8 one scale, each
    tables = (words + positions) * width
    rest = tables + outputs + (2 * layers + 1) * 2 * width  # embeddings, biases, layer norms
    codes = 4 * 16 * 24  # NF4's 16 code points, float32, one table a layer
    by_hand = {
        "cpu-fp32": (4 * (matrices + rest), 4 * tables, 4 * positions * width),
        "cpu-bf16": (2 * (matrices + rest), 2 * tables, 2 * positions * width),
        "cpu-int8": (matrices + 4 * outputs + 2 * rest, 2 * tables, 2 * positions * width),
        "cpu-int4": (matrices // 2 + 4 * matrices // 64 + 2 * rest + codes, 2 * tables, 2 * positions * width),
        "cpu-int8-dynamic": (matrices + 16 * outputs + 4 * rest + (1 + 16 / width) * words * width, 4 * tables, 4 * tables)}
    for setting, (size, embedding, unread) in by_hand.items():
        with qb.load("distilgpt2", setting, weights="random") as lm:
            assert lm.weights_bytes == size, setting
            assert lm.audit["embedding_bytes"] == embedding and lm.audit["step_bytes"] == size - unread, setting
            assert lm.audit["step_products"] == matrices + words * width and sum(lm.audit["bytes"].values()) == size
            assert lm.audit["kv_bytes_per_token"] == 2 * layers * width * lm.model.dtype.itemsize


@pytest.mark.parametrize("setting", CPU_SETTINGS)
@pytest.mark.parametrize("model", ["distilgpt2", "smollm2-135m"])
def test_the_estimate_before_load_is_near_the_ledger_after_it(model, setting):
    with qb.load(model, setting) as lm:
        estimate = weights_estimate(inspection.on_meta(lm.model.config), lm.setting)
        assert estimate == pytest.approx(lm.weights_bytes, rel=0.02)


# ---- the audit ----

def test_a_model_left_unquantised_makes_load_raise(tiny, monkeypatch):
    monkeypatch.setattr(qb.QUANTISERS["bnb-int8"], "config", lambda setting: None)  # a library that silently skips it
    with pytest.raises(qb.AuditError, match="no module was quantised"):
        qb.load(tiny, "cpu-int8")


def test_a_model_half_quantised_or_otherwise_quantised_is_named(tiny_gpt2):
    with qb.load(tiny_gpt2, "cpu-int4") as lm:
        for other, message in (("gpu-int4-fp4", "as bnb-nf4, not as bnb-fp4"), ("cpu-bf16", "8 modules are quantised"),
                               ("gpu-int4-dq", "double is False in the model, and True in the setting"),
                               ("cpu-int8", "as bnb-nf4, not as bnb-int8")):
            with pytest.raises(qb.AuditError, match=message):
                check(lm.audit, qb.SETTINGS[other])
        lm.model.transformer.h[0].mlp.c_fc = torch.nn.Linear(64, 256)
        with pytest.raises(qb.AuditError, match="7 modules were quantised, but 1 Linear were left"):
            check(audit(lm.model), lm.setting)
    with qb.load(tiny_gpt2, "cpu-int8") as lm:
        with pytest.raises(qb.AuditError, match="threshold is 6.0 in the model, and 0.0 in the setting"):
            check(lm.audit, qb.SETTINGS["gpu-int8-nosplit"])


OWN = {"cpu-int8": {"load_in_8bit": True, "llm_int8_threshold": 4.0},
       "cpu-int4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}}


@pytest.mark.parametrize("setting", OWN)
def test_a_checkpoint_that_is_quantised_itself_is_measured_as_stored_or_refused(saved, tmp_path, setting):
    how = transformers.BitsAndBytesConfig(**OWN[setting])
    transformers.AutoModelForCausalLM.from_pretrained(saved(), device_map={"": "cpu"}, quantization_config=how
                                                      ).save_pretrained(tmp_path / "own")
    for other in ("cpu-fp32", "cpu-int8", "cpu-int4"):
        with pytest.raises(ValueError, match="itself is quantised .bitsandbytes, . bits.*ask for cpu-stored"):
            qb.load(tmp_path / "own", other)
    stored = measured(tmp_path / "own", "cpu-stored").audit
    promised = {"threshold": 4.0} if setting == "cpu-int8" else {"double": True, "block": 64}
    assert stored["quantised"] == 14 and stored["details"].items() >= promised.items()
    with qb.load(tmp_path / "own", setting, weights="random") as lm:
        assert lm.weights == "random" and lm.audit["quantiser"] == qb.SETTINGS[setting].quantisation


@pytest.mark.parametrize("method, package", [
    ("gptq", "optimum"), ("awq", "gptqmodel"), ("compressed-tensors", "compressed-tensors"), ("torchao", "torchao")])
def test_as_stored_is_unavailable_without_the_package_and_refused_without_quantisation(saved, method, package):
    folder = saved()
    with pytest.raises(ValueError, match="is not quantised itself"):
        qb.load(folder, "cpu-stored")
    own = {"quant_method": method, "bits": 4, "group_size": 32, "config_groups": {}, "quant_type": "int8_weight_only"}
    config = json.loads((folder / "config.json").read_text()) | {"quantization_config": own}
    (folder / "config.json").write_text(json.dumps(config))
    row = measured(folder, "cpu-stored")
    assert row.status == "unavailable" and method in row.reason and package in row.reason


class Codes(torch.nn.Module):
    """A layer of a library that nobody here knows."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.register_buffer("qweight", torch.zeros(8, 64).to(dtype))


@pytest.mark.parametrize("dtype", [torch.int32, torch.uint8, torch.float8_e4m3fn])
def test_what_no_entry_knows_is_still_seen_to_be_quantised(tiny_llama, dtype):
    with qb.load(tiny_llama, "cpu-fp32") as lm:
        lm.model.model.layers[0].mlp.up_proj = Codes(dtype)
        found = audit(lm.model)
        assert (found["quantiser"], found["class"], found["storage_dtype"]) == ("stored", "Codes", str(dtype)[6:])
        with pytest.raises(qb.AuditError, match="1 modules are quantised"):
            check(found, lm.setting)


def renamed(change):
    """An edit of a checkpoint's weights: each by its new name, or left out."""
    return lambda folder, weights: {new: one for name, one in weights.items() if (new := change(name))}


def told(**values):
    """An edit of a checkpoint's configuration alone."""
    def edit(folder, weights):
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | values))
        return weights
    return edit


@pytest.mark.parametrize("edit, message", [
    (renamed(lambda name: "_orig_mod." + name), "21 weights are not in the .* lm_head.*it has _orig_mod"),
    (renamed(lambda name: None if "layers.1.mlp" in name else name), "3 weights are not in the .* model.layers.1.mlp"),
    (renamed(lambda name: None if "lm_head" in name else name), "1 weights are not in the .* such as lm_head.weight"),
    (renamed(lambda name: name.removeprefix("model.") if "lm_head" not in name else None), "such as lm_head.weight"),
    (told(num_hidden_layers=1), "9 weights are not in the model, such as model.layers.1"),
    (told(intermediate_size=64), "6 weights are of another shape than the model's, such as model.layers.0.mlp"),
    (lambda folder, weights: weights | {"model.layers.0.mlp.up_proj.bias": torch.ones(128)}, "not in the model"),
    (told(tie_word_embeddings=True), None),
    (lambda folder, weights: weights | {"v_head.summary.weight": torch.ones(1, 64)}, None),
    (lambda folder, weights: weights | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)}, None)])
def test_weights_that_transformers_would_make_up_or_drop_are_named(saved, edit, message):
    file = saved() / "model.safetensors"
    save_file(edit(file.parent, load_file(file)), file, {"format": "pt"})
    if message is None:
        assert measured(file.parent).status == "ok"
    else:
        with pytest.raises(ValueError, match=message):
            qb.load(file.parent, "cpu-fp32")


def test_a_mixture_of_experts_reads_what_a_token_uses_and_says_what_stays_unquantised(saved):
    folder = saved("mixtral", num_local_experts=4)
    row, unread = measured(folder), 2 * 3 * 64 * 128 * 4 // 2  # layers, matrices of 2 of the 4 experts
    assert row.status == "ok" and row.weights_bytes - row.audit["step_bytes"] == 4 * (2 * unread // 2 + 512 * 64)
    assert sum(row.audit["kept"].values()) >= 2
    try:
        assert measured(folder, "cpu-int4").audit["kept"]
    except qb.AuditError as error:
        assert "xperts" in str(error)


# ---- what is loaded ----

def test_greedy_text_of_cpu_fp32_is_plain_transformers_and_random_weights_are_the_same_every_time(tiny):
    with qb.load(tiny, "cpu-fp32") as lm:
        assert lm.encode(qb.PROMPT, batch_size=3)["attention_mask"].shape == (3, 12)  # as the published experiment counted
        how = {**lm.encode(qb.PROMPT), "min_new_tokens": 20, "max_new_tokens": 20, "do_sample": False}
        plain = transformers.AutoModelForCausalLM.from_pretrained(weights.checkpoint(find(tiny)))
        assert torch.equal(lm.model.generate(**how), plain.generate(**how))


def test_linear_computes_what_conv1d_computed(tiny_gpt2):
    with qb.load(tiny_gpt2, "cpu-fp32") as lm:
        inputs = lm.encode(qb.PROMPT)
        before = lm.model(**inputs).logits
        conv1d_to_linear(lm.model)
        assert lm.audit["left"] == {"Conv1D": 8} and audit(lm.model)["left"] == {"Linear": 8}
        assert torch.allclose(lm.model(**inputs).logits, before, atol=1e-5)


def test_smollm2_writes_sensible_english():
    pytest.importorskip("gguf")
    with qb.load("smollm2-135m", "cpu-fp32") as lm:
        assert lm.weights == "bundled"
        row = qb.generate(lm, "The capital of France is", 12, repeats=1, progress=False)
    assert "Paris" in row.text


def test_equal_architectures_with_other_tokenizers_do_not_share_a_checkpoint(tiny_llama, tmp_path, monkeypatch):
    monkeypatch.setenv("QUANTBENCH_CACHE", str(tmp_path / "cache"))
    for name in "ab":
        shutil.copytree(tiny_llama, tmp_path / name / "same")
        (tmp_path / name / "same" / "tokenizer_config.json").write_text(json.dumps({"bos_token": name}))
    made = [weights.checkpoint(find(str(tmp_path / name / "same"))) for name in "ab"]
    assert made[0] != made[1] and '"b"' in (made[1] / "tokenizer_config.json").read_text()


def test_leaving_frees_the_model_and_says_so_if_it_cannot(tiny):
    with qb.load(tiny, "cpu-fp32") as lm:
        pass
    assert lm.model is None and "closed" in repr(lm)
    lm = qb.load(tiny, "cpu-fp32")
    kept = lm.model
    with pytest.warns(UserWarning, match="still holds its memory"):
        lm.close()
    del kept


# ---- what cannot be loaded ----

@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_setting_without_a_gpu_is_a_reason_not_an_error(tiny):
    lm = qb.load(tiny, "gpu-fp16")
    assert (lm.status, lm.reason) == ("unavailable", "no NVIDIA GPU that this PyTorch can use")
    assert qb.generate(lm).status == "unavailable"


@pytest.mark.parametrize("model, setting, weights, message", [
    ("gpt2", "gpu-int5", None, "unknown setting 'gpu-int5'; did you mean .*'gpu-int4'"),
    ("gtp2", "gpu-int4", None, "unknown model 'gtp2'; did you mean 'gpt2'"),
    ("gpt2", "cpu-fp32", "best", "unknown weights")])
def test_mistakes_get_one_clear_error_before_any_work(model, setting, weights, message):
    with pytest.raises(ValueError, match=message):
        qb.load(model, setting, weights=weights)


@pytest.mark.parametrize("mistake", [{"lm": "gpt2"}, {"lm": None}, {"engine": ["eager"]}, {"cache": []}])
def test_a_mistake_in_what_is_generated_is_a_sentence(tiny_gpt2, mistake):
    with qb.load(tiny_gpt2, "cpu-fp32") as lm, pytest.raises(ValueError, match="qb.load returns|unknown"):
        qb.generate(**{"lm": lm, "max_new_tokens": 2, "progress": False} | mistake)


@pytest.mark.parametrize("field, value", [
    ("activation_function", "none-such"), ("n_head", 0), ("vocab_size", -1), ("n_embd", 0)])
def test_whatever_a_models_code_raises_while_it_is_loaded_is_a_sentence(tmp_path, field, value):
    (tmp_path / "config.json").write_text(json.dumps(TINY["gpt2"] | {field: value}))
    with pytest.raises(ValueError, match="does not load: [A-Z]"):
        qb.load(tmp_path, "cpu-fp32")


def test_a_config_that_asks_for_tuples_is_no_fault(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(TINY["gpt2"] | {"return_dict": False}))
    with qb.load(tmp_path, "cpu-fp32") as lm:
        assert qb.generate(lm, max_new_tokens=2, repeats=1, progress=False).status == "ok"


def test_out_of_memory_at_load_is_a_row(tmp_path):
    """An embedding of 144 petabytes: the estimate refuses it before anything is allocated."""
    (tmp_path / "config.json").write_text(json.dumps(
        {"model_type": "gpt2", "n_layer": 1, "n_head": 1, "n_embd": 8, "vocab_size": 2**52}))
    lm = qb.load(tmp_path, "cpu-fp32")
    assert lm.status == "out_of_memory" and "144,1" in lm.reason and "not tried" in lm.reason
    assert qb.generate(lm).status == "out_of_memory"


def test_ten_thousand_layers_are_refused_and_a_hundred_and_fifty_counted(tmp_path):
    small, start = {"model_type": "qwen3", "hidden_size": 64, "head_dim": 16, "vocab_size": 500}, time.monotonic()
    few, many = (inspection.on_meta(transformers.AutoConfig.for_model(**small, num_hidden_layers=layers))
                 for layers in (3, 150))
    for setting in ("cpu-fp32", "cpu-int4"):
        row, outside = qb.SETTINGS[setting], 2 * 500 * 64 + 64  # embedding, head, last norm
        of_layers = [weights_estimate(one, row) - outside * (4 if setting == "cpu-fp32" else 2) for one in (few, many)]
        assert of_layers[1] == 50 * of_layers[0]
    of_cache = [inspection.cache_sizes(one, 2)["kv_bytes_per_token"] for one in (few, many)]
    assert of_cache[1] == 50 * of_cache[0] > 0
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", "num_hidden_layers": 10_000}))
    for ask in (lambda: qb.load(tmp_path, "cpu-fp32"), lambda: qb.fit(tmp_path)):
        with pytest.raises(ValueError, match="10,000 layers"):
            ask()
    assert time.monotonic() - start < 30


def test_what_is_quantised_after_it_was_loaded_is_there_unquantised_first():
    shapes = inspection.on_meta(transformers.AutoConfig.for_model(**qb.MODELS["gpt2"].config))
    most = {key: load_estimate(shapes, qb.SETTINGS[key]) for key in ("cpu-fp32", "cpu-int8-dynamic", "cpu-int4")}
    assert most["cpu-int8-dynamic"] == most["cpu-fp32"] > most["cpu-int4"]


# ---- tokenizers ----

@pytest.mark.parametrize("files, tokens", [
    ({}, 12), ({"tokenizer_config.json": {"bos_token": "x"}}, 12),  # a stand-in: a vocabulary is not there
    ({"tokenizer_config.json": {"tokenizer_class": "ByT5Tokenizer"}}, 48),
    ({"tokenizer.json": "{"}, "cannot be read"), ({"tokenizer.json": {"version": "1.0"}}, "cannot be read"),
    ({"vocab.txt": "[UNK]\n[CLS]\n[SEP]\n[PAD]\n[MASK]\nonce\n",
      "tokenizer_config.json": {"tokenizer_class": "BertTokenizer"}}, 14)])
def test_what_autotokenizer_reads_is_used_and_a_stand_in_only_where_there_is_none(saved, files, tokens):
    folder = saved()
    for name, content in files.items():
        (folder / name).write_text(content if isinstance(content, str) else json.dumps(content))
    if isinstance(tokens, str):
        with pytest.raises(ValueError, match=tokens):
            qb.load(folder, "cpu-fp32")
    else:
        row = measured(folder)
        assert row.prompt_tokens == tokens and ("no tokenizer" in row.revision) == (files == {})


def test_sentencepiece_alone_is_a_tokenizer(saved, tmp_path):
    pytest.importorskip("google.protobuf")
    import sentencepiece
    (tmp_path / "text").write_text((qb.PROMPT + "\n") * 50)
    folder = saved()
    sentencepiece.SentencePieceTrainer.train(input=str(tmp_path / "text"), model_prefix=str(folder / "tokenizer"),
                                             vocab_size=300, byte_fallback=True, model_type="bpe", minloglevel=2)
    assert measured(folder).text is not None


class Odd:
    vocab_size = 500

    def __init__(self, *ids: int) -> None:
        self.encode = lambda text: list(ids)


@pytest.mark.parametrize("tokenizer, message", [(Odd(), "makes no tokens of the prompt"),
                                                (Odd(1, 512), "makes token 512, and the model has 500 of the prompt")])
def test_a_prompt_without_tokens_or_with_another_models_is_one_sentence(tiny_llama, tokenizer, message):
    with qb.load(tiny_llama, "cpu-fp32") as lm:
        lm.tokenizer = tokenizer
        with pytest.raises(ValueError, match=message):
            qb.generate(lm, progress=False)


def test_code_in_a_checkpoint_never_runs_and_nobody_is_asked(saved, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("a question on standard input"))
    folder = saved()
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "other", "auto_map": {"AutoConfig": "other.C"}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "other.py").write_text("raise SystemExit('ran')\n")
    with pytest.raises(ValueError):
        qb.load(folder, "cpu-fp32")
