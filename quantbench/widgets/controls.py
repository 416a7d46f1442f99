"""The sweep behind buttons: choose, press Run, and watch the table and the charts grow."""

from __future__ import annotations

import contextlib
import io
import threading
from dataclasses import dataclass, field
from pathlib import Path

import ipywidgets as widgets
from tqdm.notebook import tqdm

from quantbench.charts import CHARTS
from quantbench.loading import why_not
from quantbench.records import Measurement
from quantbench.results import Run
from quantbench.saving import save
from quantbench.settings import EXPERIMENT, MODELS, SETTINGS
from quantbench.sweeps.sweeping import sweep
from quantbench.tables import show
from quantbench.wording import html_text

_BAR = "{desc}{bar}{n_fmt} of {total_fmt} cells [{elapsed}<{remaining}]"
_WRAP = widgets.Layout(flex_flow="row wrap", width="auto")
_HALF = widgets.Layout(flex="1 1 22em", max_width="36em", margin="0 1em 0 0")
_WIDE = widgets.Layout(width="auto", max_width="46em")
_FIT = widgets.Layout(width="auto", margin="0 1.2em 0 0")
_current: Panel | None = None  # measuring two at once would slow both: a new panel stops the one before


def panel(run: Run | None = None) -> Panel:
    """Buttons and fields for `sweep`, shown by a notebook: what it measures is added to `run` (a new one if None).

    A cell that the run holds already is measured again and replaced. Stop ends the measuring processes within a second
    or two and keeps every row. A panel made later stops the measuring of this one. Mistakes are told in the panel.
    """
    global _current
    if _current is not None:
        _current.stop()
    _current = Panel(Run() if run is None else run)
    return _current


@dataclass(eq=False)
class _Job:
    """What one press of Run started: `measuring` once the weights are found, `stop` to end it."""

    bar: tqdm
    stop: threading.Event = field(default_factory=threading.Event)
    measuring: bool = False


