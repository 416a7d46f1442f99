"""The panel measures for real: its buttons are pressed, its fields set, and what it shows is read back."""

import json
import subprocess
import sys
import time

import ipywidgets
import pytest

import quantbench as qb
from quantbench.loading import why_not
from tests.conftest import TINY, children

PNG = b"\x89PNG"


def wait(until, seconds: float = 90.0) -> None:
    end = time.monotonic() + seconds
    while not until():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.02)


def idle(panel) -> bool:
    return not panel.run_button.disabled


def measure(panel) -> None:
    panel.run_button.click()
    wait(lambda: idle(panel))


def told(panel) -> str:
    """What stands before and behind the bar."""
    words, _, numbers = panel.progress.children[0].children
    return (words.value + numbers.value).replace("\u2007", " ")


def make(model: str, run: qb.Run | None = None, settings: tuple = ("cpu-fp32",), tokens: int = 3, repeats: int = 1):
    panel = qb.panel(run)
    panel.models.value, panel.other.value = [], model
    for key, box in panel.settings.items():
        box.value = key in settings
    panel.max_new_tokens.value, panel.repeats.value = tokens, repeats
    return panel


@pytest.fixture
def long(tmp_path) -> str:
    """A folder with a model that makes a thousand tokens, for a minute or more at 50 rounds."""
    folder = tmp_path / "long"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(TINY["gpt2"] | {"n_layer": 8, "n_positions": 1100}))
    return str(folder)


def test_run_measures_what_is_chosen_and_shows_it(tiny_gpt2):
    panel = make(tiny_gpt2, settings=("cpu-fp32", "cpu-int4"))
    assert isinstance(panel, ipywidgets.VBox)
    assert not panel.table.value.count("<tr") and panel.stop_button.disabled
    panel.run_button.click()
    assert panel.run_button.disabled and not panel.stop_button.disabled
    wait(lambda: idle(panel))
    assert [(row.setting, row.status, len(row.rounds)) for row in panel.run] == [
        ("cpu-fp32", "ok", 1), ("cpu-int4", "ok", 1)]
    assert "CPU FP32" in panel.table.value and "CPU INT4" in panel.table.value
    assert all(bytes(image.value).startswith(PNG) for image in panel.charts.values())
    assert "Done" in told(panel) and "2 of 2 cells" in told(panel)
    assert panel.error.value == "" and panel.stop_button.disabled and not children()


def test_it_starts_from_what_the_run_measured_last_and_shows_the_run(tiny_gpt2):
    run = qb.Run(qb.sweep(tiny_gpt2, "cpu-fp32", 5, repeats=1, prompt="Two words", executor="inline", progress=False))
    panel = qb.panel(run)
    assert (panel.other.value, panel.max_new_tokens.value, panel.prompt.value) == (tiny_gpt2, 5, "Two words")
    assert "CPU FP32" in panel.table.value and panel.charts["throughput"].value and panel.run is run


def test_a_cell_that_the_run_holds_is_measured_again_and_another_length_is_a_new_row(tiny_gpt2, tmp_path):
    panel = make(tiny_gpt2, qb.Run.open(tmp_path / "rows.jsonl"))
    measure(panel)
    panel.repeats.value = 2
    measure(panel)
    assert [len(row.latencies_s) for row in panel.run] == [2]
    panel.max_new_tokens.value = 4
    measure(panel)
    assert [row.max_new_tokens for row in qb.Run.read(tmp_path / "rows.jsonl")] == [3, 4]


def test_stop_in_a_long_cell_keeps_the_rows_and_leaves_no_process(tiny_gpt2, long):
    panel = make(tiny_gpt2)
    measure(panel)
    panel.other.value, panel.max_new_tokens.value, panel.repeats.value = long, 1000, 50
    panel.run_button.click()
    wait(lambda: children() and children()[0].cpu_times().user > 3)
    start = time.monotonic()
    panel.stop_button.click()
    wait(lambda: idle(panel) and not children())
    assert time.monotonic() - start < 2
    assert [(row.model, row.status) for row in panel.run] == [(tiny_gpt2, "ok")]
    assert "Stopped; what was measured is kept" in told(panel) and "0 of 1 cells" in told(panel)
    panel.other.value, panel.max_new_tokens.value, panel.repeats.value = tiny_gpt2, 4, 1
    measure(panel)
    assert [row.max_new_tokens for row in panel.run] == [3, 4] and panel.error.value == ""


FIRST = """
import sys, time, psutil, quantbench as qb
panel = qb.panel()
panel.models.value, panel.other.value = [], sys.argv[1]
panel.run_button.click()
time.sleep(1)
start = time.monotonic()
panel.stop_button.click()
while panel.run_button.disabled:
    time.sleep(0.01)
print(time.monotonic() - start)
time.sleep(9)
print(sum(len(child.children()) for child in psutil.Process().children()), len(panel.run))
"""


