"""Limits, floors, traces, verdicts, scaling and the memory ledger: on models of known parts, and by hand."""

import dataclasses
import time
import timeit
from functools import partial

import pytest
import torch

import quantbench as qb
from quantbench.why.floors import floor, mbu, step_bytes
from quantbench.why.tracing import kind_of

CPU = {"cpu": "a CPU"}
LIMITS = qb.Limits(device="cpu", name="a CPU", machine=CPU, read_bytes_per_s=10e9,
                   matrix_flops_per_s={"float32": 1e12, "int8": 4e12})
AUDIT = {"step_bytes": 100_000_000, "step_products": 25_000_000, "kv_bytes_per_token": 0, "embedding_bytes": 40_000_000,
         "compute_dtype": "float32", "quantised": 0, "quantised_bytes": 0}


def part(device_ms: float, kernels: float = 100.0, **kinds: float) -> dict:
    """A traced step, its kinds in milliseconds, the rest of the device's time "other"."""
    kinds["other"] = device_ms - sum(kinds.values())
    return {"calls": 16, "wall_s": device_ms / 500, "device_s": device_ms / 1000, "kernels": kernels,
            "kinds": {kind: ms / 1000 for kind, ms in kinds.items()}, "top": []}


def row(step_ms: float = 20.0, trace: dict | None = None, **fields) -> qb.Measurement:
    """A row of 11 tokens whose prefill takes 50 ms and whose steps must read 100 MB: 10 ms under LIMITS."""
    fields = {"setting": "cpu-fp32", "audit": AUDIT, "machine": CPU, "weights": "random"} | fields
    return qb.Measurement(model="gpt2", max_new_tokens=11, new_tokens=11, prompt_tokens=12, trace=trace,
                          latencies_s=[0.05 + step_ms / 100] * 6, first_token_s=[0.05] * 6, **fields)


# ---- limits ----

@pytest.mark.alone
def test_the_limits_are_those_of_a_plain_measurement():
    start = time.perf_counter()
    found = qb.limits("cpu")
    assert time.perf_counter() - start < 30
    array = torch.ones(2**27)  # 512 MiB
    seconds = timeit.repeat(array.sum, number=1, repeat=30)
    assert found.read_bytes_per_s == pytest.approx(array.nbytes / min(seconds), rel=0.5)
    assert set(found.matrix_flops_per_s) == {"float32", "float16", "bfloat16", "int8"}
    assert all(rate > 1e9 for rate in found.matrix_flops_per_s.values())
    assert found.machine == qb.facts() and found.versions == qb.versions() and found.device == "cpu"
    assert "GB/s" in repr(found) and "<table>" in found._repr_html_()


def test_limits_are_a_record_of_a_run_and_others_of_the_same_device_replace_them(tmp_path):
    run = qb.Run.open(tmp_path / "rows.jsonl")
    for rate in (1e9, 10e9):
        run.add(dataclasses.replace(LIMITS, read_bytes_per_s=rate))
    assert qb.Run.read(run.path).limits == run.limits and [one.read_bytes_per_s for one in run.limits] == [10e9]


def test_a_device_that_is_not_here_has_no_limits():
    with pytest.raises(ValueError, match="no device 'tpu'"):
        qb.limits("tpu")


# ---- floors, by hand ----

def test_the_floors_of_a_step_and_of_a_prefill():
    one = row(audit=AUDIT | {"kv_bytes_per_token": 1000}, batch_size=2)
    assert step_bytes(one) == 100e6 + 2 * (12 + 11 / 2) * 1000
    assert floor(one, LIMITS).read_s == pytest.approx(step_bytes(one) / 10e9)
    assert floor(one, LIMITS).compute_s == pytest.approx(2 * 2 * 25e6 / 1e12)
    assert mbu(one, LIMITS) == pytest.approx(floor(one, LIMITS).read_s / 0.020)
    # 15 million weights in the layers for each of 12 tokens, 10 million in the head for the last
    assert floor(one, LIMITS, "prefill").compute_s == pytest.approx(2 * 2 * (12 * 15e6 + 10e6) / 1e12)
    assert floor(one, LIMITS, "prefill").read_s == pytest.approx(100e6 / 10e9)


def test_int8_is_held_against_the_int8_rate_and_unknowns_have_no_floor():
    assert floor(row(setting="cpu-int8-dynamic"), LIMITS).compute_s == pytest.approx(2 * 25e6 / 4e12)
    assert floor(row(), None) is floor(row(audit=None), LIMITS) is mbu(row(audit=None), LIMITS) is None
    assert floor(row(audit=AUDIT | {"compute_dtype": "float64"}), LIMITS).seconds == pytest.approx(0.01)


