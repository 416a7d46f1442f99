"""Why a row is as fast as it is: where the time of a decode step goes, and the verdict on it in words."""

from collections.abc import Iterable
from typing import NamedTuple

import pandas as pd
from matplotlib.figure import Figure

from quantbench.charts import Bar, checked, draw, facets
from quantbench.conclusions import Findings
from quantbench.labels import Cell, cells, machine_of, not_here
from quantbench.records import FIGURES, Measurement
from quantbench.results import Run
from quantbench.settings import expect
from quantbench.tables import view
from quantbench.why.floors import Floor, Limits, floor, limits_of
from quantbench.wording import listed

# of a step's time: the device has no work; the floor, which no software can go under, by what it is; and above it
SHARES = {  # -> its column, and its words
    "idle": ("Waiting (%)", "Python, launches and waiting"),
    "reading": ("Reading (%)", "reading at memory's rate"),
    "computing": ("Computing (%)", "products at the measured matrix rate"),
    "quantisation": ("Quantising (%)", "quantising and dequantising"),
    "quantised": ("Quantised products (%)", "products with quantised weights above the floor"),
    "products": ("Other products (%)", "products with unquantised weights above the floor"),
    "rest": ("All else (%)", "attention, norms and other small work")}
CAUSES = {"overhead-bound": ("idle", "rest"), "bandwidth-bound": ("reading",),
          "compute-bound": ("computing", "products"), "dequantisation-bound": ("quantisation", "quantised")}
STEP = FIGURES["step_ms"]
NUMBERS = {STEP: 2, "Reads (MB)": 0, "Floor (ms)": 2, "MBU": 2, "Kernels/step": 0,
           **{column: 0 for column, _ in SHARES.values()}}  # column -> decimals
NEEDED = "it takes qb.limits() in the run and a trace (sweep's trace=True)"
IN_TURN = "its GPUs work in turn, one while the others wait"
FITS = 1.1  # a trace's work, of the time without a profiler: it stretches what it watches


class Verdict(NamedTuple):
    """What bounds a decode step, or a prefill, and the shares of its time: SHARES, which sum to 1."""

    kind: str
    shares: dict[str, float]


def verdict(row: Measurement, limits: Limits | None, part: str = "step") -> Verdict | None:
    """The verdict on a row's decode step, or on its "prefill": its measured time is divided among causes, and the one
    that takes the most names it. None without limits or a trace. Raises ValueError where the trace does not sum, or has
    more work than the row has time.

    What a product takes above the floor counts as dequantisation where its weights are quantised, as compute where they
    are not; all that is no product is overhead, as the time without work is: a faster product would not shorten it."""
    expect(limits, Limits | None, "limits must be what qb.limits returns")
    trace, least = expect(row, Measurement, "a verdict is on a row").trace or {}, floor(row, limits, part)
    seen = trace.get(part) or {}
    measured_s = row.ttft_s if part == "prefill" else row.step_ms and row.step_ms / 1000
    if least is None or not measured_s or not {"device_s", "kinds"} <= seen.keys():
        return None
    device, spent = seen["device_s"], seen["kinds"]
    if abs(sum(spent.values()) - device) > 0.02 * device:
        raise ValueError(f"the {part}'s trace does not sum to the time in which the device worked")
    if device > FITS * measured_s:
        raise ValueError(f"the trace does not fit the row, having more work than the {part} has time")
    shares = _shares(max(measured_s, device), device, spent, least)
    return Verdict(max(CAUSES, key=lambda kind: sum(shares[name] for name in CAUSES[kind])), shares)


def _shares(whole: float, device: float, spent: dict[str, float], least: Floor) -> dict[str, float]:
    """The floor is part of the products' time, of quantised and other ones alike; what it is longer than they are, it
    has of everything else (a cache is read in attention), and of quantising last."""
    quantised, products, quantisation = (spent.get(name, 0.0) for name in ("quantised", "products", "quantisation"))
    multiplying, bottom = quantised + products, min(least.seconds, device)
    rest, beyond = max(device - multiplying - quantisation, 0.0), max(bottom - multiplying, 0.0)
    above = max(1 - bottom / multiplying, 0.0) if multiplying else 0.0  # of a product's time
    seconds = {"idle": whole - device, "reading": 0.0, "computing": 0.0,
               "reading" if least.read_s == least.seconds else "computing": bottom,
               "quantisation": quantisation - max(beyond - rest, 0.0), "quantised": above * quantised,
               "products": above * products, "rest": max(rest - beyond, 0.0)}
    return {name: max(one, 0.0) / whole for name, one in seconds.items()}


