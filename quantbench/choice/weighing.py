"""What measured rows say of a choice: which settings hold to the limits, and which of them none outruns."""

import os
from collections import Counter
from dataclasses import dataclass
from math import ceil, inf, nan
from typing import NamedTuple

import pandas as pd

from quantbench.conclusions import FEW, Findings, beside, compared
from quantbench.evaluation.scores import Quality
from quantbench.intervals import LEAST, Ratio, median_interval
from quantbench.labels import Cell, cells, machine_of
from quantbench.quantisers import QUANTISERS
from quantbench.records import FIGURES, Measurement
from quantbench.results import Run
from quantbench.settings import BASELINES, MODELS, SETTINGS
from quantbench.tables import RANDOM, Table
from quantbench.wording import cut, html_text, listed, rounded, span

SAME = 1.05  # times the speed, or the memory, of another: too little to decide between two that tie
TAKE, SLOWER, TIE, OPEN, OUT = "take it", "slower", "tie", "not decided", "ruled out"  # verdicts
UNREAD = "its quality is not measured"
WHOLE = {key for key, one in SETTINGS.items() if not one.quantised}
MANY = 1000  # times the samples: more than anybody waits for
_DECIMALS = {FIGURES["tokens_per_s"]: 1, "× baseline": 2, FIGURES["ttft_s"]: 3, "Memory (GB)": 3, "Accuracy kept": 3,
             FIGURES["once_s"]: 1, "Energy (J/1,000 tokens)": 0, "Price of a million tokens": 2}
_COLUMNS = ["Setting", "Engine", *_DECIMALS, "Verdict", "Why"]


@dataclass(frozen=True)
class Choice:
    """What `choose` returns: the setting to take (None: not decided, or none meets the limits), why, every setting with
    its verdict, in order, the answer's measurement, and the settings whose quality could still change it."""

    answer: str | None
    why: Findings
    ranked: pd.DataFrame
    row: Measurement | None
    unread: list[str]

    @property
    def load_line(self) -> str:
        """Code that loads exactly the model that was measured; empty where there is no answer."""
        return load_line(self.row) if self.row else ""

    def _table(self) -> Table:
        told = self.ranked.loc[:, ~(self.ranked.isna() | self.ranked.isin(["", "eager"])).all()]
        return Table(told, ["Which to take"], decimals=_DECIMALS)

    def __repr__(self) -> str:
        return f"{self.why!r}\n{self._table()!r}"

    def _repr_html_(self) -> str:
        said = "".join(f"<li>{html_text(sentence)}</li>" for sentence in self.why)
        return f"<ul>{said}</ul>{self._table()._repr_html_()}"


class Candidate(NamedTuple):
    cell: Cell
    ratio: Ratio | None  # to the baseline; None: it is the baseline, or was not measured
    read: Quality | None
    broken: list[str]  # limits, in words
    doubts: list[str]  # limits that its figures leave open

    @property
    def memory_gb(self) -> float:
        """Peak VRAM, or peak RAM on a CPU; the weights where neither was read."""
        row = self.cell.row
        return max(row.vram_gb or row.ram_peak_gb or row.weights_gb or inf, 0)

    @property
    def seconds(self) -> float:
        """Of a token; NaN where nothing was measured."""
        return 1 / (self.cell.row.tokens_per_s or nan)


def judged(run: Run, asked: dict, work: dict, settings: list[str] | None, ruled_out: dict[str, str]) -> Choice:
    """What a run says, of one workload."""
    rows = [row for row in run if row.batch_size == work["batch_size"]
            and work["prompt_tokens"] in (None, row.prompt_length)]
    many = Counter(row.work for row in rows if row.status == "ok")
    tokens = work["max_new_tokens"]
    main = max(many, key=lambda one: (one[-1] == tokens, one[1:4] == ("default", 0, 0), many[one], one), default=None)
    named = cells(row for row in rows if main in (None, row.work))
    machine_of(cell.row for cell in named)
    if len(models := {cell.model for cell in named}) > 1:
        raise ValueError(f"a choice is of one model, not of {len(models)}: run.only(model=...)")
    named = [cell for cell in named if not cell.random] or named  # of its real weights, where there are such rows
    reads = _reads(run, {cell.row.subject for cell in named}, main and main[1])
    found = [Candidate(cell, ratio, read, *_held(cell, read, asked)) for cell, base, ratio in beside(named)
             for read in [reads.get(cell.row.subject)] if not settings or cell is base or cell.row.setting in settings]
    best, lead = _best([one for one in found if not one.broken and not one.doubts])
    found.sort(key=lambda one: (one is not best, *map(bool, one[-2:]), -(one.cell.row.tokens_per_s or 0)))
    told = [_verdict(one, best, lead) for one in found]
    lines = [(one.cell.setting, one.cell.row.engine, one.cell.row.tokens_per_s, one.ratio and one.ratio.value,
              one.cell.row.ttft_s, one.memory_gb, one.read and one.read.accuracy_kept, one.cell.row.once_s,
              1000 * (one.cell.row.energy_per_token_j or nan), asked["price_per_hour"] / 3600 * 1e6 * one.seconds,
              *verdict) for one, verdict in zip(found, told)]
    lines += [(SETTINGS[key].label, "", *[None] * len(_DECIMALS), OUT, why) for key, why in ruled_out.items()]
    keys = [*(one.cell.row.setting for one in found), *ruled_out]
    ranked = pd.DataFrame(lines, keys, _COLUMNS).astype(dict.fromkeys(_DECIMALS, float)).replace(inf, nan)
    unread = [one.cell.row.setting for one, (kind, _) in zip(found, told) if UNREAD in one.doubts and kind == OPEN]
    bases = [one for one in found if one.ratio is None and one.cell.measured and one.cell.row.setting in BASELINES]
    why = _why(named, best, next(iter(bases), None), ranked)
    return Choice(best and best.cell.row.setting, why, ranked, best and best.cell.row, unread)


