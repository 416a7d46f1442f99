"""The ledger's parts add up to the peak, by hand."""

import dataclasses

import pytest

from quantbench.memory import PARTS, ledger, memory_table, plot_memory, show_memory
from quantbench.record import Measurement

ROW = Measurement(
    model="gpt2", setting="gpu-int4", max_new_tokens=100, prompt_tokens=12, new_tokens=100, batch_size=2,
    latencies_s=[1.0], weights="random", weights_bytes=126_000_000, held_before_bytes=0, vram_peak_bytes=160_000_000,
    machine={"cpu": "C", "gpu": "G"}, audit={"quantised": 48, "class": "Linear4bit", "quantised_bytes": 47_000_000,
                                             "embedding_bytes": 78_000_000, "kv_bytes_per_token": 1000})


def test_the_parts_by_hand():
    parts = ledger(ROW)
    assert [parts[name] for name in PARTS] == [47e6, 78e6, 1e6, 224_000, 160e6 - 126e6 - 224_000]
    assert sum(parts[name] for name in PARTS) == ROW.vram_peak_bytes == parts["Generate peak"]


def test_a_cpu_rows_peak_is_resident_memory():
    row = dataclasses.replace(ROW, setting="cpu-int4", vram_peak_bytes=None, ram_peak_bytes=130_000_000)
    assert ledger(row)["Working memory"] == 130e6 - 126e6 - 224_000
    frame = memory_table([row])
    assert frame.loc["GPT-2 (random weights)", "Generate peak"] != frame.loc["GPT-2 (random weights)", "Generate peak"]


def test_it_says_what_no_setting_quantises():
    assert "78 MB of 126 MB under GPU INT4 are embeddings" in repr(show_memory([ROW]))


def test_rows_without_samples_have_no_line_and_an_empty_run_no_chart():
    absent = dataclasses.replace(ROW, status="unavailable", latencies_s=[], new_tokens=None)
    assert len(memory_table([ROW, absent])) == 1
    with pytest.raises(ValueError, match="nothing in this run is ok"):
        plot_memory([absent])


def test_the_chart_stacks_the_parts():
    figure = plot_memory([ROW, dataclasses.replace(ROW, setting="gpu-fp16")])
    ends = [bar.get_x() + bar.get_width() for bar in figure.axes[0].patches]
    assert max(ends) == pytest.approx(160.0)


def test_two_machines_are_refused():
    with pytest.raises(ValueError, match="2 machines"):
        plot_memory([ROW, dataclasses.replace(ROW, machine={"cpu": "D"})])
