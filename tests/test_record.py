"""A measurement: figures from samples by hand, and its line of JSON."""

import dataclasses
import html.parser
import json
import math
import typing
from pathlib import Path

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
GOLDEN = Path(__file__).parent / "data" / "schema-1.jsonl"  # as the first version wrote it: it stays as it is
SAMPLE = {int: 3, float: 1.5, str: "né\n\u2028", dict: {"a": [1, None, "b"]}, list[float]: [0.1, 2.0]}

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


def test_every_field_comes_back_from_its_line():
    hints = typing.get_type_hints(Measurement)
    full = {name: SAMPLE[(typing.get_args(hint) or [hint])[0] if hint not in SAMPLE else hint]
            for name, hint in hints.items()}
    row = Measurement(**full | {"schema": 1, "status": "timeout", "weights": "bundled", "versions": {"torch": "2"}})
    assert Measurement.from_json(row.to_json()) == row
    assert set(json.loads(row.to_json())) == set(hints)


def test_a_file_of_the_first_version_still_reads():
    lines = GOLDEN.read_text().splitlines()
    cpu, gpu = rows = [Measurement.from_json(line) for line in lines]
    assert all(json.loads(line).items() <= json.loads(row.to_json()).items() for line, row in zip(lines, rows))
    assert (cpu.latency_s, cpu.latency_ci, cpu.tokens_per_s_ci) == (3.6, (3.2, 4.0), (32.0, 40.0))
    assert (cpu.tokens_per_s, cpu.ttft_s, cpu.decode_tokens_per_s) == (128 / 3.6, 0.09, 127 / (3.6 - 0.09))
    assert (cpu.weights_gb, cpu.ram_peak_gb, cpu.vram_gb, cpu.noisy) == (0.327650304, 0.362983424, None, True)
    assert (gpu.setting_label, gpu.status, gpu.machine_name) == ("GPU INT4", "unavailable", cpu.machine_name)
    assert "no NVIDIA GPU" in repr(gpu) and gpu.latency_s is gpu.tokens_per_s is gpu.weights_gb is None


@pytest.mark.parametrize("field, value", [
    ("load_s", "1e999"), ("latencies_s", "[-1e999]"), ("machine", '{"x": [1e999]}'), ("energy_j", "[NaN]"),
    pytest.param("vram_peak_bytes", "9" * 400, id="vram_peak_bytes-too-long"),
    pytest.param("latencies_s", f"[{'9' * 400}]", id="latencies_s-too-long"),
    ("versions", '{"torch": ["2"]}'), ("machine", '{"gpu": ["x"]}'), ("machine", '{"cpu": 5}'), ("schema", "0")])
def test_what_would_break_a_run_later_is_refused_on_read(field, value):
    line = json.dumps(json.loads(ROW.to_json()) | {field: "HERE"}).replace('"HERE"', value)
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


class Tags(html.parser.HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.seen = set()
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.seen |= {tag, *(name for name, _ in attrs)}


@pytest.mark.parametrize("status", ["ok", "failed"])
def test_no_field_can_bring_a_tag(status):
    evil = "</td><img src=x onerror=alert(1)>\"'&"
    row = dataclasses.replace(ROW, model=evil, setting=evil, reason=evil, status=status, prompt=evil, text=evil,
                              audit={"quantised": evil, "class": evil}, machine={"gpu": evil}, versions={evil: evil})
    assert Tags(row._repr_html_()).seen == {"table", "thead", "tbody", "tr", "th", "td"}
    assert "&lt;img src=x" in row._repr_html_()


def test_a_row_shows_what_it_has():
    row = Measurement(model="gpt2", setting="gpu-int4", max_new_tokens=8, vram_peak_bytes=160_000_000)
    assert row.summary() == {"Model": "gpt2", "Setting": "GPU INT4", "Max New Tokens": "8", "Latency (s)": "–",
                             "Tokens/sec": "–", "TTFT (s)": "–", "VRAM (GB)": "0.160", "Weights": "–"}


@pytest.mark.parametrize("before", [None, [], "x", {"gpu_busy": "much"}, {"cpu_busy": None}, {"cpu_busy": 0.2}])
def test_conditions_of_another_shape_are_nobody_busy(before):
    assert dataclasses.replace(ROW, conditions={"before": before}).busy is None


def test_the_commit_is_not_part_of_the_key_but_versions_are():
    assert dataclasses.replace(ROW, versions={"torch": "2.13.0", "commit": "def"}).key == ROW.key
    assert dataclasses.replace(ROW, versions={"torch": "2.14.0", "commit": "abc"}).key != ROW.key


@pytest.mark.parametrize("bad, message", [
    ({"prompt": " "}, "prompt is empty"), ({"max_new_tokens": 0}, "at least 1"), ({"batch_size": True}, "batch_size"),
    ({"repeats": 0}, "repeats"), ({"budget_s": -1}, "budget_s"), ({"max_new_tokens": "9"}, "whole number"),
    ({"prompt": None}, "at least one word"), ({"batch_size": 1.0}, "batch_size must be a whole number .* not 1.0"),
    ({"max_new_tokens": None}, "max_new_tokens"), ({"budget_s": "30"}, "above 0 seconds, not '30'"),
    ({"budget_s": math.nan}, "not nan"), ({"budget_s": None}, "not None"), ({"budget_s": True}, "not True")])
def test_a_workload_that_cannot_run_is_refused(bad, message):
    with pytest.raises(ValueError, match=message):
        Workload(**bad)
