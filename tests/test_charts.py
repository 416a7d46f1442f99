"""Charts hold every row, an interval where there is one, and one colour per setting."""

import dataclasses

import matplotlib.pyplot as plt
import pytest

from quantbench.charts import CHARTS, colour_of
from quantbench.labels import cells, not_here
from quantbench.records import Measurement
from quantbench.settings import SETTINGS

T4 = {"cpu": "C", "gpu": "Tesla T4"}
RUN = [Measurement(model=model, setting=key, max_new_tokens=n, new_tokens=n, weights="pretrained", machine=T4,
                   latencies_s=[n / 50, n / 40] + [n / 45] * 4, weights_bytes=10**8,
                   vram_peak_bytes=None if setting.device == "cpu" else 2 * 10**8)
       for model in ("distilgpt2", "gpt2") for key, setting in SETTINGS.items() for n in (128, 256)]
ABSENT = Measurement(model="gpt2", setting="gpu-fp16", max_new_tokens=128, status="unavailable", reason="no GPU",
                     machine=T4)
PLOTS = [pytest.param(chart.plot, id=name) for name, chart in CHARTS.items()]


def texts(figure) -> str:
    return " ".join(text.get_text() for text in figure.findobj(plt.Text))


def lines(figure) -> set[float]:
    segments = [one for ax in figure.axes for c in ax.collections for one in getattr(c, "get_segments", list)()]
    return {round(float(x), 3) for segment in segments for x, _ in segment}


@pytest.mark.parametrize("plot", PLOTS)
def test_every_setting_and_model_is_on_it_and_pyplot_holds_nothing(plot):
    figure = plot(RUN)
    assert all(setting.label in texts(figure) for setting in SETTINGS.values())
    assert "DistilGPT-2" in texts(figure) and "Tesla T4" in texts(figure) and not plt.get_fignums()


def test_weights_in_the_hosts_memory_are_no_part_of_vram():
    offloaded = dataclasses.replace(RUN[1], setting="gpu-fp16-offload", weights_bytes=4 * 10**8, vram_peak_bytes=10**8)
    drawn = texts(CHARTS["vram"].plot([offloaded]))
    assert "0.100" in drawn and "0.400" not in drawn


def test_an_interval_is_drawn_where_there_are_six_samples_and_said():
    plot = CHARTS["throughput"].plot
    assert {40.0, 50.0} <= lines(plot(RUN[:2])) and "95% interval" in texts(plot(RUN[:2]))
    few = plot([dataclasses.replace(RUN[0], latencies_s=RUN[0].latencies_s[:5])])
    assert not lines(few) and "95%" not in texts(few)


def test_what_cannot_run_here_is_a_line_below_and_what_failed_keeps_its_place():
    crashed = dataclasses.replace(ABSENT, setting="gpu-int8", status="crashed")
    text = texts(CHARTS["throughput"].plot([RUN[0], ABSENT, crashed]))
    assert "Not here: GPU FP16: no GPU" in text and "unavailable" not in text and "crashed" in text
    assert "unavailable" in texts(CHARTS["throughput"].plot([ABSENT]))  # there is nothing else to draw
    failed = [dataclasses.replace(crashed, status="failed", batch_size=size, reason=why)
              for size, why in ((1, "A"), (8, "B"))]
    assert not_here(cells([RUN[0], *failed])) == \
        "Not here: GPT-2, GPU INT8, 128 tokens: A; GPT-2, GPU INT8, 128 tokens, batch 8: B"  # each has its own reason
    alike = [dataclasses.replace(row, reason="A") for row in failed]
    assert not_here(cells([RUN[0], *alike])) == "Not here: GPU INT8: A"
    with pytest.raises(ValueError):
        CHARTS["throughput"].plot([])


@pytest.mark.parametrize("name, faster", [("throughput", -1), ("latency", 1)])
def test_the_best_stands_first_and_no_panel_has_more_than_twelve_bars(name, faster):
    rows = [dataclasses.replace(row, latencies_s=[1.0 + place % 7] * 6) for place, row in enumerate(RUN[::2])]
    panels = {ax.get_title(loc="left"): [bar.get_width() for bar in ax.patches[::2]]  # each has its part after it
              for ax in CHARTS[name].plot(rows).axes if ax.has_data()}
    assert max(map(len, panels.values())) <= 12 and sum(map(len, panels.values())) == len(rows)
    drawn = panels["GPT-2 · 128 tokens · 1 of 2"] + panels["GPT-2 · 128 tokens · 2 of 2"]
    assert len(set(drawn)) == 7 and drawn == sorted(drawn, key=lambda value: faster * value)


def test_a_long_path_leaves_the_workload_in_its_panels_title():
    long = [dataclasses.replace(RUN[0], model="/data/" + "folder/" * 40, batch_size=size) for size in (1, 8)]
    titles = [ax.get_title(loc="left").replace("\n", " ") for ax in CHARTS["throughput"].plot(long).axes]
    assert [title.endswith("tokens, batch 8") for title in titles] == [False, True]


def test_random_weights_are_said():
    assert "GPT-2 (random weights)" in texts(CHARTS["latency"].plot([dataclasses.replace(RUN[0], weights="random")]))


@pytest.mark.parametrize("plot", PLOTS)
def test_machines_are_not_mixed_and_a_hostile_name_is_drawn_as_text(plot):
    with pytest.raises(ValueError, match="machines"):
        plot([RUN[0], dataclasses.replace(RUN[1], machine={"cpu": "other"})])
    figure = plot([dataclasses.replace(row, model=r"$\frac{<b>_^\x", prompt=r"$\x") for row in RUN[:2]] + RUN[:1])
    figure.savefig("/dev/null", format="png")
    assert "<b>" in texts(figure)


def test_a_settings_colour_is_its_quantisers_and_its_own():
    assert len({colour_of(key) for key in SETTINGS}) == len(SETTINGS) and colour_of("gone") == colour_of("another")
