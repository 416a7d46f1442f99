"""Measurements as bars: one facet per model and workload, one colour per setting, an interval on every bar."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from quantbench.bars import GREY, Bar, Colour, Panel, figure, white
from quantbench.record import FIGURES, Measurement
from quantbench.settings import SETTINGS, Setting
from quantbench.view import Cell, cells, machine_of, workloads

# One hue per width of the weights, told apart by colour-blind readers too, and a shade per setting within it.
_HUES = {
    "fp32": ("#0072B2", "#56B4E9", "#9CC9E8"),
    "16": ("#009E73", "#66C2A5", "#2F7D6B"),
    "int8": ("#D55E00", "#F0A04B", "#A65628", "#E6B422"),
    "int4": ("#8E4585", "#C77CB5", "#5B3F8C", "#9A86C9"),
}
_OTHER = "#8A8A8A"
_INTERVALS = {"tokens_per_s": "tokens_per_s_ci", "latency_s": "latency_ci"}


def plot_throughput(run: Iterable[Measurement]) -> Figure:
    """Tokens per second of every setting, per model and length. Raises ValueError for no rows or two machines."""
    return _by_workload(run, "tokens_per_s", "Tokens per second, higher is faster", ".1f")


def plot_latency(run: Iterable[Measurement]) -> Figure:
    """Seconds of a whole generate, per model and length. Raises ValueError for no rows or two machines."""
    return _by_workload(run, "latency_s", "Latency, lower is faster", ".3f")


def plot_lengths(run: Iterable[Measurement]) -> Figure:
    """Tokens per second at each length side by side, per model. Raises ValueError for no rows or two machines."""
    named, machine = _checked(run)
    lengths = workloads(named)
    tints = [0.55 * (len(lengths) - 1 - place) / max(len(lengths) - 1, 1) for place in range(len(lengths))]
    panels = []
    for model, mine in _grouped(named, "model"):
        groups = []
        for setting, rows in _grouped(mine, "setting"):
            at = {cell.workload: cell for cell in rows}
            bars = [_bar(at.get(length) or rows[0], "tokens_per_s", ".1f", tint, length not in at)
                    for length, tint in zip(lengths, tints)]
            failed = {bar.text for bar in bars if bar.value is None}
            same = len(failed) == 1 and all(bar.value is None for bar in bars)
            groups.append((setting, bars[:1] if same else bars))
        panels.append(Panel(model, model, groups))
    legend = [Patch(color=white(GREY, tint), label=length) for length, tint in zip(lengths, tints)]
    return figure("Tokens per second by number of new tokens", machine, panels, FIGURES["tokens_per_s"].label, legend)


def plot_vram(run: Iterable[Measurement]) -> Figure:
    """Peak VRAM of every setting with its weights inside it, per model and length; the weights alone where the run
    has no VRAM figures. Memory is read, not sampled: no interval. Raises ValueError for no rows or two machines."""
    named, machine = _checked(run)
    if any(cell.row.vram_gb is not None for cell in named):
        return figure("Peak VRAM while generating (the weights within it darker)", machine,
                      _facets(named, _vram_bar), FIGURES["vram_gb"].label)
    panels = [Panel(model, model, [(setting, [_weights_bar(rows)]) for setting, rows in _grouped(mine, "setting")])
              for model, mine in _grouped(named, "model")]
    return figure("Size of the weights (no VRAM figures in this run)", machine, panels, FIGURES["weights_gb"].label)


def plot_floor(run: Iterable[Measurement]) -> Figure:
    """Milliseconds of one decode step, and within it the floor: the time to read its bytes, or to compute its
    products, at this machine's measured rates. Rows without `limits` have none. Raises ValueError for no rows or two
    machines."""
    named, machine = _checked(run)
    return figure("One decode step, lower is faster (its floor is darker)", machine,
                  _facets(named, _floor_bar), FIGURES["step_ms"].label)


def _by_workload(run: Iterable[Measurement], name: str, title: str, digits: str) -> Figure:
    named, machine = _checked(run)
    return figure(title, machine, _facets(named, lambda cell: _bar(cell, name, digits)), FIGURES[name].label)


def _checked(run: Iterable[Measurement]) -> tuple[list[Cell], str]:
    rows = list(run)
    if not rows:
        raise ValueError("no measurements to draw: measure at least one setting first")
    return cells(rows), machine_of(rows)


def _grouped(named: Iterable[Cell], name: str) -> list[tuple[str, list[Cell]]]:
    groups: dict[str, list[Cell]] = {}
    for cell in named:
        groups.setdefault(getattr(cell, name), []).append(cell)
    return list(groups.items())


def _facets(named: list[Cell], bar: Callable[[Cell], Bar]) -> list[Panel]:
    """A panel per model and workload, each with all of the model's settings so that they line up."""
    panels = []
    for model, mine in _grouped(named, "model"):
        first = {setting: rows[0] for setting, rows in _grouped(mine, "setting")}
        for workload in workloads(mine):
            here = {cell.setting: bar(cell) for cell in mine if cell.workload == workload}
            panels.append(Panel(model, f"{model} · {workload}", [
                (setting, [here.get(setting) or _absent(cell)]) for setting, cell in first.items()]))
    return panels


