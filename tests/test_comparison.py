"""Machines and runs beside each other: quotients without a claim, claims by rounds, and names that stay text."""

import random
import re
import time
from pathlib import Path

import nbformat
import pandas as pd
import papermill
import pytest

from quantbench.comparison.history import changes, moves
from quantbench.comparison.machines import compare, compare_table, gathered, plot_machines
from quantbench.comparison.t4 import reference_table, shipped
from quantbench.records import Measurement
from quantbench.results import Run
from quantbench.tables import show

ROOT = Path(__file__).parent.parent
SETTINGS = ("cpu-fp32", "cpu-bf16", "cpu-int8", "cpu-int4", "cpu-int8-dynamic")
HOSTILE = '<img src=x onerror=alert(1)> | `a` "b" [c](d) ![e] $f$ {g} #h; %%i\n```\n## j'


def row(setting="cpu-fp32", seconds=(1.0,) * 6, cpu="One", model="gpt2", torch="2.11.0", rounds=True, **fields):
    fields = {"max_new_tokens": 100, "new_tokens": 100, "weights": "pretrained", "weights_bytes": 10**9} | fields
    return Measurement(model=model, setting=setting, latencies_s=list(seconds), machine={"cpu": cpu},
                       rounds=[f"r{place}" for place in range(len(seconds))] if rounds else [],
                       versions={"torch": torch, "numpy": "2.1.3"}, **fields)


def failed() -> Measurement:
    return row("gpu-fp16", (), status="unavailable", reason="no GPU", new_tokens=None, weights=None)


def test_between_machines_there_is_a_plain_quotient_and_a_verdict_is_on_a_machines_own_ratio_by_rounds():
    one = [row(seconds=(2.0,) * 6), row("cpu-int8", (1.0, 1.0, 1.0, 1.0, 0.8, 1.2))]
    two = [row(cpu="Two"), row("cpu-int8", (0.9, 1.2, 1, 1, 1, 1), "Two"), row("cpu-int4", (0.5,) * 5, "Two")]
    frame = compare_table(one, two)
    assert list(frame["Machine"]) == ["One", "Two", "One", "Two", "Two"]
    assert list(frame["Tokens/sec"]) == [50, 100, 100, 100, 200] and frame["Times the first"].tolist()[1::2] == [2, 1]
    assert frame["Times the first"].isna().tolist() == [True, False, True, False, True]
    assert frame["Verdict"].fillna("").tolist() == ["", "", "faster", "tie", "not compared"]  # two are baselines
    assert frame["Own ratio 95%"].iloc[2] == "1.63–2.55" and frame["Own ratio"].iloc[2] == 2.0
    assert set(frame["Baseline"].iloc[2:]) == {"CPU FP32"} and frame["Baseline"].iloc[:2].isna().all()


def test_engines_and_workloads_of_one_setting_are_cells_of_their_own():
    rows = [row(), row(engine="graph"), row(prompt="another"), row(prompt_length=100), row(depth=100), row(batch_size=2),
            row(cache="static"), *(row("gpu-fp16", gpus=gpus) for gpus in (1, 2, 8))]
    assert len(compare_table(rows)) == len(rows) == len(moved(rows, rows))
    for path in (ROOT / "results" / "published").rglob("*.jsonl"):
        assert len(compare_table(path)) == len(Run.read(path)), path


def test_a_good_row_never_gives_way_to_a_later_one_that_failed():
    bad = row("cpu-fp32", (), status="out_of_memory", reason="another program", new_tokens=None)
    assert compare_table([row()], [bad])["Tokens/sec"].tolist() == [100]
    assert compare_table([bad], [row()], [row(seconds=(2.0,) * 6)])["Tokens/sec"].tolist() == [50]
    assert "was ok, now out of memory: another program" in repr(changes([row()], [bad]))


