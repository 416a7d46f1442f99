"""The published columns first, numbers stay numbers, what could not run keeps its row, nothing of a row is markup."""

import dataclasses
import math

import pandas as pd

from quantbench.records import Measurement
from quantbench.tables import Table, Tables, machine_table, show, table

ROW = Measurement(model="gpt2", setting="gpu-int4", max_new_tokens=128, new_tokens=128, latencies_s=[2.0] * 6,
                  first_token_s=[0.1], weights="random", weights_bytes=127_000_000, vram_peak_bytes=167_000_000,
                  load_s=4.0, machine={"cpu": "C", "gpu": "G"}, audit={"quantised": 48, "class": "Linear4bit"})
FEW = dataclasses.replace(ROW, setting="gpu-fp16", latencies_s=[2.0, 1.0, 4.0], audit=None)
ABSENT = Measurement(model="gpt2", setting="gpu-bf16", max_new_tokens=128, status="unavailable",
                     reason="a <T4> | no\n" * 40, machine={"cpu": "C", "gpu": "G"})


def test_the_published_columns_come_first_and_are_numbers():
    frame = table([ABSENT, ROW])
    assert list(frame.columns[:5]) == ["Setting", "Max New Tokens", "Latency (s)", "Tokens/sec", "VRAM (GB)"]
    first = frame.iloc[0]
    assert first[["Setting", "Tokens/sec", "VRAM (GB)", "Once (s)"]].tolist() == ["GPU INT4", 64.0, 0.167, 4.0]
    assert math.isnan(frame.iloc[1]["Latency (s)"]) and frame.iloc[1]["Status"].startswith("unavailable: a <T4>")
    assert frame.index[0] == "GPT-2" and first["Weights"] == "random" and first["Audit"] == "48 × Linear4bit"
    assert list(table([]).columns[:2]) == ["Setting", "Max New Tokens"]


def test_an_interval_needs_six_samples_and_fewer_are_looks():
    assert table([ROW])["Tokens/sec 95%"].tolist() == ["64.0–64.0"]
    frame = table([ROW, FEW])
    assert frame["Tokens/sec 95%"].tolist() == ["32.0–128.0 (3 looks)", "64.0–64.0"]
    assert "fewer than 6 samples" in repr(show([FEW])) and "fewer than" not in repr(show([ROW]))


def test_columns_with_nothing_in_them_are_not_shown():
    header = repr(show([ROW])).splitlines()[1]
    assert "VRAM (GB)" in header and not any(name in header for name in ("RAM peak", "Energy", "Workload", "Note"))
    assert "batch 4" in repr(show([dataclasses.replace(ROW, batch_size=4)]))
    watched = dataclasses.replace(ROW, energy_j=[128.0] * 6)
    assert table([watched])["Energy (J/token)"].tolist() == [1.0] and "Energy (J/token)" in repr(show([watched]))


def test_one_table_per_model_and_machine():
    shown = show([ROW, dataclasses.replace(ROW, model="distilgpt2", weights="bundled"), ABSENT])
    assert [one.caption[:2] for one in shown] == [
        ["GPT-2", "random weights: speed and memory are real, text is not"], ["DistilGPT-2", "bundled weights"]]
    assert "–" in repr(shown) and max(map(len, repr(shown).splitlines())) < 200  # the reason is cut
    assert len(show([ROW, dataclasses.replace(ROW, machine={"cpu": "D"})])) == 2
    assert table([ROW, dataclasses.replace(ROW, machine={"cpu": "D"})])["Machine"].tolist() == ["G · C", "D"]
    assert repr(show([])) == "nothing measured yet" and "nothing measured yet" in show([])._repr_html_()


def test_what_it_shows_is_escaped_and_no_formula():
    hostile = dataclasses.replace(ROW, model="<script>|x|$a$", audit={"quantised": 1, "class": "$b$<i>"})
    cached = dataclasses.replace(ROW, cache="\x1b[31m\u202ered")
    assert all(cell.isprintable() for cell in table([cached])["Workload"])
    html = show([hostile, ABSENT])._repr_html_()
    assert not any(bad in html for bad in ("<script>", "<i>", "$", "<T4>")) and "&lt;T4&gt;" in html
    assert 'class="tex2jax_ignore"' in html
    text = show([hostile, ABSENT]).markdown()
    assert not any(bad in text for bad in ("<script>", "<i>", "$", "|x|"))


def test_a_table_of_any_frame():
    frame = pd.DataFrame({"<b>": ["\x1b[31mred", None], "KL": [0.12345, float("nan")], "KL 95%": ["0.1–0.2", "–"]})
    shown = Tables([Table(frame, ["Title", "more"], "a <note>", {"KL": 3, "KL 95%": 0})])
    html = shown._repr_html_()
    assert "0.123" in html and "&lt;b&gt;" in html and "&lt;note&gt;" in html and "\x1b" not in html + repr(shown)
    assert shown.markdown().splitlines()[3] == "| --- | ---: | ---: |"


def test_the_machine_in_words():
    text = repr(machine_table({"cpu": "Some CPU", "cores": 2, "ram_bytes": 24 * 10**9}, {"torch": "2.13.0"}))
    assert "Some CPU" in text and "24.0 GB" in text and "2.13.0" in text
