"""The panel measures for real: its buttons are pressed, its fields set, and what it shows is read back."""

import json
import time

import ipywidgets
import pytest

import quantbench as qb
from quantbench.quantisers import why_not
from tests.conftest import TINY, children


def wait(until, seconds: float = 90.0) -> None:
    end = time.monotonic() + seconds
    while not until():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.02)


def measure(panel) -> None:
    panel.run_button.click()
    wait(lambda: not panel.run_button.disabled)


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


def folder(tmp_path, **changes) -> str:
    tmp_path.mkdir(exist_ok=True)
    (tmp_path / "config.json").write_text(json.dumps(TINY["gpt2"] | changes))
    return str(tmp_path)


def test_run_measures_what_is_chosen_and_shows_it(tiny_gpt2):
    panel = make(tiny_gpt2, settings=("cpu-fp32", "cpu-int4"))
    assert isinstance(panel, ipywidgets.VBox) and not panel.table.value.count("<tr") and panel.stop_button.disabled
    panel.run_button.click()
    assert panel.run_button.disabled and not panel.stop_button.disabled
    wait(lambda: not panel.run_button.disabled)
    assert [(row.setting, row.status, len(row.rounds)) for row in panel.run] == [
        ("cpu-fp32", "ok", 1), ("cpu-int4", "ok", 1)]
    assert "CPU FP32" in panel.table.value and "CPU INT4" in panel.table.value
    assert all(bytes(image.value).startswith(b"\x89PNG") for image in panel.charts.values())
    assert "Done" in told(panel) and "2 of 2 cells" in told(panel)
    assert panel.error.value == "" and panel.stop_button.disabled and not children()


def test_it_starts_from_the_run_and_a_cell_that_it_holds_is_measured_again(tiny_gpt2):
    run = qb.Run(qb.sweep(tiny_gpt2, "cpu-fp32", 5, repeats=1, prompt="Two words", executor="inline", progress=False))
    panel = qb.panel(run)
    assert (panel.other.value, panel.max_new_tokens.value, panel.prompt.value) == (tiny_gpt2, 5, "Two words")
    assert "CPU FP32" in panel.table.value and panel.charts["throughput"].value and panel.run is run
    panel.repeats.value = 2
    measure(panel)
    assert [len(row.latencies_s) for row in run] == [2]


def test_what_fits_and_which_to_take_are_two_buttons(tiny_gpt2):
    panel = make(tiny_gpt2, settings=("cpu-fp32", "cpu-bf16"), tokens=8)
    panel.fit_button.click()
    wait(lambda: not panel.fit_button.disabled)
    assert "Decode floor (ms)" in panel.answer.value and not len(panel.run) and panel.error.value == ""
    panel.limits["keep"].value = 0
    panel.choose_button.click()
    assert panel.fit_button.disabled and panel.run_button.disabled and not panel.stop_button.disabled
    wait(lambda: not panel.choose_button.disabled)
    assert {(row.setting, len(row.rounds) >= 6) for row in panel.run} == {("cpu-fp32", True), ("cpu-bf16", True)}
    assert "Which to take" in panel.answer.value and "CPU BF16" in panel.answer.value and panel.error.value == ""
    rounds = [row.rounds for row in panel.run]
    panel.limits["ram_gb"].value = 1e-6  # other limits: nothing is measured twice
    panel.choose_button.click()
    wait(lambda: not panel.choose_button.disabled)
    assert "ruled out" in panel.answer.value and [row.rounds for row in panel.run] == rounds
    panel.limits["ttft_s"].value = -1
    panel.choose_button.click()
    wait(lambda: not panel.choose_button.disabled)
    assert "ttft_s must be above 0" in panel.error.value


