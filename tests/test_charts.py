"""Charts hold every row, with its interval, and one colour per setting."""

import dataclasses

import matplotlib.pyplot as plt
import pytest

from quantbench.charts import COLOURS, plot_latency, plot_lengths, plot_throughput, plot_vram
from quantbench.record import Measurement
from quantbench.settings import SETTINGS

PLOTS = [plot_throughput, plot_lengths, plot_latency, plot_vram]
T4 = {"cpu": "C", "gpu": "Tesla T4"}
RUN = [Measurement(model=model, setting=key, max_new_tokens=n, new_tokens=n, latencies_s=[n / 50, n / 40, n / 45],
                   weights="pretrained", weights_bytes=10**8, machine=T4,
                   vram_peak_bytes=None if setting.device == "cpu" else 2 * 10**8)
       for model in ("distilgpt2", "gpt2") for key, setting in SETTINGS.items() for n in (128, 256)]
ABSENT = Measurement(model="gpt2", setting="gpu-fp16", max_new_tokens=128, status="unavailable", reason="no GPU",
                     machine=T4)


def texts(figure) -> str:
    return " ".join(text.get_text() for text in figure.findobj(plt.Text))


@pytest.mark.parametrize("plot", PLOTS)
def test_every_setting_and_model_is_on_it_and_pyplot_holds_nothing(plot):
    figure = plot(RUN)
    assert all(setting.label in texts(figure) for setting in SETTINGS.values())
    assert "DistilGPT-2" in texts(figure) and "Tesla T4" in texts(figure)
    assert figure.number not in plt.get_fignums() if hasattr(figure, "number") else not plt.get_fignums()
    figure.savefig("/dev/null", format="png")


def test_every_bar_of_tokens_per_second_has_its_interval():
    figure = plot_throughput(RUN[:2])
    bars = [patch for ax in figure.axes for patch in ax.patches if patch.get_width() == pytest.approx(45)]
    lines = [segment for ax in figure.axes for c in ax.collections for segment in getattr(c, "get_segments", list)()]
    ends = {round(float(x), 3) for segment in lines for x, _ in segment}
    assert len(bars) == 2 and {40.0, 50.0} <= ends


def test_a_row_that_did_not_run_is_said():
    assert "unavailable" in texts(plot_throughput([RUN[0], ABSENT]))
    with pytest.raises(ValueError):
        plot_throughput([])


def test_random_weights_are_said():
    assert "random weights" in texts(plot_latency([dataclasses.replace(RUN[0], weights="random")]))


@pytest.mark.parametrize("plot", PLOTS)
def test_machines_are_not_mixed(plot):
    with pytest.raises(ValueError, match="machines"):
        plot([RUN[0], dataclasses.replace(RUN[1], machine={"cpu": "other"})])


@pytest.mark.parametrize("plot", PLOTS)
def test_a_hostile_name_is_drawn_as_text(plot):
    figure = plot([dataclasses.replace(RUN[4], model=r"$\frac{<b>_^\x")])
    figure.savefig("/dev/null", format="png")
    assert "<b>" in texts(figure)


def test_a_settings_colour_does_not_depend_on_the_run():
    assert set(COLOURS) == set(SETTINGS) and len(set(COLOURS.values())) >= 8
