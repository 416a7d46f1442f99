"""Limits, floors, traces and verdicts: a model of known bytes and known sleep, and rows recorded on a GPU."""

import dataclasses
import json
import re
import time
import timeit
from pathlib import Path
from statistics import median

import pytest
import torch

import quantbench as qb
from quantbench.audit import audit
from quantbench.explain import SHARES
from quantbench.limits import _kept, known_limits
from quantbench.scaling import scaling
from quantbench.trace import kind_of

RECORDED = qb.Run.read(Path(__file__).parent.parent / "results" / "published" / "why" / "nvidia-h200.jsonl")


def recorded(model: str, setting: str, engine: str) -> qb.Measurement:
    return max((row for row in RECORDED if (row.model, row.setting, row.engine) == (model, setting, engine)
                and row.batch_size == 1 and row.trace), key=lambda row: row.max_new_tokens)


# ---- limits ----

@pytest.mark.alone
def test_the_limits_are_those_of_a_plain_measurement_and_are_kept(tmp_path, monkeypatch):
    monkeypatch.setenv("QUANTBENCH_CACHE", str(tmp_path))
    start = time.perf_counter()
    found = qb.limits("cpu")
    assert time.perf_counter() - start < 20
    array = torch.ones(2**27)  # 512 MiB
    seconds = []
    while sum(seconds) < 3:  # as long as the limits look: other programs take a share of memory that changes
        start = time.perf_counter()
        array.sum()
        seconds.append(time.perf_counter() - start)
    assert found["read_bytes_per_s"] == pytest.approx(array.nbytes / min(seconds), rel=0.5)
    assert set(found["matrix_flops_per_s"]) >= {"float32", "bfloat16"}
    assert all(rate > 1e9 for rate in found["matrix_flops_per_s"].values())
    start = time.perf_counter()
    assert qb.limits("cpu") == found and time.perf_counter() - start < 0.1
    assert "GB/s" in repr(found) and "<table>" in found._repr_html_()
    json.loads(json.dumps(found))


def test_a_device_that_is_not_here_has_no_limits():
    with pytest.raises(ValueError, match="no device 'tpu'"):
        qb.limits("tpu")


def test_a_broken_file_of_limits_is_as_none(tmp_path, monkeypatch):
    monkeypatch.setenv("QUANTBENCH_CACHE", str(tmp_path))
    assert known_limits("cpu") is None
    for text in ("", "[1]", "{}", '{"read_bytes_per_s": 1}', "\x00"):
        _kept("cpu").write_text(text)
        assert known_limits("cpu") is None


# ---- a model of known bytes and known sleep ----

@pytest.fixture
def rate(tmp_path, monkeypatch):
    """Sets what this machine is said to read per second."""
    monkeypatch.setenv("QUANTBENCH_CACHE", str(tmp_path))

    def set_rate(bytes_per_s: float) -> None:
        _kept("cpu").write_text(json.dumps({
            "name": "a machine of known rates", "read_bytes_per_s": bytes_per_s,
            "matrix_flops_per_s": {"float32": 1e12}}))

    return set_rate


@pytest.mark.alone
def test_a_step_that_sleeps_has_the_right_floor_and_mbu_and_is_overhead_bound(tiny_gpt2, rate):
    read = 4 * (500 * 64 + 2 * (12 * 64 * 64 + 13 * 64) + 2 * 64)  # the tied head, 2 layers, a norm; no positions
    read += 2 * 2 * 64 * 4 * (12 + 20 / 2)  # keys and values of 2 layers at the mean length
    with qb.load(tiny_gpt2, "cpu-fp32") as lm:
        rate(read / 0.010)
        lm.model.transformer.register_forward_pre_hook(lambda *_: time.sleep(0.020))
        row = qb.generate(lm, max_new_tokens=20, repeats=3, trace=True, progress=False)
    assert 1e6 * row.step_mb == pytest.approx(read)
    assert row.read_ms == pytest.approx(10) and 20 < row.step_ms < 32
    assert row.mbu == pytest.approx(10 / row.step_ms)
    found = qb.verdict(row)
    assert found.kind == "overhead-bound" and found.shares["idle"] > 0.6
    assert sum(found.shares.values()) == pytest.approx(1)


