"""The timed generate: exact counts, exact latencies, and the same speed as a plain loop."""

import json
import statistics
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch

import quantbench as qb
from quantbench.decode import Eager, find_engine, inputs_of, stepwise_logits
from quantbench.engines.agreement import difference
from quantbench.intervals import median_interval
from quantbench.settings import Workload
from quantbench.timing import Timed


class Clock:
    """Seconds that advance by the next of `steps` between a timed region's two readings, and by 100 outside it."""

    def __init__(self, *steps: float) -> None:
        self.now, self.steps, self.readings = 0.0, list(steps), 0

    def __call__(self) -> float:
        self.now += self.steps.pop(0) if self.readings % 2 else 100.0
        self.readings += 1
        return self.now


@pytest.fixture
def lm(tiny):
    with qb.load(tiny, "cpu-fp32") as loaded:
        yield loaded


def measured(lm, tokens: int = 2, **how: object) -> qb.Measurement:
    return qb.generate(lm, max_new_tokens=tokens, progress=False, **how)


def test_latency_and_ttft_are_what_the_clock_says(lm):
    clock = Clock(9.0, 2.0, 0.25, 4.0, 0.5, 3.0, 0.125)  # the warm-up, then latency and first token, three times
    row = measured(lm, 6, repeats=3, clock=clock, batch_size=2)
    assert row.latencies_s == [2.0, 4.0, 3.0] and row.first_token_s == [0.25, 0.5, 0.125]
    assert (row.latency_s, row.tokens_per_s, row.ttft_s) == (3.0, 2 * 2.0, 0.25)
    assert row.decode_tokens_per_s == pytest.approx(2 * 5 / 2.75) and row.prepare_s > 0
    assert row.rounds == [] and len(row.sampled_at) == 3  # compared with no other row


@pytest.mark.parametrize("steps, budget_s, repeats", [
    ([1.0, 1.0] * 10, 30, 3),  # steady: half the range is within 3%
    ([x for i in range(10) for x in (1.0 + i % 2, 0.1)], 30, 10),  # wild: at most ten
    ([x for i in range(10) for x in (10.0 + 10 * (i % 2), 0.1)], 5, 3)])  # over the budget, but not below three
def test_repeats_end_by_spread_or_by_budget(lm, steps, budget_s, repeats):
    assert len(measured(lm, clock=Clock(1.0, *steps), budget_s=budget_s).latencies_s) == repeats


def test_a_sample_keeps_its_round_and_its_time(lm):
    cell = Timed(lm, Workload(max_new_tokens=4))
    start = time.time()
    for name in ("a-1", "a-2"):
        cell.sample(name)
    row = cell.measurement()
    assert row.rate_by_round() == {"a-1": 4 / row.latencies_s[0], "a-2": 4 / row.latencies_s[1]}
    assert start <= row.sampled_at[0] < row.sampled_at[1] <= time.time()
    assert cell.ended is None


def test_an_eos_that_would_stop_the_model_early_does_not(lm):
    inputs = lm.encode(qb.PROMPT)
    first = int(lm.model(**inputs).logits[0, -1].argmax())
    lm.model.generation_config.eos_token_id = first  # greedy decoding would stop at the first token
    free = lm.model.generate(**inputs, max_new_tokens=8, do_sample=False)
    assert free.shape[1] == inputs["input_ids"].shape[1] + 1
    row = measured(lm, 8, repeats=1)
    assert (row.new_tokens, row.prompt_tokens) == (8, inputs["input_ids"].shape[1])


def test_a_wrong_token_count_raises(lm, monkeypatch):
    whole = lm.model.generate
    monkeypatch.setattr(lm.model, "generate", lambda **how: whole(**how)[:, :-1])
    with pytest.raises(RuntimeError, match="generated 7 tokens where 8 were asked for"):
        measured(lm, 8, repeats=1)


@pytest.mark.alone
def test_a_model_slowed_by_a_known_sleep_has_that_latency(lm):
    lm.model.register_forward_pre_hook(lambda *_: time.sleep(0.05))
    row = measured(lm, 10, repeats=5)
    assert min(row.latencies_s) >= 0.5 and min(row.first_token_s) >= 0.05  # never below the sleeps
    assert min(row.latencies_s) < 0.7 and min(row.first_token_s) < 0.1  # the best of five: others use this machine


@pytest.mark.alone
def test_tokens_per_second_agree_with_a_loop_by_hand():
    """Interleaved, and the median of the ratios: what slows the machine slows both. More of them where it is noisy."""
    ratios = []

    def noisy() -> bool:
        low, high = median_interval(ratios)
        return high - low > 0.06

    with qb.load("distilgpt2", "cpu-fp32", weights="random") as lm:
        inputs = lm.encode(qb.PROMPT)
        how = {"min_new_tokens": 16, "max_new_tokens": 16, "do_sample": False}
        measured(lm, 16, repeats=1)
        while len(ratios) < 9 or (len(ratios) < 36 and noisy()):
            ours = measured(lm, 16, repeats=1).tokens_per_s
            start = time.perf_counter()
            lm.model.generate(**inputs, **how)
            ratios.append(ours / (16 / (time.perf_counter() - start)))
    assert statistics.median(ratios) == pytest.approx(1, abs=0.05)