def why_table(run: Iterable[Measurement]) -> pd.DataFrame:
    """One row per measured cell: its decode step and the floor, under the run's limits; MBU (model bandwidth
    utilisation: reading at the measured rate, of the step), where the step's time goes in percent, the verdicts on step
    and prefill, and why there is none. NaN and "" where it does not apply. Raises ValueError for two machines."""
    run = Run.of(run)
    rows = [_record(cell, limits_of(cell.row, run)) for cell in cells(run) if cell.measured]
    frame = pd.DataFrame(rows, columns=["Model", "Setting", "Workload", *NUMBERS, "Verdict", "Prefill", "Note"])
    return view(frame.astype(dict.fromkeys(NUMBERS, float)).set_index("Model"), [machine_of(run)], NUMBERS)


def _record(cell: Cell, limits: Limits | None) -> dict:
    row, least, errors = cell.row, floor(cell.row, limits), []
    found = dict.fromkeys(("step", "prefill"), Verdict("", {}))
    for part in found:
        try:
            found[part] = verdict(row, limits, part) or found[part]
        except ValueError as error:
            errors.append(str(error))
    step, prefill = found.values()
    record = {"Model": cell.title, "Setting": cell.setting, "Workload": cell.workload, STEP: row.step_ms,
              "Kernels/step": ((row.trace or {}).get("step") or {}).get("kernels"), "Verdict": step.kind,
              "Prefill": prefill.kind, "Note": "; ".join(errors) or (
                  IN_TURN * (row.gpus > 1) if step.kind else NEEDED if row.step_ms else "no decode step was timed")}
    if least:
        record |= {"Reads (MB)": least.bytes / 1e6, "Floor (ms)": 1000 * least.seconds,
                   "MBU": row.step_ms and 1000 * least.read_s / row.step_ms}
    return record | {SHARES[name][0]: 100 * share for name, share in step.shares.items()}


def explain(run: Iterable[Measurement]) -> Findings:
    """Per traced row the verdict (overhead-, bandwidth-, compute- or dequantisation-bound) and its evidence, under the
    limits of its machine and device in `run`; at the end, why others have none. Raises ValueError for two machines."""
    table, said = why_table(run).reset_index(), []
    for row in table[table["Verdict"] != ""].to_dict("records"):
        causes = [SHARES[share] for share in CAUSES[row["Verdict"]]]
        most = listed([f"{words} ({row[column]:.0f}%)" for column, words in causes if row[column] >= 5])
        prefill = f"; its prefill is {row['Prefill']}" * bool(row["Prefill"]) + f" ({row['Note']})" * bool(row["Note"])
        said.append(f"{row['Model']}, {row['Setting']}, {row['Workload']}: {row['Verdict']}{prefill}. A step "
                    f"({row[STEP]:.2f} ms) is above all {most}; its floor is {row['Floor (ms)']:.2f} ms "
                    f"({row['Reads (MB)']:.0f} MB are read).")
    for why, rows in table[table["Verdict"] == ""].groupby("Note"):
        said.append(f"No verdict: {listed([*rows['Model'].unique()])}, {', '.join(rows['Setting'].unique())}: {why}.")
    return Findings(said or ["nothing measured yet"])


def plot_floor(run: Iterable[Measurement]) -> Figure:
    """Milliseconds of one decode step, and within it the floor: the time to read its bytes, or to compute its products,
    at this machine's measured rates. Rows without limits have none. Raises ValueError for no rows or two machines."""
    run = Run.of(run)
    named, machine = checked(run)

    def bar(cell: Cell) -> Bar:
        row, least = cell.row, floor(cell.row, limits_of(cell.row, run))
        if row.step_ms is None:
            return Bar(cell, None, "no decode step")
        text = f"{row.step_ms:.2f}" + (f" (floor {1000 * least.seconds:.2f})" if least else "")
        ends = row.latency_ci and tuple(1000 * (end - row.ttft_s) / (row.new_tokens - 1) for end in row.latency_ci)
        return Bar(cell, row.step_ms, text, ends, least and min(1000 * least.seconds, row.step_ms))

    title = "One decode step, lower is faster (its floor is darker)"
    return draw(title, machine, facets(named, bar), STEP, note=not_here(named))
