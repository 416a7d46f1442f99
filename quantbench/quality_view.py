"""Quality beside cost: per setting what it keeps of the reference, what it saves and costs, and whether to take it."""

from __future__ import annotations

from collections.abc import Iterable

import pandas as pd

from quantbench.findings import Findings
from quantbench.grid import EMPTY, Grids
from quantbench.plain import is_a
from quantbench.record import FIGURES, Measurement
from quantbench.settings import SETTINGS
from quantbench.stats import Interval, overlap
from quantbench.tables import grid
from quantbench.view import Cell, cells, machine_of, plain

TARGET = 0.99  # share of the reference's top-1 accuracy that a setting must keep to be taken
BASES = {"cpu": ("cpu-fp32",), "cuda": ("gpu-fp16", "gpu-bf16", "gpu-fp32")}  # per device, nothing quantised
WORTH = 0.05  # share of the reference's memory that is worth saving
_LABEL = {name: FIGURES[name].label for name in ("perplexity", "kl_mean", "kl_ci", "top1_agreement", "tokens_per_s",
                                                 "vram_gb", "weights_gb")}
# what only `Measurement.quality` knows
_MORE = {"perplexity_se": "± (over windows)", "kl_p99": "KL 99th percentile", "dp_mean": "Δp mean",
         "dp_rms": "Δp RMS", "accuracy_kept": "Accuracy kept", "keeps_99": "Keeps 99%", "keeps_999": "Keeps 99.9%"}
_DECIMALS = {_LABEL["perplexity"]: 2, _MORE["perplexity_se"]: 2, _LABEL["kl_mean"]: 5, _MORE["kl_p99"]: 4,
             _LABEL["top1_agreement"]: 3, _MORE["dp_mean"]: 4, _MORE["dp_rms"]: 4, _MORE["accuracy_kept"]: 4,
             _LABEL["tokens_per_s"]: 1, _LABEL["vram_gb"]: 3, _LABEL["weights_gb"]: 3}
COLUMNS = ("Setting", _LABEL["perplexity"], _MORE["perplexity_se"], _LABEL["kl_mean"], _LABEL["kl_ci"],
           _MORE["kl_p99"], _LABEL["top1_agreement"], _MORE["dp_mean"], _MORE["dp_rms"], _MORE["accuracy_kept"],
           _MORE["keeps_99"], _MORE["keeps_999"], _LABEL["tokens_per_s"], _LABEL["vram_gb"], _LABEL["weights_gb"])
_NOTE = ("KL: KL(reference || setting), nats per token. Δp: change of the true token's probability. Top-1 agreement: "
         "share of tokens with the same first choice. Accuracy kept: top-1 accuracy over the reference's, with "
         "MLPerf's targets of 99% and 99.9%. Definitions as in llama.cpp's perplexity tool; intervals by bootstrap "
         "over windows.")


def quality_table(run: Iterable[Measurement]) -> pd.DataFrame:
    """One row per model and setting that has quality, beside the speed of its longest workload; NaN where none."""
    return _frame(scored(run))


def show_quality(run: Iterable[Measurement]) -> Grids:
    """The table as a notebook shows it: one per model and text, the reference first named, without empty columns."""
    grids = []
    for (model, *_), group in grouped(scored(run)):
        frame = _frame(group)
        keep = [name for name in COLUMNS if not all(value == EMPTY or pd.isna(value) for value in frame[name])]
        caption = [model, f"{group[0].row.weights} weights", on_what(group[0].row), plain(group[0].row.machine_name)]
        grids.append(grid(frame[keep], [part for part in caption if part], note=_NOTE, decimals=_DECIMALS))
    return Grids(grids, empty="no quality measured yet")