def test_nothing_but_generate_runs_in_a_timed_region(lm, monkeypatch):
    calls, plain = [], lm.model.generate
    monkeypatch.setattr(lm.model, "generate", lambda **how: calls.append(set(how)) or plain(**how))
    measured(lm, repeats=2)
    assert len(calls) == 5  # warm-up, then twice: whole, first token
    assert all(not {"streamer", "logits_processor", "stopping_criteria"} & names for names in calls)


@pytest.mark.parametrize("bad, message", [
    ({"max_new_tokens": 0}, "max_new_tokens must be a whole number of at least 1, not 0"),
    ({"prompt": "  "}, "the prompt is empty"), ({"budget_s": 0}, "budget_s must be above 0"),
    ({"max_new_tokens": 60}, "12 prompt tokens \\+ 60 new ones are over the 64 tokens"),
    ({"engine": "eagre"}, "unknown engine 'eagre'; did you mean 'eager'")])
def test_a_workload_that_cannot_run_is_refused(lm, bad, message):
    with pytest.raises(ValueError, match=message):
        qb.generate(lm, **bad)


def test_a_closed_model_is_refused(tiny):
    with qb.load(tiny, "cpu-fp32") as lm:
        pass
    with pytest.raises(RuntimeError, match="load it again"):
        qb.generate(lm)
    with pytest.raises(RuntimeError, match="load it again"):
        qb.batch_effect(lm)


@pytest.mark.parametrize("wrong", [None, "gpt2", qb.Run(), ["gpt2"]])
def test_what_takes_a_loaded_model_says_so(lm, wrong):
    row = qb.generate(lm, max_new_tokens=1, repeats=1, progress=False)
    for work in (qb.generate, qb.quality, qb.reference, qb.batch_effect, partial(qb.trace, row=row)):
        with pytest.raises(ValueError, match="takes what qb.load returns, not"):
            work(wrong)
    for work in (partial(qb.trace, lm), partial(qb.verdict, limits=None), partial(qb.verdict, row)):
        with pytest.raises(ValueError, match="a row, not|a row of|on a row, not|limits must be"):
            work(wrong or 3)
    with pytest.raises(ValueError, match="takes a row of"):
        qb.trace(lm, replace(row, model="another"))


def test_running_out_of_memory_is_a_row_and_the_model_lives_on(lm):
    hook = lm.model.lm_head.register_forward_pre_hook(lambda *_: torch.empty(2**60))  # an exabyte: refused for real
    row = measured(lm)
    assert row.status == "out_of_memory" and "allocate" in row.reason and row.latencies_s == []
    hook.remove()
    assert measured(lm, repeats=1).status == "ok"


def test_a_cache_that_cannot_fit_is_not_tried(lm):
    row = measured(lm, batch_size=10**9)
    assert row.status == "out_of_memory" and "the KV cache would need about" in row.reason


def test_any_other_error_raises(lm):
    lm.model.lm_head.register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        measured(lm)


def test_the_row_says_where_and_with_what_it_was_made(lm):
    row = measured(lm, repeats=1)
    assert row.machine["cpu"] and row.machine["cores"] >= 1 and row.machine["ram_bytes"] > 1e9
    assert {"python", "torch", "transformers", "bitsandbytes", "quantbench"} <= set(row.versions)
    assert row.weights_bytes > 0 and row.load_s > 0 and row.audit["compute_dtype"] == "float32"
    assert row.vram_gb is None and row.text is None and row.conditions["before"]["cpu_busy"] >= 0
    assert json.loads(json.dumps(row.machine)) == row.machine


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="no peak of resident memory to reset here")
def test_the_resident_peak_is_what_generate_allocates_whoever_else_is_in_the_process(tiny):
    with qb.load(tiny, "cpu-fp32") as lm:
        before = measured(lm, repeats=1).ram_peak_bytes
        others = torch.ones(50_000_000)
        beside = measured(lm, repeats=1).ram_peak_bytes
        del others
        lm.model.lm_head.register_forward_pre_hook(_touch_200_mb)
        after = measured(lm, repeats=1).ram_peak_bytes
    assert 195e6 < after - before < 260e6 and beside - before < 60e6


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="no peak to read here")
def test_every_row_of_a_model_holds_its_weights():
    """A file's pages come in when they are first read: at load, not in one of the generations."""
    with qb.load("distilgpt2", "cpu-fp32", weights="random") as lm:
        rows = [measured(lm, 2, repeats=1, engine=engine) for engine in ("eager", "eager", "graph")]
    assert min(row.ram_peak_bytes / row.weights_bytes for row in rows) > 0.95  # without them: some 0.05


