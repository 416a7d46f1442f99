"""Sentences and ratios from rows, checked by hand: no difference is named that rounds do not show."""

import dataclasses
import math

import pytest

from quantbench.conclusions import findings, ratios
from quantbench.labels import cells
from quantbench.records import Measurement
from quantbench.results import Run
from quantbench.saving import save
from quantbench.tables import show

T4 = {"cpu": "C", "gpu": "Tesla T4"}
SIX = [2.0, 2.1, 1.95, 2.0, 2.1, 1.9]


def row(setting, seconds, **more):
    asked = {"model": "gpt2", "setting": setting, "max_new_tokens": 100, "new_tokens": 100, "machine": T4,
             "weights": "pretrained", "weights_bytes": 10**8, "rounds": [f"r{place}" for place in range(len(seconds))]}
    return Measurement(**asked | {"latencies_s": seconds} | more)


FP16 = row("gpu-fp16", SIX, weights_bytes=249_000_000, vram_peak_bytes=291_000_000)
INT8 = row("gpu-int8", [2 * s for s in SIX], weights_bytes=164_000_000, vram_peak_bytes=205_000_000)
INT4 = row("gpu-int4", [s * by for s, by in zip(SIX, [0.9, 1.1, 1, 1, 1, 1])], vram_peak_bytes=167_000_000)
CPU = row("cpu-fp32", [10 * s for s in SIX], weights_bytes=498_000_000)
NF4 = row("gpu-int4", [s / 1.25 for s in SIX])


def said(*rows):
    return repr(findings(rows))


@pytest.mark.parametrize("rows, sentence", [
    ((FP16, INT8), "GPT-2: at 100 tokens GPU FP16 is the fastest: GPU INT8 at 0.50 (0.49–0.51, 6 rounds) times"),
    ((FP16, INT8, NF4), "GPU INT4 is the fastest: 1.25 (1.23–1.27, 6 rounds) times GPU FP16."),
    ((FP16, INT4, INT8), "GPU FP16 and GPU INT4 are a tie for the fastest: GPU INT4 at 1.00 (0.89–1.13, 6 rounds)"),
    ((CPU, INT8), "GPU INT8 is the fastest: 5.00 (4.90–5.10, 6 rounds) times CPU FP32"),
    ((FP16, dataclasses.replace(INT8, rounds=[])), "not compared (measured apart, not side by side"),
    ((FP16, row("gpu-int8", SIX[:5])), "not compared (5 shared rounds of the 6 needed"),
    ((FP16, INT8, dataclasses.replace(NF4, rounds=[])), "times GPU FP16; not compared: GPU INT4."),
    ((FP16, INT8, *(dataclasses.replace(one, max_new_tokens=200, rounds=[]) for one in (FP16, INT8))),
     "GPT-2: at 100 tokens GPU FP16 is the fastest: GPU INT8 at 0.50 (0.49–0.51, 6 rounds) times GPU FP16."),
    ((FP16,), "only GPU FP16 was measured"),
    ((INT8, INT4), "nothing is compared: neither GPU FP16 nor CPU FP32 was measured"),
    ((FP16, INT8, CPU), "GPU INT8 has the smallest peak VRAM at 100 tokens (0.205 GB; GPU FP16, the largest, 0.291 GB)"),
    ((FP16, CPU), "GPU FP16 has the smallest weights (0.249 GB; CPU FP32, the largest, 0.498 GB)"),
])
def test_what_is_said(rows, sentence):
    assert sentence in said(*rows)


def test_who_is_slower_than_one_of_those_that_tie_shares_no_place_with_them():
    """The fastest median is so noisy that it ties with everyone: INT8 is slower than FP16 all the same."""
    noisy = row("gpu-int4", [s * by for s, by in zip(SIX, [0.4, 2.0, 0.8, 0.9, 0.5, 1.9])])
    text = said(FP16, noisy, row("gpu-int8", [s / 0.8 for s in SIX]))
    assert "GPU FP16 and GPU INT4 are a tie for the fastest" in text and "GPU INT8 at" not in text


def test_the_workload_that_most_settings_share_in_rounds_is_spoken_of():
    shorter = [dataclasses.replace(one, max_new_tokens=50, new_tokens=50) for one in (FP16, NF4, INT8)]
    text = said(*shorter, FP16, NF4, INT8)
    assert "at 100 tokens GPU INT4 is the fastest" in text and "at 50" not in text
    assert "at 50 tokens GPU INT4 is the fastest" in said(*shorter, FP16, NF4)
    assert "at 50 tokens GPU INT4" in said(*shorter, *(dataclasses.replace(one, rounds=[]) for one in (FP16, NF4, INT8)))


