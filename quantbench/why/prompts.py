"""Prefill beside decode: which setting answers first, by the length of its prompt and the size of its batch."""

import textwrap
from collections.abc import Iterable
from itertools import groupby
from math import nan

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from quantbench.charts import GREY, INK, SMALL, TEXT, canvas, checked, colour_of
from quantbench.conclusions import Findings, compared
from quantbench.intervals import median_interval
from quantbench.labels import Cell, cells, machine_of
from quantbench.records import FIGURES, Measurement
from quantbench.tables import view
from quantbench.wording import listed, rounded

RATES = ("prefill_tokens_per_s", "decode_tokens_per_s")
Groups = dict[tuple, dict[int, list[Cell]]]  # (model, what is shared) -> prompt tokens -> cells


def prompt_table(run: Iterable[Measurement]) -> pd.DataFrame:
    """One row per measured cell: prompt tokens, batch, depth, cache and its bytes per token, TTFT (s), and the rates of
    prefill and decode (tokens/s) with their 95% intervals, None below 6 samples."""
    rows = [(cell.title, cell.setting, cell.row.prompt_tokens, cell.row.batch_size, cell.row.depth, cell.row.cache,
             cell.row.cache_per_token, cell.row.ttft_s,
             *(part for rate in RATES for part in (getattr(cell.row, rate), median_interval(cell.row.rates(rate)))))
            for cell in cells(run) if cell.measured]
    names = [name for rate in RATES for name in (FIGURES[rate], f"{FIGURES[rate]} 95%")]
    numbers = dict.fromkeys(["Prompt tokens", "Batch", "Depth", FIGURES["cache_per_token"]], 0) | {FIGURES["ttft_s"]: 3}
    columns = ["Model", "Setting", "Prompt tokens", "Batch", "Depth", "Cache",
               *map(FIGURES.get, ("cache_per_token", "ttft_s")), *names]
    return view(pd.DataFrame(rows, columns=columns).set_index("Model"), [], numbers | dict.fromkeys(names, 1))


def prompt_findings(run: Iterable[Measurement]) -> Findings:
    """Per model, engine, batch and depth: which setting gives the whole answer first at which prompt length, as far as
    rounds tell (else they are "not told apart"), and about where they change places. ValueError for two machines."""
    named, said = cells(run), []
    machine_of(cell.row for cell in named)
    for (model, shared), lengths in _groups(named).items():
        stretches, parts = [[*some] for _, some in groupby(lengths, lambda length: _told(lengths[length]))], []
        for last, here in zip([[], *stretches], stretches):
            crossing = last and _crossing(lengths, last[-1], here[0])
            where = f"over about {crossing:,}" if crossing else f"from {here[0]:,}" if last else f"up to {here[-1]:,}"
            parts.append(f"{where} prompt tokens {_told(lengths[here[0]])}")
        said.append(f"{model}, {shared}: {'; '.join(parts)}.")
    return Findings(said or ["fewer than two prompt lengths measured yet"])


def plot_prompts(run: Iterable[Measurement]) -> Figure:
    """Prefill and decode against prompt length at the smallest batch, a line per setting with its 95% intervals, and a
    map of which setting gives the whole answer first, by prompt length and batch. Raises ValueError for no two prompt
    lengths or two machines."""
    named, machine = checked(run)
    models: dict[tuple, Groups] = {}
    for (model, shared), lengths in _groups(named).items():
        row = next(iter(lengths.values()))[0].row
        models.setdefault((model, row.engine, row.depth, row.cache, row.max_new_tokens), {})[shared] = lengths
    if not models:
        raise ValueError("nothing to draw: it takes two prompt lengths (sweep's prompt_tokens)")
    title, below = "Reading a prompt and writing an answer", f"{machine} · Bars: 95% interval of the median"
    figure, axes = canvas(title, below, "Prompt tokens", (len(models), 3), (10, 2.9 * len(models) + 0.8))
    for line, ((model, *_), batches) in zip(axes, models.items()):
        shared, lengths = next(iter(batches.items()))
        for ax, rate in zip(line, RATES):
            _draw_rate(ax, rate, lengths)
        line[0].set_title(f"{model}, {shared}", loc="left", size=TEXT, weight="bold", color=INK, parse_math=False)
        line[1].legend(frameon=False, fontsize=SMALL)
        _draw_fastest(line[2], list(batches.values()))
    return figure


