"""Limits, floors, traces, verdicts, scaling and the memory ledger: on models of known parts, and by hand."""

import dataclasses
import time
import timeit
from functools import partial

import pytest
import torch

import quantbench as qb
from quantbench.why import tracing
from quantbench.why.floors import floor

CPU = {"cpu": "a CPU"}
LIMITS = qb.Limits(device="cpu", name="a CPU", machine=CPU, read_bytes_per_s=10e9,
                   matrix_flops_per_s={"float32": 1e12, "int8": 4e12})
AUDIT = {"step_bytes": 100_000_000, "step_products": 25_000_000, "kv_bytes_per_token": 0, "embedding_bytes": 40_000_000,
         "compute_dtype": "float32", "quantised": 0, "quantised_bytes": 0}


def part(device_ms: float, **kinds: float) -> dict:
    """A traced step, its kinds in milliseconds, the rest of the device's time "other"."""
    kinds["other"] = device_ms - sum(kinds.values())
    return {"calls": 16, "device_s": device_ms / 1000, "kernels": 100.0,
            "kinds": {kind: ms / 1000 for kind, ms in kinds.items()}}


def row(step_ms: float = 20.0, trace: dict | None = None, **fields) -> qb.Measurement:
    """A row of 11 tokens whose prefill takes 50 ms and whose steps must read 100 MB: 10 ms under LIMITS."""
    fields = {"setting": "cpu-fp32", "audit": AUDIT, "machine": CPU, "weights": "random"} | fields
    return qb.Measurement(model="gpt2", max_new_tokens=11, new_tokens=11, prompt_tokens=12, trace=trace,
                          latencies_s=[0.05 + step_ms / 100] * 6, first_token_s=[0.05] * 6, **fields)


# ---- limits and floors ----

@pytest.mark.alone
def test_the_limits_are_those_of_a_plain_measurement():
    found, array = qb.limits("cpu"), torch.ones(2**27)  # 512 MiB
    seconds = timeit.repeat(array.sum, number=1, repeat=30)
    assert found.read_bytes_per_s == pytest.approx(array.nbytes / min(seconds), rel=0.5)
    assert set(found.matrix_flops_per_s) == {"float32", "float16", "bfloat16", "int8"}
    assert all(rate > 1e9 for rate in found.matrix_flops_per_s.values())
    assert found.key == ("cpu", qb.facts()["cpu"]) and "GB/s" in repr(found) and "<table>" in found._repr_html_()
    with pytest.raises(ValueError, match="no device 'tpu'"):
        qb.limits("tpu")


def test_the_floors_of_a_step_and_of_a_prefill_by_hand():
    one = row(audit=AUDIT | {"kv_bytes_per_token": 1000}, batch_size=2)
    step, prefill = floor(one, LIMITS), floor(one, LIMITS, "prefill")
    assert step.bytes == 100e6 + 2 * (12 + 11 / 2) * 1000 and step.read_s == pytest.approx(step.bytes / 10e9)
    assert step.compute_s == pytest.approx(2 * 2 * 25e6 / 1e12)
    assert prefill == pytest.approx((100e6, 100e6 / 10e9, 2 * 2 * 12 * 15e6 / 1e12))  # 10 of 25 million in the head
    int8 = row(audit=AUDIT | {"storage_dtype": "int8"})
    assert floor(int8, LIMITS).compute_s == pytest.approx(2 * 25e6 / 4e12)
    assert floor(row(audit=AUDIT | {"compute_dtype": "float64"}), LIMITS).seconds == pytest.approx(0.01)
    assert floor(row(), None) is floor(row(audit=None), LIMITS) is None


# ---- traces ----

TAKEN: dict[str, list[float]] = {}  # kind of an operator -> the seconds that each call took while a profiler watched


def _sleep(kind: str, x: torch.Tensor, ms: float) -> torch.Tensor:
    start = time.perf_counter()
    time.sleep(ms / 1000)
    same = x.clone()
    if torch.autograd._profiler_enabled():
        TAKEN.setdefault(f"{kind} {ms:.0f}", []).append(time.perf_counter() - start)
    return same


KNOWN = torch.library.Library("known", "DEF")  # operators that take the time that they are asked for
for operator, kind in (("linear", "products"), ("softmax", "attention")):
    KNOWN.define(f"{operator}(Tensor x, float ms) -> Tensor")
    KNOWN.impl(operator, partial(_sleep, kind), "CPU")


