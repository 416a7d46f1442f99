"""Machines side by side: ratios worked by hand, and names that stay text."""

import subprocess
import sys
from pathlib import Path

import nbformat
import papermill
import pytest

from quantbench.changes import changes
from quantbench.compare import compare, compare_table, plot_machines
from quantbench.record import Measurement
from quantbench.run import Run
from quantbench.sides import shipped

ROOT = Path(__file__).parent.parent
PUBLISHED = ROOT / "results" / "reference" / "published-colab-t4.csv"
HOSTILE = '<img src=x onerror=alert(1)> | `a` "b" [c](d) ![e] $f$'


def row(setting="cpu-fp32", seconds=(1.0, 1.0, 1.0), cpu="One", model="gpt2", torch="2.11.0", **fields) -> Measurement:
    fields = {"max_new_tokens": 100, "new_tokens": 100, "weights": "pretrained", "weights_bytes": 10**9} | fields
    return Measurement(model=model, setting=setting, latencies_s=list(seconds), machine={"cpu": cpu},
                       versions={"torch": torch, "numpy": "2.1.3"}, **fields)


def failed(setting="gpu-fp16", cpu="One", **fields) -> Measurement:
    return row(setting, (), cpu, status="unavailable", reason="no GPU", new_tokens=None, weights=None, **fields)


# ---- side by side ----

def test_ratios_are_those_of_tokens_per_second():
    frame = compare_table([row(seconds=(2.0, 2.0, 2.0))], [row(seconds=(1.0, 1.0, 1.0), cpu="Two")])
    assert list(frame["Machine"]) == ["One", "Two"] and list(frame["Tokens/sec"]) == [50.0, 100.0]
    assert frame["Ratio"].isna().tolist() == [True, False]
    assert frame.iloc[1][["Ratio", "Ratio low", "Ratio high"]].tolist() == [2.0, 2.0, 2.0]


def test_an_interval_that_holds_one_is_a_tie():
    grids = compare([row(seconds=(0.9, 1.0, 1.1))], [row(seconds=(0.95, 1.0, 1.3), cpu="Two")])
    assert "1.00× (0.69–1.16, tie)" in str(grids)  # 0.9 / 1.3 and 1.1 / 0.95: medians of three go to the ends


def test_one_sample_has_a_ratio_without_an_interval():
    assert "2.00× (no interval)" in str(compare([row(seconds=(2.0,))], [row(seconds=(1.0,), cpu="Two")]))


def test_two_sets_of_versions_on_a_machine_stand_apart_by_what_differs():
    names = compare_table([row(), row(torch="2.12.0", seconds=(2.0, 2.0))], [row(cpu="Two")])["Machine"]
    assert list(names) == ["One · torch 2.11.0", "One · torch 2.12.0", "Two"]


def test_a_cell_that_only_one_machine_measured_keeps_its_row_and_says_why():
    grid, = compare([row(), failed()], [row("gpu-fp16", cpu="Two")])
    assert grid.rows == [["CPU FP32", "100 tokens", "100.0 (100.0–100.0)", "–", "–"],
                         ["GPU FP16", "100 tokens", "unavailable", "100.0 (100.0–100.0)", "–"]]


def test_random_weights_meet_real_ones_and_it_is_said():
    grid, = compare([row(weights="random")], [row(cpu="Two")])
    assert grid.caption == ["GPT-2", "random weights on One: speed is real, text is not"]
    both = compare([row(weights="random"), row()], [row(cpu="Two")])
    assert [grid.caption[0] for grid in both] == ["GPT-2 (random weights)", "GPT-2"]


def test_prompts_are_told_apart_over_all_runs():
    grid, = compare([row(prompt="one")], [row(prompt="two", cpu="Two")])
    assert [cells[1] for cells in grid.rows] == ["100 tokens, “one”", "100 tokens, “two”"]


def test_the_published_table_joins_by_the_tokens_it_generated_without_intervals():
    mine = row("cpu-fp32", (4.0, 4.0), model="distilgpt2", max_new_tokens=128, new_tokens=128)
    frame = compare_table([mine], PUBLISHED)
    there = frame[(frame["Machine"] == "Colab T4, published") & (frame.index == "DistilGPT-2")]
    at = there[(there["Setting"] == "CPU FP32") & (there["Workload"] == "128 tokens")].iloc[0]
    asked_256 = 140 - 12  # latency x tokens/sec of that row, less the prompt
    seconds = [line.split(",") for line in PUBLISHED.read_text().splitlines()]
    seconds = next(float(cells[3]) for cells in seconds if cells[:3] == ["distilgpt2", "cpu-fp32", "256"])
    assert at["Tokens/sec"] == pytest.approx(asked_256 / seconds)
    assert at["Ratio"] == pytest.approx(asked_256 / seconds / 32) and there["Ratio low"].isna().all()
    assert set(there["Workload"]) == {"64 tokens", "128 tokens"}
    assert "no samples and so no intervals" in str(compare([mine], PUBLISHED))


def test_another_csv_and_no_runs_are_refused(tmp_path):
    (tmp_path / "other.csv").write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match="not a published table"):
        compare(tmp_path / "other.csv")
    with pytest.raises(ValueError, match="nothing to compare"):
        compare()
    with pytest.raises(FileNotFoundError):
        compare(tmp_path / "none.jsonl")
    assert "nothing measured" in str(compare([failed()]))