def _reads(run: Run, subjects: set, cache: str | None) -> dict[tuple, Quality]:
    """By subject its quality, of the one text, windows and reference that most of them were read on (of two the later);
    what failed counts where that is all there is."""
    found = [one for one in run.qualities if one.subject in subjects and one.cache == cache]
    many = Counter(one.key[7:] for one in reversed(found) if one.accuracy_kept is not None)
    main = max(many, key=many.get, default=None)
    failed = {one.subject: one for one in found if one.status != "ok"}
    return failed | {one.subject: one for one in found if one.key[7:] == main}


def _held(cell: Cell, read: Quality | None, asked: dict) -> tuple[list[str], list[str]]:
    """Which limits a cell breaks, and which it leaves open: an interval lies beyond, or about, the limit."""
    row, broken, doubts = cell.row, [], []
    if not cell.measured:
        return [cell.outcome], []
    first, looks = median_interval(row.first_token_s), (len(row.latencies_s), "rounds")
    checks = [(f"GB of {place}", ".3f", size, None if size is None else (size, size), 0, asked[f"{place.lower()}_gb"],
               looks) for place, size in _memory(row).items()]
    checks += [("s to the first token", ".3f", row.ttft_s, first, 0, asked["ttft_s"], looks),
               ("tokens/s", ".1f", row.tokens_per_s, row.tokens_per_s_ci, asked["min_tokens_per_s"], inf, looks)]
    keep = asked["keep"] if row.weights != "random" else 0
    if keep and read is None:
        doubts += [UNREAD] * (row.setting not in WHOLE)
    elif keep and read.status != "ok":
        (broken if read.status == "failed" else doubts).append(cut(f"quality {read.status}: {read.reason}", 160))
    elif keep:
        of = read.tokens, "tokens of text"
        checks.append(("of the accuracy", ".3f", read.accuracy_kept, read.accuracy_kept_ci, keep, inf, of))
    for what, digits, seen, interval, least, most, (count, of) in checks:
        if interval is None:
            told = f"unknown {what}" if seen is None else f"{seen:{digits}} {what}, in {count:,} {of} too few to tell"
            doubts += [told] * ((least, most) != (0, inf))
            continue
        (low, high), said = interval, f"{span(interval, digits)} {what}"
        if high < least or low > most:
            broken.append(said)
        elif low < least or most < high:
            doubts.append(f"{said} in {count:,} {of}, {_needed(count, low, high, least or most)}")
    return broken, doubts


def _memory(row: Measurement) -> dict[str, float | None]:
    """The GB that were seen in each memory that a setting fills: weights that are offloaded are in the host's."""
    setting = SETTINGS.get(row.setting)
    on_gpu = setting.device == "cuda" if setting else row.vram_peak_bytes is not None
    ram = {"RAM": row.weights_gb if on_gpu else row.ram_peak_gb}
    return ({"VRAM": row.vram_gb} if on_gpu else ram) | (ram if setting and setting.offload else {})


def _needed(count: int, low: float, high: float, limit: float) -> str:
    """How many samples it would take until an interval of this middle ends at the limit: it shrinks with their root."""
    far = abs((low + high) / 2 - limit)
    times = ((high - low) / 2 / far) ** 2 if far else inf
    return f"about {rounded(ceil(count * times)):,} would tell" if times < MANY else "too near the limit to tell"


def _best(sure: list[Candidate]) -> tuple[Candidate | None, Candidate | None]:
    """Of those that meet all limits the one to take, None where rounds do not tell; and the first that none outruns."""
    sure = sorted(sure, key=lambda one: -one.cell.row.tokens_per_s)
    free = [one for one in sure if all(compared(one.cell, other.cell).verdict != SLOWER for other in sure)]
    paces = [compared(one.cell, free[0].cell) for one in free[1:]]
    if not free or any(pace.interval is None for pace in paces):
        return None, next(iter(free), None)
    level = [free[0], *(one for one, pace in zip(free[1:], paces) if SAME * pace.value >= 1)]
    small = [one for one in level if one.memory_gb <= SAME * min(other.memory_gb for other in level)]
    return min(small, key=lambda one: (one.read and one.read.kl_mean) or one.cell.row.setting not in WHOLE), free[0]


