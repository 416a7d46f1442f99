"""Every notebook keeps the rules; 01 to 04 run whole with tiny parameters."""

import ast
import re
import shutil
from collections import Counter
from pathlib import Path

import nbformat
import papermill
import pytest

import quantbench as qb
from quantbench.charts import CHARTS
from tests.conftest import pretrained

ROOT = Path(__file__).parent.parent
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


def code_cells(path: Path) -> list:
    return [cell for cell in nbformat.read(path, 4).cells if cell.cell_type == "code"]


def plain(source: str) -> str:
    """Python without IPython's magics."""
    return re.sub(r"^(\s*)%.*$", r"\1pass", source, flags=re.MULTILINE)


@pytest.fixture(params=NOTEBOOKS, ids=lambda path: path.stem)
def notebook(request) -> Path:
    return request.param


def test_it_is_valid_and_committed_without_outputs(notebook):
    nbformat.validate(nbformat.read(notebook, 4))
    assert all(not cell.outputs and cell.execution_count is None for cell in code_cells(notebook))


def test_it_asks_colab_for_a_t4(notebook):
    metadata = nbformat.read(notebook, 4).metadata
    assert metadata.accelerator == "GPU" and metadata.colab.gpuType == "T4"


def test_there_is_one_parameters_cell_that_papermill_can_set(notebook):
    tagged = [cell for cell in code_cells(notebook) if "parameters" in cell.metadata.get("tags", [])]
    assert len(tagged) == 1
    body = ast.parse(tagged[0].source).body
    assert body and all(isinstance(node, ast.Assign) for node in body)
    assert all("#@param" in line for line in tagged[0].source.splitlines())


def test_cells_are_short_and_logic_lives_in_the_package(notebook):
    for cell in code_cells(notebook)[1:]:
        tree = ast.parse(plain(cell.source))
        assert len(cell.source.splitlines()) <= (12 if cell.metadata.get("tags") else 8), cell.source  # a form has a field a line
        assert not any(isinstance(node, (ast.FunctionDef, ast.ClassDef, ast.Lambda)) for node in ast.walk(tree))


def test_every_name_it_takes_from_the_package_is_there(notebook):
    text = "\n".join(cell.source for cell in nbformat.read(notebook, 4).cells)
    missing = [name for name in set(re.findall(r"\bqb\.(\w+)", text)) if not hasattr(qb, name)]
    assert not missing


@pytest.mark.parametrize("name", qb.__all__)
def test_every_public_name_leads_somewhere_and_says_what_it_is(name):
    assert getattr(qb, name) is not None and (not callable(getattr(qb, name)) or getattr(qb, name).__doc__)


def test_notebook_02_runs_whole_where_a_setting_is_refused(tmp_path):
    rows, how = tmp_path / "out" / "rows.jsonl", {"intermediate_size": 80, "num_hidden_layers": 1}
    parameters = {"model": pretrained(tmp_path / "model", **how), "max_new_tokens": 4, "tokens": 300, "prompt": "Once",
                  "settings": ["gpu-fp16", "cpu-int8-weights", "cpu-int4-weights"], "cell_budget_s": 0.1,
                  "results": str(rows)}
    papermill.execute_notebook(ROOT / "notebooks" / "02_quality.ipynb", tmp_path / "executed.ipynb", parameters,
                               cwd=ROOT / "notebooks", progress_bar=False)
    run = qb.Run.read(rows)
    assert {row.setting: row.status for row in run} == {
        "cpu-fp32": "ok", "gpu-fp16": "unavailable", "cpu-int8-weights": "ok", "cpu-int4-weights": "failed"}
    assert "multiple of 32 inputs" in run.only(status="failed")[0].reason
    assert {one.setting: one.status for one in run.qualities} == {
        "cpu-fp32": "ok", "gpu-fp16": "unavailable", "cpu-int8-weights": "ok"}
    assert {"quality.csv", "quality.png"} <= {path.name for path in rows.parent.iterdir()}