# ---- one measurement -> one bar ----

def _bar(cell: Cell, name: str, digits: str, tint: float = 0.0, absent: bool = False) -> Bar:
    if absent or not cell.measured:
        return _absent(cell) if absent else _failed(cell)
    value = getattr(cell.row, name)
    text = f"{value:{digits}}" + (" noisy" if cell.row.noisy else "")
    return Bar(white(_colour(cell), tint), _hatch(cell), value, text, getattr(cell.row, _INTERVALS[name]))


def _vram_bar(cell: Cell) -> Bar:
    row = cell.row
    if not cell.measured:
        return _failed(cell)
    if row.vram_gb is None:
        weights = "" if row.weights_gb is None else f", weights {row.weights_gb:.3f}"
        return Bar(_colour(cell), "", None, f"on the CPU{weights}")
    text = f"{row.vram_gb:.3f}" + ("" if row.weights_gb is None else f" (weights {row.weights_gb:.3f})")
    return Bar(_colour(cell), _hatch(cell), row.vram_gb, text, inside=row.weights_gb)


def _floor_bar(cell: Cell) -> Bar:
    row = cell.row
    if not cell.measured or row.step_ms is None:
        return _failed(cell)
    steps = row.new_tokens - 1
    interval = row.latency_ci and tuple(1000 * (end - row.ttft_s) / steps for end in row.latency_ci)
    floor = None if row.read_ms is None else min(max(row.read_ms, row.compute_ms or 0), row.step_ms)
    text = f"{row.step_ms:.2f}" + ("" if floor is None else f" (floor {floor:.2f})")
    return Bar(_colour(cell), _hatch(cell), row.step_ms, text, interval, inside=floor)


def _weights_bar(rows: list[Cell]) -> Bar:
    """Weights are the same at every length: the first row that has them speaks for all."""
    cell = next((cell for cell in rows if cell.row.weights_gb is not None), rows[0])
    if cell.row.weights_gb is None:
        return _failed(cell)
    return Bar(_colour(cell), _hatch(cell), cell.row.weights_gb, f"{cell.row.weights_gb:.3f}")


def _failed(cell: Cell) -> Bar:
    return Bar(_colour(cell), "", None, cell.status)


def _absent(cell: Cell) -> Bar:
    return Bar(_colour(cell), "", None, "not measured")


def _family(setting: Setting) -> str:
    if "int8" in setting.quantisation:
        return "int8"
    if setting.quantisation != "none":
        return "int4"
    return "fp32" if setting.dtype == "float32" else "16"


def _colours() -> dict[str, str]:
    """Setting -> colour, over all of SETTINGS, so that it is the same whatever a run holds."""
    members: dict[str, list[str]] = {}
    for key, setting in SETTINGS.items():
        members.setdefault(_family(setting), []).append(key)
    return {key: _HUES[family][place % len(_HUES[family])]
            for family, keys in members.items() for place, key in enumerate(keys)}


COLOURS = _colours()


def _colour(cell: Cell) -> Colour:
    return to_rgb(COLOURS.get(cell.row.setting, _OTHER))


def _hatch(cell: Cell) -> str:
    setting = SETTINGS.get(cell.row.setting)
    return "////" if setting is not None and setting.device == "cpu" else ""
