"""Quality beside cost: per setting what it keeps of the reference, what it saves and costs, and whether to take it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

import pandas as pd

from quantbench.conclusions import Findings, compared
from quantbench.evaluation.scores import Quality
from quantbench.intervals import Ratio, ratio_of_rounds
from quantbench.labels import Cell, cells, machine_of
from quantbench.quantisers import QUANTISERS
from quantbench.records import FIGURES
from quantbench.results import Run
from quantbench.settings import MODELS, SETTINGS
from quantbench.tables import Table, Tables
from quantbench.wording import listed, plain, span

WORTH = 0.05  # share of the baseline's memory that is worth saving
_ORDER = {key: place for place, key in enumerate(SETTINGS)}
_FOUND = {"Perplexity": ("perplexity", 2), "± (over windows)": ("perplexity_se", 2), "KL vs reference": ("kl_mean", 5),
          "KL 95%": ("kl_ci", ".2g"), "KL 99th percentile": ("kl_p99", 4), "Top-1 agreement": ("top1_agreement", 3),
          "Accuracy kept": ("accuracy_kept", 3), "Accuracy kept 95%": ("accuracy_kept_ci", ".3f")}
_COST = {FIGURES[name]: (name, decimals) for name, decimals in (("tokens_per_s", 1), ("vram_gb", 3), ("weights_gb", 3))}
_DECIMALS = {label: digits for label, (_, digits) in (_FOUND | _COST).items() if isinstance(digits, int)}
_NOTE = ("KL: KL(reference || setting), nats per token. Top-1 agreement: share of tokens with the same first choice. "
         "Accuracy kept: top-1 accuracy over the reference's; keeps 99% (MLPerf's target): whether its interval lies "
         "above that, below, or does not tell. Intervals are over windows of the text.")


@dataclass(frozen=True, eq=False)
class Scored:
    """A quality with its names, and its setting's row at the workload that most of its group have, where it has one."""

    found: Quality
    cell: Cell | None
    model: str
    setting: str
    device: str | None
    quantised: bool
    is_reference: bool
    memory_gb: float | None  # VRAM where it was measured, else the weights, in 1e9 bytes
    memory: str  # which of the two


def scored(found: Quality, cell: Cell | None = None) -> Scored:
    row, name = SETTINGS.get(found.setting), MODELS[found.model].label if found.model in MODELS else found.model
    memory = "vram_gb" if cell and cell.row.vram_gb is not None else "weights_gb"
    return Scored(found, cell, plain(name), plain(found.setting_label), row and row.device,
                  row is None or QUANTISERS[row.quantisation].family(row) not in ("fp32", "16"),
                  found.setting == found.reference, cell and getattr(cell.row, memory),
                  "VRAM" if memory == "vram_gb" else "weights")


def groups(run: Iterable) -> list[list[Scored]]:
    """What can be compared, in the order of SETTINGS: one model, machine, versions, text, windows and reference."""
    run, found = Run.of(run), {}
    for one in sorted(run.qualities, key=lambda one: _ORDER.get(one.setting, len(_ORDER))):
        if one.status == "ok" and one.perplexity is not None:
            found.setdefault((one.subject[:3], one.subject[4:], one.text, *one.key[-5:]), []).append(one)
    rows = [cell for cell in cells(run) if cell.measured]
    return [_joined(group, rows) for group in found.values()]


def _joined(group: list[Quality], rows: list[Cell]) -> list[Scored]:
    subjects = {one.subject for one in group}
    rows = [cell for cell in rows if cell.row.subject in subjects]
    works = [((cell.row.engine == "eager", *cell.row.key[:-5:-1]), cell) for cell in rows]
    many = Counter(work for work, _ in works)
    shared = max(many, key=lambda work: (many[work], work), default=None)  # of several: eager, then the longest
    at = {cell.row.subject: cell for work, cell in works if work == shared}
    return [scored(one, at.get(one.subject)) for one in group]


def on_what(group: list[Scored]) -> str:
    """ "quantbench-eval against CPU FP32: 2978 tokens, context 512, stride 256; speed at 128 tokens"."""
    found = group[0].found
    speed = dict.fromkeys(f"; speed at {one.cell.workload} ({plain(one.cell.row.engine)})" for one in group if one.cell)
    return plain(f"{found.text}{f' against {_reference(found)}' if found.reference else ''}: {found.tokens} tokens, "
                 f"context {found.context}, stride {found.stride}{''.join(speed)}")


def _reference(found: Quality) -> str:
    return SETTINGS[found.reference].label if found.reference in SETTINGS else plain(found.reference)


# ---- tables ----

def quality_table(run: Iterable) -> pd.DataFrame:
    """One row per quality, beside what its setting takes at the workload that most have; NaN where nothing."""
    return _frame([one for group in groups(run) for one in group])


def show_quality(run: Iterable) -> Tables:
    """The table as a notebook shows it: one per model, machine, text and reference, without empty columns."""
    shown = []
    for group in groups(run):
        caption = [group[0].model, f"{group[0].found.weights} weights", on_what(group), group[0].found.machine_name]
        frame = _frame(group).drop(columns="Workload").dropna(axis="columns", how="all")
        shown.append(Table(frame, [part for part in caption if part], _NOTE, _DECIMALS))
    return Tables(shown, empty="no quality measured yet")