def quality_findings(run: Iterable[Measurement]) -> Findings:
    """Per setting what it saves, what it costs and how far it agrees with the reference, with a verdict.

    A verdict is about this model on this text: a setting is not for it if it keeps less than 99% of the
    reference's top-1 accuracy for certain (by the 95% interval). Raises ValueError for a run of several machines.
    """
    rows = list(run)
    machine_of(rows)
    said = []
    for (model, *_), group in grouped(scored(rows)):
        base = next((cell for cell in group if cell.row.setting == _of(cell, "reference")), None)
        others = [cell for cell in group if cell is not base and _paired(cell)]
        if base is not None:
            said.append(f"{model}, {base.setting}: the reference, with a perplexity of {base.row.perplexity:.1f}. "
                        f"Measured on {on_what(base.row)}.")
        said += [_judged(model, cell, base, group) for cell in others]
        said += [f"{model}, {cell.setting}: perplexity {cell.row.perplexity:.1f}, not compared with a reference."
                 for cell in group if cell is not base and not _paired(cell)]
    failed = [f"{cell.model}, {cell.setting}: {cell.outcome}." for cell in cells(rows)
              if _of(cell, "status") not in (None, "ok")]
    return Findings([*said, *dict.fromkeys(failed)] or ["no quality measured yet"])


def _paired(cell: Cell) -> bool:
    return cell.row.kl_mean is not None and cell.row.top1_agreement is not None


def scored(run: Iterable[Measurement]) -> list[Cell]:
    """Per model and setting with quality the cell of the longest measured workload, in the tables' order."""
    best: dict[tuple, Cell] = {}
    for cell in cells(run):
        if cell.row.perplexity is not None and cell.row.status == "ok":
            best[cell.model, cell.setting, cell.row.machine_name] = cell  # cells come by length
    return list(best.values())


def grouped(some: Iterable[Cell]) -> list[tuple[tuple, list[Cell]]]:
    """Cells whose quality can be compared: one model, machine, text, windows and reference."""
    groups: dict[tuple, list[Cell]] = {}
    for cell in some:
        alike = ("text", "text_sha256", "tokens", "context", "stride", "reference")
        key = cell.model, cell.row.machine_name, *(str((cell.row.quality or {}).get(name)) for name in alike)
        groups.setdefault(key, []).append(cell)
    return list(groups.items())


def on_what(row: Measurement) -> str:
    """ "quantbench-eval against CPU FP32: 2978 tokens, context 512, stride 256"."""
    found = row.quality or {}
    reference = SETTINGS[key].label if (key := str(found.get("reference"))) in SETTINGS else None
    where = f" against {reference}" if reference else ""
    return plain(f"{found.get('text')}{where}: {found.get('tokens')} tokens, context {found.get('context')}, "
                 f"stride {found.get('stride')}")


def memory_of(row: Measurement) -> tuple[float | None, str]:
    """What a setting takes and what that is: VRAM where it was measured, else the weights, in 1e9 bytes."""
    return (row.vram_gb, "VRAM") if row.vram_gb is not None else (row.weights_gb, "weights")


def _frame(some: list[Cell]) -> pd.DataFrame:
    frame = pd.DataFrame([_record(cell) for cell in some], columns=list(COLUMNS),
                         index=pd.Index([cell.model for cell in some], name="Model", dtype=object))
    return frame.astype(dict.fromkeys(_DECIMALS, float))


def _record(cell: Cell) -> dict:
    more = {label: _of(cell, name, float) for name, label in _MORE.items()}
    flags = {True: "yes", False: "no", None: EMPTY}
    more |= {_MORE[name]: flags[_of(cell, name, bool)] for name in ("keeps_99", "keeps_999")}
    steps = " (token by token)" if _of(cell, "stepwise", bool) else ""
    figures = {label: getattr(cell.row, name) for name, label in _LABEL.items() if name != "kl_ci"}
    return more | figures | {"Setting": cell.setting + steps, _LABEL["kl_ci"]: _span(cell.row.kl_ci)}


def _judged(model: str, cell: Cell, base: Cell | None, group: list[Cell]) -> str:
    reference = SETTINGS[_of(cell, "reference")].label if _of(cell, "reference") in SETTINGS else "the reference"
    plain_one = _unquantised(cell, group)
    cost = [] if plain_one is None else [_saving(cell.row, plain_one.row), _pace(cell.row, plain_one.row)]
    cost = " and ".join(filter(None, cost)) + ("" if plain_one in (None, base) else f" against {plain_one.setting}")
    before = "" if base is None else f"{base.row.perplexity:.1f} → "
    parts = [cost, f"agrees with {reference} on {cell.row.top1_agreement:.0%} of tokens"]
    return (f"{model}, {cell.setting}: {', '.join(filter(None, parts))} (perplexity {before}"
            f"{cell.row.perplexity:.1f}): {_verdict(cell, plain_one, group)}.")