def _touch_200_mb(*_: object) -> None:
    torch.ones(50_000_000)


gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here: the GPU settings were not run")


@gpu
@pytest.mark.parametrize("setting", [key for key, row in qb.SETTINGS.items() if row.device == "cuda"])
def test_every_gpu_setting(tiny, setting):
    with qb.load(tiny, setting) as lm:
        row = measured(lm, 4, repeats=2)
    assert row.status == "ok" and row.vram_peak_bytes >= row.weights_bytes * 0.98
    assert row.vram_reserved_bytes >= row.vram_peak_bytes and row.ram_peak_bytes is None


def test_a_long_prompt_repeats_the_bundled_text(lm):
    assert inputs_of(lm, Workload(batch_size=2, prompt_tokens=9, depth=4000))["input_ids"].shape == (2, 4009)


@pytest.mark.parametrize("depth, prompt_tokens, batch", [(0, 5, 1), (7, None, 2), (9, 6, 1)])
def test_a_prompt_has_the_tokens_asked_for_and_what_is_cached_before_it_changes_no_text(lm, depth, prompt_tokens, batch):
    """Eager generates the same after reading it all at once."""
    workload = Workload(max_new_tokens=4, batch_size=batch, prompt_tokens=prompt_tokens, depth=depth)
    ids = inputs_of(lm, workload)["input_ids"]
    row = qb.generate(lm, max_new_tokens=4, batch_size=batch, prompt_tokens=prompt_tokens, depth=depth, repeats=2,
                      progress=False)
    assert row.depth == depth and row.prompt_tokens == (prompt_tokens or len(lm.tokenizer.encode(qb.PROMPT)))
    assert ids.shape == (batch, depth + row.prompt_tokens)
    cell = Timed(lm, workload)
    cell.sample()
    assert torch.equal(cell.output, Eager(lm, {"input_ids": ids, "attention_mask": torch.ones_like(ids)}, 4)(4))
    assert row.prefill_tokens_per_s == pytest.approx(batch * row.prompt_tokens / row.ttft_s)
    graph = qb.generate(lm, max_new_tokens=4, batch_size=batch, prompt_tokens=prompt_tokens, depth=depth, repeats=2,
                        engine="graph", progress=False)
    assert (graph.status, graph.reason) == ("ok", None)


@pytest.mark.parametrize("engine", ["eager", "graph"])
def test_only_the_logits_that_are_used_are_computed(lm, engine):
    """Those of a whole depth, batch x depth x vocabulary, are gigabytes."""
    rows, work = [], Workload(max_new_tokens=3, prompt_tokens=5, depth=20, batch_size=2)
    lm.model.get_output_embeddings().register_forward_hook(lambda _, args, logits: rows.append(int(logits.shape[1])))
    made = find_engine(engine)(lm, inputs_of(lm, work), 3, work.depth)
    made.rewind()
    text = made(3)
    assert set(rows) == {1}
    stepwise_logits(lm.model, text, 3)
    difference(lm, text, text.flip(1), 25)
    assert max(rows) == 3


def test_a_model_that_computes_all_logits_gives_the_same(lm, monkeypatch):
    ids, forward = inputs_of(lm, Workload(prompt_tokens=12))["input_ids"], lm.model.forward
    with torch.no_grad():
        kept = stepwise_logits(lm.model, ids, 4)
        monkeypatch.setattr(lm.model, "forward", lambda input_ids, past_key_values, use_cache: forward(
            input_ids=input_ids, past_key_values=past_key_values, use_cache=use_cache))
        torch.testing.assert_close(stepwise_logits(lm.model, ids, 4), kept)


class Slow(torch.nn.Module):
    """Adds known seconds to every forward pass: so much for each token that it reads."""

    def __init__(self, token_s: float, step_s: float) -> None:
        super().__init__()
        self.token_s, self.step_s = token_s, step_s

    def __call__(self, module, args, kwargs):
        time.sleep(self.step_s + self.token_s * kwargs["input_ids"].shape[1])


@pytest.mark.alone
@pytest.mark.parametrize("depth, batch", [(0, 1), (16, 4)])
def test_known_seconds_per_prompt_token_and_per_step_come_out(tiny_gpt2, depth, batch):
    token_s, step_s = 0.03, 0.4
    with qb.load(tiny_gpt2, "cpu-fp32") as lm:
        lm.model.register_forward_pre_hook(Slow(token_s, step_s), with_kwargs=True)
        row = qb.generate(lm, max_new_tokens=4, batch_size=batch, prompt_tokens=10, depth=depth, repeats=2,
                          progress=False)
    assert row.prefill_tokens_per_s == pytest.approx(batch * 10 / (step_s + 10 * token_s), rel=0.05)
    assert row.decode_tokens_per_s == pytest.approx(batch / (step_s + token_s), rel=0.05)