def _frame(some: list[Scored]) -> pd.DataFrame:
    def text(value: object, digits: int | str) -> object:
        return value if isinstance(digits, int) or value is None else span(value, digits)

    told = {True: "yes", False: "no", None: "not told"}
    columns = {"Setting": [one.setting + (" (token by token)" if one.found.stepwise else "") for one in some]}
    columns |= {label: [text(getattr(one.found, name), how) for one in some] for label, (name, how) in _FOUND.items()}
    columns["Keeps 99%"] = [told[one.found.keeps_99] if one.found.reference else None for one in some]
    columns["Workload"] = [one.cell and one.cell.workload for one in some]
    columns |= {label: [one.cell and getattr(one.cell.row, name) for one in some] for label, (name, _) in _COST.items()}
    models = pd.Index([one.model for one in some], name="Model", dtype=object)
    return pd.DataFrame(columns, index=models, dtype=object).astype(dict.fromkeys(_DECIMALS, float))


# ---- findings ----

def quality_findings(run: Iterable) -> Findings:
    """Per model what its settings are held against; then a line for each: whether to take it, and in brackets how close
    it stays, what it saves and what it costs.

    A setting is held against the unquantised one of its own device with the least KL, and beaten only by another one
    of its device, never by the reference. Raises ValueError for a run of several machines.
    """
    run = Run.of(run)
    machine_of([*run, *run.qualities])
    said = [sentence for group in groups(run) for sentence in _said(group)]
    failed = [scored(found) for found in run.qualities if found.status != "ok"]
    said += [f"{one.model}, {one.setting}: {Cell(one.found, one.model, one.setting, '').outcome}." for one in failed]
    return Findings(said or ["no quality measured yet"])


def _said(group: list[Scored]) -> list[str]:
    model, found, bases = group[0].model, group[0].found, [one for one in group if baseline(one, group) is one]
    start = f"{model}: every setting read {found.tokens:,} tokens of {found.text}"
    if found.reference is None:
        perplexities = listed([f"{one.found.perplexity:.1f} {one.setting}" for one in group])
        return [f"{start}, with no reference to hold them against (perplexity: {perplexities})."]
    itself = "".join(f" (perplexity {one.found.perplexity:.1f})" for one in group if one.is_reference)
    own = "".join(f" {base.setting} is what its device's others are held against ({_closeness(base)})."
                  for base in bases if not base.is_reference)
    return [f"{start}, {_reference(found)} being the reference{itself}.{own}"] + [
        f"{model}, {one.setting}: {verdict(one, group)} ({_numbers(one, baseline(one, group))})."
        for one in group if one.found.kl_mean is not None and one not in bases and not one.is_reference]


def baseline(one: Scored, group: list[Scored]) -> Scored | None:
    """The unquantised setting of the same device with the least KL."""
    mates = [other for other in group if other.device == one.device and other.found.kl_mean is not None]
    return min((mate for mate in mates if not mate.quantised), key=lambda mate: mate.found.kl_mean, default=None)


def verdict(one: Scored, group: list[Scored]) -> str:
    """Whether to take a setting, in words."""
    base, kept = baseline(one, group), one.found.keeps_99
    saved, pace = _saved(one, base), _pace(one, base).verdict
    if kept is False:
        return "not for this model, as it keeps less than 99% of the accuracy"
    if saved is not None and saved < WORTH and pace in ("tie", "slower"):
        return f"nothing gained over {base.setting}"
    if better := beaten_by(one, group):
        return f"{better.setting} is closer, no larger and no slower"
    told = f"{'it keeps' if kept else f'{one.found.tokens:,} tokens do not tell whether it keeps'} 99% of the accuracy"
    gains = pace == "faster" or saved is not None and saved >= WORTH
    return f"worth {'taking' if kept else 'trying'}: {told}" if gains else told


def beaten_by(one: Scored, group: list[Scored]) -> Scored | None:
    """Another setting of its device, not the reference, that is closer in the windows of the text, no larger, and in
    the rounds not slower."""
    return next((other for other in group if other.device == one.device and not other.is_reference
                 and ratio_of_rounds(_by_window(other), _by_window(one)).verdict == "slower"  # less of it
                 and (saved := _saved(other, one)) is not None and saved >= 0
                 and _pace(other, one).verdict in ("faster", "tie")), None)


def _saved(one: Scored, base: Scored | None) -> float | None:
    """The share of the other's memory that is not needed."""
    known = base and one.memory_gb is not None and base.memory_gb and one.memory == base.memory
    return 1 - one.memory_gb / base.memory_gb if known else None


def _pace(one: Scored, base: Scored | None) -> Ratio:
    return compared(one.cell, base.cell) if base and one.cell else Ratio(None, None, 0)


def _by_window(one: Scored) -> dict[str, float]:
    return {str(place): kl for place, kl in enumerate(one.found.kl_windows or ()) if kl > 0}


def _closeness(one: Scored) -> str:
    agreement = one.found.top1_agreement
    return f"KL {one.found.kl_mean:.2g}" + ("" if agreement is None else f", {agreement:.1%} the same first choice")


def _numbers(one: Scored, base: Scored | None) -> str:
    saved, pace, cost = _saved(one, base), _pace(one, base), []
    if saved is not None:
        share = "as much" if abs(saved) < 0.005 else f"{abs(saved):.0%} {'less' if saved > 0 else 'more'}"
        cost.append(f"{share} {one.memory}")
    if pace.interval is not None:
        cost.append("as fast" if pace.verdict == "tie" else f"{pace.value:.2f} × the speed")
    return _closeness(one) + (f"; against {base.setting} {' and '.join(cost)}" if cost else "")
