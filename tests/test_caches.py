"""The cache as an axis: the same text, bytes as computed by hand, at every depth; and where there is none, a sentence."""

import gc
import json
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, QuantizedCache
from transformers.utils import is_hqq_available

import quantbench as qb
from quantbench.decode import Eager, inputs_of, new_cache, stepwise_logits
from quantbench.inspection import held_in
from quantbench.settings import CACHES, Workload
from quantbench.sweeps.plan import plan
from quantbench.timing import Timed
from tests.conftest import TINY

QUANTISED = [name for name, bits in CACHES.items() if bits]
needs_hqq = pytest.mark.skipif(not is_hqq_available(), reason="needs hqq: pip install quantbench[cache]")
WAYS = ["default", "static", *(pytest.param(name, marks=needs_hqq) for name in QUANTISED)]
NEW, PROMPT = 6, 9  # tokens


@pytest.fixture
def lm(tiny):
    with qb.load(tiny, "cpu-fp32") as lm:
        yield lm


def measured(lm, cache: str, depth: int = 0, batch: int = 1, **how: object) -> qb.Measurement:
    return qb.generate(lm, max_new_tokens=NEW, prompt_tokens=PROMPT, depth=depth, batch_size=batch, cache=cache,
                       repeats=1, progress=False, **how)


def by_hand(lm, work: Workload) -> torch.Tensor:
    """A loop with a cache of its own: what is cached before, the prompt, then the best token, one by one."""
    ids = inputs_of(lm, work)["input_ids"]
    cache, parts = new_cache(work.cache, lm.model.config, 60), [ids[:, work.depth:]]
    with torch.no_grad():
        if work.depth:
            cache = lm.model(input_ids=ids[:, :work.depth], past_key_values=cache, use_cache=True).past_key_values
        for _ in range(work.max_new_tokens):
            out = lm.model(input_ids=parts[-1], past_key_values=cache, use_cache=True)
            cache, logits = out.past_key_values, out.logits[:, -1]
            logits[:, lm.model.generation_config.eos_token_id] = -torch.inf
            parts.append(logits.argmax(-1, keepdim=True))
    return torch.cat([ids[:, :work.depth], *parts], dim=1)


@pytest.mark.parametrize("cache", WAYS)
@pytest.mark.parametrize("depth, batch", [(0, 1), (0, 2), (16, 2)])
def test_every_sample_starts_from_the_same_cache_and_gives_the_text_of_a_loop_by_hand(lm, cache, depth, batch):
    work = Workload(max_new_tokens=NEW, prompt_tokens=PROMPT, depth=depth, batch_size=batch, cache=cache)
    cell, expected = Timed(lm, work), by_hand(lm, work)
    for _ in range(3):
        cell.sample()
        assert torch.equal(cell.output, expected)
    row = cell.measurement()
    assert (row.status, row.cache, row.depth) == ("ok", cache, depth)


def test_a_static_cache_gives_the_defaults_text_and_is_no_other_cell(lm):
    plain = Eager(lm, inputs_of(lm, Workload(max_new_tokens=NEW, prompt_tokens=PROMPT)), NEW)
    cell = Timed(lm, Workload(max_new_tokens=NEW, prompt_tokens=PROMPT, cache="static"))
    cell.sample()
    assert torch.equal(cell.output, plain(NEW))
    static, default = cell.measurement(), measured(lm, "default")
    assert static.key != default.key and static.cell == default.cell
    run = qb.Run([default, static])
    assert len(run) == 2 and "static cache" in repr(qb.show(run)) and "Cache: static" in repr(static)


