"""Machines and runs beside each other: quotients without a claim, claims by rounds, and names that stay text."""

import random
import re
import time
from pathlib import Path

import nbformat
import papermill
import pytest

from quantbench.comparison.handing_on import report
from quantbench.comparison.history import changes
from quantbench.comparison.machines import compare, compare_table, plot_machines
from quantbench.comparison.t4 import reference_table, shipped, show_reference
from quantbench.records import Measurement
from quantbench.results import Run

ROOT = Path(__file__).parent.parent
REFERENCE = ROOT / "results" / "reference" / "colab-t4.csv"
HOSTILE = '<img src=x onerror=alert(1)> | `a` "b" [c](d) ![e] $f$ {g} #h; %%i\n```\n## j'


def row(setting="cpu-fp32", seconds=(1.0,) * 6, cpu="One", model="gpt2", torch="2.11.0", rounds=True, **fields):
    fields = {"max_new_tokens": 100, "new_tokens": 100, "weights": "pretrained", "weights_bytes": 10**9} | fields
    return Measurement(model=model, setting=setting, latencies_s=list(seconds), machine={"cpu": cpu},
                       rounds=[f"r{place}" for place in range(len(seconds))] if rounds else [],
                       versions={"torch": torch, "numpy": "2.1.3"}, **fields)


def failed(setting="gpu-fp16", cpu="One", **fields) -> Measurement:
    return row(setting, (), cpu, status="unavailable", reason="no GPU", new_tokens=None, weights=None, **fields)


# ---- side by side ----

def test_between_machines_there_is_a_plain_quotient_and_no_verdict():
    frame = compare_table([row(seconds=(2.0,) * 6)], [row(cpu="Two")])
    assert list(frame["Machine"]) == ["One", "Two"] and list(frame["Tokens/sec"]) == [50.0, 100.0]
    assert frame["Times the first"].fillna(0).tolist() == [0.0, 2.0]
    assert frame["Verdict"].isna().all() and frame["Own ratio"].isna().all()  # both are their machine's baseline


def test_a_verdict_is_on_a_machines_own_ratio_by_rounds():
    one = [row(), row("cpu-int8", (0.5, 0.5, 0.5, 0.5, 0.4, 0.6))]
    two = [row(cpu="Two"), row("cpu-int8", (0.9, 1.2, 1, 1, 1, 1), "Two"), row("cpu-int4", (0.5,) * 5, "Two")]
    frame = compare_table(one, two).dropna(subset="Verdict")
    assert list(frame["Verdict"]) == ["faster", "tie", "not compared"] and set(frame["Baseline"]) == {"CPU FP32"}
    assert frame["Own ratio 95%"].iloc[0] == "1.63–2.55" and frame["Own ratio"].iloc[0] == 2.0


def test_two_sets_of_versions_on_a_machine_stand_apart_by_what_differs():
    names = compare_table([row(), row(torch="2.12.0", seconds=(2.0, 2.0))], [row(cpu="Two")])["Machine"]
    assert list(names) == ["One · torch 2.11.0", "One · torch 2.12.0", "Two"]


def test_rows_say_why_they_are_empty_that_weights_are_random_and_prompts_are_told_apart():
    frame = compare_table([row(weights="random"), failed()], [row("gpu-fp16", cpu="Two"), row(cpu="Two", prompt="two")])
    assert list(frame.index) == ["GPT-2"] * 4 and frame["Weights"].fillna("").tolist() == ["random", "", "", ""]
    assert frame["Status"].iloc[2] == "unavailable: no GPU" and len(set(frame["Workload"])) == 2
    table, = compare([row(weights="random"), failed()], [row("gpu-fp16", cpu="Two")])
    assert "random weights" in table.caption[1]


def test_files_the_reference_table_and_what_is_refused(tmp_path):
    path = Run([row()]).save(tmp_path / "rows.jsonl")
    assert str(compare(path, [row(cpu="Two")])) == str(compare([row()], [row(cpu="Two")]))
    mine = row(seconds=(4.0, 4.0), model="distilgpt2", max_new_tokens=128, new_tokens=128)
    frame = compare_table([mine], REFERENCE)
    there = frame[(frame["Machine"] == "Colab T4, reference table") & (frame["Workload"] == "128 tokens")]
    at = there[(there.index == "DistilGPT-2") & (there["Setting"] == "CPU FP32")].iloc[0]
    assert at["Tokens/sec"] == pytest.approx(128 / 8.754) and at["Times the first"] == pytest.approx(4 / 8.754)
    assert "no samples" in str(compare([mine], REFERENCE)) and frame["Tokens/sec 95%"].isna().all()
    (tmp_path / "other.csv").write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match="not a reference table"):
        compare(tmp_path / "other.csv")
    with pytest.raises(ValueError, match="nothing to compare"):
        compare()
    with pytest.raises(FileNotFoundError):
        compare(tmp_path / "none.jsonl")
    with pytest.raises(ValueError, match="no measurements"):
        plot_machines([failed()])