def _groups(named: list[Cell]) -> Groups:
    found, several = {}, len({cell.row.max_new_tokens for cell in named}) > 1
    for cell in (cell for cell in named if cell.measured):
        row = cell.row
        shared = ", ".join([row.engine, f"batch {row.batch_size}", *[f"depth {row.depth:,}"] * bool(row.depth),
                            *[f"{row.cache} cache"] * (row.cache != "default"),
                            *[f"{row.max_new_tokens:,} new tokens"] * several])
        found.setdefault((cell.title, shared), {}).setdefault(row.prompt_tokens, []).append(cell)
    return {place: {length: [one for one in some if one.row.prompt_length] or some for length, some in sorted(
            lengths.items())} for place, lengths in found.items() if len(lengths) > 1}  # lengths asked for: of one text


def _name(cell: Cell) -> str:
    """The setting's, without the engine, which all share."""
    return cell.setting.removesuffix(f" · {cell.row.engine}")


def _fastest(group: list[Cell]) -> list[Cell]:
    """The cell with the highest rate of whole answers, and those that rounds do not tell from it."""
    best = max(group, key=lambda cell: cell.row.tokens_per_s)
    return [best, *(cell for cell in group if cell is not best and compared(best, cell).verdict != "faster")]


def _told(group: list[Cell]) -> str:
    """Which cell of a length is first, as far as rounds tell."""
    best, *level = _fastest(group)
    names = listed([_name(cell) for cell in group if cell is best or cell in level])
    if not level:
        return f"{'take' if group[1:] else 'there is only'} {names}"
    return f"{names} are {'a tie' if {compared(best, cell).verdict for cell in level} == {'tie'} else 'not told apart'}"


def _crossing(lengths: dict[int, list[Cell]], before: int, after: int) -> int | None:
    """About where all who are first at a length have passed those who were at the one before, in two digits: on the
    lines between both. None where one is first at both, or was not measured at both."""
    seconds = [{_name(cell): cell.row.latency_s for cell in lengths[length]} for length in (before, after)]
    gaps = [[known.get(_name(new), nan) - known.get(_name(old), nan) for known in seconds]
            for old in _fastest(lengths[before]) for new in _fastest(lengths[after])]
    if not all(start > 0 > end for start, end in gaps):
        return None
    place = before + (after - before) * max(start / (start - end) for start, end in gaps)
    return min(max(rounded(place), before), after)


def _draw_rate(ax: Axes, rate: str, lengths: dict[int, list[Cell]]) -> None:
    drawn = [cell for group in lengths.values() for cell in group]
    for setting in dict.fromkeys(map(_name, drawn)):
        line = [cell for cell in drawn if _name(cell) == setting]
        colour, asked = colour_of(line[0].row.setting), [cell.row.prompt_tokens for cell in line]
        values = [getattr(cell.row, rate) or nan for cell in line]
        ends = [median_interval(cell.row.rates(rate)) or (nan, nan) for cell in line]
        ax.plot(asked, values, marker="o", markersize=4, linewidth=1.4, color=colour, label=setting)
        ax.vlines(asked, *zip(*ends), color=colour, linewidth=1.4)
    ax.set(xscale="log", ylim=(0, None))
    ax.set_xticks(list(lengths), [f"{length:,}" for length in lengths])
    ax.minorticks_off()
    ax.set_ylabel(FIGURES[rate], size=SMALL, color=GREY)


def _draw_fastest(ax: Axes, batches: list[dict[int, list[Cell]]]) -> None:
    lengths = sorted({length for one in batches for length in one})
    for place, one in enumerate(batches):
        for length, group in one.items():
            winners, column = _fastest(group), lengths.index(length)
            ax.barh(place, 0.95, 0.9, left=column, color=colour_of(winners[0].row.setting), alpha=0.4)
            names = textwrap.fill("only " * (len(group) < 2) + " or ".join(map(_name, winners)), 42 // len(lengths))
            ax.text(column + 0.05, place, names, va="center", size=SMALL - 1, parse_math=False)
    ax.set_yticks(range(len(batches)), [f"batch {next(iter(one.values()))[0].row.batch_size}" for one in batches])
    ax.set_xticks([column + 0.5 for column in range(len(lengths))], [f"{length:,}" for length in lengths])
    ax.set(xlim=(0, len(lengths)), ylim=(len(batches) - 0.5, -0.5))
    ax.set_title("First with the whole answer", loc="left", size=SMALL, color=GREY)
    ax.grid(visible=False)
    ax.spines[:].set_visible(False)
