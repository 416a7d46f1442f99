"""The published columns first, numbers stay numbers, what could not run keeps its row, nothing of a row is markup."""

import dataclasses
import math
from pathlib import Path

import pandas as pd
import pytest
from matplotlib.text import Text

import quantbench as qb
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
    assert table([ROW])["Tokens/sec 95%"].tolist() == ["64.0"]
    frame = table([ROW, FEW])
    assert frame["Tokens/sec 95%"].tolist() == ["32.0–128.0 (3 looks)", "64.0"]
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
    assert shown[0].note.startswith("Not here: GPU BF16: a <T4> | no a") and [*shown[0].frame["Setting"]] == ["GPU INT4"]
    assert max(map(len, repr(shown).splitlines())) < 200 and "unavailable: a <T4>" in repr(show([ABSENT]))  # both are cut
    assert len(show([ROW, dataclasses.replace(ROW, machine={"cpu": "D"})])) == 2
    assert table([ROW, dataclasses.replace(ROW, machine={"cpu": "D"})])["Machine"].tolist() == ["G · C", "D"]
    assert repr(show([])) == "nothing measured yet" and "nothing measured yet" in show([])._repr_html_()


@pytest.mark.parametrize("status", ["unavailable", "failed", "out_of_memory"])
def test_what_ran_since_is_told_as_it_ran_and_what_fails_since_stays(status):
    """A package that is installed in between is another version, so that the run holds both rows."""
    ran = dataclasses.replace(ROW, revision="r", versions={"torchao": "1"}, created_at="2026-11-02T00:00:00+00:00")
    missed = Measurement(model="gpt2", setting="gpu-int4", max_new_tokens=128, machine=ROW.machine, status=status,
                         reason="not installed", created_at="2026-11-01T00:00:00+00:00")
    for run in ([missed, ran], [ran, missed]):
        assert table(run)["Setting"].tolist() == ["GPU INT4"] and table(run)["Status"].tolist() == ["ok"]
        text = repr(show(run)) + repr(qb.findings(run))
        assert "not installed" not in text and "not installed" not in charts_text(run)
    other = dataclasses.replace(missed, max_new_tokens=256)
    since = dataclasses.replace(missed, created_at="2026-11-03T00:00:00+00:00")
    assert all(len(table([ran, one])) == 2 for one in (other, since, dataclasses.replace(missed, engine="graph")))


def charts_text(run) -> str:
    return " ".join(text.get_text() for text in qb.plot_throughput(run).findobj(Text))


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


VIEWS = ("table", "show", "findings", "ratios", "plot_throughput", "plot_lengths", "plot_latency", "plot_vram",
         "quality_table", "quality_findings", "show_quality", "plot_quality", "continuations", "why_table", "explain",
         "plot_floor", "plot_scaling", "prompt_table", "prompt_findings", "plot_prompts", "memory_table", "panel",
         "reference_table", "compare", "compare_table", "plot_machines", "changes")


@pytest.mark.parametrize("view", VIEWS)
def test_what_is_no_run_is_said_in_one_sentence_by_every_view(view):
    paths = [] if view in ("compare", "compare_table", "plot_machines", "changes") else ["rows.jsonl", Path("x.jsonl")]
    others = [3, ROW, [1, 2], [ROW, 2], [[ROW]], [{"model": "gpt2"}], pd.DataFrame({"a": [1]}), qb.Run, *paths]
    for wrong in others + [None] * (view != "panel"):  # a panel of None makes a run of its own
        with pytest.raises(ValueError, match=r"qb\.Run.*, not ") as told:
            getattr(qb, view)(wrong)
        assert len(str(told.value)) < 200 and "\n" not in str(told.value)
    with pytest.raises(ValueError, match="takes a qb.Run"):
        qb.save([ROW, 2], "never made")
    with pytest.raises(ValueError, match="a run takes what"):
        qb.Run().add([ROW])


def test_a_tilde_is_home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert {path.parent for path in qb.save([ROW], "~/here")} == {tmp_path / "here"}
    assert [*qb.Run.read("~/here/rows.jsonl")] == [ROW] and qb.Run([ROW]).save("~/x.jsonl") == tmp_path / "x.jsonl"


def test_one_token_is_no_plural():
    assert "Workload" not in show([dataclasses.replace(ROW, max_new_tokens=1)])[0].frame
    assert "at 1 token only GPU INT4" in qb.findings([dataclasses.replace(ROW, max_new_tokens=1)])[0]


def test_every_frame_of_a_view_is_shown():
    run = qb.Run([dataclasses.replace(ROW, setting=key, rounds=list("abcdef")) for key in ("gpu-fp16", "gpu-int4")])
    assert "GPU INT4" in repr(show(table(run))) and "64.0" in show(table(run)[["Setting", "Tokens/sec"]]).markdown()
    ratios = qb.ratios(run)
    assert "1.00" in repr(show(ratios)) and list(ratios) == list(ratios.reset_index(drop=True)) and "Model" in ratios
    assert repr(show(qb.memory_table(run).reset_index())) == repr(show(qb.memory_table(run)))
    assert repr(show(table([]))) == repr(show(qb.quality_table(run))) == "nothing measured yet"
    with pytest.raises(ValueError, match="unknown figure 'vram_gb'; did you mean"):
        qb.ratios(run, figure="vram_gb")


def test_the_machine_in_words():
    text = repr(machine_table({"cpu": "Some CPU", "cores": 2, "ram_bytes": 24 * 10**9}, {"torch": "2.13.0"}))
    assert "Some CPU" in text and "24.0 GB" in text and "2.13.0" in text
    with pytest.raises(ValueError, match="takes qb.facts"):
        machine_table(qb.Run([ROW]))