@pytest.mark.alone
@pytest.mark.parametrize("words, engine", [(2, "eager"), (40, "eager"), (40, "graph")])
def test_known_parts_are_found_whatever_the_length_of_the_prefill(tiny_gpt2, monkeypatch, words, engine):
    """A step has 200 ms of products and 150 of attention more than the model's own 2, a prefill half as much again; 12
    ms are nobody's work."""

    def work(module, args, hidden) -> torch.Tensor:
        times = 1.5 if hidden.shape[1] > 1 else 1.0
        time.sleep(0.012)
        return torch.ops.known.softmax(torch.ops.known.linear(hidden, 200 * times), 150 * times)

    monkeypatch.setattr(tracing, "STEPS", 3)  # of 5, those in the middle
    with qb.load(tiny_gpt2, "cpu-fp32") as lm:
        lm.model.transformer.ln_f.register_forward_hook(work)
        timed = qb.generate(lm, "word " * words, max_new_tokens=6, repeats=1, engine=engine, progress=False)
        TAKEN.clear()
        found = qb.trace(lm, timed).trace
    for name, times in (("prefill", 1.5), ("step", 1)):
        kinds = found[name]["kinds"]
        assert found[name]["calls"] == 3 and kinds["quantised"] == kinds["quantisation"] == 0
        for kind, ms in (("products", 200 * times), ("attention", 150 * times)):
            assert len(taken := TAKEN[f"{kind} {ms:.0f}"]) == 3
            assert kinds[kind] == pytest.approx(sum(taken) / 3, rel=0.05)
        assert found[name]["device_s"] == pytest.approx(sum(kinds.values())) and kinds["other"] < 0.05


@pytest.mark.parametrize("setting", ["cpu-fp32", "cpu-int8", "cpu-int4", "cpu-int8-dynamic"])
def test_a_trace_divides_the_time_and_changes_nothing_else(tiny, setting):
    with qb.load(tiny, setting) as lm:
        plain = qb.generate(lm, max_new_tokens=8, repeats=3, progress=False)
        traced = qb.trace(lm, plain)
        one_token = qb.trace(lm, dataclasses.replace(plain, max_new_tokens=1))
        assert qb.trace(lm, dataclasses.replace(plain, status="failed")).trace is None
    assert set(one_token.trace) == {"prefill"} and dataclasses.replace(traced, trace=None) == plain
    for one in traced.trace.values():
        assert one["device_s"] == pytest.approx(sum(one["kinds"].values())) and one["kernels"] > 20
        assert one["kinds"]["attention"] > 0 and one["kinds"]["products"] + one["kinds"]["quantised"] > 0
        assert (one["kinds"]["quantised"] > 0) is (setting != "cpu-fp32")


@pytest.mark.parametrize("name, kind", [
    ("nvjet_sm90_hsh_64x8_64x16_4x1_v_bz_bias_NNT", "products"), ("triton_tem_fused_addmm_0", "products"),
    ("aten::linear", "products"), ("void kdequant_mm_int32_fp16<4, 512>", "quantisation"), ("aten::add", "other"),
    ("fmha_cutlassF_f32_aligned_64x64_rf_sm80(PyTorchMemEffAttention)", "attention"),
    ("void gemm_4bit_simt<__half, 1>", "bnb-nf4"), ("cutlass_80_tensorop_i16832gemm_s8_256x128_128x3_tn", "bnb-int8"),
    ("bitsandbytes::int8_scaled_mm", "bnb-int8"), ("quantized::linear_dynamic", "dynamic-int8")])
def test_kernels_and_operators_are_known_by_their_names(name, kind):
    own = kind in qb.QUANTISERS  # products of this quantiser
    assert tracing.kind_of(name, qb.QUANTISERS[kind if own else "bnb-nf4"].kernels) == ("quantised" if own else kind)
    assert tracing.kind_of(name) == ("products" if own else kind)


# ---- verdicts, under LIMITS: a step takes 20 ms and must read for 10 ----

@pytest.mark.parametrize("step_ms, trace, kind, share", [
    (20, part(6, products=5), "overhead-bound", {"idle": 14 / 20, "reading": 6 / 20, "products": 0.0}),
    (20, part(19, products=12), "bandwidth-bound", {"reading": 10 / 20, "products": 2 / 20, "rest": 7 / 20}),
    (19, part(19, attention=9, products=2), "bandwidth-bound", {"reading": 10 / 19, "rest": 9 / 19}),  # attention reads
    (24, part(24, products=1, quantised=23), "dequantisation-bound", {"quantised": 14 * 23 / 24 / 24}),
    (24, part(24, products=8, quantised=5, quantisation=11), "dequantisation-bound", {"quantisation": 11 / 24}),
    (18, part(18, quantised=9, quantisation=9), "bandwidth-bound", {"quantisation": 8 / 18, "quantised": 0.0}),
    (20, part(21, products=21), "compute-bound", {"idle": 0.0, "reading": 10 / 21})])  # a profiler's 5%