@pytest.mark.alone
def test_a_step_that_reads_is_bandwidth_bound(tiny_gpt2, rate):
    ballast, vector = torch.ones(2**14, 2**14), torch.ones(1, 2**14)  # 1 GiB, read as a decode step reads weights

    def read(*_) -> None:
        torch.nn.functional.linear(vector, ballast)

    rate(ballast.nbytes / median(timeit.repeat(read, number=1, repeat=20)))
    with qb.load(tiny_gpt2, "cpu-fp32") as lm:
        lm.model.transformer.register_buffer("ballast", ballast)
        lm.model.transformer.register_forward_pre_hook(read)
        lm.audit = audit(lm.model)
        row = qb.generate(lm, max_new_tokens=10, repeats=3, trace=True, progress=False)
    assert row.step_mb > ballast.nbytes / 1e6
    assert qb.verdict(row).kind == "bandwidth-bound" and row.mbu > 0.5, qb.explain([row])


@pytest.mark.parametrize("setting", ["cpu-fp32", "cpu-int4", "cpu-int8-dynamic", "cpu-bf16"])
def test_the_weights_that_are_multiplied_are_counted_in_every_setting(tiny_gpt2, setting):
    with qb.load(tiny_gpt2, setting) as lm:
        assert lm.audit["step_products"] == 2 * 12 * 64 * 64 + 500 * 64


# ---- traces ----

@pytest.mark.parametrize("setting", ["cpu-fp32", "cpu-int8", "cpu-int4", "cpu-int8-dynamic"])
def test_a_trace_divides_the_time_and_touches_no_timed_sample(tiny, setting):
    profiled = []

    def clock() -> float:
        profiled.append(torch.autograd._profiler_enabled())
        return time.perf_counter()

    with qb.load(tiny, setting) as lm:
        row = qb.generate(lm, max_new_tokens=8, repeats=3, trace=True, clock=clock, progress=False)
    assert profiled and not any(profiled)
    trace = row.trace
    assert trace["tokens"] == 8 and 0 < trace["device_s"] <= trace["wall_s"]
    assert sum(trace["kinds"].values()) == pytest.approx(trace["device_s"], rel=0.02)
    assert trace["kinds"]["products"] > 0 and trace["kinds"]["attention"] > 0 and trace["kernels"] > 20
    assert qb.Measurement.from_json(row.to_json()) == row


def test_without_asking_there_is_no_trace(tiny):
    with qb.load(tiny, "cpu-fp32") as lm:
        assert qb.generate(lm, max_new_tokens=2, repeats=1, progress=False).trace is None


@pytest.mark.parametrize("name, kind", [
    ("nvjet_sm90_hsh_64x8_64x16_4x1_v_bz_bias_NNT", "products"), ("void gemm_4bit_simt<__half, 1>", "products"),
    ("fmha_cutlassF_f32_aligned_64x64_rf_sm80(PyTorchMemEffAttention)", "attention"),
    ("cudnn_generated_fort_native_sdpa_sm80_flash_fprop", "attention"),
    ("void kInt8VectorQuant<__half, 1024, 1>", "quantisation"), ("void kdequant_mm_int32_fp16<4, 512>", "quantisation"),
    ("void kDequantizeBlockwise<__half, 512, 64, 8, 2>", "quantisation"), ("aten::linear", "products"),
    ("quantized::linear_dynamic", "products"), ("bitsandbytes::int8_vectorwise_quant", "quantisation"),
    ("void at::native::vectorized_layer_norm_kernel", None), ("aten::add", None),
])
def test_kernels_and_operators_are_known_by_their_names(name, kind):
    assert kind_of(name) == kind


# ---- verdicts, on rows recorded on an H200 ----