def _verdict(one: Candidate, best: Candidate | None, lead: Candidate | None) -> tuple[str, str]:
    """In a word, and why."""
    if one.broken or one is best:
        return (OUT, listed(one.broken)) if one.broken else (TAKE, "")
    doubts, rival = one.doubts, best or lead
    if rival is not None and rival is not one:
        pace = compared(one.cell, rival.cell)
        told = f"{pace.value:.2f} ({span(pace.interval, '.2f')}, {pace.rounds} rounds) × {rival.cell.setting}" \
            if pace.interval else f"{pace.rounds} rounds shared with {rival.cell.setting}, {LEAST} would tell"
        if best and pace.interval and (pace.verdict == SLOWER or not doubts):
            return (SLOWER, told) if pace.verdict == SLOWER else (TIE, f"{told}, {one.memory_gb:.3g} GB")
        doubts = [*doubts, told]
    return OPEN, listed(doubts or ["too few rounds shared with the others"])


def _why(named: list[Cell], best: Candidate | None, base: Candidate | None, ranked: pd.DataFrame) -> Findings:
    """The answer, then by its figures what is open, what ties, what is slower and what is ruled out; and after how many
    tokens the answer has made up for what it needs once more than the baseline."""
    said = {kind: "; ".join([f"{name} ({why})" for name, why in zip(some["Setting"][:FEW], some["Why"])]
                            + [f"{len(some) - FEW} more, in the table"] * (len(some) > FEW))
            for kind in (OPEN, TIE, SLOWER, OUT) for some in [ranked[ranked["Verdict"] == kind]] if len(some)}
    answer = OPEN if OPEN in said else "nothing meets the limits"
    if best:
        figures = [f"{best.cell.row.tokens_per_s:,.1f} tokens/s", f"{best.memory_gb:.3g} GB"]
        if best.ratio and best.ratio.interval:
            figures.append(f"{best.ratio.value:.2f} ({span(best.ratio.interval, '.2f')}) × baseline")
        if best.read and best.read.accuracy_kept:
            figures.append(f"{best.read.accuracy_kept:.1%} of the accuracy")
        answer = f"{'keep' if best is base else 'take'} {best.cell.setting} ({listed(figures)})"
    start = f"{named[0].title} at {named[0].workload}" if named else "Nothing of this batch size and prompt is measured"
    said |= {"quality": f"not known, {RANDOM}"} if named and named[0].random else {}
    why = Findings([f"{start}: {answer}.", *(f"{kind.capitalize()}: {text}." for kind, text in said.items())])
    once = [one and one.cell.row.once_s for one in (best, base)]
    if None not in once and (more := once[0] - once[1]) > 0 and best.seconds < base.seconds:
        tokens = rounded(more / (base.seconds - best.seconds))
        why.append(f"First answers: {best.cell.setting} needs {once[0]:.1f} s once, {more:.1f} s more than "
                   f"{base.cell.setting}: made up after about {tokens:,} tokens.")
    return why


def load_line(row: Measurement) -> str:
    """Code that loads exactly the model of a row: transformers' own where that alone does, else `qb.load`."""
    if row.setting not in SETTINGS:
        return f"# {row.setting} is a setting of another quantbench"
    setting, known, name = SETTINGS[row.setting], MODELS.get(row.model), row.model
    how = f"\n# measured by qb.generate(..., engine={row.engine!r})" * (row.engine != "eager")
    ours = setting.linear or setting.offload or setting.quantisation == "gguf" or name.endswith(".gguf") or row.gpus > 1
    if ours or row.weights != "pretrained":
        more = [repr(row.weights)] * (row.weights is not None) + [f"gpus={row.gpus}"] * (row.gpus > 1)
        return f"lm = qb.load({', '.join([repr(name), repr(row.setting), *more])}){how}"
    asked = [f"dtype={setting.dtype!r}", f"device_map={ {'': setting.device} }"]
    asked += [f"revision={row.revision!r}"] * (len(row.revision or "") == 40)  # the Hub's commit
    names = ["AutoModelForCausalLM"]
    if made := QUANTISERS[setting.quantisation].config(setting):
        names.append(type(made).__name__)
        inside = [f"{key}={value!r}" for key, value in made.to_diff_dict().items() if not key.startswith("_")]
        asked.append(f"quantization_config={names[-1]}({', '.join(inside)})")
    called = ",\n    ".join([repr(known.hub if known else os.path.expanduser(name)), *asked])
    return f"from transformers import {', '.join(names)}\nmodel = {names[0]}.from_pretrained(\n    {called}){how}"