def test_rows_say_why_they_are_empty_that_weights_are_random_and_versions_and_prompts_are_told_apart():
    names = compare_table([row(), row(torch="2.12.0", seconds=(2.0, 2.0))], [row(cpu="Two")])["Machine"]
    assert list(names) == ["One · torch 2.11.0", "One · torch 2.12.0", "Two"]
    mine = [row(weights="random"), failed()]
    frame = compare_table(mine, [row("gpu-fp16", cpu="Two"), row(cpu="Two", prompt="two")])
    assert list(frame.index) == ["GPT-2"] * 4 and frame["Weights"].fillna("").tolist() == ["random", "", "", ""]
    assert frame["Status"].iloc[2] == "unavailable: no GPU" and len(set(frame["Workload"])) == 2
    assert "random" in repr(compare(mine)[0])


def test_files_what_is_refused_and_what_is_shipped(tmp_path):
    path = Run([row()]).save(tmp_path / "rows.jsonl")
    assert str(compare(path, [row(cpu="Two")])) == str(compare([row()], [row(cpu="Two")]))
    assert shipped() and compare(*shipped())
    with pytest.raises(ValueError, match="nothing to compare"):
        compare()
    with pytest.raises(FileNotFoundError):
        changes(tmp_path / "none.jsonl")
    with pytest.raises(ValueError, match="no measurements"):
        plot_machines([failed()])


def test_hundreds_of_machines_take_seconds():
    runs = [[row(setting, cpu=f"CPU {place}", model=f"model-{model}", max_new_tokens=length, new_tokens=length)
             for model in range(5) for setting in SETTINGS for length in (10, 20)] for place in range(200)]
    start = time.process_time()
    assert sum(len(table.frame) for table in compare(*runs)) == 10_000
    assert len(changes(*runs[:100], *runs[:100])) == 300
    assert time.process_time() - start < 10


def measured(seed: int, slow: float = 1.0, processes: float = 0.01, rounds: int = 24) -> list[Measurement]:
    """A run of 2 models x 5 settings x 2 lengths: a day that all share, a process each, and a noise per sample."""
    noise = random.Random(seed)
    day, rows = 1 + noise.uniform(-0.15, 0.15), []
    for model in ("gpt2", "distilgpt2"):
        for setting in SETTINGS:
            own = day * noise.lognormvariate(0, processes) * (slow if (model, setting) == ("gpt2", "cpu-int4") else 1)
            rows += [row(setting, [own * noise.lognormvariate(0, 0.03) for _ in range(rounds)], model=model,
                         max_new_tokens=length, new_tokens=length) for length in (64, 128)]
    return rows


def moved(before: list[Measurement], after: list[Measurement]):
    (_, before), (_, after) = gathered([before, after], per_source=True).groupby("side")
    return moves(before, after)


@pytest.mark.parametrize(("processes", "rounds"), [(0.01, 6), (0.01, 60), (0.1, 24)])
def test_the_same_machine_names_one_cell_in_twenty_at_most_and_a_slower_setting_is_found(processes, rounds):
    same = pd.concat(moved(*(measured(seed + day, 1.0, processes, rounds) for day in (0, 1000))) for seed in range(60))
    assert same["verdict"].isin(["faster", "slower"]).sum() <= 0.05 * 60 * 16
    if processes < 0.1:
        slow = pd.concat(moved(measured(seed, rounds=30), measured(99 + seed, 1.14, rounds=30)) for seed in range(40))
        assert ((slow["verdict"] == "slower") & (slow["Setting"] == "CPU INT4")).sum() >= 0.9 * 80


