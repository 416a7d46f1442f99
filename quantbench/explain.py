"""Why a row is as fast as it is: where one decode step's time goes, and the verdict on it in words."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

import pandas as pd

from quantbench.findings import BASELINES, Findings
from quantbench.grid import Grids
from quantbench.plain import is_a
from quantbench.record import FIGURES, Measurement
from quantbench.settings import SETTINGS
from quantbench.tables import grid
from quantbench.view import Cell, cells, machine_of, plain

FLOORS = {name: FIGURES[name].label for name in ("step_ms", "step_mb", "read_ms", "compute_ms", "mbu")}
SHARES = {"idle": "Waiting (%)", "reading": "Reading (%)", "computing": "Computing (%)",
          "quantisation": "Quantising (%)", "quantised": "Quantised products (%)",
          "products": "Other products (%)", "rest": "All else (%)"}
# products with quantised weights: bitsandbytes' and torch's operators, and the 8-bit kernels of CUTLASS and cuBLAS
QUANTISED = re.compile(r"gem[mv]_4bit|int8_\w*(_mm|matmul)\b|linear_dynamic|igemm|tensorop_i\d|_s8|_int_mm")
VERDICTS = ("overhead-bound", "bandwidth-bound", "compute-bound", "dequantisation-bound")


@dataclass(frozen=True)
class Verdict:
    """What bounds one decode step. `shares` of the step's time sum to 1: `idle` (the device has no work: Python,
    launches), `reading` or `computing` (the floor that no software can go under), `quantisation` (quantising and
    dequantising outside a product), `quantised` and `products` (products with quantised and with other weights, above
    the floor), `rest` (all other work)."""

    kind: str
    shares: dict[str, float]


def explain(run: Iterable[Measurement]) -> Findings:
    """Per traced row the verdict (overhead-, bandwidth-, compute- or dequantisation-bound) and its evidence.

    Rows that were not traced, or on a machine whose `limits` were not known then, are named at the end. Raises
    ValueError for a run of several machines.
    """
    rows = list(run)
    machine_of(rows)
    named = [cell for cell in cells(rows) if cell.measured]
    said, silent = [], []
    for cell in named:
        if (found := verdict(cell.row)) is None:
            silent.append(cell)
        else:
            said.append(f"{cell.model}, {cell.setting}, {cell.workload}: {found.kind}. {_evidence(cell, found, named)}")
    if silent:
        names = "; ".join(dict.fromkeys(f"{cell.model} {cell.setting} at {cell.workload}" for cell in silent))
        said.append(f"No verdict: {names}. It needs qb.limits() before the row, and trace=True in it.")
    return Findings(said or ["nothing measured yet"])


def why_table(run: Iterable[Measurement]) -> pd.DataFrame:
    """One row per measured cell: its decode step, the floor, MBU, where the step's time goes in percent, and the
    verdict; NaN and "" where there are no limits or no trace."""
    measured = [cell for cell in cells(run) if cell.measured]
    records = []
    for cell in measured:
        found = verdict(cell.row)
        shares = {label: 100 * found.shares[name] if found else None for name, label in SHARES.items()}
        records.append({"Setting": cell.setting, "Workload": cell.workload}
                       | {label: getattr(cell.row, name) for name, label in FLOORS.items()}
                       | {"Kernels/token": _kernels(cell.row)} | shares
                       | {"Verdict": found.kind if found else ""})
    numbers = [*FLOORS.values(), "Kernels/token", *SHARES.values()]
    frame = pd.DataFrame(records, columns=["Setting", "Workload", *numbers, "Verdict"],
                         index=pd.Index([cell.model for cell in measured], name="Model", dtype=object))
    return frame.astype(dict.fromkeys(numbers, float))


def show_why(run: Iterable[Measurement]) -> Grids:
    """`why_table` as a notebook shows it, one per model, without columns that tell nothing here. Raises ValueError for
    a run of several machines."""
    rows = list(run)
    machine, frame = machine_of(rows), why_table(rows).dropna(axis="columns", how="all")
    idle = [label for label in SHARES.values() if label in frame and not frame[label].round().any()]
    same = ["Workload"] if frame["Workload"].nunique() == 1 else []
    frame = frame.drop(columns=[FLOORS["step_mb"], FLOORS["compute_ms"], *idle, *same], errors="ignore")
    decimals = dict.fromkeys(SHARES.values(), 0) | {FLOORS[name]: 2 for name in ("step_ms", "read_ms", "mbu")}
    caption = [machine, *(rows and same and [cells(rows)[0].workload])]
    return Grids([grid(part, [plain(model), *caption], decimals=decimals | {"Kernels/token": 0})
                  for model, part in frame.groupby(level=0, sort=False)])


def verdict(row: Measurement) -> Verdict | None:
    """The verdict on a row: the cause that takes the most of a decode step. None without limits or a trace.

    No threshold: the step's time is divided among causes, and the largest names it. What a product takes above the
    floor counts as dequantisation where its weights are quantised and as compute where they are not; everything that
    is not a product is overhead, as the time without work is: a faster product would not shorten it.
    """
    if (shares := _shares(row)) is None:
        return None
    causes = {
        "overhead-bound": shares["idle"] + shares["rest"],
        "bandwidth-bound": shares["reading"],
        "compute-bound": shares["computing"] + shares["products"],
        "dequantisation-bound": shares["quantisation"] + shares["quantised"],
    }
    return Verdict(max(causes, key=causes.__getitem__), shares)


def _shares(row: Measurement) -> dict[str, float] | None:
    trace, kinds = row.trace or {}, (row.trace or {}).get("kinds")
    if not (row.step_ms and row.read_ms is not None and is_a(trace.get("device_s"), float) and isinstance(kinds, dict)):
        return None
    if not all(is_a(value, float) and value >= 0 for value in (trace["device_s"], *kinds.values())):
        return None
    # per step, and never more than it took: a profiler slows the work that it watches
    per_token = min(1.0, row.step_ms / 1000 / trace["device_s"]) if trace["device_s"] else 0.0
    spent = {kind: per_token * seconds for kind, seconds in kinds.items()}
    step, busy = row.step_ms / 1000, per_token * trace["device_s"]
    floor = min(max(row.read_ms, row.compute_ms or 0) / 1000, busy)
    reading = row.read_ms >= (row.compute_ms or 0)
    products = spent.get("products", 0.0)
    quantisation = min(spent.get("quantisation", 0.0), busy - floor)
    above = min(max(products - floor, 0.0), busy - floor - quantisation)
    quantised = above * _quantised(trace.get("top"), kinds)
    return {name: seconds / step for name, seconds in {
        "idle": max(step - busy, 0.0), "reading": floor if reading else 0.0, "computing": 0.0 if reading else floor,
        "quantisation": quantisation, "quantised": quantised, "products": above - quantised,
        "rest": busy - floor - quantisation - above}.items()}


def _quantised(top: object, kinds: dict) -> float:
    """Which part of the products has quantised weights, by the names of the kernels that took the most."""
    named = [one for one in top if isinstance(one, dict) and is_a(one.get("seconds"), float)
             and QUANTISED.search(str(one.get("name")))] if isinstance(top, list) else []
    return min(1.0, sum(one["seconds"] for one in named) / kinds["products"]) if kinds.get("products") else 0.0


def _kernels(row: Measurement) -> float | None:
    count = (row.trace or {}).get("kernels")
    return count if is_a(count, float) else None


# ---- the evidence, in words ----

def _evidence(cell: Cell, found: Verdict, named: list[Cell]) -> str:
    row, shares = cell.row, found.shares
    floor = max(row.read_ms, row.compute_ms or 0)
    what = (f"reading {row.step_mb:.0f} MB at {row.limits['read_bytes_per_s'] / 1e9:.0f} GB/s"
            if shares["reading"] or not shares["computing"] else "its products at the measured matrix rate")
    said = f"A step takes {row.step_ms:.2f} ms; {what} needs {floor:.2f} ms ({floor / row.step_ms:.0%} of it). "
    if row.mbu > 1:
        said += "That is faster than memory: a cache holds the weights. "
    return said + " ".join(filter(None, [_causes(row, shares), _largest(row), _against(cell, found, named)]))


def _causes(row: Measurement, shares: dict[str, float]) -> str:
    """ "Of the step, the GPU waits 93%." """
    gpu = row.vram_peak_bytes is not None
    words = {"idle": "the GPU waits" if gpu else "Python, outside torch's operators, takes",
             "quantisation": "quantising and dequantising take",
             "quantised": "products with quantised weights take, above that floor,",
             "products": "products with unquantised weights take, above that floor,",
             "rest": f"attention, norms and other small {'kernels' if gpu else 'operators'} take"}
    parts = sorted(((shares[name], text) for name, text in words.items() if shares[name] >= 0.05), reverse=True)
    return f"Of the step, {'; '.join(f'{text} {share:.0%}' for share, text in parts)}." if parts else ""


def _largest(row: Measurement) -> str:
    """The one kernel or operator that takes the most, where that is a lot."""
    top, device = row.trace.get("top"), row.trace["device_s"]
    first = top[0] if isinstance(top, list) and top and isinstance(top[0], dict) else {}
    if not (is_a(first.get("seconds"), float) and is_a(first.get("calls"), float) and first["seconds"] > 0.3 * device):
        return ""
    name = plain(first.get("name")).partition("<")[0].removeprefix("void ")[:48]
    times = "once" if round(first["calls"]) == 1 else f"{first['calls']:.0f} times"
    name += " (the output head)" if times == "once" and name == "aten::linear" else ""
    return f"{name}, called {times} a token, is {first['seconds'] / device:.0%} of the work."


def _against(cell: Cell, found: Verdict, named: list[Cell]) -> str:
    """A quantised row beside the unquantised one: more kernels, fewer bytes."""
    row = cell.row
    device = SETTINGS[row.setting].device if row.setting in SETTINGS else None
    base = next((other for key in BASELINES for other in named if other.row.setting == key and other.model == cell.model
                 and other.workload == cell.workload and other.row.engine == row.engine and other.row.trace
                 and SETTINGS[key].device == device), None)
    if base is None or not (row.audit or {}).get("quantised") or base.row.step_mb is None:
        return ""
    ours, theirs = _kernels(row), _kernels(base.row)
    if ours is None or theirs is None or ours <= theirs:
        return ""
    units = "kernels" if row.vram_peak_bytes is not None else "operators"
    said = (f"It launches {ours:.0f} {units} a token where {base.setting} launches {theirs:.0f}, to read "
            f"{row.step_mb:.0f} instead of {base.row.step_mb:.0f} MB")
    idle = found.kind == "overhead-bound"
    return said + (": quantising cannot help until overhead goes away." if idle else ".")
