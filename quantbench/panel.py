"""The sweep behind buttons: choose, press Run, and watch the table and the charts grow."""

from __future__ import annotations

import contextlib
import html
import io
import threading
from pathlib import Path

import ipywidgets as widgets
from matplotlib.figure import Figure

from quantbench.loaders import why_not
from quantbench.models import MODELS
from quantbench.progress import Progress
from quantbench.record import PROMPT, Measurement
from quantbench.run import Run
from quantbench.save import CHARTS, save
from quantbench.settings import PUBLISHED, SETTINGS
from quantbench.sweep import sweep
from quantbench.tables import show
from quantbench.view import plain

_TICK_S = 0.5
_WRAP = widgets.Layout(flex_flow="row wrap", width="auto")
_HALF = widgets.Layout(flex="1 1 22em", max_width="36em", margin="0 1em 0 0")
_WIDE = widgets.Layout(width="auto", max_width="46em")
_SCROLL = widgets.Layout(width="auto", overflow="auto")
_FIT = widgets.Layout(width="auto", margin="0 1.2em 0 0")
_TITLES = {"throughput": "Tokens/sec", "lengths": "By length", "latency": "Latency", "memory": "Memory"}
_current: Panel | None = None  # measuring two at once would slow both: a new panel stops the one before


def panel(run: Run | None = None) -> Panel:
    """Buttons and fields for `sweep`, shown by a notebook: what it measures is added to `run` (a new one if None).

    A cell that the run holds already is measured again and replaced. Stop ends the measuring process within a second
    or two and keeps every row. A panel made later stops the measuring of this one. Mistakes are told in the panel.
    """
    global _current
    if _current is not None:
        _current.stop()
    _current = Panel(Run() if run is None else run)
    return _current


