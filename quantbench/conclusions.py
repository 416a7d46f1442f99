"""What a run's numbers say, in sentences computed from them, and the ratios that they rest on."""

from collections import Counter
from collections.abc import Iterable, Sequence

import pandas as pd

from quantbench.intervals import LEAST, Ratio, ratio_of_rounds
from quantbench.labels import Cell, cells, machine_of
from quantbench.records import PER_SAMPLE, Measurement
from quantbench.settings import BASELINES, SETTINGS, find_setting, unknown
from quantbench.tables import view
from quantbench.wording import cut, listed, markdown_text, plain, span

FEW = 3  # of a kind are named one by one: of more, the table tells


class Findings(list[str]):
    """Sentences; a notebook shows them as bullets that start bold, with everything from the data escaped."""

    def _repr_markdown_(self) -> str:
        parts = (map(markdown_text, sentence.split(": ", 1)) for sentence in self)
        return "\n".join(f"- **{start}:** {' '.join(rest)}" if rest else f"- {start}" for start, *rest in parts)

    def __repr__(self) -> str:
        return "\n".join(f"- {plain(sentence)}" for sentence in self)


def ratios(run: Iterable[Measurement], baseline: str = BASELINES[0], figure: str = "tokens_per_s") -> pd.DataFrame:
    """Every measured cell's tokens/sec, or another `figure` ("decode_tokens_per_s", "prefill_tokens_per_s"), over the
    baseline's: that setting, eager, of the same model, workload and machine (CPU FP32 where the usual one was not
    measured). Low and High are NaN where the two share too few rounds for a verdict, Ratio where they share none.
    Raises ValueError for an unknown baseline or figure, naming the nearest."""
    find_setting(baseline)
    if figure not in PER_SAMPLE:
        raise ValueError(unknown("figure", figure, PER_SAMPLE))
    found = beside(cells(run), BASELINES if baseline == BASELINES[0] else (baseline,), figure)
    rows = [(cell.model, plain(cell.row.setting_label), plain(cell.row.engine), cell.workload, ratio.value,
             *(ratio.interval or (None, None)), ratio.rounds, ratio.verdict) for cell, _, ratio in found if ratio]
    columns = ["Model", "Setting", "Engine", "Workload", "Ratio", "Low", "High", "Rounds", "Verdict"]
    numbers = dict.fromkeys(["Ratio", "Low", "High"], 2)
    return view(pd.DataFrame(rows, columns=columns).astype(dict.fromkeys(numbers, float)), [], numbers)


def beside(named: Iterable[Cell], keys: Sequence[str] = BASELINES,
           figure: str = "tokens_per_s") -> list[tuple[Cell, Cell | None, Ratio | None]]:
    """Every cell with its baseline (the first of these settings that was measured, eager, of its model, workload and
    machine; of several, such as of two versions, the one with which it shares most rounds, then the last) and its ratio
    to it: None where it was not measured, or is a baseline itself."""
    def place(cell: Cell) -> tuple:
        return cell.title, cell.row.machine_name, cell.workload

    named, bases = list(named), {}
    for cell in named:
        if cell.measured and (cell.row.gpus, cell.row.engine) == (1, "eager") and cell.row.setting in keys:
            bases.setdefault(place(cell), []).insert(0, cell)
    return [(cell, base, compared(cell, base, figure) if cell.measured and cell is not base else None)
            for cell in named for base in [max(bases.get(place(cell), ()), default=None, key=lambda one: (
                -keys.index(one.row.setting), one is cell, len({*cell.row.rounds} & {*one.row.rounds})))]]


def compared(cell: Cell, base: Cell | None, figure: str = "tokens_per_s") -> Ratio:
    """A rate of one cell over another's (see `Measurement.rates`), by the rounds that both were in."""
    return ratio_of_rounds(cell.row.rate_by_round(figure), base.row.rate_by_round(figure) if base else {})