# ---- traces ----

TAKEN: list[tuple[str, float, float]] = []  # name, milliseconds asked for, and seconds taken while a profiler watched


def _sleep(name: str, x: torch.Tensor, ms: float) -> torch.Tensor:
    start = time.perf_counter()
    time.sleep(ms / 1000)
    same = x.clone()
    if torch.autograd._profiler_enabled():
        TAKEN.append((name, ms, time.perf_counter() - start))
    return same


KNOWN = torch.library.Library("known", "DEF")  # operators that take the time that they are asked for
for operator, kind in (("linear", "products"), ("softmax", "attention"), ("rest", "other")):
    KNOWN.define(f"{operator}(Tensor x, float ms) -> Tensor")
    KNOWN.impl(operator, partial(_sleep, kind), "CPU")


@pytest.mark.alone
@pytest.mark.parametrize("engine", ["eager", "graph"])
@pytest.mark.parametrize("words, tokens", [(2, 12), (40, 6)])
def test_known_parts_are_found_whatever_the_length_of_the_prefill(tiny_gpt2, words, tokens, engine):
    """A step has 80 ms of products and 60 of attention more than the model's own, a prefill three times as much; 12 ms
    are nobody's work."""

    def work(module, args, hidden) -> torch.Tensor:
        times = 3.0 if hidden.shape[1] > 1 else 1.0
        time.sleep(0.012)
        return torch.ops.known.softmax(torch.ops.known.linear(hidden, 80 * times), 60 * times)

    def rest(module, args, hidden) -> torch.Tensor:
        return torch.ops.known.rest(hidden, 152 * (3.0 if hidden.shape[1] > 1 else 1.0))

    asked = {"max_new_tokens": tokens, "repeats": 1, "engine": engine, "progress": False}
    with qb.load(tiny_gpt2, "cpu-fp32") as lm:
        idle = lm.model.transformer.ln_f.register_forward_hook(rest)  # work after a rest is slower: its own too
        own = qb.trace(lm, qb.generate(lm, "word " * words, **asked)).trace
        idle.remove()
        lm.model.transformer.ln_f.register_forward_hook(work)
        timed = qb.generate(lm, "word " * words, **asked)
        for _ in range(4):  # a host that stalls in one look does not in all of them
            TAKEN.clear()
            found = qb.trace(lm, timed).trace
            parts = known_parts(found, own)
            if all(one == pytest.approx(known, rel=0.05) for one, known in parts):
                break
    assert all(one == pytest.approx(known, rel=0.05) for one, known in parts), parts
    assert (found["prefill"]["calls"], found["step"]["calls"]) == (3, min(tokens - 1, 16))
    for one in found.values():
        assert one["kinds"]["quantised"] == one["kinds"]["quantisation"] == 0
        assert one["kinds"]["other"] < 0.1 * one["device_s"]
        assert one["device_s"] == pytest.approx(sum(one["kinds"].values())) and one["device_s"] < one["wall_s"]
        assert engine == "graph" or one["wall_s"] - one["device_s"] > 0.012  # a captured step sleeps no more


def known_parts(found: dict, own: dict) -> list[tuple[float, float]]:
    """Of each part and kind the seconds that the trace found, and those slept on top of the model's own."""
    parts = []
    for part_name, times in (("prefill", 3), ("step", 1)):
        for kind, ms in (("products", 80 * times), ("attention", 60 * times)):
            seconds = [taken for name, slept, taken in TAKEN if (name, slept) == (kind, ms)]
            assert len(seconds) == found[part_name]["calls"]
            parts.append((found[part_name]["kinds"][kind], sum(seconds) / len(seconds) + own[part_name]["kinds"][kind]))
    return parts


@pytest.mark.parametrize("setting", ["cpu-fp32", "cpu-int8", "cpu-int4", "cpu-int8-dynamic"])
def test_a_trace_divides_the_time_and_touches_no_timed_sample(tiny, setting):
    profiled = []

    def clock() -> float:
        profiled.append(torch.autograd._profiler_enabled())
        return time.perf_counter()

    with qb.load(tiny, setting) as lm:
        plain = qb.generate(lm, max_new_tokens=8, repeats=3, clock=clock, progress=False)
        traced = qb.trace(lm, plain)
    assert profiled and not any(profiled)
    assert plain.trace is None and dataclasses.replace(traced, trace=None) == plain
    for one in traced.trace.values():
        assert 0 < one["device_s"] <= one["wall_s"] and one["kernels"] > 20
        assert one["kinds"]["attention"] > 0 and one["kinds"]["products"] + one["kinds"]["quantised"] > 0
        assert (one["kinds"]["quantised"] > 0) is (setting != "cpu-fp32")