def test_moves_and_their_words():
    before = [row(), row("cpu-int8"), row("cpu-int4"), row("cpu-bf16")]
    after = [row(torch="2.12.0", seconds=(2.0,) * 6), *(row(key, (seconds,) * 6, torch="2.12.0") for key, seconds in (
        ("cpu-int8", 2.5), ("cpu-int4", 2.0), ("cpu-bf16", 2.0)))]
    frame = moved(before, after).set_index("Setting").loc["CPU INT8"]
    assert frame["move"] == pytest.approx(0.8) and frame["spread"] == 0.02 and frame["verdict"] == "slower"
    assert [frame["low"], frame["high"]] == pytest.approx([0.8 / 1.02, 0.8 * 1.02])
    assert changes(before, after) == [
        "One: torch 2.11.0 → torch 2.12.0.",
        "GPT-2, CPU INT8, 100 tokens: slower by 20% against CPU FP32 (0.78–0.82 times what it was).",
        "No change beyond the spread of these two runs (2%–45% of a ratio): 2 of 3 ratios.",
        "The baselines ran at 0.50 times what they did: two runs cannot tell why."]
    assert changes(before, before)[1] == \
        "No change beyond the spread of these two runs (2% of a ratio): 3 of 3 ratios."


def test_too_few_rounds_memory_what_stopped_working_and_runs_with_nothing_in_common():
    for few in ({"rounds": False}, {"seconds": (1.0,) * 5}):
        said = changes([row(**few), row("cpu-int8", **few)], [row(), row("cpu-int8", (9.0,) * 6)])
        assert said[1] == "Not compared: 1 of 2 cells (under 6 rounds with the same baseline)." and len(said) == 3
    said = changes([row(), row("gpu-fp16")], [row(weights_bytes=2 * 10**9), failed()])
    assert said[0] == "One: the same versions of everything."
    assert {*said[1:3]} == {"GPT-2, GPU FP16, 100 tokens: was ok, now unavailable: no GPU.",
                            "GPT-2, CPU FP32, 100 tokens: Weights (GB) 1.000 → 2.000."}
    assert "nothing to hold it against" in changes([row()], [row(cpu="Two")])[0]
    assert changes([row()], [row("cpu-int8")])[1] == "No cell is in both."


def test_the_reference_table_is_corrected_and_only_rows_of_its_workload_stand_beside_it():
    asked, others = {"max_new_tokens": 128, "new_tokens": 128}, [{"engine": "compile"}, {"gpus": 2}, {"prompt": "other"}, {
        "prompt_length": 1024}, {"depth": 512}, {"cache": "static"}, {"batch_size": 4}]
    frame = reference_table([row(**asked), *(row(seconds=(0.1,), **asked, **other) for other in others)])
    at = frame[(frame.index == "GPT-2") & (frame["Setting"] == "CPU FP32") & (frame["Max New Tokens"] == 128)].iloc[0]
    assert at["Tokens/sec (here)"] == 128.0 and at["Tokens/sec (corrected)"] == pytest.approx(128 / 11.896)
    assert "76 and 140 (DistilGPT-2) and 140 and 268 (GPT-2)" in repr(show(frame))
    assert "random weights" in str(show(reference_table([row(weights="random", max_new_tokens=128)])))
    assert len(show(reference_table())) == 2
    with pytest.raises(ValueError, match="2 machines"):
        reference_table([row(), row(cpu="Two")])


def test_the_chart_has_a_bar_per_setting_and_machine_and_hostile_names_stay_text():
    fig = plot_machines([row(), row("cpu-int8"), failed()], [row(cpu="Two")], [row(cpu=HOSTILE, weights="random")])
    shown = [text.get_text() for text in fig.axes[0].texts]
    assert shown[:2] == ["100.0, One", "100.0, Two"] and shown[2].endswith("… (random weights)")
    fig.canvas.draw()
    one = [row(model=HOSTILE, cpu=HOSTILE, torch=torch) for torch in ("2", HOSTILE)]
    for shown in (compare(one).markdown(), changes(one)._repr_markdown_()):
        assert "<img" not in shown and "](d)" not in shown and "`" not in shown
        assert not re.search(r"^## j", shown, re.M)
    assert "<img" not in compare(one)._repr_html_()


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
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["compare.md", "machines.png"]
