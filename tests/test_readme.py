"""The texts say what results/published/ says, and the code that they show is true."""

import __future__
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
from PIL import Image

import quantbench as qb
from quantbench import charts, decode, quantisers, records, settings

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / name for name in ("README.md", "results/README.md", "CONTRIBUTING.md", "CHANGELOG.md",
                                  "docs/decisions.md", "docs/lab-notes.md")]
sys.path.insert(0, str(ROOT / "docs"))
import render  # noqa: E402


def test_its_tables_are_those_of_the_published_rows():
    check = subprocess.run([sys.executable, "-m", "cogapp", "--check", "README.md", "results/README.md"], cwd=ROOT,
                           capture_output=True, text=True)
    assert check.returncode == 0, "stale: run `make readme`\n" + check.stdout + check.stderr


def test_its_charts_were_drawn_from_the_published_rows():
    drawings = render.drawings()
    assert {path.name for path in render.CHARTS.glob("*.png")} == set(drawings)
    for name, (source, _) in drawings.items():
        with Image.open(render.CHARTS / name) as picture:
            assert picture.info["Source"] == render.digest(source), f"{name} is stale: run `make readme`"


def test_every_published_row_says_where_and_with_what_it_was_made():
    for run in [run for folder in render.FOLDERS for run in render.published(folder).values()]:
        assert len({record.machine_name for record in [*run, *run.qualities]}) == 1
        for row in run:
            assert row.machine["cpu"] and {"torch", "transformers", "bitsandbytes"} <= set(row.versions)
            assert row.status in ("ok", "unavailable", "out_of_memory") and (row.status == "ok" or row.reason)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_leads_somewhere(page):
    for target, anchor in re.findall(r"\]\((?!https?:)([^)#]*)(?:#([^)]*))?\)", page.read_text()):
        found = page.parent / target if target else page
        assert found.exists(), f"{page.name}: {target}"
        heads = re.findall(r"^#+ (.*)$", found.read_text(), re.MULTILINE) if anchor else []
        assert not anchor or anchor in {re.sub(r"[^\w -]", "", head).lower().replace(" ", "-") for head in heads}, anchor


def test_a_student_can_read_it_and_it_names_every_room():
    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines()) <= 110
    rooms = {path.parent.name for path in (ROOT / "quantbench").glob("*/__init__.py")}
    assert set(re.findall(r"^\| `(\w+)/` \|", text, re.MULTILINE)) == rooms
    assert "T4" in text[:text.index("## ")] and "random weights" in text[:text.index("## ")]


def blocks(page: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), re.DOTALL)


def test_the_code_it_shows_runs(tiny_gpt2, tmp_path, capsys):
    code = (blocks("README.md")[0].replace("results/local/", f"{tmp_path}/").replace('"gpt2"', repr(tiny_gpt2))
            .replace("gpu-int4", "cpu-int4").replace("run=run", 'run=run, executor="inline"').replace("128", "3"))
    exec(compile(code, "README", "exec"), {})
    assert len(qb.Run.read(tmp_path / "mine.jsonl")) == len(qb.EXPERIMENT)
    assert "CPU INT4" in capsys.readouterr().out


@pytest.fixture
def registries():
    """What a test adds to them goes again."""
    homes = settings.SETTINGS, quantisers.QUANTISERS, records.FIGURES, charts.CHARTS, decode.ENGINES
    kept = [dict(home) for home in homes]
    yield
    for home, rows in zip(homes, kept):
        home.clear()
        home.update(rows)


def added(code: str, home: ModuleType) -> dict:
    """Run `code` as if it stood in `home`; the names that it made."""
    names = dict(vars(home))
    exec(compile(code, home.__name__, "exec", flags=__future__.annotations.compiler_flag), names)
    return names


def test_the_places_that_contributing_names_are_there():
    named = re.findall(r"`(\w+)` in `(?:quantbench/)?(\w+\.py)`", (ROOT / "CONTRIBUTING.md").read_text())
    assert len(named) >= 9
    for name, file in named:
        assert re.search(rf"^(?:class |def )?{name}\b", (ROOT / "quantbench" / file).read_text(), re.MULTILINE), name


def test_what_contributing_shows_works(tiny_gpt2, tmp_path, registries, monkeypatch):
    row, quantiser, figure, chart, engine = blocks("CONTRIBUTING.md")
    for home, code in ((quantisers, quantiser), (charts, chart), (decode, engine)):
        added(code, home)
    ttft_steps = added(figure, records)["ttft_steps"]
    ttft_steps.__set_name__(qb.Measurement, "ttft_steps")
    monkeypatch.setattr(qb.Measurement, "ttft_steps", ttft_steps, raising=False)
    mine = settings.Setting("mine", "CPU BF16 weights", "cpu", "float32", "bf16-weights", linear=True)
    rows = [eval(row.strip().rstrip(","), vars(settings)), mine]
    settings.SETTINGS.update({one.key: one for one in rows})

    run = qb.Run(qb.sweep(tiny_gpt2, [one.key for one in rows], 16, engine=["eager", "static"], repeats=6,
                          executor="inline", progress=False))

    assert [(one.setting, one.engine, one.status) for one in run] == [
        (one.key, name, "ok") for one in rows for name in ("eager", "static")], run
    assert run[0].audit["details"]["double"] and run[2].audit["quantiser"] == "bf16-weights"
    assert all(one.ttft_steps > 0 for one in run) and records.FIGURES["ttft_steps"] == "First token (steps)"
    assert (tmp_path / "first.png") in qb.save(run, tmp_path)