def test_notebook_03_runs_whole(tiny_gpt2, tiny_llama, tmp_path):
    rows = tmp_path / "out" / "rows.jsonl"
    parameters = {"model": tiny_gpt2, "sizes": [tiny_gpt2, tiny_llama], "batch_sizes": [1, 2], "max_new_tokens": 4,
                  "prompt_tokens": [4, 12], "settings": ["cpu-fp32", "gpu-int4", "cpu-int4"], "cell_budget_s": 0.1,
                  "results": str(rows)}
    papermill.execute_notebook(ROOT / "notebooks" / "03_why.ipynb", tmp_path / "executed.ipynb", parameters,
                               cwd=ROOT / "notebooks", progress_bar=False)
    run = qb.Run.read(rows)
    done = {(row.batch_size, row.engine) for row in run if row.status == "ok"}
    assert done == {(1, "eager"), (2, "eager"), (1, "graph")}
    outputs = [output for cell in code_cells(tmp_path / "executed.ipynb") for output in cell.outputs]
    assert sum("image/png" in output.get("data", {}) for output in outputs) == 4
    names = {path.name for path in rows.parent.iterdir() if not path.name.startswith(".")}
    assert names == {"rows.jsonl", "why.csv", "floor.png", "scaling.png", "prompts.png"}


def test_notebook_04_runs_whole(tiny_gpt2, tmp_path):
    parameters = {"model": tiny_gpt2, "settings": ["cpu-fp32", "cpu-int4"], "max_new_tokens": 4,
                  "results": str(tmp_path / "rows.jsonl")}
    papermill.execute_notebook(ROOT / "notebooks" / "04_choose.ipynb", tmp_path / "executed.ipynb", parameters,
                               cwd=ROOT / "notebooks", progress_bar=False)
    measured = {row.setting for row in qb.Run.read(tmp_path / "rows.jsonl") if row.status == "ok"}
    assert measured == {"cpu-fp32", "cpu-int4"}
    printed = "".join(output.text for cell in code_cells(tmp_path / "executed.ipynb") for output in cell.outputs
                      if output.output_type == "stream")
    assert "from_pretrained(" in printed or "qb.load(" in printed


def test_notebook_01_runs_whole(tiny_gpt2, tmp_path):
    shutil.copy(NOTEBOOKS[0], tmp_path / "notebook.ipynb")
    rows = tmp_path / "out" / "rows.jsonl"
    parameters = {"models": [tiny_gpt2], "max_new_tokens": [3, 5], "compare_tokens": 4, "cell_budget_s": 0.1,
                  "results": str(rows)}
    papermill.execute_notebook(tmp_path / "notebook.ipynb", tmp_path / "executed.ipynb", parameters,
                               cwd=ROOT / "notebooks", progress_bar=False)
    compared = [row for row in qb.Run.read(rows) if row.max_new_tokens == 4 and row.status == "ok"]
    assert compared and all(len(row.rounds) >= 6 for row in compared)
    run, every = qb.Run.read(rows), [*qb.EXPERIMENT, *qb.more_settings(qb.facts())]
    assert Counter((row.setting, row.max_new_tokens) for row in run) == Counter(
        [(setting, n) for setting in qb.EXPERIMENT for n in (3, 5)] + [(setting, 4) for setting in every])
    assert all(row.status in ("ok", "unavailable") for row in run)
    outputs = [output for cell in code_cells(tmp_path / "executed.ipynb") for output in cell.outputs]
    assert sum("image/png" in output.get("data", {}) for output in outputs) == 4
    assert not any(output.output_type == "error" for output in outputs)
    said = "".join(output.data.get("text/markdown", "") for output in outputs if "data" in output)
    assert "at 4 tokens" in said and "not compared" not in said
    names = {path.name for path in rows.parent.iterdir() if not path.name.startswith(".")}
    assert names == {"rows.jsonl", "table.csv", "table.md", *(f"{name}.png" for name in CHARTS)}