def test_one_token_has_no_step_and_a_row_that_is_not_ok_no_trace(tiny_gpt2):
    with qb.load(tiny_gpt2, "cpu-fp32") as lm:
        assert set(qb.trace(lm, qb.generate(lm, max_new_tokens=1, repeats=1, progress=False)).trace) == {"prefill"}
    with qb.load(tiny_gpt2, "gpu-fp16") as lm:
        if lm.status != "ok":
            assert qb.trace(lm, qb.generate(lm)).trace is None


@pytest.mark.parametrize("name, kind", [
    ("nvjet_sm90_hsh_64x8_64x16_4x1_v_bz_bias_NNT", "products"), ("triton_tem_fused_addmm_0", "products"),
    ("fmha_cutlassF_f32_aligned_64x64_rf_sm80(PyTorchMemEffAttention)", "attention"),
    ("cudnn_generated_fort_native_sdpa_sm80_flash_fprop", "attention"),
    ("void kInt8VectorQuant<__half, 1024, 1>", "quantisation"), ("void kdequant_mm_int32_fp16<4, 512>", "quantisation"),
    ("void kDequantizeBlockwise<__half, 512, 64, 8, 2>", "quantisation"), ("aten::linear", "products"),
    ("bitsandbytes::int8_vectorwise_quant", "quantisation"),
    ("void at::native::vectorized_layer_norm_kernel", "other"), ("aten::add", "other"),
])
def test_kernels_and_operators_are_known_by_their_names(name, kind):
    assert kind_of(name) == kind_of(name, qb.QUANTISERS["bnb-nf4"].kernels) == kind


@pytest.mark.parametrize("quantiser, name", [
    ("bnb-nf4", "void gemm_4bit_simt<__half, 1>"), ("bnb-int8", "cutlass_80_tensorop_i16832gemm_s8_256x128_128x3_tn"),
    ("bnb-int8", "bitsandbytes::int8_scaled_mm"), ("dynamic-int8", "quantized::linear_dynamic")])
def test_quantised_products_are_those_of_the_quantiser(quantiser, name):
    assert kind_of(name, qb.QUANTISERS[quantiser].kernels) == "quantised" and kind_of(name) == "products"


# ---- verdicts, under LIMITS: a step takes 20 ms and must read for 10 ----

@pytest.mark.parametrize("step_ms, trace, kind, share", [
    (20, part(6, products=5), "overhead-bound", {"idle": 14 / 20, "reading": 6 / 20, "products": 0.0}),
    (20, part(19, products=12), "bandwidth-bound", {"reading": 10 / 20, "products": 2 / 20, "rest": 7 / 20}),
    (19, part(19, attention=9, products=2), "bandwidth-bound", {"reading": 10 / 19, "rest": 9 / 19}),  # attention reads
    (24, part(24, products=1, quantised=23), "dequantisation-bound", {"quantised": 14 * 23 / 24 / 24}),
    (24, part(24, products=8, quantised=5, quantisation=11), "dequantisation-bound", {"quantisation": 11 / 24}),
    (18, part(18, quantised=9, quantisation=9), "bandwidth-bound", {"quantisation": 8 / 18, "quantised": 0.0}),
    (20, part(21, products=21), "compute-bound", {"idle": 0.0, "reading": 10 / 21}),  # a profiler's 5%
])
def test_the_verdict_is_the_largest_cause_of_the_measured_time(step_ms, trace, kind, share):
    found = qb.verdict(row(step_ms, trace={"step": trace}), LIMITS)
    assert found.kind == kind and sum(found.shares.values()) == pytest.approx(1)
    assert {name: found.shares[name] for name in share} == pytest.approx(share)
    assert all(one >= 0 for one in found.shares.values())


def test_a_large_batch_is_compute_bound_at_its_floor():
    big = row(batch_size=300, trace={"step": part(19, products=18)})  # its products take 15 ms at the measured rate
    assert qb.verdict(big, LIMITS).shares["computing"] == pytest.approx(15 / 20)
    assert qb.verdict(big, LIMITS).kind == "compute-bound"


def test_the_prefill_is_judged_by_itself():
    one = row(trace={"step": part(6, products=5), "prefill": part(45, products=44)})  # of 50 ms, 10 at its floor
    assert qb.verdict(one, LIMITS, "prefill").kind == "compute-bound"
    assert "Its prefill (50.00 ms, at least 10.00 ms) is compute-bound." in qb.explain([one], LIMITS)[0]