def test_files_and_runs_are_the_same(tmp_path):
    path = Run([row()]).save(tmp_path / "rows.jsonl")
    assert str(compare(path, [row(cpu="Two")])) == str(compare([row()], [row(cpu="Two")]))


# ---- what changed ----

def test_a_slower_setting_is_named_with_its_interval():
    said = changes([row(seconds=(0.88, 0.88, 0.88))], [row(seconds=(1.0, 1.0, 1.0), torch="2.12.0")])
    assert said[0] == "One: torch 2.11.0 → 2.12.0."
    assert said[1] == "GPT-2, CPU FP32, 100 tokens: slower by 12% (interval 12–12%), 113.6 → 100.0 tokens/sec."


def test_the_ends_of_the_interval_come_from_the_samples():
    said = changes([row(seconds=(1.0, 1.0, 1.0))], [row(seconds=(0.5, 0.8, 1.0 / 1.1), torch="2.12.0")])
    assert "faster by 25% (interval 10–100%)" in said[1]


def test_only_a_change_whose_interval_excludes_one_is_named():
    said = changes([row(seconds=(0.9, 1.0, 1.1))], [row(seconds=(1.0, 1.05, 1.1), torch="2.12.0")])
    assert said[1:] == ["No change that these repeats can tell from noise: 1 of 1 cells."]


def test_memory_and_what_stopped_working_are_named():
    before = [row(), row("gpu-fp16", vram_peak_bytes=10**9)]
    after = [row(weights_bytes=2 * 10**9, torch="2.12.0"), failed(torch="2.12.0")]
    said = changes(before, after)
    assert "GPT-2, CPU FP32, 100 tokens: weights 1.000 → 2.000 GB." in said
    assert "GPT-2, GPU FP16, 100 tokens: was measured, now unavailable." in said


def test_one_file_with_two_sets_of_versions_and_one_run_measured_twice():
    assert changes([row(), row(torch="2.12.0")])[0] == "One: torch 2.11.0 → 2.12.0."
    assert changes([row()], [row()])[0] == "One: the same versions of everything, measured twice."
    assert "nothing to hold it against" in changes([row()], [row(cpu="Two")])[0]


def test_names_stay_text():
    one, two = row(model=HOSTILE, cpu=HOSTILE), row(model=HOSTILE, cpu="Two", torch=HOSTILE)
    page = compare([one], [two])._repr_html_()
    assert "<img" not in page and "&lt;img" in page
    said = changes([one], [row(model=HOSTILE, cpu=HOSTILE, torch=HOSTILE, seconds=(2.0, 2.0))])._repr_markdown_()
    assert "<img" not in said and "](d)" not in said and "`" not in said
    for text in (compare([one], [two]).markdown(), said):
        assert "](d)" not in text and "<img" not in text


def test_the_chart_has_a_bar_per_setting_and_machine():
    fig = plot_machines([row(), row("cpu-int8"), failed()], [row(cpu="Two")], [row("cpu-int8", cpu=HOSTILE)])
    ax, = fig.axes
    assert [label.get_text() for label in ax.get_yticklabels()] == ["CPU FP32", "CPU INT8"]
    assert [text.get_text() for text in ax.texts] == ["A 100.0", "B 100.0", "A 100.0", "C 100.0"]
    fig.canvas.draw()
    other = row("cpu-int8", max_new_tokens=200, new_tokens=200, weights="random")
    short, long = plot_machines([row(weights="random"), other]).axes
    assert [text.get_text() for text in short.texts] == ["A 100.0", "A not measured"]
    assert short.get_title("left").replace("\n", " ") == "GPT-2 (random weights: A) · 100 tokens"
    with pytest.raises(ValueError, match="no measurements"):
        plot_machines([failed()])


# ---- notebook 05 ----

def test_notebook_05_compares_files_and_never_imports_torch(tmp_path):
    mine = Run([row(max_new_tokens=128, new_tokens=128), failed()]).save(tmp_path / "mine.jsonl")
    later = Run([row(seconds=(2, 2), max_new_tokens=128, new_tokens=128, torch="2.12.0")]).save(tmp_path / "b.jsonl")
    notebook = nbformat.read(ROOT / "notebooks" / "05_compare_machines.ipynb", 4)
    notebook.cells.append(nbformat.v4.new_code_cell('assert not {"torch", "transformers"} & set(sys.modules)'))
    nbformat.write(notebook, tmp_path / "notebook.ipynb")
    parameters = {"mine": [str(mine), str(later)], "before_and_after": [str(mine), str(later)],
                  "folder": str(tmp_path / "out")}
    done = papermill.execute_notebook(tmp_path / "notebook.ipynb", tmp_path / "executed.ipynb", parameters,
                                      cwd=ROOT / "notebooks", progress_bar=False)
    outputs = [output for cell in done.cells if cell.cell_type == "code" for output in cell.outputs]
    assert not any(output.output_type == "error" for output in outputs)
    assert sum("image/png" in output.get("data", {}) for output in outputs) == 1
    assert any("slower by 50%" in str(output.get("data", {})) for output in outputs)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "compare.md", "machines.png", "report.html", "report.md"]


def test_what_is_shipped_can_be_compared():
    assert shipped()[-1].name == PUBLISHED.name and all(path.suffix == ".jsonl" for path in shipped()[:-1])
    assert compare(*shipped())


def test_comparing_needs_no_torch():
    code = (f"import sys; from quantbench.compare import compare; compare({str(PUBLISHED)!r}); "
            "assert 'torch' not in sys.modules")
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