class Panel(widgets.VBox):
    """What `panel` returns. Its fields are attributes: code can set and press what a person can."""

    def __init__(self, run: Run) -> None:
        self.run, self._job = run, None
        self._ask_for(run[-1] if len(run) else Measurement(model=next(iter(MODELS)), setting="-", max_new_tokens=128))
        self.run_button = widgets.Button(description="Run", button_style="primary", icon="play")
        self.stop_button = widgets.Button(description="Stop", icon="stop", disabled=True)
        self.save_button = widgets.Button(description="Save", icon="save")
        self.progress = widgets.Box(layout=_WRAP)  # tqdm's bar, once there is one
        self.error, self.table, self.saved = (widgets.HTML(layout={"overflow": "auto"}) for _ in range(3))
        self.charts = {name: widgets.Image(layout={"max_width": "100%"}) for name in CHARTS}
        self.folder = widgets.Text(value=str(run.path.parent if run.path else "results/local/panel"), layout=_WIDE)
        self.run_button.on_click(lambda _: self.start())
        self.stop_button.on_click(lambda _: self.stop())
        self.save_button.on_click(lambda _: self.save())
        super().__init__(self._rows())
        self._show()

    def _ask_for(self, asked: Measurement) -> None:
        """The fields of what to measure, filled with what was `asked` for last."""
        known, labels = asked.model in MODELS, [(row.label, key) for key, row in MODELS.items()]
        self.models = widgets.SelectMultiple(options=labels, value=[asked.model] * known, rows=len(labels),
                                             layout=_WIDE)
        self.other = widgets.Text(value="" if known else asked.model, layout=_WIDE,
                                  placeholder="and a Hub id (owner/name) or a folder")
        self.prompt = widgets.Textarea(value=asked.prompt, rows=3, layout=_WIDE)
        tokens = asked.max_new_tokens
        self.max_new_tokens = widgets.IntSlider(value=tokens, min=1, max=max(1000, tokens), layout=_WIDE)
        self.repeats = widgets.IntSlider(value=0, min=0, max=50, layout=_WIDE)
        self.settings = {key: widgets.Checkbox(description=row.label, disabled=why_not(row) is not None, indent=False,
                                               layout=_FIT) for key, row in SETTINGS.items()}
        for key in EXPERIMENT:
            self.settings[key].value = not self.settings[key].disabled

    def _rows(self) -> list[widgets.Widget]:
        self._tabs = widgets.Tab(list(self.charts.values()))
        for place, name in enumerate(self.charts):
            self._tabs.set_title(place, CHARTS[name].tab)
        what = widgets.VBox([_labelled("Models (Ctrl or ⌘ for several)", self.models, self.other)], layout=_HALF)
        how = widgets.VBox([_labelled("New tokens", self.max_new_tokens), _labelled("Prompt", self.prompt),
                            _labelled("Rounds (0: 6 to 30, until the ratios are known)", self.repeats)], layout=_HALF)
        return [widgets.HBox([what, how], layout=_WRAP), *_settings(self.settings),
                widgets.HBox([self.run_button, self.stop_button], layout=_WRAP), self.progress, self.error, self.table,
                self._tabs, _labelled("Save to folder", widgets.HBox([self.folder, self.save_button], layout=_WRAP),
                                      self.saved)]

    def start(self) -> None:
        """What the Run button does."""
        models = [*self.models.value, *filter(None, [self.other.value.strip()])]
        settings = [key for key, box in self.settings.items() if box.value and not box.disabled]
        missing = "" if settings else "choose at least one setting"
        self._mistake(missing if models else "choose a model, or give a Hub id or a folder")
        if self.error.value or self._job is not None:
            return
        job = self._job = _Job(tqdm(desc="Looking for the weights", bar_format=_BAR, display=False))
        self.progress.children = [job.bar.container]
        self._set_busy(True)
        asked = {"models": models, "settings": settings, "max_new_tokens": self.max_new_tokens.value,
                 "prompt": self.prompt.value, "repeats": self.repeats.value or None}
        threading.Thread(target=self._measure, args=(job, asked), daemon=True).start()

    def stop(self) -> None:
        """What the Stop button does: end the measuring processes, keep the rows."""
        if (job := self._job) is not None:
            job.stop.set()
            self.stop_button.disabled = True
            if not job.measuring:  # a look-up on the Hub is left to end by itself
                self._end(job, "Stopped")

    def save(self) -> None:
        """What the Save button does: `save` to the folder of the field beside it."""
        self._mistake("")
        try:
            paths = save(self.run, Path(self.folder.value.strip() or ".").expanduser())
        except (ValueError, OSError) as error:
            self._mistake(str(error))
        else:
            self.saved.value = "<br>".join(map(html_text, paths))

    def _measure(self, job: _Job, asked: dict) -> None:
        words = "Ended early"
        try:
            rows = sweep(**asked, stop=job.stop, progress=job.bar)
            job.measuring = True
            with contextlib.closing(rows):
                for row in () if job.stop.is_set() else rows:
                    self.run.add(row)
                    self._show()  # nothing is timed until the next row is asked for: drawing disturbs no sample
            words = "Stopped; what was measured is kept" if job.stop.is_set() else "Done"
        except Exception as error:
            if job is self._job:  # else nobody waits for that look-up any more
                mistake = isinstance(error, (ValueError, OSError))
                self._mistake(str(error) if mistake else f"{type(error).__name__}: {error}")
                if not mistake:
                    raise
        finally:
            self._end(job, words)

    def _end(self, job: _Job, words: str) -> None:
        if job is self._job:
            job.bar.set_description(words)
            job.bar.close()
            self._job = None
            self._set_busy(False)

    def _set_busy(self, busy: bool) -> None:
        self.run_button.disabled = self.save_button.disabled = busy
        self.stop_button.disabled = not busy

    def _show(self) -> None:
        """The table and the charts anew, from the run."""
        self.table.value = show(self.run)._repr_html_()
        self._tabs.layout.display = None if len(self.run) else "none"
        for name, chart in CHARTS.items() if len(self.run) else ():
            try:
                picture = io.BytesIO()
                chart.plot(self.run).savefig(picture, format="png", dpi=110)
                self.charts[name].value = picture.getvalue()
            except ValueError as error:  # rows of several machines are never in one chart
                self._mistake(str(error))

    def _mistake(self, words: str) -> None:
        self.error.value = words and f'<span role="alert" style="color:#d9363e">{html_text(words)}</span>'


def _settings(boxes: dict[str, widgets.Checkbox]) -> list[widgets.Widget]:
    """The boxes that can be ticked, then those that cannot, under the reason why."""
    groups: dict[str | None, list[widgets.Checkbox]] = {None: []}
    for key, box in boxes.items():
        groups.setdefault(why_not(SETTINGS[key]), []).append(box)
    return [_labelled("Settings" if reason is None else f"Not on this machine: {reason}",
                      widgets.HBox(group, layout=_WRAP)) for reason, group in groups.items()]


def _labelled(label: str, *fields: widgets.Widget) -> widgets.VBox:
    return widgets.VBox([widgets.HTML(f"<b>{html_text(label)}</b>"), *fields])