@pytest.mark.parametrize("trace, error", [
    (part(23, products=20), "does not fit the row"), (part(6, products=5) | {"device_s": 0.012}, "does not sum")])
def test_a_trace_that_is_not_of_the_row_is_an_error_and_gets_no_verdict(trace, error):
    one = row(trace={"step": trace})
    with pytest.raises(ValueError, match=error):
        qb.verdict(one, LIMITS)
    assert qb.explain([one], LIMITS)[0].startswith("No verdict: GPT-2 (random weights), CPU FP32") and error in \
        qb.explain([one], LIMITS)[0]
    assert qb.why_table([one], LIMITS)["Verdict"].tolist() == [""]


def test_no_trace_or_no_limits_is_no_verdict_and_limits_of_another_device_or_machine_are_none():
    one = row(trace={"step": part(6, products=5)})
    gpu, elsewhere = dataclasses.replace(LIMITS, device="cuda"), dataclasses.replace(LIMITS, machine={"cpu": "B"})
    for run in ([one], [row(), LIMITS], [one, gpu], [one, elsewhere], [row(audit=None, trace=one.trace), LIMITS],
                [row(trace={"step": {}}), LIMITS]):
        assert "qb.limits()" in qb.explain(qb.Run(run))[0]
        qb.show_why(qb.Run(run)), qb.plot_floor(qb.Run(run))
    assert qb.explain([]) == ["nothing measured yet"]
    assert qb.explain(qb.Run([one, gpu, LIMITS])) == qb.explain([one], LIMITS)


def test_the_evidence_names_the_largest_causes_operators_and_what_cannot_help():
    small = AUDIT | {"step_bytes": 40_000_000, "quantised": 4}
    rows = [row(40.0, {"step": part(12, products=11)}),
            row(50.0, {"step": part(9, 250, quantised=4)}, setting="cpu-int4", audit=small)]
    first, second = qb.explain(rows, LIMITS)
    assert first == ("GPT-2 (random weights), CPU FP32, 11 tokens: overhead-bound. A step (40.00 ms) is above all "
                     "Python, launches and waiting (70%); reading 100 MB is 10.00 ms of it.")
    assert "launches more operators than CPU FP32 (250 against 100) to read less (40 against 100 MB): quantis" in second
    fast = qb.explain([row(trace={"step": part(6, products=5)})], LIMITS)[0]
    assert fast.endswith("reading 100 MB would take 10.00 ms from memory: a cache holds some.")


def test_the_table_of_reasons_has_numbers_and_shows_no_empty_columns():
    rows = [row(trace={"step": part(19, products=12)}), row(setting="cpu-bf16")]
    table = qb.why_table(rows, LIMITS)
    assert table.loc["GPT-2 (random weights)", "MBU"].tolist() == pytest.approx([0.5, 0.5])
    assert table["Reading (%)"].iloc[0] == pytest.approx(50) and table["Verdict"].tolist() == ["bandwidth-bound", ""]
    shown = repr(qb.show_why(rows, LIMITS))
    assert "Reading (%)" in shown and "Quantising (%)" not in shown and "Prefill" not in shown and "11 tokens" in shown


# ---- where it starts to pay ----

def cell(setting: str, batch: int, seconds: float, rounds: int = 6, **fields) -> qb.Measurement:
    """A cell whose rounds take 1, 2, 3 ... per cent longer each: the noise is all rounds', not the settings'."""
    samples = [seconds * (1 + number / 100) for number in range(rounds)]
    return qb.Measurement(**{"model": "gpt2", "weights_bytes": 10**9} | fields, setting=setting, max_new_tokens=8,
                          new_tokens=8, prompt_tokens=12, batch_size=batch, latencies_s=samples, machine=CPU,
                          first_token_s=[0.01] * rounds, weights="random", rounds=list(map(str, range(rounds))))


def test_it_pays_from_where_all_rounds_say_so_on():
    base, ours = {1: 1.0, 4: 1.2, 16: 2.0, 64: 4.0}, {1: 2.0, 4: 1.2, 16: 1.0, 64: 1.0}
    rows = [cell(setting, batch, seconds) for setting, times in (("gpu-fp16", base), ("gpu-int8", ours))
            for batch, seconds in times.items()]
    assert qb.crossovers(rows) == ["GPT-2 (random weights), by batch size: GPU INT8 is faster than GPU FP16 from batch "
                                   "16 on (0.50 times at batch 1, 4.00 times at batch 64)."]
    texts = [text.get_text() for text in qb.plot_scaling(rows).axes[0].texts]
    assert texts == ["batch 1: 0.50", "batch 4: 1.00 tie", "batch 16: 2.00", "batch 64: 4.00"]
    assert "nowhere faster" in qb.crossovers([one for one in rows if one.batch_size < 16])[0]