class Panel(widgets.VBox):
    """What `panel` returns. Its fields are attributes: code can set and press what a person can."""

    def __init__(self, run: Run) -> None:
        self.run, self._job = run, None
        asked = run[-1] if len(run) else Measurement(model=next(iter(MODELS)), setting="", max_new_tokens=128)
        self.models = widgets.SelectMultiple(options=[(row.label, key) for key, row in MODELS.items()],
                                             value=[asked.model] if asked.model in MODELS else [], rows=len(MODELS),
                                             layout=_WIDE)
        self.other = widgets.Text(value="" if asked.model in MODELS else asked.model, layout=_WIDE,
                                  placeholder="and a Hub id (owner/name) or a folder")
        self.prompt = widgets.Textarea(value=asked.prompt or PROMPT, rows=3, layout=_WIDE)
        self.max_new_tokens = widgets.IntSlider(value=asked.max_new_tokens, min=1, max=max(1000, asked.max_new_tokens),
                                                layout=_WIDE)
        self.repeats = widgets.IntSlider(value=0, min=0, max=50, layout=_WIDE)
        self.settings = {key: widgets.Checkbox(description=row.label, indent=False, layout=_FIT,
                                               disabled=why_not(row) is not None)
                         for key, row in SETTINGS.items()}
        for key in PUBLISHED:
            self.settings[key].value = not self.settings[key].disabled
        self.run_button = widgets.Button(description="Run", button_style="primary", icon="play")
        self.stop_button = widgets.Button(description="Stop", icon="stop", disabled=True)
        self.progress = widgets.IntProgress(max=1, layout=widgets.Layout(width="12em"))
        self.words, self.error, self.table = (widgets.HTML(layout=_SCROLL) for _ in range(3))
        self.charts = {name: widgets.Image(format="png", layout=widgets.Layout(max_width="100%")) for name in CHARTS}
        self.folder = widgets.Text(value=str(run.path.parent if run.path else "results/local/panel"), layout=_WIDE)
        self.save_button = widgets.Button(description="Save", icon="save")
        self.saved = widgets.HTML()
        self.run_button.on_click(lambda _: self.start())
        self.stop_button.on_click(lambda _: self.stop())
        self.save_button.on_click(lambda _: self.save())
        super().__init__(self._rows())
        self._show()

    def _rows(self) -> list[widgets.Widget]:
        self._tabs = widgets.Tab(list(self.charts.values()))
        for place, name in enumerate(self.charts):
            self._tabs.set_title(place, _TITLES[name])
        what = widgets.VBox([_labelled("Models (Ctrl or ⌘ for several)", self.models, self.other)], layout=_HALF)
        how = widgets.VBox([_labelled("New tokens", self.max_new_tokens), _labelled("Prompt", self.prompt),
                            _labelled("Repeats (0: 3 to 10, until the interval is narrow)", self.repeats)],
                           layout=_HALF)
        buttons = widgets.HBox([self.run_button, self.stop_button, self.progress], layout=_WRAP)
        return [widgets.HBox([what, how], layout=_WRAP), *_settings(self.settings), buttons, self.words,
                self.error, self.table, self._tabs,
                _labelled("Save to folder", widgets.HBox([self.folder, self.save_button], layout=_WRAP), self.saved)]

    def start(self) -> None:
        """What the Run button does."""
        models = [*self.models.value, *filter(None, [self.other.value.strip()])]
        settings = [key for key, box in self.settings.items() if box.value and not box.disabled]
        missing = "" if settings else "choose at least one setting"
        missing = missing if models else "choose a model, or give a Hub id or a folder"
        self._say(self.error, missing, mistake=True)
        if missing or self._job is not None:
            return
        tokens = self.max_new_tokens.value
        job = self._job = Progress([plain(f"{MODELS[model].label if model in MODELS else model} · "
                                          f"{SETTINGS[key].label} · {tokens} tokens")
                                    for model in models for key in settings])
        asked = {"models": models, "settings": settings, "max_new_tokens": tokens, "prompt": self.prompt.value,
                 "repeats": self.repeats.value or None, "stop": job.stop, "progress": False}
        self._set_busy(True)
        self.progress.max = len(job.cells)
        measuring = threading.Thread(target=self._measure, args=(job, asked), daemon=True)
        measuring.start()
        threading.Thread(target=self._watch, args=(job, measuring), daemon=True).start()

    def stop(self) -> None:
        """What the Stop button does: end the measuring process, keep the rows."""
        if (job := self._job) is not None:
            job.stop.set()
            self.stop_button.disabled = True

    def save(self) -> None:
        """What the Save button does: `save` to the folder of the field beside it."""
        self._say(self.error, "")
        try:
            paths = save(self.run, Path(self.folder.value.strip() or ".").expanduser())
        except (ValueError, OSError) as error:
            self._say(self.error, str(error), mistake=True)
        else:
            self.saved.value = "<br>".join(html.escape(plain(path)) for path in paths)

    def _measure(self, job: Progress, asked: dict) -> None:
        try:
            with contextlib.closing(sweep(**asked)) as rows:
                job.start_cell()
                for row in rows:
                    self.run.add(row)
                    job.end_cell()
                    self._show()  # the next cell waits: drawing does not disturb what is timed
                    job.start_cell()
        except Exception as error:
            if job.stop.is_set() and not job.measuring:  # nobody waits for that look-up any more
                return
            job.failed = True
            mistake = isinstance(error, (ValueError, OSError))
            self._say(self.error, str(error) if mistake else f"{type(error).__name__}: {error}", mistake=True)
            if not mistake:
                raise

    def _watch(self, job: Progress, measuring: threading.Thread) -> None:
        """Tell how far `measuring` is until it ends. A look-up on the Hub that was stopped is left to end by itself."""
        while measuring.is_alive() and (job.measuring or not job.stop.is_set()):
            self.progress.value = len(job.took)
            self._say(self.words, job.words())
            measuring.join(_TICK_S)
        self.progress.value = len(job.took)
        self._say(self.words, job.last_words())
        self._job = None
        self._set_busy(False)

    def _set_busy(self, busy: bool) -> None:
        self.run_button.disabled = self.save_button.disabled = busy
        self.stop_button.disabled = not busy

    def _show(self) -> None:
        """The table and the charts anew, from the run."""
        self.table.value = show(self.run)._repr_html_()
        self._tabs.layout.display = None if len(self.run) else "none"
        for name, plot in CHARTS.items() if len(self.run) else ():
            try:
                self.charts[name].value = _png(plot(self.run))
            except ValueError as error:  # rows of several machines are never in one chart
                self._say(self.error, str(error), mistake=True)

    @staticmethod
    def _say(where: widgets.HTML, words: str, mistake: bool = False) -> None:
        style = ' role="alert" style="color:#d9363e"' if mistake else ""
        where.value = f"<span{style}>{html.escape(plain(words))}</span>" if words else ""


def _settings(boxes: dict[str, widgets.Checkbox]) -> list[widgets.Widget]:
    """The boxes that can be ticked, then those that cannot, under the reason why."""
    groups: dict[str | None, list[widgets.Checkbox]] = {None: []}
    for key, box in boxes.items():
        groups.setdefault(why_not(SETTINGS[key]), []).append(box)
    return [_labelled("Settings" if reason is None else f"Not on this machine: {reason}",
                      widgets.HBox(group, layout=_WRAP)) for reason, group in groups.items()]


def _labelled(label: str, *fields: widgets.Widget) -> widgets.VBox:
    return widgets.VBox([widgets.HTML(f"<b>{html.escape(label)}</b>"), *fields])


def _png(figure: Figure) -> bytes:
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=110)
    return file.getvalue()
