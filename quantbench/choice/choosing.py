"""Which setting to take under a person's limits: judged by intervals and shared rounds, measured where it must be."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from math import inf
from typing import NamedTuple

import pandas as pd

import quantbench as qb
from quantbench.conclusions import Findings, beside, compared
from quantbench.evaluation.scores import Quality
from quantbench.intervals import Ratio, median_interval
from quantbench.labels import Cell, cells, machine_of
from quantbench.quantisers import QUANTISERS
from quantbench.records import FIGURES, Measurement
from quantbench.results import Run
from quantbench.settings import BASELINES, MODELS, SETTINGS
from quantbench.tables import RANDOM, Table
from quantbench.wording import html_text, listed, span

SAME = 1.05  # times the speed, or the memory, of another: too little to decide between two that tie
TAKE, SLOWER, TIE, OPEN, OUT = "take it", "slower", "tie", "not decided", "ruled out"  # verdicts
BELIEVED = 1.03  # times a limit: an estimate beyond that is not measured
UNREAD = "its quality is not measured"
_DECIMALS = {FIGURES["tokens_per_s"]: 1, "× baseline": 2, FIGURES["ttft_s"]: 3, "Memory (GB)": 3, "Accuracy kept": 3}
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
        return Table(self.ranked, ["Which to take"], decimals=_DECIMALS)

    def __repr__(self) -> str:
        return f"{self.why!r}\n{self._table()!r}"

    def _repr_html_(self) -> str:
        said = "".join(f"<li>{html_text(sentence)}</li>" for sentence in self.why)
        return f"<ul>{said}</ul>{self._table()._repr_html_()}"


class _Candidate(NamedTuple):
    cell: Cell
    ratio: Ratio | None  # to the baseline; None: it is the baseline, or was not measured
    read: Quality | None
    broken: list[str]  # limits, in words
    doubts: list[str]  # limits that its figures leave open

    @property
    def memory_gb(self) -> float:
        """Peak VRAM, or peak RAM on a CPU; the weights where neither was read."""
        row = self.cell.row
        return row.vram_gb or row.ram_peak_gb or row.weights_gb or inf


def choose(model_or_run: str | os.PathLike | Run, vram_gb: float | None = None, ram_gb: float | None = None,
           min_tokens_per_s: float | None = None, ttft_s: float | None = None, keep: float | None = 0.99,
           prompt_tokens: int | None = None, batch_size: int = 1, max_new_tokens: int = 64,
           settings: Iterable[str] | None = None, run: Run | None = None) -> Choice:
    """The fastest setting that surely meets the limits: at most `vram_gb` or `ram_gb` (peak, 1e9 bytes) and `ttft_s`
    seconds to the first token, at least `min_tokens_per_s`, and `keep` of the reference's accuracy. None: any will do.

    Of a Run it judges what is there, of one model, at this workload or what most rows have. A model's name is measured
    into `run`, in rounds, where estimates allow and the run lacks it; then quality, the fastest first, until that
    cannot change the answer. Faster is told by shared rounds; a tie goes to the smaller, if by 5%, then to the lower
    KL. What a limit's interval leaves open is never named. `settings`: of these alone, and the baseline. Raises
    ValueError for several models or machines, and for a mistake in an argument.
    """
    given = {"vram_gb": vram_gb, "ram_gb": ram_gb, "ttft_s": ttft_s, "rate": min_tokens_per_s, "keep": keep}
    if wrong := [name for name, limit in given.items() if limit is not None and not limit > 0]:
        raise ValueError(f"a limit must be above 0: {listed(wrong)}")
    asked = {name: limit or (0 if name in ("rate", "keep") else inf) for name, limit in given.items()}
    work = {"prompt_tokens": prompt_tokens, "batch_size": batch_size, "max_new_tokens": max_new_tokens}
    settings = settings and [SETTINGS.find(key).key for key in settings]
    if isinstance(model_or_run, Run):
        return _judged(model_or_run, asked, work, settings, {})
    from quantbench.weights import check_name
    name, run = check_name(model_or_run), Run() if run is None else run
    base, wanted, ruled_out = _plan(name, asked, batch_size, settings, run)
    list(qb.sweep(name, wanted, run=run, **work))
    return _with_quality(name, base, run, lambda: _judged(run.only(model=name), asked, work, wanted, ruled_out))


def _plan(name: str, asked: dict, batch_size: int, settings: list[str] | None,
          run: Run) -> tuple[str | None, list[str], dict[str, str]]:
    """The baseline, what to measure (the baseline with it), and what estimates rule out: setting -> why."""
    from quantbench.choice.fitting import estimates
    found, ruled_out = {one.setting.key: one for one in estimates(name, None, run)}, {}
    base = next((key for key in BASELINES if key in found and not found[key].why), None)
    device = SETTINGS[base].device if base else "cuda" if qb.facts().get("gpu") else "cpu"
    wanted = settings or [key for key, one in found.items() if one.setting.device == device]
    for one in (found[key] for key in wanted if key in found):
        limit, rate = asked["vram_gb" if one.setting.device == "cuda" else "ram_gb"], batch_size / one.floor_s
        if one.why or one.weights / 1e9 > BELIEVED * limit or BELIEVED * rate < asked["rate"]:
            ruled_out[one.setting.key] = one.why or (f"by estimate, {one.weights / 1e9:.3g} GB of weights" +
                                                     f" and at most {rate:.3g} tokens/s" * (rate == rate))
    ruled_out.pop(base, None)  # measured all the same: ratios are to it
    return base, [key for key in dict.fromkeys([base, *wanted]) if key and key not in ruled_out], ruled_out


def _with_quality(name: str, base: str | None, run: Run, judge: Callable[[], Choice]) -> Choice:
    """Evaluate the settings whose quality could change the answer, one by one, against the baseline."""
    choice, reference, tried = judge(), None, set()
    while base and (todo := [key for key in choice.unread if key not in tried]):
        try:
            if reference is None:
                with qb.load(name, base) as lm:
                    reference = qb.reference(lm)
                run.add(reference.quality)
            with qb.load(name, todo[0]) as lm:
                run.add(qb.quality(lm, reference))
        except ValueError as error:  # no tokenizer, too few positions
            choice.why.append(f"Quality cannot be told: {error}.")
            return choice
        tried.add(todo[0])
        choice = judge()
    return choice


def _judged(run: Run, asked: dict, work: dict, settings: list[str] | None, ruled_out: dict[str, str]) -> Choice:
    """What a run says, of one workload."""
    rows = [row for row in run if row.batch_size == work["batch_size"]
            and work["prompt_tokens"] in (None, row.prompt_length)]
    many = Counter(row.work for row in rows if row.status == "ok")
    tokens = work["max_new_tokens"]
    main = max(many, key=lambda one: (one[-1] == tokens, one[1:4] == ("default", 0, 0), many[one], one), default=None)
    named = cells(row for row in rows if main in (None, row.work))
    machine_of(cell.row for cell in named)
    if len(titles := {cell.title for cell in named}) > 1:
        raise ValueError(f"a choice is of one model, not of {len(titles)}: run.only(model=...)")
    reads = {one.subject: one for one in run.qualities if main and one.cache == main[1]}
    found = [_Candidate(cell, ratio, read, *_held(cell, read, asked)) for cell, base, ratio in beside(named)
             for read in [reads.get(cell.row.subject)] if not settings or cell is base or cell.row.setting in settings]
    best, lead = _best([one for one in found if not one.broken and not one.doubts])
    found.sort(key=lambda one: (one is not best, *map(bool, one[-2:]), -(one.cell.row.tokens_per_s or 0)))
    told = [_verdict(one, best, lead) for one in found]
    lines = [(one.cell.setting, one.cell.row.engine, one.cell.row.tokens_per_s, one.ratio and one.ratio.value,
              one.cell.row.ttft_s, one.memory_gb, one.read and one.read.accuracy_kept, *verdict)
             for one, verdict in zip(found, told)]
    lines += [(SETTINGS[key].label, "", *[None] * 5, OUT, why) for key, why in ruled_out.items()]
    keys = [*(one.cell.row.setting for one in found), *ruled_out]
    ranked = pd.DataFrame(lines, keys, _COLUMNS).astype(dict.fromkeys(_DECIMALS, float)).replace(inf, float("nan"))
    unread = [one.cell.row.setting for one, (kind, _) in zip(found, told) if UNREAD in one.doubts and kind == OPEN]
    return Choice(best and best.cell.row.setting, _why(named, best, ranked), ranked, best and best.cell.row, unread)


def _held(cell: Cell, read: Quality | None, asked: dict) -> tuple[list[str], list[str]]:
    """Which limits a cell breaks, and which it leaves open: an interval lies beyond, or about, the limit."""
    row, broken = cell.row, []
    if not cell.measured:
        return [cell.outcome], []
    place, memory = ("RAM", row.ram_peak_gb) if row.vram_peak_bytes is None else ("VRAM", row.vram_gb)
    first, rate = median_interval(row.first_token_s) or [row.ttft_s] * 2, row.tokens_per_s_ci or [row.tokens_per_s] * 2
    checks = [(f"GB of {place}", ".3f", (memory, memory), 0, asked[f"{place.lower()}_gb"]),
              ("s to the first token", ".3f", first, 0, asked["ttft_s"]),
              (f"tokens/s in {len(row.latencies_s)} rounds", ".1f", rate, asked["rate"], inf)]
    if read and row.weights != "random":
        kept = read.accuracy_kept_ci or (None, None)
        checks.append((f"of the accuracy on {read.tokens} tokens", ".3f", kept, asked["keep"], inf))
    doubts = [UNREAD] * bool(not read and asked["keep"] and row.weights != "random" and _quantised(row))
    for what, digits, (low, high), least, most in checks:
        if (least, most) != (0, inf):
            said = "unknown" if low is None else f"{low:{digits}}" if low == high else span((low, high), digits)
            said += f" {what}"
            broken += [said] * (low is not None and (high < least or low > most))
            doubts += [said] * (low is None or low < least <= high or low <= most < high)
    return broken, doubts


def _quantised(row: Measurement) -> bool:
    return row.setting not in SETTINGS or SETTINGS[row.setting].quantised


def _best(sure: list[_Candidate]) -> tuple[_Candidate | None, _Candidate | None]:
    """Of those that meet all limits the one to take, None where rounds do not tell; and the first that none outruns."""
    sure = sorted(sure, key=lambda one: -one.cell.row.tokens_per_s)
    free = [one for one in sure if all(compared(one.cell, other.cell).verdict != SLOWER for other in sure)]
    paces = [compared(one.cell, free[0].cell) for one in free[1:]]
    if not free or any(pace.interval is None for pace in paces):
        return None, free[0] if free else None
    level = [free[0], *(one for one, pace in zip(free[1:], paces) if SAME * pace.value >= 1)]
    small = [one for one in level if one.memory_gb <= SAME * min(other.memory_gb for other in level)]
    return min(small, key=lambda one: (one.read and one.read.kl_mean) or float(_quantised(one.cell.row))), free[0]


def _verdict(one: _Candidate, best: _Candidate | None, lead: _Candidate | None) -> tuple[str, str]:
    """In a word, and why."""
    if one.broken or one is best:
        return (OUT, listed(one.broken)) if one.broken else (TAKE, "")
    doubts, rival = one.doubts, best or lead
    if rival is not None and rival is not one:
        pace = compared(one.cell, rival.cell)
        told = f"{pace.value:.2f} ({span(pace.interval, '.2f')}, {pace.rounds} rounds) × {rival.cell.setting}" \
            if pace.interval else f"{pace.rounds} rounds shared with {rival.cell.setting}"
        if best and (pace.verdict == SLOWER or not doubts):
            return (SLOWER, told) if pace.verdict == SLOWER else (TIE, f"{told}, {one.memory_gb:.3g} GB")
        doubts = [*doubts, told]
    return OPEN, listed(doubts or ["too few rounds shared with the others"])


def _why(named: list[Cell], best: _Candidate | None, ranked: pd.DataFrame) -> Findings:
    """The answer, then by its figures what is open, what ties, what is slower and what is ruled out."""
    said = {kind: "; ".join(f"{name} ({why})" for name, why in zip(some["Setting"], some["Why"]))
            for kind in (OPEN, TIE, SLOWER, OUT) for some in [ranked[ranked["Verdict"] == kind]] if len(some)}
    answer = OPEN if OPEN in said else "nothing meets the limits"
    if best:
        figures = [f"{best.cell.row.tokens_per_s:,.1f} tokens/s", f"{best.memory_gb:.3g} GB"]
        if best.ratio and best.ratio.interval:
            figures.append(f"{best.ratio.value:.2f} ({span(best.ratio.interval, '.2f')}) × baseline")
        if best.read and best.read.accuracy_kept:
            figures.append(f"{best.read.accuracy_kept:.1%} of the accuracy")
        answer = f"{'take' if best.ratio else 'keep'} {best.cell.setting} ({listed(figures)})"
    start = f"{named[0].title} at {named[0].workload}" if named else "Nothing is measured"
    said |= {"quality": f"not known, {RANDOM}"} if named and named[0].random else {}
    return Findings([f"{start}: {answer}.", *(f"{kind.capitalize()}: {text}." for kind, text in said.items())])


def load_line(row: Measurement) -> str:
    """Code that loads exactly the model of a row: transformers' own where that alone does, else `qb.load`."""
    setting, known = SETTINGS[row.setting], MODELS.get(row.model)
    if setting.linear or row.weights != "pretrained":
        return f"lm = qb.load({row.model!r}, {row.setting!r}, {row.weights!r})"
    asked = [f"dtype={setting.dtype!r}", f"device_map={ {'': setting.device} }"]
    asked += [f"revision={row.revision!r}"] * (len(row.revision or "") == 40)  # the Hub's commit
    names = ["AutoModelForCausalLM"]
    if made := QUANTISERS[setting.quantisation].config(setting):
        names.append(type(made).__name__)
        inside = [f"{key}={value!r}" for key, value in made.to_diff_dict().items() if not key.startswith("_")]
        asked.append(f"quantization_config={names[-1]}({', '.join(inside)})")
    called = ",\n    ".join([repr(known.hub if known else row.model), *asked])
    return f"from transformers import {', '.join(names)}\nmodel = {names[0]}.from_pretrained(\n    {called})"