def test_hundreds_of_machines_take_seconds():
    settings = ("cpu-fp32", "cpu-bf16", "cpu-int8", "cpu-int4", "cpu-int8-dynamic")
    runs = [[row(setting, cpu=f"CPU {place}", model=f"model-{model}", max_new_tokens=length, new_tokens=length)
             for model in range(5) for setting in settings for length in (10, 20)] for place in range(200)]
    start = time.perf_counter()
    assert sum(len(table.frame) for table in compare(*runs)) == 10_000
    changes(*runs)
    assert time.perf_counter() - start < 10


def test_the_chart_has_a_bar_per_setting_and_machine():
    hostile = row("cpu-int8", cpu=HOSTILE, weights="random")
    fig = plot_machines([row(), row("cpu-int8"), failed()], [row(cpu="Two")], [hostile])
    ax, = fig.axes
    assert [label.get_text() for label in ax.get_yticklabels()] == ["CPU FP32", "CPU INT8"]
    shown = [text.get_text() for text in ax.texts]
    assert shown[:3] == ["100.0, One", "100.0, Two", "100.0, One"] and shown[3].endswith("… (random weights)")
    fig.canvas.draw()


# ---- what changed ----

def measured(seed: int, slow: float = 1.0, processes: float = 0.01, rounds: int = 24) -> list[Measurement]:
    """A run of 2 models x 5 settings x 2 lengths: a day that all share, a process each, and a noise per sample."""
    noise = random.Random(seed)
    day, rows = 1 + noise.uniform(-0.15, 0.15), []
    for model in ("gpt2", "distilgpt2"):
        for setting in ("cpu-fp32", "cpu-bf16", "cpu-int8", "cpu-int4", "cpu-int8-dynamic"):
            own = day * noise.lognormvariate(0, processes) * (slow if (model, setting) == ("gpt2", "cpu-int4") else 1)
            rows += [row(setting, [own * noise.lognormvariate(0, 0.03) for _ in range(rounds)], model=model,
                         max_new_tokens=length, new_tokens=length) for length in (64, 128)]
    return rows


@pytest.mark.parametrize(("processes", "rounds"), [(0.01, 6), (0.01, 24), (0.01, 60), (0.1, 24)])
def test_the_same_machine_on_two_days_names_at_most_one_cell_in_twenty(processes, rounds):
    named = sum("% against" in sentence for seed in range(60)
                for sentence in changes(measured(seed, processes=processes, rounds=rounds),
                                        measured(1000 + seed, processes=processes, rounds=rounds)))
    assert named <= 0.05 * 60 * 16


def test_a_setting_that_became_slower_is_found_whatever_the_day():
    said = [sentence for seed in range(40) for sentence in changes(measured(seed, rounds=30), measured(1000 + seed, 1 / 0.88, rounds=30))]
    found = [sentence for sentence in said if re.match("GPT-2, CPU INT4, .*: slower by .* against CPU FP32", sentence)]
    assert len(found) >= 0.9 * 80


def test_a_change_in_words_with_its_interval():
    before = [row(), row("cpu-int8"), row("cpu-int4"), row("cpu-bf16")]
    after = [row(torch="2.12.0", seconds=(2.0,) * 6), *(row(key, (seconds,) * 6, torch="2.12.0") for key, seconds in (
        ("cpu-int8", 2.5), ("cpu-int4", 2.0), ("cpu-bf16", 2.0)))]
    assert changes(before, after) == [
        "One: torch 2.11.0 → 2.12.0.",
        "GPT-2, CPU INT8, 100 tokens: slower by 20% against CPU FP32 (interval 18.4%–21.6%).",
        "No change beyond the spread of these two runs (2%–45% of a ratio): 2 of 3 ratios.",
        "The baselines ran at 0.50–0.50 times what they did: by the day or by the versions, two runs cannot tell."]


def test_without_rounds_or_with_few_nothing_is_claimed_and_it_is_said_once():
    for one in ({"rounds": False}, {"seconds": (1.0,) * 5}):
        said = changes([row(**one), row("cpu-int8", **one)], [row(), row("cpu-int8", (9.0,) * 6)])
        assert [sentence for sentence in said if "apart" in sentence] == [
            "Measured apart, not compared: 1 of 2 cells (in one run or both under 6 rounds with the same baseline)."]
        assert not any("% against" in sentence for sentence in said)