def test_what_was_missed_or_disturbed_is_one_sentence_and_the_same_is_said_once():
    noisy = row("gpu-int4", [1.0, 2.0, 3.0, 4.0, 5.0, 6.0])
    busy = dataclasses.replace(FP16, conditions={"before": {"gpu_busy": 0.6}, "after": {"throttled": ["power cap"]}})
    absent = row("gpu-bf16", [], new_tokens=None, status="unavailable", reason="only emulated")
    mine = findings([busy, noisy, INT8, absent])
    assert len(mine) == 3 and mine[2] == (
        "GPT-2: GPU FP16 disturbed (GPU 60% busy, GPU held back by its power cap); GPU INT4 disturbed (noisy); "
        "GPU BF16 not measured (unavailable: only emulated).")
    both = findings([one for each in (FP16, absent) for one in (each, dataclasses.replace(each, model="distilgpt2"))])
    assert both[-1] == "GPT-2 and DistilGPT-2: GPU BF16 not measured (unavailable: only emulated)." and len(both) == 2
    assert said() == "- nothing measured yet"


def test_random_weights_and_hostile_names_and_two_machines():
    assert "GPT-2 (random weights): " in said(dataclasses.replace(FP16, weights="random"))
    markdown = findings([dataclasses.replace(FP16, model="<b>*x*</b>")])._repr_markdown_()
    assert "<b>" not in markdown and "*x*" not in markdown.replace("**", "")
    with pytest.raises(ValueError, match="2 machines"):
        findings([FP16, dataclasses.replace(INT8, machine={"cpu": "D"})])


def test_ratios_are_to_the_eager_baseline_of_the_same_workload():
    graph = dataclasses.replace(FP16, engine="graph", latencies_s=[s / 4 for s in SIX])
    frame = ratios([FP16, INT8, graph, dataclasses.replace(CPU, rounds=[])])
    assert frame[["Setting", "Engine", "Ratio", "Rounds", "Verdict"]].values.tolist()[1:] == [
        ["GPU FP16", "graph", 4.0, 6, "faster"], ["GPU INT8", "eager", 0.5, 6, "slower"]]
    assert frame["Verdict"][0] == "not compared" and math.isnan(frame["Low"][0]) and math.isnan(frame["Ratio"][0])
    assert ratios([CPU, INT8])["Ratio"].tolist() == [5.0]  # the usual baseline is missing: CPU FP32
    assert set(ratios([FP16, INT8], baseline="gpu-bf16")["Verdict"]) == {"not compared"}
    with pytest.raises(ValueError, match="gpu-fp16"):
        ratios([FP16], baseline="gpu-fp61")


def test_rows_of_one_setting_are_numbered_and_prompts_told_apart():
    named = cells([dataclasses.replace(FP16, versions={"torch": version, "os": "x"}) for version in "12"])
    assert [cell.setting for cell in named] == ["GPU FP16", "GPU FP16 (2)"]
    named = cells([dataclasses.replace(FP16, prompt=prompt) for prompt in ("a", "b" * 50)])
    assert [cell.workload for cell in named] == ["100 tokens, prompt 1 “a”", f"100 tokens, prompt 2 “{'b' * 19}…”"]


def test_what_is_saved(tmp_path):
    formula = dataclasses.replace(INT8, model="=1+1")
    written = save(Run([FP16, formula]), tmp_path / "new")
    assert [path.name for path in written[:3]] == ["rows.jsonl", "table.csv", "table.md"] and len(written) == 7
    csv = written[1].read_bytes()
    assert csv.startswith("\ufeffModel,".encode()) and b"\n'=1+1," in csv and "–".encode() in csv
    assert "only GPU FP16 was measured" in written[2].read_text(encoding="utf-8")
    assert len(Run.read(written[0])) == 2 and all(path.stat().st_size for path in written)
    kept = Run.open(tmp_path / "mine.jsonl")
    kept.add(FP16)
    assert save(kept, tmp_path)[0] == kept.path and not (tmp_path / "rows.jsonl").exists()
    with pytest.raises(ValueError, match="nothing"):
        save(Run(), tmp_path / "empty")
    with pytest.raises(OSError):
        save(kept, written[0])


def test_a_setting_on_two_gpus_is_another_cell_and_never_the_baseline():
    both = [row("gpu-fp16", [2 * s for s in SIX], gpus=2), FP16, INT8]
    assert len(Run(both)) == 3 and "GPU FP16 on 2 GPUs" in repr(show(both))
    assert dict(zip(ratios(both)["Setting"], ratios(both)["Ratio"])) == {"GPU FP16 on 2 GPUs": 0.5, "GPU INT8": 0.5}


def test_of_two_versions_each_row_is_held_against_the_baseline_of_its_own_rounds():
    later = row("gpu-fp16", [3.0] * 6, versions={"torch": "3"}, rounds=[f"b{place}" for place in range(6)])
    run = Run([FP16, INT8, later])
    assert [*ratios(run)["Verdict"]] == ["slower"] and ratios(run)["Ratio"].item() == pytest.approx(0.5)
    assert "GPU FP16 is the fastest: GPU INT8 at 0.50" in said(*run)
    for two in ([FP16, later], [later, FP16]):  # baselines alone
        assert ratios(Run(two)).empty and "not compared" in said(*two)
