"""The README says what results/published/ says."""

import re
import subprocess
import sys
from pathlib import Path

from PIL import Image

import quantbench as qb

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "docs"))
import render  # noqa: E402


def test_its_tables_are_those_of_the_published_rows():
    check = subprocess.run([sys.executable, "-m", "cogapp", "--check", "README.md"], cwd=ROOT, capture_output=True,
                           text=True)
    assert check.returncode == 0, "stale: run `make readme`\n" + check.stdout + check.stderr


def test_its_charts_were_drawn_from_the_published_rows():
    drawings = render.drawings()
    assert {path.name for path in render.CHARTS.glob("*.png")} == set(drawings)
    for name, (source, _) in drawings.items():
        with Image.open(render.CHARTS / name) as picture:
            assert picture.info["Source"] == render.digest(source), f"{name} is stale: run `make readme`"


def test_every_published_row_says_where_and_with_what_it_was_made():
    for run in [run for folder in render.PLOTS for run in render.published(folder).values()]:
        assert len({row.machine_name for row in run}) == 1
        for row in run:
            assert row.machine["cpu"] and {"torch", "transformers", "bitsandbytes"} <= set(row.versions)
            assert row.status in ("ok", "unavailable") and (row.status == "ok" or row.reason)


def test_every_link_leads_somewhere():
    for path in [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "docs" / "decisions.md"]:
        for target in re.findall(r"\]\((?!https?:)([^)#]+)\)", path.read_text()):
            assert (path.parent / target).exists(), f"{path.name}: {target}"


def test_every_module_has_its_line_in_the_layout():
    text = (ROOT / "README.md").read_text()
    for path in (ROOT / "quantbench").glob("*.py"):
        assert path.name == "__init__.py" or f"`{path.name}`" in text or f"quantbench/{path.name}" in text, path.name


def test_the_code_it_shows_runs(tiny_gpt2, tmp_path):
    code = re.search(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL).group(1)
    code = (code.replace("results/local/", f"{tmp_path}/").replace('"gpt2"', repr(tiny_gpt2))
            .replace("gpu-", "cpu-").replace("cpu-fp16", "cpu-fp32").replace("[128, 256]", "[3]").replace("=128", "=3"))
    exec(compile(code, "README", "exec"), {})
    assert len(qb.Run.read(tmp_path / "mine.jsonl")) == 3