def test_the_verdict_is_the_largest_cause_of_the_measured_time(step_ms, trace, kind, share):
    found = qb.verdict(row(step_ms, trace={"step": trace}), LIMITS)
    assert found.kind == kind and sum(found.shares.values()) == pytest.approx(1) and min(found.shares.values()) >= 0
    assert {name: found.shares[name] for name in share} == pytest.approx(share)


def test_a_large_batch_is_compute_bound_at_its_floor_and_the_prefill_is_judged_by_itself():
    big = row(batch_size=300, trace={"step": part(19, products=18)})  # its products take 15 ms at the measured rate
    found = qb.verdict(big, LIMITS)
    assert found.kind == "compute-bound" and found.shares["computing"] == pytest.approx(15 / 20)
    both = row(trace={"step": part(6, products=5), "prefill": part(45, products=44)})  # of 50 ms, 10 at its floor
    assert qb.verdict(both, LIMITS, "prefill").kind == "compute-bound"
    assert "its prefill is compute-bound" in qb.explain(qb.Run([both, LIMITS]))[0]


@pytest.mark.parametrize("trace, error", [
    (part(23, products=20), "does not fit the row"), (part(6, products=5) | {"device_s": 0.012}, "does not sum")])
def test_a_trace_that_is_not_of_the_row_is_an_error_and_gets_no_verdict(trace, error):
    one = row(trace={"step": trace})
    with pytest.raises(ValueError, match=error):
        qb.verdict(one, LIMITS)
    said, table = qb.explain(qb.Run([one, LIMITS]))[0], qb.why_table(qb.Run([one, LIMITS]))
    assert said.startswith("No verdict: GPT-2 (random weights), CPU FP32") and error in said
    assert table["Verdict"].tolist() == [""] and error in table["Note"].item()


def test_no_trace_or_no_limits_is_no_verdict_and_limits_of_another_device_or_machine_are_none():
    one = row(trace={"step": part(6, products=5)})
    gpu, elsewhere = dataclasses.replace(LIMITS, device="cuda"), dataclasses.replace(LIMITS, machine={"cpu": "B"})
    for run in ([one], [row(), LIMITS], [one, gpu], [one, elsewhere], [row(audit=None, trace=one.trace), LIMITS],
                [row(trace={"step": {}}), LIMITS]):
        assert "qb.limits()" in qb.explain(qb.Run(run))[0]
        qb.show(qb.why_table(qb.Run(run))), qb.plot_floor(qb.Run(run))
    assert qb.explain([]) == ["nothing measured yet"]
    assert qb.explain(qb.Run([one, gpu, elsewhere, LIMITS])) == qb.explain(qb.Run([one, LIMITS]))


def test_the_table_has_the_numbers_that_the_sentence_and_the_chart_say():
    run = qb.Run([row(trace={"step": part(19, products=12)}), row(setting="cpu-bf16"), LIMITS])
    table = qb.why_table(run)
    assert table.loc["GPT-2 (random weights)", "MBU"].tolist() == pytest.approx([0.5, 0.5])
    assert table["Reading (%)"].iloc[0] == pytest.approx(50) and table["Verdict"].tolist() == ["bandwidth-bound", ""]
    shown = repr(qb.show(qb.why_table(run)))
    assert "Reading (%)" in shown and "Quantising (%)" not in shown and "Prefill" not in shown and "11 tokens" in shown
    assert qb.explain(run)[0] == ("GPT-2 (random weights), CPU FP32, 11 tokens: bandwidth-bound. A step (20.00 ms) is "
                                  "above all reading at memory's rate (50%); its floor is 10.00 ms (100 MB are read).")
    assert "20.00 (floor 10.00)" in [text.get_text() for text in qb.plot_floor(run).axes[0].texts]


# ---- where it starts to pay ----

