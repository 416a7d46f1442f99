"""Quality beside speed: the table, the chart, and what each setting wrote."""

import os.path
import re
from collections.abc import Iterable
from itertools import cycle

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from quantbench.charts import GREY, INK, SMALL, canvas, colour_of
from quantbench.evaluation.judging import MEMORY, Scored, beats, groups, on_what
from quantbench.labels import cells, machine_of
from quantbench.records import FIGURES
from quantbench.results import Run
from quantbench.tables import Table, Tables, view
from quantbench.wording import span

_COLUMNS = {  # label -> an attribute of the quality, its cell or its row, and its decimals or the format of its ends
    "Perplexity": ("perplexity", 2), "± (over windows)": ("perplexity_se", 2), "KL vs reference": ("kl_mean", 5),
    "KL 95%": ("kl_ci", ".2g"), "KL 99th percentile": ("kl_p99", 4), "Top-1 agreement": ("top1_agreement", 3),
    "Accuracy kept": ("accuracy_kept", 3), "Accuracy kept 95%": ("accuracy_kept_ci", ".3f"),
    "Keeps 99%": ("keeps_99", None), "Workload": ("workload", None), FIGURES["tokens_per_s"]: ("tokens_per_s", 1),
    FIGURES["vram_gb"]: ("vram_gb", 3), FIGURES["weights_gb"]: ("weights_gb", 3)}
_DECIMALS = {label: digits for label, (_, digits) in _COLUMNS.items() if isinstance(digits, int)}
_NOTE = ("KL: KL(reference || setting), nats per token. Top-1 agreement: share of tokens with the same first choice. "
         "Accuracy kept: top-1 accuracy over the reference's; keeps 99% (MLPerf's target): whether its interval lies "
         "above that, below, or does not tell. Intervals are over windows of the text.")


def quality_table(run: Iterable) -> pd.DataFrame:
    """One row per quality, beside what its setting takes at the workload that most have; NaN where nothing."""
    return view(_frame([one for group in groups(run) for one in group]), [], _DECIMALS, _NOTE)


def _frame(some: list[Scored]) -> pd.DataFrame:
    records = []
    for one in some:
        parts = (one.found, one.cell, one.cell and one.cell.row)
        record = {"Setting": one.setting + " (token by token)" * bool(one.found.stepwise)}
        for label, (name, digits) in _COLUMNS.items():
            value = next((getattr(part, name) for part in parts if hasattr(part, name)), None)
            record[label] = span(value, digits) if value and isinstance(digits, str) else value
        told = {True: "yes", False: "no", None: "not told"}[one.found.keeps_99]
        records.append(record | {"Keeps 99%": told if one.found.reference else None})
    models = pd.Index([one.model for one in some], name="Model", dtype=object)
    return pd.DataFrame(records, models, ["Setting", *_COLUMNS], object).astype(dict.fromkeys(_DECIMALS, float))


def show_quality(run: Iterable) -> Tables:
    """The table as a notebook shows it: one per model, machine, text and reference, without empty columns."""
    shown = []
    for group in groups(run):
        caption = [group[0].model, f"{group[0].found.weights} weights", on_what(group), group[0].found.machine_name]
        frame = _frame(group).drop(columns="Workload").dropna(axis="columns", how="all")
        shown.append(Table(frame, list(filter(None, caption)), _NOTE, _DECIMALS))
    return Tables(shown, empty="no quality measured yet")


def plot_quality(run: Iterable) -> Figure:
    """Speed against closeness to the reference, per model and text: the upper right corner is the best. A mark's area
    is the memory, in GB in the legend, which has the closest first; a hollow one is beaten by another of its device.
    Raises ValueError where no setting has both, and for rows of two machines."""
    run = Run.of(run)
    machine = machine_of([*run, *run.qualities])
    both = [[one for one in group if one.cell and one.found.kl_mean is not None] for group in groups(run)]
    if not (panels := [sorted(some, key=lambda one: one.found.kl_mean) for some in both if some]):
        raise ValueError("no setting here has both speed and quality: qb.generate and qb.quality give them")
    title, size = "Speed against quality: up and to the right is better", (9, 0.6 + 4 * len(panels))
    fig, axes = canvas(title, machine, FIGURES["tokens_per_s"], (len(panels), 1), size)
    for ax, panel in zip(axes[:, 0], panels):
        ax.set_title(f"{panel[0].model}\n{on_what(panel)}", loc="left", size=SMALL, color=GREY, parse_math=False)
        _draw(ax, panel)
    return fig


def _draw(ax: Axes, panel: list[Scored]) -> None:
    held = [next(((gb, of) for name, of in MEMORY.items() if (gb := getattr(one.cell.row, name))), (0, ""))
            for one in panel]
    for shape, one, (gb, of) in zip(cycle("oD^sv<>phPX*8"), panel, held):
        colour, kl, row = colour_of(one.found.setting), max(one.found.kl_mean, 0.0), one.cell.row
        size, area = f" · {gb:.3f} GB {of}" * bool(gb), 30 + 150 * gb / (max(held)[0] or 1)
        hollow = any(beats(other, one) for other in panel)
        ax.scatter(row.tokens_per_s, kl, s=area, marker=shape, zorder=3, edgecolor=colour,
                   facecolor="none" if hollow else colour, label=f"{one.setting} · {kl:.2g}{size}")
        ax.hlines(kl, *(row.tokens_per_s_ci or [row.tokens_per_s] * 2), color=INK, linewidth=0.8)
    ax.set_yscale("symlog", linthresh=min((one.found.kl_mean for one in panel if one.found.kl_mean > 0), default=1e-5))
    ax.invert_yaxis()
    ax.set_xlim(0, 1.05 * ax.get_xlim()[1])
    ax.set_ylabel("KL from the reference, nats", size=SMALL, color=GREY)
    legend = ax.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False, fontsize=SMALL)
    for text in legend.get_texts():
        text.set_parse_math(False)


def continuations(run: Iterable) -> Tables:
    """The greedy texts of a run that continue a prompt by itself, a table per model, machine and prompt, each setting's
    longest: what it shares with the first one's (the qualities' reference where it wrote), and how it goes on."""
    run, together, tables = Run.of(run), {}, []
    references = {(one.model, one.reference) for one in run.qualities}
    for cell in cells(run):  # they come by length
        if cell.row.text is not None and cell.row.status == "ok" and cell.row.work[1:5] == ("default", 0, 0, 1):
            together.setdefault((cell.model, f"{cell.row.prompt} …", cell.row.machine_name), {})[cell.setting] = cell
    for place, found in together.items():
        texts = sorted(found.values(), key=lambda cell: (cell.row.model, cell.row.setting) not in references)
        parts = [(cell.setting, *_divided(cell.row.text, texts[0].row.text)) for cell in texts]
        frame = pd.DataFrame(parts, columns=["Setting", f"As {texts[0].setting} wrote", "And on"])
        tables.append(Table(frame, [*filter(None, place)]))
    return Tables(tables, empty="no texts of a prompt by itself: random weights write noise")


def _divided(text: str, first: str) -> tuple[str, str]:
    """`text` as the words that it shares with `first`, and the rest; where one was cut, it shares all."""
    common = os.path.commonprefix([text, first])
    end = len(text) if common in (text, first) else re.match(r"(?s)(.*\s)?", common).end()
    return text[:end], text[end:]