def findings(run: Iterable[Measurement]) -> Findings:
    """At most three sentences per model: which setting is the fastest, as far as rounds tell; which is the smallest;
    what could not be measured, or not well. Models of which the same is to be said share a sentence.

    Speed and memory are of one workload: what most settings share, the longest of several, in rounds where some are.
    Raises ValueError for a run of several machines."""
    named, said = cells(run), {}
    machine_of(cell.row for cell in named)
    for model in dict.fromkeys(cell.title for cell in named):
        mine = [cell for cell in named if cell.title == model]
        measured = [cell for cell in mine if cell.measured]
        in_rounds = [cell for cell in measured if cell.row.rounds] or measured
        many = Counter((cell.row.cache == "default", *cell.row.work[:-3:-1], cell.workload) for cell in in_rounds)
        main = max(many, key=lambda work: (many[work], work), default=("",))[-1]
        group = [cell for cell in measured if cell.workload == main]
        for sentence in (_speed(group), _memory(group), _caveats(mine)):
            said.setdefault(sentence, []).append(model)
    said.pop("", None)
    return Findings([f"{listed(models)}: {sentence}." for sentence, models in said.items()] or ["nothing measured yet"])


def _speed(group: list[Cell]) -> str:
    """The verdict on one workload's cells: each is compared by rounds with the baseline, and the best of them with all
    others: who ties with it shares its place."""
    if not group:
        return ""
    start, found = f"at {group[0].workload}", beside(group)
    base = max(bases := [base for _, base, _ in found], key=bases.count)  # of two versions': what most are held against
    every = {cell: ratio for cell, other, ratio in found if ratio and other is base}
    judged = {cell: ratio for cell, ratio in every.items() if ratio.interval}
    if len(group) == 1:
        return f"{start} only {group[0].setting} was measured"
    if base is None:
        neither = " nor ".join(SETTINGS[key].label for key in BASELINES)
        return f"{start} nothing is compared: neither {neither} was measured"
    if not judged:
        rounds = max((ratio.rounds for ratio in every.values()), default=0)
        why = f"{rounds} shared rounds of the {LEAST} needed" if rounds else "measured apart, not side by side"
        return f"{start} the settings are not compared ({why}: see qb.sweep)"
    first = max(judged, key=lambda cell: judged[cell].value)
    best = first if judged[first].value > 1 else base
    level = [cell for cell in (base, *judged) if cell is best or compared(best, cell).verdict == "tie"]
    if base in level:  # who is slower than one of them shares no place with it
        level = [cell for cell in level if cell is base or judged[cell].verdict != "slower"]
    shown = [first] if len(level) > FEW else [cell for cell in level if cell in judged] or [first]
    told = [("" if level == [cell] else f"{cell.setting} at ") + f"{judged[cell].value:.2f} "
            f"({span(judged[cell].interval, '.2f')}, {judged[cell].rounds} rounds)" for cell in shown]
    apart = [cell.setting for cell in group if cell is not base and cell not in judged]
    return (f"{start} {listed([cell.setting for cell in level])} {'are a tie for' if level[1:] else 'is'} the fastest: "
            f"{listed(told)} times {base.setting}" + (f"; not compared: {listed(apart)}" if apart else ""))


def _memory(group: list[Cell]) -> str:
    """The smallest peak VRAM, or weights where the run has no VRAM, against the largest."""
    what = f"peak VRAM at {group[0].workload}" if group else ""
    sizes = pd.Series({cell.setting: cell.row.vram_gb for cell in group}, dtype=float).dropna()
    if len(sizes) < 2:
        what = "weights"
        sizes = pd.Series({plain(cell.row.setting_label): cell.row.weights_gb for cell in group}, dtype=float).dropna()
    smallest = list(sizes.index[sizes.round(3) == sizes.min().round(3)]) if len(sizes) else []
    if len(smallest) == len(sizes):
        return ""
    return (f"{listed(smallest)} {'have' if smallest[1:] else 'has'} the smallest {what} "
            f"({sizes.min():.3f} GB; {sizes.idxmax()}, the largest, {sizes.max():.3f} GB)")


def _caveats(mine: list[Cell]) -> str:
    """What was not measured and why, and what was disturbed; with the workload where not all of a setting is meant."""
    tags, said = [cell.note and f"disturbed ({cell.note})" if cell.measured else
                  f"not measured ({cut(cell.outcome, 100)})" for cell in mine], {}
    for cell, tag in zip(mine, tags):
        every = all(other == tag for mate, other in zip(mine, tags) if mate.setting == cell.setting)
        said.setdefault(tag, {})[cell.setting if every else f"{cell.setting} at {cell.workload}"] = None
    return "; ".join(f"{listed(list(names))} {tag}" if len(names) <= FEW else
                     f"{tags.count(tag)} of {len(mine)} cells {tag}" for tag, names in said.items() if tag)
