"""Measurements as a DataFrame, and as tables for a notebook, a terminal and the README."""

from __future__ import annotations

import math
from collections.abc import Iterable

import pandas as pd

from quantbench.grid import EMPTY, Grid, Grids
from quantbench.record import FIGURES, Measurement
from quantbench.view import Cell, cells, plain

# figure -> decimals where it is shown; the order is that of the columns
_DECIMALS = {"latency_s": 3, "tokens_per_s": 1, "vram_gb": 3, "ttft_s": 3, "weights_gb": 3, "ram_peak_gb": 3,
             "energy_per_token_j": 2}
_LABEL = {name: FIGURES[name].label for name in [*_DECIMALS, "tokens_per_s_ci"]}
_SHOWN_AS = {_LABEL[name]: decimals for name, decimals in _DECIMALS.items()}
LENGTH = "Max New Tokens"
PUBLISHED_COLUMNS = ("Setting", LENGTH, _LABEL["latency_s"], _LABEL["tokens_per_s"], _LABEL["vram_gb"])
COLUMNS = (*PUBLISHED_COLUMNS, _LABEL["tokens_per_s_ci"], _LABEL["ttft_s"], _LABEL["weights_gb"],
           _LABEL["ram_peak_gb"], _LABEL["energy_per_token_j"], "Audit", "Status", "Note")


def table(run: Iterable[Measurement]) -> pd.DataFrame:
    """One row per measurement, the published columns first; numbers stay numbers, NaN where there is none.

    Sorted by model as they first came, then by setting, then by length. A cell that could not run keeps its row.
    Rows of several machines get a column "Machine".
    """
    return _frame(cells(run))


def show(run: Iterable[Measurement]) -> Grids:
    """The table as a notebook or a terminal shows it: one per model (and machine), without empty columns."""
    named = cells(run)
    frame = _frame(named)
    keep = [name for name in COLUMNS if name in PUBLISHED_COLUMNS or not _is_empty(frame[name])]
    groups: dict[tuple, list[int]] = {}
    for place, cell in enumerate(named):
        groups.setdefault((cell.model, cell.row.machine_name), []).append(place)
    grids = []
    for (model, machine), places in groups.items():
        faint = frozenset(at for at, place in enumerate(places) if named[place].row.status != "ok")
        caption = [model, *_weights([named[place] for place in places]), plain(machine)]
        grids.append(grid(frame.iloc[places][keep], [part for part in caption if part], faint))
    return Grids(grids)


def markdown(run: Iterable[Measurement]) -> str:
    """The same tables as GitHub Markdown, with everything from the data escaped."""
    return show(run).markdown()


def machine_table(facts: dict, versions: dict | None = None) -> Grids:
    """What `machine.facts()` and `machine.versions()` say, in words."""
    capability = ".".join(map(str, facts.get("gpu_capability") or ()))
    several = f" × {facts['gpu_count']}" if (facts.get("gpu_count") or 1) > 1 else ""
    words = {
        "CPU": facts.get("cpu"),
        "CPU cores": facts.get("cores"),
        "PyTorch threads": facts.get("torch_threads"),
        "RAM": _gigabytes(facts.get("ram_bytes")),
        "System": facts.get("os"),
        "GPU": f"{facts['gpu']}{several}" if facts.get("gpu") else "none that this PyTorch can use",
        "GPU memory": _gigabytes(facts.get("gpu_bytes")),
        "Compute capability": capability,
        "Driver": facts.get("driver"),
        "CUDA": facts.get("cuda"),
    }
    rows = [(name, plain(value)) for name, value in {**words, **(versions or {})}.items() if value not in (None, "")]
    return Grids([Grid(["This machine"], ["", "is"], [(plain(name), value) for name, value in rows])])


def grid(frame: pd.DataFrame, caption: list[str], faint: frozenset[int] = frozenset(), note: str = "",
         decimals: dict[str, int] = _SHOWN_AS) -> Grid:
    """A frame as text: numbers with the `decimals` of their column, NaN as a dash, numbers set to the right."""
    numbers = frozenset(name for name in frame.columns if pd.api.types.is_numeric_dtype(frame[name]))
    rows = [[_text(value, decimals.get(name, 0)) for name, value in zip(frame.columns, row)]
            for row in frame.itertuples(index=False)]
    return Grid(caption, list(frame.columns), rows, numbers | {_LABEL["tokens_per_s_ci"]}, faint, note)


def _frame(named: list[Cell]) -> pd.DataFrame:
    machines = {cell.row.machine_name for cell in named}
    columns = [*COLUMNS, "Machine"] if len(machines) > 1 else list(COLUMNS)
    frame = pd.DataFrame([_record(cell) for cell in named], columns=columns,
                         index=pd.Index([cell.model for cell in named], name="Model", dtype=object))
    return frame.astype({LENGTH: int} | {name: float for name in _SHOWN_AS})


def _record(cell: Cell) -> dict:
    row = cell.row
    low, high = row.tokens_per_s_ci or (None, None)
    notes = ["noisy"] * row.noisy + [cell.workload.partition(", ")[2]]
    return {
        "Setting": cell.setting,
        LENGTH: row.max_new_tokens,
        **{_LABEL[name]: getattr(row, name) for name in _DECIMALS},
        _LABEL["tokens_per_s_ci"]: EMPTY if low is None else f"{low:.1f}–{high:.1f}",
        "Audit": _audit(row.audit),
        "Status": cell.outcome,
        "Note": ", ".join(filter(None, notes)),
        "Machine": plain(row.machine_name),
    }


def _audit(found: dict | None) -> str:
    """ "24 × Linear4bit", with what was left unquantised if anything; a dash where nothing is quantised."""
    count = (found or {}).get("quantised")
    if not count:
        return EMPTY
    left = found.get("left")
    left = ", ".join(f"{number} {kind}" for kind, number in left.items()) if isinstance(left, dict) else ""
    return plain(f"{count} × {found.get('class') or 'modules'}" + (f" (left: {left})" if left else ""))


def _weights(named: list[Cell]) -> list[str]:
    kinds = dict.fromkeys(cell.row.weights for cell in named if cell.row.weights)
    if "random" in kinds:
        return ["speed and memory are real, text is not"]
    return [f"{' and '.join(kinds)} weights"] if kinds else []


def _text(value: object, decimals: int) -> str:
    if isinstance(value, str):
        return value
    return EMPTY if value is None or math.isnan(value) else f"{value:.{decimals}f}"


def _is_empty(column: pd.Series) -> bool:
    return all(value in ("", EMPTY) if isinstance(value, str) else pd.isna(value) for value in column)


def _gigabytes(count: int | None) -> str | None:
    return None if count is None else f"{count / 1e9:.1f} GB"
