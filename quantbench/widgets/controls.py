"""The package behind buttons: measure, and watch table and charts grow; ask what fits, and which setting to take."""

import contextlib
import io
import operator
import threading
from collections.abc import Callable
from pathlib import Path

import ipywidgets as widgets
from tqdm.notebook import tqdm

from quantbench.charts import CHARTS
from quantbench.choice.choosing import choose
from quantbench.choice.fitting import fit
from quantbench.machine import facts
from quantbench.quantisers import why_not
from quantbench.records import Measurement
from quantbench.results import Run
from quantbench.saving import save
from quantbench.settings import EXPERIMENT, MODELS, SETTINGS
from quantbench.sweeps.sweeping import sweep
from quantbench.tables import show
from quantbench.wording import html_text

_BAR = "{desc}{bar}{n_fmt} of {total_fmt} cells [{elapsed}<{remaining}]"
_WRAP = {"flex_flow": "row wrap"}
_LIMITS = {"vram_gb": "VRAM (GB)", "ram_gb": "RAM (GB)", "ttft_s": "TTFT (s)", "min_tokens_per_s": "Tokens/s",
           "keep": "Accuracy kept"}  # of `choose`; 0: none
_FIELD = {"style": {"description_width": "11em"}, "layout": {"width": "auto", "max_width": "50em"}}
_current: "Panel | None" = None  # measuring two at once would slow both: a new panel stops the one before


def panel(run: Run | None = None) -> "Panel":
    """Buttons and fields for `sweep`, `fit` and `choose`: what is measured is added to `run` (a new one if None); Run
    replaces the same cells there. A panel made later stops the measuring of this one."""
    global _current
    if _current is not None:
        _current.stop()
    _current = Panel(Run.given(run))
    return _current


