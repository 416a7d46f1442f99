"""A measurement: figures from samples by hand, and its line of JSON."""

import dataclasses
import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from quantbench.record import FIGURES, SCHEMA, Measurement, NewerSchema, Workload

ROW = Measurement(
    model="gpt2", setting="gpu-int4", max_new_tokens=100, weights="random", prompt_tokens=12, new_tokens=100,
    batch_size=2, latencies_s=[4.0, 2.0, 5.0], first_token_s=[0.5, 0.25, 1.0], weights_bytes=127_000_000,
    vram_peak_bytes=160_000_000, energy_j=[100.0, 300.0, 200.0], audit={"quantised": 48, "class": "Linear4bit"},
    machine={"cpu": "C", "gpu": "G"}, versions={"torch": "2.13.0", "commit": "abc"})

plain = st.recursive(st.none() | st.booleans() | st.integers(-2**53, 2**53) | st.text()
                     | st.floats(allow_nan=False, allow_infinity=False),
                     lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner), max_leaves=8)
seconds = st.lists(st.floats(1e-9, 1e9), max_size=10)


def test_figures_by_hand():
    assert (ROW.latency_s, ROW.ttft_s) == (4.0, 0.5)
    assert ROW.tokens_per_s == 2 * 100 / 4
    assert ROW.decode_tokens_per_s == 2 * 99 / 3.5
    assert (ROW.vram_gb, ROW.weights_gb, ROW.ram_peak_gb) == (0.16, 0.127, None)
    assert ROW.energy_per_token_j == 1.0
    assert ROW.latency_ci == (2.0, 5.0) and ROW.tokens_per_s_ci == (40.0, 100.0)
    assert ROW.noisy and not dataclasses.replace(ROW, latencies_s=[4.0, 4.1, 4.0]).noisy


def test_a_row_without_samples_has_no_figures():
    row = Measurement(model="gpt2", setting="gpu-fp16", max_new_tokens=8, status="unavailable", reason="no GPU")
    assert all(getattr(row, name) in (None, False) for name in FIGURES)
    assert "no GPU" in repr(row)


def test_busy_names_who_else_was_there():
    busy = dataclasses.replace(ROW, conditions={"before": {"gpu_busy": 0.5, "cpu_busy": 0.1}})
    assert busy.busy == "GPU 50% busy" and ROW.busy is None


@given(seconds, seconds, plain, st.text(), st.none() | st.text())
def test_a_row_comes_back_from_its_line(latencies, firsts, machine, prompt, text):
    row = dataclasses.replace(ROW, latencies_s=latencies, first_token_s=firsts, machine={"x": machine}, prompt=prompt,
                              text=text)
    assert Measurement.from_json(row.to_json()) == row and "\n" not in row.to_json()


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_nan_and_infinity_reach_neither_a_row_nor_a_file(value):
    with pytest.raises(ValueError):
        dataclasses.replace(ROW, latencies_s=[1.0, value])
    with pytest.raises(ValueError):
        dataclasses.replace(ROW, machine={"x": value}).to_json()
    line = ROW.to_json().replace("4.0", json.dumps(value))
    with pytest.raises(ValueError):
        Measurement.from_json(line)


@given(st.binary())
def test_any_bytes_are_read_or_refused(line):
    try:
        Measurement.from_json(line)
    except (ValueError, RecursionError):
        pass


@pytest.mark.parametrize("change", [
    {"schema": None}, {"schema": True}, {"latencies_s": "fast"}, {"latencies_s": [-1.0]}, {"audit": []},
    {"status": "fine"}, {"weights": "best"}, {"model": None}, {"colour": "red"}, {"batch_size": 1.5}])
def test_a_line_that_is_no_measurement_is_refused(change):
    with pytest.raises(ValueError):
        Measurement.from_json(json.dumps(json.loads(ROW.to_json()) | change))


def test_a_later_schema_is_refused_by_name():
    with pytest.raises(NewerSchema, match=f"schema {SCHEMA + 1}.*upgrade quantbench"):
        Measurement.from_json(json.dumps(json.loads(ROW.to_json()) | {"schema": SCHEMA + 1}))


def test_hostile_text_stays_text():
    row = dataclasses.replace(ROW, model="<script>alert(1)</script>")
    assert "<script>" not in row._repr_html_() and "&lt;script&gt;" in row._repr_html_()


def test_the_commit_is_not_part_of_the_key_but_versions_are():
    assert dataclasses.replace(ROW, versions={"torch": "2.13.0", "commit": "def"}).key == ROW.key
    assert dataclasses.replace(ROW, versions={"torch": "2.14.0", "commit": "abc"}).key != ROW.key


@pytest.mark.parametrize("bad, message", [
    ({"prompt": " "}, "prompt is empty"), ({"max_new_tokens": 0}, "at least 1"), ({"batch_size": True}, "batch_size"),
    ({"repeats": 0}, "repeats"), ({"budget_s": -1}, "budget_s"), ({"max_new_tokens": "9"}, "whole number")])
def test_a_workload_that_cannot_run_is_refused(bad, message):
    with pytest.raises(ValueError, match=message):
        Workload(**bad)