def cell(setting: str, batch: int, seconds: float, rounds: int = 6, **fields) -> qb.Measurement:
    """A cell whose rounds take 1, 2, 3 ... per cent longer each: the noise is all rounds', not the settings'."""
    samples = [seconds * (1 + number / 100) for number in range(rounds)]
    return qb.Measurement(**{"model": "gpt2", "weights_bytes": 10**9} | fields, setting=setting, max_new_tokens=8,
                          new_tokens=8, prompt_tokens=12, batch_size=batch, latencies_s=samples, machine=CPU,
                          first_token_s=[0.01] * rounds, weights="random", rounds=list(map(str, range(rounds))))


def test_it_pays_where_the_rounds_say_so():
    base, ours = {1: 1.0, 4: 1.2, 16: 2.0}, {1: 2.0, 4: 1.2, 16: 1.0}
    rows = [cell(setting, batch, seconds) for setting, times in (("gpu-fp16", base), ("gpu-int8", ours))
            for batch, seconds in times.items()]
    rows += [cell("gpu-fp16", 1, 1.0, model="gpt2-xl", weights_bytes=3 * 10**9),
             cell("gpu-int8", 1, 0.5, 5, model="gpt2-xl"), cell("gpu-int4", 4, 1.0)]
    texts = [text.get_text() for text in qb.plot_scaling(rows).axes[0].texts]
    assert texts == ["8 tokens: 0.50 slower", "8 tokens, batch 4: 1.00 tie", "8 tokens, batch 16: 2.00 faster",
                     "8 tokens: not compared"]
    with pytest.raises(ValueError, match="two batch sizes"):
        qb.plot_scaling(rows[:1])


def test_a_name_in_markup_is_text_and_two_machines_are_never_explained_together():
    rows = [cell(setting, batch, 1.0, model="<b>$\\frac{$ *x*</b>") for setting in ("gpu-fp16", "gpu-int8")
            for batch in (1, 4)]
    tables = [qb.show(view(rows)) for view in (qb.why_table, qb.memory_table)]
    page = qb.explain(rows)._repr_markdown_() + "".join(table.markdown() for table in tables)
    assert "*x*" not in page and "<b>" not in page + "".join(table._repr_html_() for table in tables)
    for plot in (qb.plot_scaling, qb.plot_floor):
        plot(rows).draw_without_rendering()
    rows.append(dataclasses.replace(rows[0], machine={"cpu": "another"}))
    for view in (qb.explain, qb.why_table, qb.memory_table, qb.plot_floor, qb.plot_scaling):
        with pytest.raises(ValueError, match="2 machines"):
            view(rows)


# ---- the memory ledger ----

LEDGER = qb.Measurement(
    model="gpt2", setting="gpu-int4", max_new_tokens=100, prompt_tokens=12, new_tokens=100, batch_size=2,
    latencies_s=[1.0], weights="random", weights_bytes=126_000_000, held_before_bytes=0, vram_peak_bytes=160_000_000,
    machine={"cpu": "C", "gpu": "G"}, audit={"quantised": 48, "class": "Linear4bit", "quantised_bytes": 47_000_000,
                                             "embedding_bytes": 78_000_000, "kv_bytes_per_token": 1000})
PARTS = ["Quantised layers", "Embeddings and head", "Other weights", "KV cache", "Working memory"]


def test_the_parts_of_memory_add_up_to_the_peak_and_a_cpus_is_resident_memory():
    failed = dataclasses.replace(LEDGER, status="failed", latencies_s=[], new_tokens=None)
    cpu = dataclasses.replace(LEDGER, setting="cpu-int4", vram_peak_bytes=None, ram_peak_bytes=130_000_000)
    table = qb.memory_table([LEDGER, cpu, failed])
    assert table[PARTS].iloc[0].tolist() == pytest.approx([47, 78, 1, 0.224, 160 - 126 - 0.224]) and len(table) == 2
    assert table["Working memory"].iloc[1] == pytest.approx(130 - 126 - 0.224)
    assert table["Generate peak"].iloc[0] == 160 and table["Generate peak"].isna().iloc[1]
    assert "78.0" in repr(qb.show(qb.memory_table([LEDGER]))) and not qb.show(qb.memory_table([failed]))


# ---- prompts ----

def asked(setting: str, prompt: int, batch: int = 1) -> qb.Measurement:
    """FP32 reads at 10,000 tokens/s and writes a token in 30 ms, INT8 at 2,000 and in 10 ms: as long at 500 tokens."""
    read_s, step_s = {"cpu-fp32": (1e-4, 0.03), "cpu-int8-dynamic": (5e-4, 0.01)}[setting]
    seconds = [(1 + share / 1000) * (read_s * prompt + 10 * step_s) for share in range(6)]
    return qb.Measurement(model="gpt2", setting=setting, max_new_tokens=11, new_tokens=11, prompt_tokens=prompt,
                          prompt_length=prompt, batch_size=batch, latencies_s=seconds, rounds=[*"abcdef"], machine=CPU,
                          first_token_s=[(1 + share / 1000) * read_s * prompt for share in range(6)])