def test_stop_does_not_wait_for_the_first_process_of_all(long):
    done = subprocess.run([sys.executable, "-c", FIRST, long], capture_output=True, text=True, timeout=120)
    took, left = done.stdout.splitlines()
    assert float(took) < 2 and left == "0 0", done.stderr


def test_stop_does_not_wait_for_the_weights_to_be_found(tiny_gpt2, monkeypatch):
    found = []
    monkeypatch.setattr("quantbench.sweeps.plan.find", lambda *asked: (time.sleep(3), found.append(asked), 1 / 0))
    panel = make(tiny_gpt2)
    panel.run_button.click()
    panel.stop_button.click()
    assert idle(panel) and "Stopped" in told(panel)
    wait(lambda: found, 10)
    assert panel.error.value == "" and not len(panel.run)


def test_a_new_panel_stops_the_measuring_of_the_one_before(long):
    panel = make(long, tokens=1000, repeats=50)
    panel.run_button.click()
    wait(children)
    qb.panel()
    wait(lambda: idle(panel) and not children(), 5)
    assert len(panel.run) == 0


def test_settings_that_cannot_run_are_greyed_under_the_reason():
    panel = qb.panel()
    reasons = {key: why_not(setting) for key, setting in qb.SETTINGS.items()}
    assert {key: box.disabled for key, box in panel.settings.items()} == {k: bool(why) for k, why in reasons.items()}
    labels = {box: group.children[0].value for group in panel.children if isinstance(group, ipywidgets.VBox)
              for row in group.children if isinstance(row, ipywidgets.HBox) for box in row.children}
    for key, box in panel.settings.items():
        assert (reasons[key] or "<b>Settings</b>") in labels[box]


@pytest.mark.parametrize("change, said", [
    ({"other": ""}, "choose a model"), ({"other": "gtp2"}, "did you mean"), ({"prompt": "  "}, "prompt is empty"),
    ({"max_new_tokens": 60}, "over the 64 tokens"), ({"other": "<b>x</b>"}, "&lt;b&gt;x&lt;/b&gt;"),
])
def test_a_mistake_is_one_escaped_line(tiny_gpt2, change, said):
    panel = make(tiny_gpt2)
    for name, value in change.items():
        getattr(panel, name).value = value
    measure(panel)
    assert said in panel.error.value and "\n" not in panel.error.value and "<b>" not in panel.error.value
    assert len(panel.run) == 0


def test_no_setting_is_a_mistake_and_goes_with_the_next_run(tiny_gpt2):
    panel = make(tiny_gpt2, settings=())
    measure(panel)
    assert "choose at least one setting" in panel.error.value
    panel.settings["cpu-fp32"].value = True
    measure(panel)
    assert panel.error.value == "" and len(panel.run) == 1


def test_markup_in_a_model_name_shows_as_text(tmp_path):
    folder = tmp_path / "<img src=x onerror=alert(1)>"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(TINY["gpt2"]))
    panel, shown = make(str(folder)), []
    panel.progress.observe(lambda change: change.new[0].children[0].observe(lambda words: shown.append(words.new), "value"),
                           "children")
    measure(panel)
    assert len(panel.run) == 1 and any("&lt;img" in words for words in shown)
    assert not any("<img" in words for words in [panel.table.value, panel.error.value, *shown])
    assert "&lt;img" in panel.table.value


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_failure_that_is_nobodys_mistake_is_named_in_the_panel(tiny_gpt2, monkeypatch):
    panel = make(tiny_gpt2)
    monkeypatch.setattr(qb.Run, "add", lambda run, row: 1 / 0)
    measure(panel)
    assert "ZeroDivisionError" in panel.error.value and "Ended early" in told(panel) and not children()


def test_rows_of_several_machines_have_a_table_and_a_line_instead_of_charts():
    rows = [qb.Measurement(model="gpt2", setting="cpu-fp32", max_new_tokens=3, new_tokens=3, latencies_s=[1.0],
                           machine={"cpu": name}) for name in ("one", "two")]
    panel = qb.panel(qb.Run(rows))
    assert "one" in panel.table.value and "2 machines" in panel.error.value


def test_save_writes_the_files_and_names_them(tiny_gpt2, tmp_path):
    panel = make(tiny_gpt2)
    panel.folder.value = str(tmp_path / "out")
    panel.save_button.click()
    assert "nothing to save" in panel.error.value and panel.saved.value == ""
    measure(panel)
    panel.save_button.click()
    names = {path.name for path in (tmp_path / "out").iterdir() if not path.name.startswith(".")}
    assert names == {"rows.jsonl", "table.csv", "table.md", *(f"{name}.png" for name in panel.charts)}
    assert all(name in panel.saved.value for name in names) and len(qb.Run.read(tmp_path / "out" / "rows.jsonl")) == 1
    (tmp_path / "file").touch()
    panel.folder.value = str(tmp_path / "file")
    panel.save_button.click()
    assert "file" in panel.error.value