@pytest.mark.parametrize("model, setting, engine, kind", [
    ("gpt2", "gpu-fp16", "eager", "overhead-bound"), ("gpt2", "gpu-int8", "eager", "overhead-bound"),
    ("gpt2", "gpu-fp16", "graph", "overhead-bound"), ("gpt2", "gpu-int4", "graph", "overhead-bound"),
    ("llama-7b-shape", "gpu-fp16", "graph", "bandwidth-bound"),
    ("llama-7b-shape", "gpu-int4", "graph", "dequantisation-bound"),
])
def test_the_verdict_on_a_recorded_row(model, setting, engine, kind):
    found = qb.verdict(recorded(model, setting, engine))
    assert found.kind == kind and sum(found.shares.values()) == pytest.approx(1)
    assert set(found.shares) == set(SHARES) and all(share >= 0 for share in found.shares.values())


def test_a_quantised_model_whose_plain_head_takes_longest_is_not_bound_by_dequantising():
    """As INT4 on a CPU, whose head stays in float16: 11 of 16 ms."""
    row = recorded("gpt2", "gpu-int4", "graph")
    top = [{"name": "aten::linear", "seconds": 11e-3, "calls": 1.0},
           {"name": "bitsandbytes::gemv_4bit", "seconds": 3e-3, "calls": 48.0}]
    trace = {"device_s": 15e-3, "kinds": {"products": 14e-3, "other": 1e-3}, "top": top}
    row = dataclasses.replace(row, latencies_s=[0.016 * (row.max_new_tokens - 1) + 0.01] * 3,
                              first_token_s=[0.01] * 3, trace=trace)
    assert qb.verdict(row).kind == "compute-bound"
    top[0]["name"], top[1]["name"] = top[1]["name"], top[0]["name"]
    assert qb.verdict(row).kind == "dequantisation-bound"


def test_a_large_batch_is_compute_bound():
    row = recorded("llama-7b-shape", "gpu-fp16", "graph")
    batch = 2000  # the floor of its products is far above that of its bytes, and fills the step
    row = dataclasses.replace(row, batch_size=batch, audit=row.audit | {"kv_bytes_per_token": 0})
    seconds = 2 * batch * row.audit["step_products"] / row.limits["matrix_flops_per_s"]["float16"]
    trace = {"device_s": seconds * 1.1, "kinds": {"products": seconds * 1.05, "other": seconds * 0.05}}
    row = dataclasses.replace(row, latencies_s=[seconds * 1.2 * (row.max_new_tokens - 1) + 0.01] * 3,
                              first_token_s=[0.01] * 3, trace=trace)
    assert qb.verdict(row).kind == "compute-bound"


def test_the_evidence_names_kernels_waiting_and_what_cannot_help():
    said = {sentence.partition(": ")[0]: sentence for sentence in qb.explain(RECORDED)}
    text = said["GPT-2 (random weights), GPU INT8, 32 tokens"]
    assert re.search(r"the GPU waits 9\d%", text) and "launches 576 kernels a token where GPU FP16 launches 297" in text
    assert text.endswith("quantising cannot help until overhead goes away.")
    assert "needs 0.06 ms" in said["GPT-2 (random weights), GPU FP16, 32 tokens"]


def test_rows_without_limits_or_trace_get_no_verdict_and_broken_ones_do_no_harm():
    row = recorded("gpt2", "gpu-fp16", "eager")
    for change in ({"trace": None}, {"limits": None}, {"limits": {"read_bytes_per_s": "fast"}}, {"trace": {"kinds": 3}},
                   {"trace": {"device_s": "x", "kinds": {}}}, {"audit": {"step_bytes": "many"}}, {"audit": None},
                   {"trace": row.trace | {"kinds": {"products": -1.0}}},
                   {"trace": {"kernels": "many"}}, {"limits": {"matrix_flops_per_s": 3}}):
        broken = dataclasses.replace(row, **change)
        assert qb.verdict(broken) is None and "No verdict" in qb.explain([broken])[0]
        qb.show_why([broken]), qb.plot_floor([broken])
    assert qb.explain([]) == ["nothing measured yet"]


def test_two_machines_are_never_explained_together():
    row = recorded("gpt2", "gpu-fp16", "eager")
    with pytest.raises(ValueError, match="2 machines"):
        qb.explain([row, dataclasses.replace(row, machine={"cpu": "another"})])