@pytest.mark.parametrize("cache", WAYS)
@pytest.mark.parametrize("depth, batch", [(0, 1), (16, 2)])
def test_the_bytes_are_those_counted_by_hand(lm, cache, depth, batch):
    row, config = measured(lm, cache, depth, batch), lm.model.config
    heads = getattr(config, "num_key_value_heads", config.num_attention_heads)
    values = 2 * config.num_hidden_layers * heads * 16  # of a token: keys and values, 16 to a head
    whole, quantised = depth + PROMPT + NEW - 1, depth or PROMPT  # what is read first is quantised, no later token yet
    expected = 4 * values * whole
    if bits := CACHES[cache]:  # and a float32 scale and zero to every group, which is a head here
        expected = 4 * values * (whole - quantised) + (values * bits // 8 + values // 16 * 8) * quantised
    assert row.cache_bytes == batch * expected and row.cache_per_token == pytest.approx(expected / whole)
    if depth:
        assert qb.memory_table([row])["KV cache"].item() == row.cache_bytes / 1e6
        assert qb.prompt_table([row])["Cache (bytes/token)"].item() == row.cache_per_token


@pytest.mark.parametrize("cache", QUANTISED)
def test_an_engine_with_a_cache_of_its_own_takes_static_and_refuses_a_quantised_one(lm, cache):
    assert measured(lm, "static", depth=16, engine="graph").status == "ok"
    row = measured(lm, cache, engine="graph")
    assert (row.status, row.reason) == ("unavailable", f"the graph engine runs with no {cache} cache")


@pytest.mark.skipif(is_hqq_available(), reason="hqq is here")
def test_without_hqq_a_quantised_cache_is_a_row_that_names_it(lm):
    row = measured(lm, "quantized-4")
    assert (row.status, row.reason) == ("unavailable", "a quantised cache needs hqq: pip install quantbench[cache]")


@pytest.mark.parametrize("kind, refused", [("mamba", {"static", *QUANTISED}), ("mistral", {*QUANTISED})])
def test_a_model_that_has_no_such_cache_says_so(tmp_path, kind, refused):
    sizes = TINY["llama"] | {"model_type": kind, "sliding_window": 8, "state_size": 8, "head_dim": 16}
    (tmp_path / "config.json").write_text(json.dumps(sizes))
    with qb.load(tmp_path, "cpu-fp32") as lm:
        rows = {name: measured(lm, name) for name in CACHES}
        deep = measured(lm, "default", depth=8)
    assert {name for name, row in rows.items() if row.status == "unavailable"} == refused
    assert all(20 < len(rows[name].reason) < 200 and "\n" not in rows[name].reason for name in refused)
    assert deep.status == ("ok" if kind == "mistral" else "unavailable"), deep.reason


@pytest.mark.parametrize("kind, how, held", [
    ("mistral", {"sliding_window": 16}, lambda tokens: 512 * min(tokens, 15)),
    ("gemma2", {"sliding_window": 16}, lambda tokens: 256 * min(tokens, 15) + 256 * tokens),
    ("lfm2", {"layer_types": ["conv", "full_attention"]}, lambda tokens: 768 + 256 * tokens),
    ("mamba", {"state_size": 8}, lambda tokens: 12_288)])
def test_a_window_forgets_and_a_state_does_not_grow(tmp_path, kind, how, held):
    """The default cache, which generate drops: its bytes are told, and are what a cache that is kept holds."""
    sizes = TINY["llama"] | {"model_type": kind, "head_dim": 16, "num_hidden_layers": 2, "hidden_size": 64} | how
    (tmp_path / "config.json").write_text(json.dumps(sizes))
    with qb.load(tmp_path, "cpu-fp32") as lm:
        for prompt, new, batch in ((4, 3, 1), (9, 8, 2), (40, 6, 2)):
            row = qb.generate(lm, max_new_tokens=new, prompt_tokens=prompt, batch_size=batch, repeats=1, progress=False)
            assert (row.status, row.cache_bytes) == ("ok", batch * held(prompt + new - 1))
        if kind != "mamba":
            deep = qb.generate(lm, max_new_tokens=6, prompt_tokens=9, depth=31, repeats=1, progress=False)
            assert deep.cache_bytes == row.cache_bytes / 2


def test_a_sweep_over_caches_resumes_and_old_files_hold_the_default(tiny_gpt2, tmp_path):
    run, how = qb.Run.open(tmp_path / "rows.jsonl"), {"depth": 8, "repeats": 6, "executor": "inline", "progress": False}
    first = list(qb.sweep(tiny_gpt2, "cpu-fp32", 3, cache=["default", "static"], run=run, **how))
    assert [row.cache for row in first] == ["default", "static"] and len(qb.Run.read(run.path)) == 2
    more = list(qb.sweep(tiny_gpt2, "cpu-fp32", 3, cache=["static", "default", "quantized-4"], run=run, **how))
    assert [row.cache for row in more] == ["quantized-4"]
    old = json.loads(Path(run.path).read_bytes().splitlines()[0])
    del old["cache"], old["cache_bytes"]
    Path(run.path).write_text(json.dumps(old) + "\n")
    assert qb.Run.read(run.path)[0].cache == "default" and qb.Run.read(run.path)[0].key == first[0].key
    asked = plan(tiny_gpt2, "cpu-fp32", "eager", [Workload(max_new_tokens=3, depth=8, cache="static")], None)[0]
    assert asked.title.endswith("3 tokens, depth 8, static cache") and asked.key == first[1].key


def test_a_cache_that_there_is_not_is_a_mistake(lm):
    for work in (lambda: measured(lm, "quantised-4"), lambda: qb.sweep("gpt2", "cpu-fp32", cache=["static", "quantised-4"]),
                 lambda: qb.quality(lm, cache="quantised-4")):
        with pytest.raises(ValueError, match="unknown cache 'quantised-4'; did you mean 'quantized-4'"):
            work()


@needs_hqq
def test_whatever_its_heads_a_model_has_a_quantised_cache():
    """hqq packs groups by twos: an odd number of heads of 64, one after the other, must not fail."""
    for kind, heads in (("llama", 3), ("llama", 1), ("gpt_bigcode", 1)):
        config = AutoConfig.for_model(kind, vocab_size=50, hidden_size=192, num_hidden_layers=1, num_attention_heads=3,
                                      num_key_value_heads=heads, intermediate_size=64)
        model, ids = AutoModelForCausalLM.from_config(config).eval(), torch.arange(7)[None]
        with torch.no_grad():
            found = stepwise_logits(model, ids, 6, "quantized-4")
        assert found.isfinite().all() and isinstance(new_cache("quantized-4", config, 7), QuantizedCache)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here: no allocator was asked")
@pytest.mark.parametrize("cache", WAYS)
def test_bytes_of_a_cache_are_the_allocators(tiny_llama, cache):
    """What it is asked for: what it allocates is rounded up to blocks, by some percent."""
    with qb.load(tiny_llama, "gpu-fp16") as lm:
        work = Workload(batch_size=8, prompt_tokens=30, depth=8, max_new_tokens=4, cache=cache)
        engine = Eager(lm, inputs_of(lm, work), 4, work.depth)
        for _ in range(2):  # workspaces are taken in the first
            engine.rewind()
            engine(4)
        told, before = held_in(engine.cache), torch.cuda.memory_stats()["requested_bytes.all.current"]
        engine.cache = engine.inputs["past_key_values"] = None
        gc.collect()
        assert before - torch.cuda.memory_stats()["requested_bytes.all.current"] == pytest.approx(told, rel=0.02)