class Panel(widgets.VBox):
    """What `panel` returns. Its fields are attributes: code can set and press what a person can."""

    def __init__(self, run: Run) -> None:
        self.run, self._stop = run, None  # the event that ends what is measured now
        last = run[-1] if len(run) else Measurement(model=next(iter(MODELS)), setting="-", max_new_tokens=128)
        known, tokens = last.model in MODELS, last.max_new_tokens
        labels = [(row.label, key) for key, row in MODELS.items()]
        self.models = widgets.SelectMultiple(description="Models", options=labels, value=[last.model] * known,
                                             rows=len(labels), **_FIELD)
        self.other = widgets.Text("" if known else last.model, description="or another",
                                  placeholder="a Hub id (owner/name) or a folder", **_FIELD)
        self.max_new_tokens = widgets.IntSlider(tokens, 1, max(1000, tokens), description="New tokens", **_FIELD)
        self.prompt = widgets.Textarea(last.prompt, description="Prompt", rows=3, **_FIELD)
        self.repeats = widgets.IntSlider(0, 0, 50, description="Rounds (0: 6 to 30)", **_FIELD)
        self.reasons = {key: why_not(row, facts()) for key, row in SETTINGS.items()}  # why it cannot run here
        self.settings = {key: widgets.Checkbox(key in EXPERIMENT and not reason, description=SETTINGS[key].label,
                                               disabled=bool(reason), indent=False, layout={"width": "auto"})
                         for key, reason in self.reasons.items()}
        self.limits = {name: widgets.FloatText(0.99 * (name == "keep"), description=label, step=0.01, layout={
            "width": "15em"}, style={"description_width": "8em"}) for name, label in _LIMITS.items()}
        self.run_button = widgets.Button(description="Run", button_style="primary", icon="play")
        self.fit_button = widgets.Button(description="What fits", icon="balance-scale")
        self.choose_button = widgets.Button(description="Which to take", icon="check")
        self.stop_button = widgets.Button(description="Stop", icon="stop", disabled=True)
        self.save_button = widgets.Button(description="Save", icon="save")
        self.stop_button.on_click(lambda _: self.stop())
        for button, does in ((self.run_button, self.start), (self.fit_button, self.fit),
                             (self.choose_button, self.choose), (self.save_button, self.save)):
            button.on_click(lambda _, does=does: does())
            widgets.dlink((self.stop_button, "disabled"), (button, "disabled"), operator.not_)
        self.progress = widgets.VBox()  # tqdm's bar, once there is one
        self.error, self.answer, self.table, self.saved = (widgets.HTML(layout={"overflow": "auto"}) for _ in range(4))
        self.charts = {name: widgets.Image(layout={"max_width": "100%"}) for name in CHARTS}
        self._tabs = widgets.Tab(list(self.charts.values()))
        for place, chart in enumerate(CHARTS.values()):
            self._tabs.set_title(place, chart.tab)
        home = run.path.parent if run.path else "results/local/panel"
        self.folder = widgets.Text(str(home), description="Folder", **_FIELD)
        super().__init__(self._lines())
        self._show()

    def _lines(self) -> list[widgets.Widget]:
        """From top to bottom: of the settings what can be ticked, then what cannot, under the reason why."""
        boxes = [one for reason in dict.fromkeys([None, *self.reasons.values()]) for one in (
            widgets.HTML(f"Not on this machine: {html_text(reason)}" if reason else "<b>Settings</b>"),
            widgets.HBox([self.settings[key] for key, why in self.reasons.items() if why == reason], layout=_WRAP))]
        heading = "<b>Limits of what to take</b> (speed and accuracy at least, others at most; 0: none)"
        buttons = [self.run_button, self.fit_button, self.choose_button, self.stop_button]
        return [self.models, self.other, self.max_new_tokens, self.prompt, self.repeats, *boxes,
                widgets.HTML(heading), widgets.HBox([*self.limits.values()], layout=_WRAP),
                widgets.HBox(buttons, layout=_WRAP), self.progress, self.error, self.answer, self.table, self._tabs,
                self.folder, self.save_button, self.saved]

    def start(self) -> None:
        asked = self._asked() | {"prompt": self.prompt.value, "repeats": self.repeats.value or None}

        def measure(stop: threading.Event, bar: tqdm) -> None:
            with contextlib.closing(sweep(**asked, stop=stop, progress=bar)) as rows:
                for row in () if stop.is_set() else rows:
                    self.run.add(row)
                    self._show()  # nothing is timed until the next row is asked for: drawing disturbs no sample
        self._begin(measure, bool(asked["models"] and asked["settings"]), "a setting")

    def fit(self) -> None:
        def estimate(stop: threading.Event, bar: tqdm) -> None:
            self.answer.value = "".join(fit(model, run=self.run)._repr_html_() for model in models)
        models = self._asked()["models"]
        self._begin(estimate, bool(models))

    def choose(self) -> None:
        """`choose` for each model, among the settings that are ticked."""
        asked = self._asked() | {name: field.value or None for name, field in self.limits.items()}
        models = asked.pop("models")

        def take(stop: threading.Event, bar: tqdm) -> None:
            chosen = [choose(model, **asked, run=self.run, stop=stop, progress=bar) for model in models]
            self.answer.value = "".join(one._repr_html_() for one in chosen)
            self._show()
        self._begin(take, bool(models and asked["settings"]), "a setting")

    def _asked(self) -> dict:
        return {"models": [*self.models.value, *filter(None, [self.other.value.strip()])],
                "settings": [key for key, box in self.settings.items() if box.value and not box.disabled],
                "max_new_tokens": self.max_new_tokens.value}

    def _begin(self, work: Callable, enough: bool, more: str = "") -> None:
        """`work` in a thread of its own, if nothing else is at work."""
        self._mistake("" if enough else f"choose a model, or give a Hub id or a folder{', and ' * bool(more)}{more}")
        if self.error.value or self._stop is not None:
            return
        self._stop = threading.Event()
        self._bar = tqdm(desc="Looking for the weights", bar_format=_BAR, display=False)
        self.progress.children = [self._bar.container]
        self.stop_button.disabled = False
        self._measuring = threading.Thread(target=self._work, args=(self._stop, self._bar, work), daemon=True)
        self._measuring.start()

    def stop(self) -> None:
        """End the measuring processes, keep the rows."""
        if (stop := self._stop) is not None:
            stop.set()
            self._measuring.join(1)  # a look-up on the Hub is left to end by itself
            self._end(stop)

    def save(self) -> None:
        self._mistake("")
        try:
            self.saved.value = "<br>".join(map(html_text, save(self.run, Path(self.folder.value or ".").expanduser())))
        except (ValueError, OSError) as error:
            self._mistake(str(error))

    def _work(self, stop: threading.Event, bar: tqdm, work: Callable) -> None:
        words = "Done"
        try:
            work(stop, bar)
        except Exception as error:
            words, known = "Ended early", isinstance(error, (ValueError, OSError))
            if not stop.is_set():
                self._mistake(str(error) if known else f"{type(error).__name__}: {error}")
        self._end(stop, words)

    def _end(self, stop: threading.Event, words: str = "") -> None:
        if stop is self._stop:
            self._bar.set_description("Stopped; what was measured is kept" if stop.is_set() else words)
            self._bar.close()
            self._stop = None
            self.stop_button.disabled = True

    def _show(self) -> None:
        self.table.value = show(self.run)._repr_html_()
        self._tabs.layout.display = None if len(self.run) else "none"
        try:
            for name, chart in CHARTS.items() if len(self.run) else ():
                chart.plot(self.run).savefig(picture := io.BytesIO(), format="png", dpi=110)
                self.charts[name].value = picture.getvalue()
        except ValueError as error:  # rows of several machines are never in one chart
            self._mistake(str(error))

    def _mistake(self, words: str) -> None:
        self.error.value = words and f'<span role="alert" style="color:#d9363e">{html_text(words)}</span>'
