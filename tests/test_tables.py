"""The published columns first, numbers stay numbers, what could not run keeps its row."""

import dataclasses
import math

import pytest

from quantbench.published import published_table, show_published
from quantbench.record import Measurement
from quantbench.tables import machine_table, markdown, show, table

ROW = Measurement(model="gpt2", setting="gpu-int4", max_new_tokens=128, new_tokens=128, latencies_s=[2.0, 2.0, 2.0],
                  first_token_s=[0.1], weights="random", weights_bytes=127_000_000, vram_peak_bytes=167_000_000,
                  machine={"cpu": "C", "gpu": "G"}, audit={"quantised": 48, "class": "Linear4bit"})
ABSENT = Measurement(model="gpt2", setting="gpu-bf16", max_new_tokens=128, status="unavailable", reason="a <T4> | no",
                     machine={"cpu": "C", "gpu": "G"})


def test_the_published_columns_come_first_and_are_numbers():
    frame = table([ABSENT, ROW])
    assert list(frame.columns[:5]) == ["Setting", "Max New Tokens", "Latency (s)", "Tokens/sec", "VRAM (GB)"]
    first = frame.iloc[0]
    assert (first["Setting"], first["Tokens/sec"], first["VRAM (GB)"]) == ("GPU INT4", 64.0, 0.167)
    assert math.isnan(frame.iloc[1]["Latency (s)"]) and frame.iloc[1]["Status"].startswith("unavailable: a <T4>")
    assert "random weights" in frame.index[0] and first["Audit"] == "48 × Linear4bit"


def test_energy_has_its_column_only_where_it_was_read_for_long_enough():
    watched = dataclasses.replace(ROW, energy_j=[128.0, 0.0, 256.0])
    assert table([watched])["Energy (J/token)"].tolist() == [1.0] and "Energy (J/token)" in repr(show([watched]))
    brief = dataclasses.replace(watched, latencies_s=[0.2, 0.2, 0.2])
    assert brief.energy_per_token_j is None and "Energy" not in repr(show([brief, ROW]))


def test_an_empty_run_has_the_columns():
    assert list(table([]).columns[:2]) == ["Setting", "Max New Tokens"]


def test_what_it_shows_is_escaped():
    hostile = dataclasses.replace(ROW, model="<script>|x|")
    html = show([hostile, ABSENT])._repr_html_()
    assert "<script>" not in html and "&lt;T4&gt;" in html
    text = markdown([hostile, ABSENT])
    assert "<script>" not in text and "| no" not in text.replace("\\| no", "")


def test_one_table_per_model_and_dashes_for_nothing():
    shown = show([ROW, dataclasses.replace(ROW, model="distilgpt2"), ABSENT])
    assert len(shown) == 2 and "–" in repr(shown)


def test_the_published_table_is_corrected_by_inference():
    frame = published_table()
    corrected = sorted(set(frame["New tokens (inferred)"]))
    assert len(frame) == 16 and corrected == [64, 128, 256]
    gpt2 = frame[(frame["Setting"] == "CPU FP32") & (frame["Latency (s)"] == 11.896)].iloc[0]
    assert gpt2["Tokens/sec (corrected)"] == pytest.approx(128 / 11.896)
    assert "inference" in repr(show_published([ROW])).lower()


def test_the_users_own_row_stands_beside_it():
    frame = published_table([ROW])
    mine = frame[(frame["Setting"] == "GPU INT4") & (frame["Latency (s)"] == 1.910)].iloc[0]
    assert mine["Tokens/sec (here)"] == 64.0 and mine["Weights (GB), model alone"] == 0.127


def test_the_machine_in_words():
    text = repr(machine_table({"cpu": "Some CPU", "cores": 2, "ram_bytes": 24 * 10**9}, {"torch": "2.13.0"}))
    assert "Some CPU" in text and "24.0 GB" in text and "2.13.0" in text