def _unquantised(cell: Cell, group: list[Cell]) -> Cell | None:
    """What a setting's memory and speed are held against: the first of BASES on its device that is here."""
    own = cell.row.setting
    bases = BASES[SETTINGS[own].device] if own in SETTINGS else ()
    if own in bases:  # a plain setting is held against wider ones only
        bases = bases[bases.index(own) + 1:]
    found = {other.row.setting: other for other in group}
    return next((found[key] for key in bases if key in found), None)


def _sizes(row: Measurement, other: Measurement) -> tuple[float, float, str] | None:
    """Both rows' VRAM, or both rows' weights, and which."""
    for name, what in (("vram_gb", "VRAM"), ("weights_gb", "weights")):
        if getattr(row, name) is not None and getattr(other, name):
            return getattr(row, name), getattr(other, name), what
    return None


def _saved(row: Measurement, base: Measurement) -> float:
    """The share of the other's memory that is not needed; 0 where it is not known."""
    own, its, _ = _sizes(row, base) or (1, 1, "")
    return 1 - own / its


def _saving(row: Measurement, base: Measurement) -> str:
    if (sizes := _sizes(row, base)) is None:
        return ""
    saved = _saved(row, base)
    if abs(saved) < 0.005:
        return f"takes as much {sizes[2]}" if sizes[2] == "VRAM" else "has weights as large"
    return f"saves {saved:.0%} of the {sizes[2]}" if saved > 0 else f"takes {-saved:.0%} more {sizes[2]}"


def _gain(row: Measurement, base: Measurement) -> float | None:
    """Tokens/sec over the other's, less one; 0 for a tie, None where it is not known."""
    if row.tokens_per_s is None or base.tokens_per_s is None:
        return None
    tie = overlap(row.tokens_per_s_ci, base.tokens_per_s_ci)
    return 0.0 if tie else row.tokens_per_s / base.tokens_per_s - 1


def _pace(row: Measurement, base: Measurement) -> str:
    gain = _gain(row, base)
    if gain is None:
        return ""
    return "is as fast (a tie)" if gain == 0 else f"costs {-gain:.0%} speed" if gain < 0 else f"is {gain:.0%} faster"


def _verdict(cell: Cell, base: Cell | None, group: list[Cell]) -> str:
    kept, tokens = _kept(cell), _of(cell, "tokens", int)
    if base is not None and _saved(cell.row, base.row) < WORTH and (_gain(cell.row, base.row) or 0) <= 0:
        return "nothing gained"
    if kept is not None and kept[1] < TARGET:
        return f"not for this model, as it keeps at most {kept[1]:.1%} of the accuracy"
    better = next((other for other in group if _dominates(other, cell)), None)
    if better is not None:
        return f"{better.setting} is closer, no larger and no slower"
    if kept is not None and kept[0] >= TARGET:
        return "worth taking, as it keeps 99% of the accuracy"
    return f"worth trying, but {tokens} tokens do not tell whether it keeps 99% of the accuracy"


def _dominates(other: Cell, cell: Cell) -> bool:
    """Whether `other` is closer for certain, and neither larger nor slower for certain."""
    if other is cell or other.row.kl_mean is None or overlap(other.row.kl_ci, cell.row.kl_ci):
        return False
    sizes, gain = _sizes(other.row, cell.row), _gain(other.row, cell.row)
    return (other.row.kl_mean < cell.row.kl_mean and sizes is not None and sizes[0] <= sizes[1]
            and gain is not None and gain >= 0)


def _of(cell: Cell, name: str, hint: object = str) -> object:
    """What `quality` says of `name`; None where it says nothing, or a file brought something else."""
    value = (cell.row.quality or {}).get(name)
    return value if is_a(value, hint) else None


def _kept(cell: Cell) -> Interval | None:
    """The interval of the kept accuracy."""
    return (found := _of(cell, "accuracy_kept_ci", list[float])) and (found[0], found[-1])


def _span(interval: Interval | None) -> str:
    return EMPTY if interval is None else f"{interval[0]:.2g}–{interval[1]:.2g}"
