"""A measurement: figures from samples by hand, and its line of JSON, which is typed when it is read."""

import dataclasses
import json
import math
import re
import warnings
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import quantbench as qb
from quantbench.records import FIGURES, SCHEMA, Measurement
from quantbench.results import NewerSchema, Run, from_line, to_line

ROW = Measurement(
    model="gpt2", setting="gpu-int4", max_new_tokens=100, weights="random", prompt_tokens=12, new_tokens=100,
    batch_size=2, latencies_s=[4.0, 2.0, 5.0, 4.0, 3.0, 5.0], first_token_s=[0.5, 0.25, 1.0], weights_bytes=127_000_000,
    vram_peak_bytes=160_000_000, energy_j=[100.0, 300.0, 200.0], audit={"quantised": 48, "class": "Linear4bit"},
    rounds=list("abcdef"), load_s=2.0, machine={"cpu": "C", "gpu": "G"}, versions={"torch": "2.13.0", "commit": "abc"})
PART = {"calls": 1, "device_s": 0.5, "kernels": 3.0, "kinds": {"products": 0.5}}
FULL = dataclasses.replace(
    ROW, revision="seed 0", engine="graph", prompt="né\n\u2028", prompt_length=3, status="timeout", reason="x", prepare_s=1.0,
    sampled_at=[1.5] * 6, others_busy=[0.0] * 6, text="", held_before_bytes=1, load_peak_bytes=-1, vram_reserved_bytes=2,
    vram_device_bytes=3, ram_peak_bytes=4,
    gpu_peak_bytes=[3, 4], gpu_busy=[0.5, None], cache="static", cache_bytes=5, trace={"prefill": PART, "step": PART},
    conditions={"before": {"gpu_busy": 0.5, "throttled": ["power cap"]}, "after": {}, "no_energy": None})
QUALITY = qb.Quality(model="gpt2", setting="gpu-int4", text="t", tokens=9, perplexity=2.0, kl_mean=0.1, kl_ci=(0.0, 0.2))
LIMITS = qb.Limits(device="cpu", name="C", read_bytes_per_s=1e10, matrix_flops_per_s={"float32": 1e11})
GOLDEN = Path(__file__).parent / "data" / "schema-1.jsonl"  # as the first version wrote it: it stays as it is

seconds = st.lists(st.floats(1e-9, 1e8), min_size=1, max_size=10)
plain = st.recursive(st.none() | st.booleans() | st.integers() | st.text() | st.floats(),
                     lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner), max_leaves=8)


def changed(record: object, **fields: object) -> bytes:
    """The line of `record` with other values in it; a name such as "audit.left" reaches inside."""
    data = json.loads(to_line(record))
    for name, value in fields.items():
        *outer, last = name.split(".")
        inner = data
        for key in outer:
            inner = inner[key]
        inner[last] = value
    return json.dumps(data).encode()


def test_figures_by_hand():
    assert (ROW.latency_s, ROW.ttft_s) == (4.0, 0.5)
    assert ROW.tokens_per_s == 2 * 100 / 4
    assert ROW.decode_tokens_per_s == pytest.approx(2 * 99 / 3.5) and ROW.step_ms == 1000 * 3.5 / 99
    assert (ROW.vram_gb, ROW.weights_gb, ROW.ram_peak_gb) == (0.16, 0.127, None)
    assert ROW.energy_per_token_j == 1.0 and ROW.once_s == 2.0
    assert dataclasses.replace(ROW, depth=9, cache_bytes=24_000).cache_per_token == 24_000 / 2 / (9 + 12 + 99)
    assert ROW.latency_ci == (2.0, 5.0) and ROW.tokens_per_s_ci == (40.0, 100.0) == ROW.tokens_per_s_range
    assert ROW.rate_by_round() == {"a": 50.0, "b": 100.0, "c": 40.0, "d": 50.0, "e": 200 / 3, "f": 40.0}
    assert ROW.noisy and not dataclasses.replace(ROW, latencies_s=[4.0, 4.1, 4.0], rounds=[]).noisy


def test_five_samples_are_looks_and_no_interval():
    row = dataclasses.replace(ROW, latencies_s=[4.0, 2.0, 5.0, 4.0, 3.0], rounds=[])
    assert row.latency_ci is row.tokens_per_s_ci is None and row.tokens_per_s_range == (40.0, 100.0)
    assert "5 looks: 40.0–100.0" in repr(row) and "95%: 40.0–100.0" in repr(ROW)


def test_a_row_without_samples_has_no_figures():
    row = Measurement(model="gpt2", setting="gpu-fp16", max_new_tokens=8, status="unavailable", reason="no GPU")
    assert all(getattr(row, name) in (None, False) for name in FIGURES) and row.rate_by_round() == {}
    assert "no GPU" in repr(row)