def test_what_shares_too_few_rounds_is_not_compared():
    rows = [cell("gpu-fp16", 1, 1.0), cell("gpu-fp16", 4, 1.0), cell("gpu-int8", 1, 0.5, 5), cell("gpu-int8", 4, 0.5)]
    assert qb.crossovers(rows)[0].endswith("from batch 4 on (2.00 times at batch 4); not compared at batch 1.")
    assert "not compared with GPU FP16" in qb.crossovers(rows[:3] + [cell("gpu-int8", 4, 0.5, rounds=3)])[0]
    assert "batch 1: not compared" in [text.get_text() for text in qb.plot_scaling(rows).axes[0].texts]


def test_models_are_a_line_of_their_own_and_one_place_is_none():
    rows = [cell(setting, 1, seconds, model=model, weights_bytes=size) for model, size, seconds in
            (("gpt2", 10**9, 2.0), ("gpt2-xl", 3 * 10**9, 0.5))
            for setting, seconds in (("gpu-fp16", 1.0), ("gpu-int4", seconds))]
    assert qb.crossovers(rows) == ["By model size, batch 1 (random weights): GPU INT4 is faster than GPU FP16 from "
                                   "GPT-2 XL on (0.50 times at GPT-2, 2.00 times at GPT-2 XL)."]
    assert qb.crossovers(rows[:2]) == ["fewer than two batch sizes or models measured yet"]
    with pytest.raises(ValueError, match="two batch sizes"):
        qb.plot_scaling(rows[:2])


def test_a_name_in_markup_is_text_and_two_machines_are_never_explained_together():
    rows = [cell(setting, batch, 1.0, model="<b>$\\frac{$ *x*</b>") for setting in ("gpu-fp16", "gpu-int8")
            for batch in (1, 4)]
    page = qb.crossovers(rows)._repr_markdown_() + qb.show_why(rows)._repr_html_() + qb.show_memory(rows)._repr_html_()
    assert "<b>$" not in page and "*x*" not in qb.crossovers(rows)._repr_markdown_()
    for plot in (qb.plot_scaling, qb.plot_floor, qb.plot_memory):
        plot(rows).draw_without_rendering()
    rows.append(dataclasses.replace(rows[0], machine={"cpu": "another"}))
    views = (qb.explain, qb.crossovers, qb.show_why, qb.show_memory, qb.plot_floor, qb.plot_scaling, qb.plot_memory)
    for view in views:
        with pytest.raises(ValueError, match="2 machines"):
            view(rows)


# ---- the memory ledger ----

LEDGER = qb.Measurement(
    model="gpt2", setting="gpu-int4", max_new_tokens=100, prompt_tokens=12, new_tokens=100, batch_size=2,
    latencies_s=[1.0], weights="random", weights_bytes=126_000_000, held_before_bytes=0, vram_peak_bytes=160_000_000,
    machine={"cpu": "C", "gpu": "G"}, audit={"quantised": 48, "class": "Linear4bit", "quantised_bytes": 47_000_000,
                                             "embedding_bytes": 78_000_000, "kv_bytes_per_token": 1000})
PARTS = ["Quantised layers", "Embeddings and head", "Other weights", "KV cache", "Working memory"]


def test_the_parts_of_memory_add_up_to_the_peak():
    absent = dataclasses.replace(LEDGER, status="unavailable", latencies_s=[], new_tokens=None)
    table = qb.memory_table([LEDGER, absent])
    assert table[PARTS].iloc[0].tolist() == pytest.approx([47, 78, 1, 0.224, 160 - 126 - 0.224])
    assert len(table) == 1 and table["Generate peak"].tolist() == [160.0]
    assert max(bar.get_width() for bar in qb.plot_memory([LEDGER]).axes[0].patches) == pytest.approx(160)
    assert "78 MB of 126 MB under GPU INT4 are embeddings" in repr(qb.show_memory([LEDGER]))


def test_a_cpu_rows_peak_is_resident_memory_and_an_empty_run_has_no_chart():
    cpu = dataclasses.replace(LEDGER, setting="cpu-int4", vram_peak_bytes=None, ram_peak_bytes=130_000_000)
    table = qb.memory_table([cpu])
    assert table["Working memory"].tolist() == pytest.approx([130 - 126 - 0.224])
    assert table["Generate peak"].isna().all()
    with pytest.raises(ValueError, match="nothing in this run is ok"):
        qb.plot_memory([dataclasses.replace(LEDGER, status="failed", latencies_s=[], new_tokens=None)])
