"""Why a row is as fast as it is: where the time of a decode step goes, and the verdict on it in words."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import pandas as pd
from matplotlib.figure import Figure

from quantbench.charts import Bar, checked, draw, facets, not_here
from quantbench.conclusions import Findings
from quantbench.labels import Cell, cells, machine_of
from quantbench.records import FIGURES, Measurement
from quantbench.results import Run
from quantbench.settings import BASELINES
from quantbench.tables import Table, Tables
from quantbench.why.floors import Floor, Limits, floor, limits_of, mbu
from quantbench.wording import listed

SHARES = {  # of a step's time -> its column, and its words
    "idle": ("Waiting (%)", "Python, launches and waiting"),
    "reading": ("Reading (%)", "reading at memory's rate"),
    "computing": ("Computing (%)", "products at the measured matrix rate"),
    "quantisation": ("Quantising (%)", "quantising and dequantising"),
    "quantised": ("Quantised products (%)", "products with quantised weights above the floor"),
    "products": ("Other products (%)", "products with unquantised weights above the floor"),
    "rest": ("All else (%)", "attention, norms and other small work"),
}
CAUSES = {"overhead-bound": ("idle", "rest"), "bandwidth-bound": ("reading",),
          "compute-bound": ("computing", "products"), "dequantisation-bound": ("quantisation", "quantised")}
NUMBERS = {FIGURES["step_ms"]: 2, "Reads (MB)": 0, "Read floor (ms)": 2, "Compute floor (ms)": 2, "MBU": 2,
           "Kernels/step": 0, **{column: 0 for column, _ in SHARES.values()}}  # column -> decimals
FITS = 1.1  # a trace's work, of the time without a profiler: it stretches what it watches


@dataclass(frozen=True)
class Verdict:
    """What bounds a decode step, or a prefill. `shares` of its time sum to 1: `idle` (the device has no work: Python,
    launches), `reading` or `computing` (the floor that no software can go under), `quantisation` (quantising and
    dequantising outside a product), `quantised` and `products` (products with quantised and with other weights, above
    the floor), `rest` (all other work)."""

    kind: str
    shares: dict[str, float]


def verdict(row: Measurement, limits: Limits | None, part: str = "step") -> Verdict | None:
    """The verdict on a row's decode step, or on its "prefill": the cause that takes the most of its measured time. None
    without limits or a trace. Raises ValueError where the trace does not sum, or has more work than the row has time.

    No threshold: the time is divided among causes, and the largest names it. What a product takes above the floor
    counts as dequantisation where its weights are quantised and as compute where they are not; everything that is not
    a product is overhead, as the time without work is: a faster product would not shorten it.
    """
    seen, least = (row.trace or {}).get(part) or {}, floor(row, limits, part)
    measured_s = row.ttft_s if part == "prefill" else row.step_ms and row.step_ms / 1000
    if least is None or not measured_s or not {"device_s", "kinds"} <= seen.keys():
        return None
    device, spent = seen["device_s"], seen["kinds"]
    if abs(sum(spent.values()) - device) > 0.02 * device:
        raise ValueError("the trace does not sum: its kinds are more or less than the time in which the device worked")
    if device > FITS * measured_s:
        raise ValueError(f"the trace does not fit the row, having more work than the {part} has time")
    shares = _shares(max(measured_s, device), device, spent, least)
    return Verdict(max(CAUSES, key=lambda kind: sum(shares[name] for name in CAUSES[kind])), shares)


def _shares(whole: float, device: float, spent: dict[str, float], least: Floor) -> dict[str, float]:
    """The floor is part of the products' time, of quantised and other ones alike; what it is longer than they are, it
    has of everything else (a cache is read in attention), and of quantising last."""
    bottom, quantisation = min(least.seconds, device), spent.get("quantisation", 0.0)
    quantised, products = spent.get("quantised", 0.0), spent.get("products", 0.0)
    rest = max(device - quantised - products - quantisation, 0.0)
    above, beyond = max(quantised + products - bottom, 0.0), max(bottom - quantised - products, 0.0)
    plain, reading = above * products / (quantised + products or 1), least.read_s == least.seconds
    seconds = (whole - device, bottom if reading else 0.0, 0.0 if reading else bottom,
               quantisation - max(beyond - rest, 0.0), above - plain, plain, max(rest - beyond, 0.0))
    return {name: max(one, 0.0) / whole for name, one in zip(SHARES, seconds)}


@dataclass(frozen=True)
class _Look:
    """A measured cell with what was found of it; the reason in the place of a verdict that there is not."""

    cell: Cell
    limits: Limits | None
    floor: Floor | None
    step: Verdict | str
    prefill: Verdict | str

    @property
    def kernels(self) -> float | None:
        return ((self.cell.row.trace or {}).get("step") or {}).get("kernels")


def _looks(run: Run, limits: Limits | None) -> list[_Look]:
    def judged(row: Measurement, known: Limits | None, part: str) -> Verdict | str:
        try:
            return verdict(row, known, part) or "it takes qb.limits() in the run and a trace (sweep's trace=True)"
        except ValueError as error:
            return str(error)

    found = [(cell, limits_of(cell.row, run, limits)) for cell in cells(run) if cell.measured]
    return [_Look(cell, known, floor(cell.row, known), *(judged(cell.row, known, part) for part in ("step", "prefill")))
            for cell, known in found]


def explain(run: Iterable[Measurement], limits: Limits | None = None) -> Findings:
    """Per traced row the verdict (overhead-, bandwidth-, compute- or dequantisation-bound) and its evidence, under the
    limits of its machine and device in `run`, or under `limits`. Rows without a verdict are named at the end, with the
    reason. Raises ValueError for a run of several machines."""
    run, said, silent = Run.of(run), [], {}
    machine_of(run)
    looks = _looks(run, limits)
    for look in looks:
        name = f"{look.cell.title}, {look.cell.setting}, {look.cell.workload}"
        if isinstance(look.step, str):
            silent.setdefault(look.step, []).append(name)
        else:
            evidence = filter(None, (_causes(look), _against(look, looks), _prompt(look)))
            said.append(f"{name}: {look.step.kind}. {' '.join(evidence)}")
    said += [f"No verdict: {'; '.join(names)}: {why}." for why, names in silent.items()]
    return Findings(said or ["nothing measured yet"])


def _causes(look: _Look) -> str:
    """ "A step (12.30 ms) is above all Python, launches and waiting (93%); reading 249 MB is 0.06 ms of it." """
    least, step_ms, shares = look.floor, look.cell.row.step_ms, look.step.shares
    causes = sorted(CAUSES[look.step.kind], key=shares.__getitem__, reverse=True)
    said = listed([f"{SHARES[name][1]} ({shares[name]:.0%})" for name in causes if shares[name] >= 0.05])
    what = f"reading {least.bytes / 1e6:.0f} MB" if least.read_s == least.seconds else "multiplying by its weights"
    cached = least.seconds > look.cell.row.trace["step"]["device_s"]
    held = "would take {:.2f} ms from memory: a cache holds some" if cached else "is {:.2f} ms of it"
    return f"A step ({step_ms:.2f} ms) is above all {said}; {what} {held.format(1000 * least.seconds)}."


def _against(look: _Look, looks: list[_Look]) -> str:
    """A row beside the unquantised one of its device: more kernels to read fewer bytes."""
    def same(one: _Look) -> tuple:
        row = one.cell.row
        return one.cell.title, one.cell.workload, row.engine, row.vram_peak_bytes is None

    base = next((one for key in BASELINES for one in looks if one.cell.row.setting == key and same(one) == same(look)
                 and one.floor and one.kernels is not None), look)
    if look.kernels is None or look.kernels <= base.kernels or look.floor.bytes >= base.floor.bytes:
        return ""
    units = "operators" if look.cell.row.vram_peak_bytes is None else "kernels"
    counts = f"{look.kernels:.0f} against {base.kernels:.0f}"
    sizes = f"{look.floor.bytes / 1e6:.0f} against {base.floor.bytes / 1e6:.0f} MB"
    said = f"It launches more {units} than {base.cell.setting} ({counts}) to read less ({sizes})"
    return said + (": quantising cannot help until overhead goes away." if look.step.kind == "overhead-bound" else ".")


def _prompt(look: _Look) -> str:
    if isinstance(look.prefill, str):
        return f"Its prefill has no verdict: {look.prefill}." if look.cell.row.trace.get("prefill") else ""
    least = 1000 * floor(look.cell.row, look.limits, "prefill").seconds
    return f"Its prefill ({1000 * look.cell.row.ttft_s:.2f} ms, at least {least:.2f} ms) is {look.prefill.kind}."


def why_table(run: Iterable[Measurement], limits: Limits | None = None) -> pd.DataFrame:
    """One row per measured cell: its decode step, the floor, MBU (model bandwidth utilisation), where the step's time
    goes in percent, and the verdicts on step and prefill; NaN and "" where there is none."""
    looks = _looks(Run.of(run), limits)
    frame = pd.DataFrame(map(_record, looks), columns=["Setting", "Workload", *NUMBERS, "Verdict", "Prefill"],
                         index=pd.Index([look.cell.title for look in looks], name="Model", dtype=object))
    return frame.astype(dict.fromkeys(NUMBERS, float))


def _record(look: _Look) -> list:
    row, least, step, prefill = look.cell.row, look.floor, *(None if isinstance(one, str) else one
                                                             for one in (look.step, look.prefill))
    floors = [None] * 4
    if least is not None:
        floors = [least.bytes / 1e6, 1000 * least.read_s, 1000 * least.compute_s, mbu(row, look.limits)]
    shares = [100 * share for share in step.shares.values()] if step else [None] * len(SHARES)
    return [look.cell.setting, look.cell.workload, row.step_ms, *floors, look.kernels, *shares,
            step.kind if step else "", prefill.kind if prefill else ""]


def show_why(run: Iterable[Measurement], limits: Limits | None = None) -> Tables:
    """`why_table` as a notebook shows it, one per model, without columns that tell nothing here. Raises ValueError for
    a run of several machines."""
    run = Run.of(run)
    machine, frame = machine_of(run), why_table(run, limits).round(NUMBERS)
    nothing = [name for name in frame if frame[name].fillna(0).isin(["", 0]).all()]
    same = ["Workload"] if frame["Workload"].nunique() == 1 else []
    caption = [machine, *frame["Workload"].unique()[:len(same)]]
    return Tables(Table(part.drop(columns=nothing + same), [title, *caption], decimals=NUMBERS)
                  for title, part in frame.groupby(level=0, sort=False))


def plot_floor(run: Iterable[Measurement], limits: Limits | None = None) -> Figure:
    """Milliseconds of one decode step, and within it the floor: the time to read its bytes, or to compute its products,
    at this machine's measured rates. Rows without limits have none. Raises ValueError for no rows or two machines."""
    run = Run.of(run)
    named, machine = checked(run)

    def bar(cell: Cell) -> Bar:
        row, least = cell.row, floor(cell.row, limits_of(cell.row, run, limits))
        if row.step_ms is None:
            return Bar(cell, None, "no decode step")
        bottom = least and min(1000 * least.seconds, row.step_ms)
        ends = row.latency_ci and tuple(1000 * (end - row.ttft_s) / (row.new_tokens - 1) for end in row.latency_ci)
        text = f"{row.step_ms:.2f}" + (f" (floor {bottom:.2f})" if least else "")
        return Bar(cell, row.step_ms, text, ends, bottom)

    return draw("One decode step, lower is faster (its floor is darker)", machine, facets(named, bar),
                FIGURES["step_ms"], note=not_here(named))