@pytest.mark.parametrize("before, words", [({"gpu_busy": 0.5, "cpu_busy": 0.1}, "GPU 50% busy"), ({}, None),
                                           ({"cpu_busy": None}, None), ({"cpu_busy": 0.2}, None)])
def test_busy_names_who_else_was_there(before, words):
    assert dataclasses.replace(ROW, conditions={"before": before}).busy == words and ROW.busy is None


def test_the_commit_is_not_part_of_the_key_but_versions_are():
    assert dataclasses.replace(ROW, versions={"torch": "2.13.0", "commit": "def"}).key == ROW.key
    assert dataclasses.replace(ROW, versions={"torch": "2.14.0", "commit": "abc"}).key != ROW.key


@pytest.mark.parametrize("status", ["ok", "failed"])
def test_no_field_can_bring_a_tag_or_steer_a_terminal(status):
    evil = "</td><img src=x onerror=alert(1)>\"'&\x1b[31m\u202e"
    row = dataclasses.replace(ROW, model=evil, setting=evil, reason=evil, status=status, prompt=evil, text=evil,
                              audit={"quantised": 1, "class": evil}, machine={"gpu": evil}, versions={evil: evil})
    assert set(re.findall(r"<[^>]*>", row._repr_html_().replace("/", ""))) == {
        "<table>", "<thead>", "<tbody>", "<tr>", "<th>", "<td>"}
    assert "&lt;img src=x" in row._repr_html_() and not {"\x1b", "\u202e"} & {*row._repr_html_(), *repr(row)}


# ---- lines ----

@given(seconds, st.text(), st.none() | st.text(), st.floats(0, 1e9))
def test_a_row_comes_back_from_its_line(latencies, prompt, text, busy):
    row = dataclasses.replace(ROW, latencies_s=latencies, rounds=[], prompt=prompt, text=text, reason=text,
                              conditions={"before": {"cpu_busy": busy}})
    assert from_line(to_line(row)) == [row] and to_line(row).count(b"\n") == 1


@pytest.mark.parametrize("record", [FULL, QUALITY, LIMITS])
def test_every_field_comes_back_from_its_line(record):
    assert from_line(to_line(record)) == [record]
    assert set(json.loads(to_line(record))) == {"kind", *(field.name for field in dataclasses.fields(record))}
    assert record is not FULL or None not in vars(FULL).values()


def test_a_file_of_the_first_version_still_reads():
    cpu, gpu = rows = [row for line in GOLDEN.read_text().splitlines() for row in from_line(line)]
    for line, row in zip(GOLDEN.read_text().splitlines(), rows):
        assert (json.loads(line) | {"schema": SCHEMA}).items() <= json.loads(to_line(row)).items()
    assert (cpu.latency_s, cpu.latency_ci, cpu.tokens_per_s_range) == (3.6, None, (32.0, 40.0))
    assert (cpu.tokens_per_s, cpu.ttft_s, cpu.step_ms) == (128 / 3.6, 0.09, 1000 * (3.6 - 0.09) / 127)
    assert (cpu.weights_gb, cpu.ram_peak_gb, cpu.vram_gb, cpu.noisy) == (0.327650304, 0.362983424, None, True)
    assert (gpu.setting_label, gpu.status, gpu.machine_name) == ("GPU INT4", "unavailable", cpu.machine_name)
    assert "no NVIDIA GPU" in repr(gpu) and gpu.latency_s is gpu.tokens_per_s is gpu.weights_gb is None


def test_what_a_row_of_the_first_version_held_beside_speed_becomes_records():
    old = json.loads(GOLDEN.read_text().splitlines()[0])
    old["quality"] = {"text": "t", "tokens": 9, "perplexity": 2.0, "keeps_99": True}
    old["limits"] = {"device": "cpu", "name": "C", "read_bytes_per_s": 1e10, "matrix_flops_per_s": {"float32": 1e11}}
    row, quality, limits = from_line(json.dumps(old | {"trace": {"of": "another shape"}}))
    assert row.tokens_per_s and row.trace is None and (quality.perplexity, quality.tokens) == (2.0, 9)
    assert quality.subject == row.subject and limits.machine_name == row.machine_name
    run = Run([row, quality, limits])
    assert (list(run), run.qualities, run.limits) == ([row], [quality], [limits])
    for part in ("quality", "limits"):
        for value in ([1], 5, "x", {"colour": "red"}):
            with pytest.raises(ValueError):
                from_line(json.dumps(old | {part: value}))