# ---- where it starts to pay ----

def cell(setting: str, batch: int, seconds: list[float]) -> qb.Measurement:
    return qb.Measurement(model="gpt2", setting=setting, max_new_tokens=8, new_tokens=8, prompt_tokens=12,
                          batch_size=batch, latencies_s=seconds, first_token_s=[0.01] * len(seconds), weights="random",
                          weights_bytes=10**9, machine={"cpu": "a CPU"})


def test_the_crossover_is_where_the_interval_leaves_one():
    base = {1: 1.0, 4: 1.2, 16: 2.0, 64: 4.0}
    ours = {1: 2.0, 4: 1.3, 16: 1.0, 64: 1.0}
    rows = [cell("gpu-fp16", batch, [s, s * 1.01, s * 0.99]) for batch, s in base.items()]
    rows += [cell("gpu-int8", batch, [s, s * 1.01, s * 0.99]) for batch, s in ours.items()]
    series, = scaling(rows)
    assert [point.ratio for point in series.points] == pytest.approx([0.5, 1.2 / 1.3, 2.0, 4.0])
    said, = qb.crossovers(rows)
    assert "GPU INT8 is faster than GPU FP16 from batch 16 on (0.50× at batch 1, 4.00× at batch 64)" in said
    assert len(qb.plot_scaling(rows).axes) == 1
    never = [row for row in rows if row.batch_size < 16]
    assert "nowhere faster" in qb.crossovers(never)[0]


def test_a_model_named_in_markup_is_text_in_sentences_and_charts():
    name = "<b>$\\frac{$ *x*</b>"
    rows = [dataclasses.replace(cell(setting, batch, [1.0, 1.1]), model=name)
            for setting in ("gpu-fp16", "gpu-int8") for batch in (1, 4)]
    page = qb.crossovers(rows)._repr_markdown_() + qb.show_why(rows)._repr_html_() + qb.explain(rows)._repr_markdown_()
    assert "<b>$" not in page and "*x*" not in qb.crossovers(rows)._repr_markdown_()
    for chart in (qb.plot_scaling(rows), qb.plot_floor(rows)):
        chart.draw_without_rendering()


def test_one_batch_size_has_no_line():
    rows = [cell("gpu-fp16", 1, [1.0, 1.1]), cell("gpu-int8", 1, [1.0, 1.1])]
    assert qb.crossovers(rows) == ["fewer than two batch sizes or models measured yet"]
    with pytest.raises(ValueError, match="two batch sizes"):
        qb.plot_scaling(rows)


# ---- batches and lengths, for real ----

def test_a_sweep_takes_several_batch_sizes_and_counts_all_sequences(tiny):
    rows = list(qb.sweep(tiny, "cpu-fp32", 5, batch_size=[1, 3], repeats=3, progress=False))
    assert [(row.batch_size, row.status) for row in rows] == [(1, "ok"), (3, "ok")]
    for row in rows:
        assert row.tokens_per_s == pytest.approx(row.batch_size * 5 / row.latency_s)


@pytest.mark.alone
def test_latency_does_not_shrink_with_repeats():
    with qb.load("distilgpt2", "cpu-fp32", weights="random") as lm:
        seconds = qb.generate(lm, max_new_tokens=16, repeats=20, progress=False).latencies_s
    assert median(seconds[10:]) == pytest.approx(median(seconds[:10]), rel=0.2)


@pytest.fixture
def two_threads():
    """With more, a step's products shrink and the growing cache's share rises: 1.36 times on 16 cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.alone
def test_a_thousand_tokens_cost_little_more_each_than_a_hundred(two_threads):
    with qb.load("gpt2", "cpu-fp32", weights="random") as lm:
        short, long, again = (qb.generate(lm, max_new_tokens=tokens, repeats=1, progress=False)
                              for tokens in (100, 1000, 100))
    each = min(short.latency_s, again.latency_s) / 100
    assert long.latency_s / 1000 <= 1.3 * each
    assert max(short.latency_s, again.latency_s) < 1.5 * min(short.latency_s, again.latency_s)