def test_which_setting_answers_first_and_where_they_change_places():
    rows = [asked(setting, prompt, batch) for setting in ("cpu-fp32", "cpu-int8-dynamic") for prompt in (12, 128, 1024)
            for batch in (1, 4)]
    assert list(qb.prompt_findings(rows)) == [
        f"GPT-2, eager, batch {batch}: up to 128 prompt tokens take CPU INT8 dynamic; over about 500 prompt tokens take "
        "CPU FP32." for batch in (1, 4)]
    assert len(qb.plot_prompts(rows).axes) == 3
    both = [*rows, *(dataclasses.replace(row, max_new_tokens=5) for row in rows)]  # answers of another length
    assert [one.count("CPU FP32") for one in qb.prompt_findings(both)] == [1] * 4 and len(qb.plot_prompts(both).axes) == 6
    own = [dataclasses.replace(row, prompt_length=None) for row in rows if row.prompt_length == 12]  # as many of another
    assert qb.prompt_findings([*own, *rows]) == qb.prompt_findings(rows)
    table = qb.prompt_table(rows)
    assert "7960.2–8000.0" in repr(qb.show(table)) and "Depth" not in repr(qb.show(table))
    assert table["Prefill tokens/sec"].iloc[0] == pytest.approx(10_000, rel=0.01)
    assert table["Decode tokens/sec"].iloc[0] == pytest.approx(1 / 0.03, rel=0.01)
    told = qb.ratios(rows, figure="prefill_tokens_per_s")
    assert told["Ratio"].iloc[0] == pytest.approx(0.2) and told["Verdict"].iloc[0] == "slower"


def answered(rounds: str = "abcdef", **seconds: tuple[float, float]) -> str:
    """What is said of answers that take FP32 and INT8 so many seconds, by prompt length; 1% of noise, in turn."""
    rows = [qb.Measurement(model="gpt2", setting=setting, max_new_tokens=11, new_tokens=11, prompt_tokens=int(name[1:]),
                           prompt_length=int(name[1:]), rounds=list(rounds), machine=CPU,
                           latencies_s=[whole * (1 + (turn + place) % 2 / 100) for turn in range(6)])
            for name, both in seconds.items()
            for place, (setting, whole) in enumerate(zip(("cpu-fp32", "cpu-int8-dynamic"), both)) if whole]
    return qb.prompt_findings(rows)[0].split(": ")[1].replace(" prompt tokens", "").replace("CPU ", "")


def test_a_tie_hides_no_difference_at_another_length_and_without_rounds_nothing_is_told():
    assert answered(p12=(1, 2), p128=(2, 2), p512=(2, 2), p1024=(3, 2)) == \
        "up to 12 take FP32; from 128 FP32 and INT8 dynamic are a tie; from 1,024 take INT8 dynamic."
    assert answered(p12=(1, 2), p128=(2, 1), p1024=(2, 2)) == \
        "up to 12 take FP32; over about 70 take INT8 dynamic; from 1,024 FP32 and INT8 dynamic are a tie."
    assert answered(p12=(1, 2), p128=(1, 2)) == "up to 128 take FP32."
    assert answered(p12=(None, 2), p128=(1, 2)) == "up to 12 there is only INT8 dynamic; from 128 take FP32."
    assert answered("", p12=(1, 2), p128=(2, 1)) == "up to 128 FP32 and INT8 dynamic are not told apart."


@pytest.mark.parametrize(("first", "second", "about"), [("1024 1 1.1", "1032 2 1", 1024), ("120 1 2", "126 1.1 1", 126)])
def test_a_place_in_two_digits_is_never_beyond_the_lengths_that_it_lies_between(first, second, about):
    asked = {f"p{length}": (float(one), float(two)) for length, one, two in map(str.split, (first, second))}
    assert f"over about {about:,} take" in answered(**asked)


def test_one_prompt_length_says_nothing():
    assert "fewer than two" in qb.prompt_findings([asked("cpu-fp32", 12)])[0]
    with pytest.raises(ValueError, match="two prompt lengths"):
        qb.plot_prompts([asked("cpu-fp32", 12)])