def test_a_later_schema_is_refused_by_name():
    with pytest.raises(NewerSchema, match=f"schema {SCHEMA + 1}.*upgrade quantbench"):
        from_line(changed(ROW, schema=SCHEMA + 1))


NESTED = json.loads("[" * 600 + "]" * 600)


@pytest.mark.parametrize("record, name, value", [
    (FULL, "schema", None), (FULL, "schema", 0), (FULL, "kind", []), (FULL, "kind", "colour"), (FULL, "colour", "red"),
    (FULL, "model", None), (FULL, "reason", 5), (FULL, "status", "fine"), (FULL, "weights", "best"),
    (FULL, "batch_size", 0), (FULL, "batch_size", 1.5), (FULL, "max_new_tokens", 1e300), (FULL, "load_s", 1e999),
    (FULL, "latencies_s", "fast"), (FULL, "latencies_s", [-1.0]), (FULL, "latencies_s", [1e308]),
    (FULL, "latencies_s", [1.0] * 200_000), (FULL, "latencies_s", [10**400]), (FULL, "latencies_s", [True]),
    (FULL, "rounds", ["a"]), (FULL, "energy_j", [math.nan]), (FULL, "vram_peak_bytes", 1.5),
    (FULL, "vram_peak_bytes", 10**400), (FULL, "load_peak_bytes", -10**400), (FULL, "audit.details", {"a": 10**400}), (FULL, "model", "\ud800"),
    (FULL, "audit", []), (FULL, "audit", NESTED), (FULL, "audit.quantised_bytes", "many"), (FULL, "audit.left", {"a": "b"}),
    (FULL, "conditions.after", 5), (FULL, "conditions.before.throttled", "yes"), (FULL, "trace.step", 1),
    (FULL, "trace.step.kinds", {"a": "b"}), (FULL, "machine.gpu_capability", "9.0"), (FULL, "machine.gpu_capability", [9]),
    (FULL, "machine.gpu", ["x"]), (FULL, "machine.cpu", 5), (FULL, "machine.x", 1), (FULL, "versions.torch", ["2"]),
    (QUALITY, "kl_ci", []), (QUALITY, "kl_mean", "x"), (LIMITS, "device", "tpu"), (LIMITS, "read_bytes_per_s", 0),
], ids=lambda value: None if isinstance(value, str) else "_")
def test_what_would_break_a_view_is_refused_when_read(record, name, value):
    with pytest.raises(ValueError):
        from_line(changed(record, **{name: value}))


@pytest.mark.parametrize("value", [math.nan, math.inf, -1.0, 1e308])
@pytest.mark.parametrize("bad", [lambda x: {"load_s": x}, lambda x: {"conditions": {"after": {"cpu_busy": x}}}])
def test_what_is_no_measurement_cannot_be_made(value, bad):
    with pytest.raises(ValueError):
        dataclasses.replace(ROW, **bad(value))


@pytest.mark.parametrize("line", [b"", b"null", b"[" * 10**5, b"{" * 600, b'{"model": "\xff"}', b'"' + b"x" * 10**7,
                                  b'{"schema": %s}' % (b"9" * 5000)])
def test_a_line_that_is_no_record_is_refused(line):
    with pytest.raises(ValueError):
        from_line(line)


@given(st.binary())
def test_any_bytes_are_read_or_refused(line):
    try:
        from_line(line)
    except ValueError:
        pass


PLACES = [*(field.name for field in dataclasses.fields(FULL)), "audit.class", "audit.left", "machine.gpu", "machine.cores",
          "conditions.before", "conditions.before.gpu_busy", "versions.torch", "trace.step", "trace.step.top"]


@settings(max_examples=200, deadline=None)
@given(st.sampled_from(PLACES), plain)
def test_whatever_stands_in_a_field_is_refused_or_harmless_in_every_view(name, value):
    try:
        records = from_line(changed(dataclasses.replace(FULL, status="ok"), **{name: value}))
    except ValueError:
        return
    run = Run([*records, dataclasses.replace(records[0], setting="gpu-fp16")])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for view in (qb.table(run), qb.show(run), qb.findings(run), qb.ratios(run), run):
            repr(view).encode()
        qb.show(run).markdown().encode(), run._repr_html_().encode()


def test_fewer_threads_are_another_machine():
    machine = {"cpu": "C", "cores": 4, "torch_threads": 4}
    names = [dataclasses.replace(ROW, machine=facts).machine_name for facts in (
        machine, machine | {"torch_threads": 1}, machine | {"torch_threads": 1, "gpu": "G"}, {"cpu": "C"}, {})]
    assert names == ["C", "C (1 of 4 cores)", "G · C", "C", ""]