def test_stop_in_a_long_cell_keeps_the_rows_and_a_new_panel_stops_too(tiny_gpt2, tmp_path):
    panel = make(tiny_gpt2)
    measure(panel)
    panel.other.value = folder(tmp_path, n_layer=8, n_positions=1100)
    panel.max_new_tokens.value, panel.repeats.value = 1000, 50
    for stop in (panel.stop_button.click, qb.panel):
        panel.run_button.click()
        wait(lambda: ": round" in told(panel) and children())
        stop()
        wait(lambda: not panel.run_button.disabled and not children(), 5)
        assert [(row.model, row.status) for row in panel.run] == [(tiny_gpt2, "ok")]
        assert "Stopped; what was measured is kept" in told(panel) and "0 of 1 cells" in told(panel)


def test_stop_does_not_wait_for_the_weights_to_be_found(tiny_gpt2, monkeypatch):
    found = []
    monkeypatch.setattr("quantbench.sweeps.plan.find", lambda *asked: (time.sleep(3), found.append(asked), 1 / 0))
    panel = make(tiny_gpt2)
    panel.run_button.click()
    panel.stop_button.click()
    assert not panel.run_button.disabled and "Stopped" in told(panel)
    wait(lambda: found, 10)
    time.sleep(0.2)
    assert panel.error.value == "" and not len(panel.run)


def test_settings_that_cannot_run_are_greyed_under_the_reason():
    panel, title = qb.panel(), ""
    for one in panel.children:
        title = one.value if isinstance(one, ipywidgets.HTML) else title
        for key, box in panel.settings.items():
            if box in getattr(one, "children", ()):
                why = why_not(qb.SETTINGS[key], qb.facts())
                assert box.disabled == bool(why) and (why or "Settings") in title


@pytest.mark.parametrize("change, said", [
    ({"other": ""}, "choose a model"), ({"other": "gtp2"}, "did you mean"), ({"prompt": "  "}, "prompt is empty"),
    ({"max_new_tokens": 60}, "over the 64 tokens"), ({"other": "<b>x</b>"}, "&lt;b&gt;x&lt;/b&gt;")])
def test_a_mistake_is_one_escaped_line(tiny_gpt2, change, said):
    panel = make(tiny_gpt2)
    for name, value in change.items():
        getattr(panel, name).value = value
    measure(panel)
    assert said in panel.error.value and "\n" not in panel.error.value and "<b>" not in panel.error.value
    panel.settings["cpu-fp32"].value, panel.other.value = False, tiny_gpt2
    measure(panel)
    assert "and a setting" in panel.error.value and len(panel.run) == 0


def test_markup_in_a_model_name_shows_as_text_and_a_failure_is_named(tmp_path, monkeypatch):
    panel, shown = make(folder(tmp_path / "<img src=x onerror=alert(1)>")), []
    panel.progress.observe(lambda change: change.new[0].children[0].observe(lambda words: shown.append(words.new), "value"),
                           "children")
    measure(panel)
    assert any("&lt;img" in words for words in shown) and "&lt;img" in panel.table.value
    assert not any("<img" in words for words in [panel.table.value, panel.error.value, *shown])
    monkeypatch.setattr(qb.Run, "add", lambda run, row: 1 / 0)
    measure(panel)
    assert "ZeroDivisionError" in panel.error.value and "Ended early" in told(panel) and not children()


def test_save_writes_the_files_and_names_them_and_rows_of_two_machines_are_a_mistake(tmp_path):
    rows = [qb.Measurement(model="gpt2", setting="cpu-fp32", max_new_tokens=3, new_tokens=3, latencies_s=[1.0],
                           machine={"cpu": name}) for name in ("one", "two")]
    assert "2 machines" in qb.panel(qb.Run(rows)).error.value
    for run, said in ((qb.Run(), "nothing to save"), (qb.Run(rows[:1]), "")):
        panel = qb.panel(run)
        panel.folder.value = str(tmp_path / "out")
        panel.save_button.click()
        assert said in panel.error.value
    names = {path.name for path in (tmp_path / "out").iterdir() if not path.name.startswith(".")}
    assert names == {"rows.jsonl", "table.csv", "table.md", *(f"{name}.png" for name in panel.charts)}
    assert all(name in panel.saved.value for name in names)
