"""Sentences from rows, checked by hand."""

import dataclasses

import pytest

from quantbench.findings import findings
from quantbench.record import Measurement

T4 = {"cpu": "C", "gpu": "Tesla T4"}


def row(setting, seconds, **more):
    asked = {"model": "gpt2", "setting": setting, "max_new_tokens": 100, "new_tokens": 100, "machine": T4,
             "weights": "pretrained", "weights_bytes": 10**8}
    return Measurement(**asked | {"latencies_s": seconds} | more)


FP16 = row("gpu-fp16", [2.0, 2.0, 2.0], weights_bytes=249_000_000, vram_peak_bytes=291_000_000)
INT8 = row("gpu-int8", [4.0, 4.0, 4.0], weights_bytes=164_000_000, vram_peak_bytes=205_000_000)
INT4 = row("gpu-int4", [1.9, 2.0, 2.1], weights_bytes=127_000_000, vram_peak_bytes=167_000_000)
CPU = row("cpu-fp32", [10.0, 10.0, 10.0], weights_bytes=498_000_000)


def said(*rows):
    return repr(findings(rows))


def test_the_fastest_the_smallest_and_the_ratios():
    text = said(FP16, INT8, CPU)
    assert "GPU FP16 at 50.0 tokens/sec" in text and "is the fastest" in text
    assert "GPU INT8 0.50×" in text and "CPU FP32 0.20×" in text
    assert "smallest weights GPU INT8, 0.164 GB" in text


def test_overlapping_intervals_are_a_tie():
    text = said(FP16, INT4)
    assert "a tie for the fastest" in text and "GPU INT4 1.00× (0.95–1.05, tie)" in text


def test_without_gpu_fp16_ratios_are_to_cpu_fp32_and_it_is_said():
    assert "against CPU FP32 (no GPU FP16 row" in said(CPU, INT8)


def test_noisy_busy_and_throttled_rows_are_named():
    noisy = dataclasses.replace(INT8, latencies_s=[2.0, 4.0, 6.0])
    busy = dataclasses.replace(FP16, conditions={"before": {"gpu_busy": 0.6}, "after": {"throttled": ["power cap"]}})
    text = said(noisy, busy)
    assert "Noisy" in text and "GPU INT8 at 100 tokens" in text
    assert "GPU FP16 at 100 tokens (GPU 60% busy, GPU held back by its power cap)" in text


def test_what_was_not_measured_has_its_reason():
    absent = row("gpu-bf16", [], new_tokens=None, status="unavailable", reason="only emulated")
    assert "Not measured, unavailable: only emulated: GPU BF16" in said(FP16, absent)
    assert said() == "- nothing measured yet"


def test_random_weights_are_said():
    assert "random weights" in said(dataclasses.replace(FP16, weights="random"))


def test_hostile_names_stay_text_in_markdown():
    markdown = findings([dataclasses.replace(FP16, model="<b>*x*</b>")])._repr_markdown_()
    assert "<b>" not in markdown and "*x*" not in markdown.replace("**", "").replace("\\*", "")


def test_two_machines_are_refused():
    with pytest.raises(ValueError, match="2 machines"):
        findings([FP16, dataclasses.replace(INT8, machine={"cpu": "D"})])