def test_memory_what_stopped_working_and_runs_with_nothing_in_common():
    said = changes([row(), row("gpu-fp16")], [row(weights_bytes=2 * 10**9), failed()])
    assert said[0] == "One: the same versions of everything, measured twice."
    assert "GPT-2, CPU FP32, 100 tokens: weights 1.000 → 2.000 GB." in said
    assert "GPT-2, GPU FP16, 100 tokens: was measured, now unavailable." in said
    assert "nothing to hold it against" in changes([row()], [row(cpu="Two")])[0]
    assert changes([row()], [row("cpu-int8")])[1] == "No cell is in both."


# ---- the reference table ----

def test_the_reference_table_is_corrected_and_only_eager_rows_stand_beside_it():
    asked = {"max_new_tokens": 128, "new_tokens": 128}
    frame = reference_table([row(**asked), row(engine="compile", seconds=(0.1,), **asked)])
    at = frame[(frame.index == "GPT-2") & (frame["Setting"] == "CPU FP32") & (frame["Max New Tokens"] == 128)].iloc[0]
    assert at["Tokens/sec (here)"] == 128.0
    assert at["Tokens/sec (corrected)"] == pytest.approx(128 / 11.896)
    assert "76 and 140 (DistilGPT-2) and 140 and 268 (GPT-2)" in frame.attrs["note"]
    assert "random weights" in str(show_reference([row(weights="random")])) and len(show_reference()) == 2
    with pytest.raises(ValueError, match="2 machines"):
        reference_table([row(), row(cpu="Two")])


# ---- text stays text; handing on ----

def test_hostile_names_stay_text(tmp_path):
    one = [row(model=HOSTILE, cpu=HOSTILE, created_at="<b>`x`", torch=torch, seconds=seconds)
           for torch, seconds in (("2", (1.0,) * 6), (HOSTILE, (2.0,) * 6))]
    text = report(one[:1], tmp_path / "deep" / "r.MD").read_text()
    outside = re.sub(r"^```mermaid\n.*?^```$", "", text, flags=re.M | re.S)
    for shown in (outside, compare(one).markdown(), changes(one)._repr_markdown_()):
        assert "<img" not in shown and "<b>`" not in shown and "](d)" not in shown and "`" not in shown
        assert not re.search(r"^## j", shown, re.M)
    assert "<img" not in compare(one)._repr_html_()
    chart, = re.findall(r"^```mermaid\n(.*?)^```$", text, re.M | re.S)
    lines = chart.strip().splitlines()
    assert len(lines) == 5 and not set("`<>#%{};|&$\\") & set("".join(re.findall('"([^"]*)"', chart)))
    assert all(line.count('"') == 2 for line in lines[1:4])


def test_a_report_has_a_section_and_charts_per_machine_and_ends_in_md(tmp_path):
    text = report([row(), row("cpu-int8", (0.5,) * 6), failed(), failed(cpu="Two")], tmp_path / "r.md").read_text()
    assert re.findall(r"^## (.*)$", text, re.M) == ["One", "Two"]
    assert '    x-axis ["CPU FP32", "CPU INT8"]\n    y-axis "Tokens/sec" 0 --> 210\n    bar [100.0, 200.0]' in text
    for rows, name, why in (([row()], "r.html", "nbconvert"), ([], "s.md", "no measurements")):
        with pytest.raises(ValueError, match=why):
            report(rows, tmp_path / name)


def test_notebook_05_compares_files_and_never_imports_torch(tmp_path):
    mine = Run([row(), row("cpu-int8"), failed()]).save(tmp_path / "mine.jsonl")
    later = Run([row(torch="2.12.0"), row("cpu-int8", (2.0,) * 6, torch="2.12.0")]).save(tmp_path / "b.jsonl")
    notebook = nbformat.read(ROOT / "notebooks" / "05_compare_machines.ipynb", 4)
    notebook.cells.append(nbformat.v4.new_code_cell('assert not {"torch", "transformers"} & set(sys.modules)'))
    nbformat.write(notebook, tmp_path / "notebook.ipynb")
    mine = [str(mine), str(later)]
    parameters = {"mine": mine, "before_and_after": mine, "folder": str(tmp_path / "out")}
    done = papermill.execute_notebook(tmp_path / "notebook.ipynb", tmp_path / "executed.ipynb", parameters,
                                      cwd=ROOT / "notebooks", progress_bar=False)
    assert "slower by 50%" in str(done) and str(done).count("'image/png'") == 1
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["compare.md", "machines.png", "report.md"]


def test_what_is_shipped_can_be_compared():
    assert shipped()[-1] == REFERENCE and all(path.suffix == ".jsonl" for path in shipped()[:-1])
    assert compare(*shipped())
