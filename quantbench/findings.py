"""What a run's numbers say, in sentences computed from them."""

from __future__ import annotations

from collections.abc import Iterable

from quantbench.grid import markdown_text
from quantbench.record import Measurement
from quantbench.settings import SETTINGS
from quantbench.stats import Interval, overlap, ratio_ci
from quantbench.view import Cell, cells, machine_of, plain, workloads

BASELINES = ("gpu-fp16", "cpu-fp32")  # ratios are to the first that was measured
_NOTHING = "nothing measured yet"


class Findings(list[str]):
    """Sentences; a notebook shows them as bullets, with everything from the data escaped."""

    def _repr_markdown_(self) -> str:
        return "\n".join(f"- {_bold_start(sentence)}" for sentence in self)

    def __repr__(self) -> str:
        return "\n".join(f"- {sentence}" for sentence in self)


def findings(run: Iterable[Measurement]) -> Findings:
    """Per model: the fastest setting and every other's ratio of tokens/sec to GPU FP16 (to CPU FP32 where there is
    none), the smallest one; then what is noisy, what was not measured and why, and whose weights are random.

    Two settings are a tie where the 95% intervals of their tokens/sec overlap. Raises ValueError for a run of
    several machines.
    """
    rows = list(run)
    machine_of(rows)
    named = cells(rows)
    if not any(cell.measured for cell in named):
        return Findings([_NOTHING, *_not_measured(named)])
    said = []
    for model in dict.fromkeys(cell.model for cell in named):
        mine = [cell for cell in named if cell.model == model and cell.measured]
        for workload in workloads(mine):
            said.append(f"{model}, {workload}: " + _speed([cell for cell in mine if cell.workload == workload]))
        said += [f"{model}: {text}" for text in (_smallest_weights(mine), _smallest_vram(mine)) if text]
    if any("tie" in sentence for sentence in said):
        said.append("A tie: the 95% intervals overlap, so this run does not tell the settings apart.")
    return Findings(said + _noisy(named) + _disturbed(named) + _not_measured(named) + _random(named))


# ---- speed: one model, one workload ----

def _speed(group: list[Cell]) -> str:
    return ". ".join(filter(None, [_fastest(group), _ratios(group)])) + "."


def _fastest(group: list[Cell]) -> str:
    best = max(group, key=lambda cell: cell.row.tokens_per_s)
    if len(group) == 1:
        return f"only {_rated(best)} was measured"
    if best.row.tokens_per_s_ci is None:
        return f"{_rated(best)} had the highest rate, but a single sample has no interval to rank it by"
    tied = [cell for cell in group if cell is not best and _tie(cell, best)]
    if tied:
        return f"a tie for the fastest between {_listed([_rated(cell) for cell in [best, *tied]])}"
    return f"{_rated(best)} is the fastest"


def _ratios(group: list[Cell]) -> str:
    """Each setting's tokens/sec over the baseline's, with the interval of that ratio."""
    base = next((cell for key in BASELINES for engine in (True, False) for cell in reversed(group)
                 if cell.row.setting == key and (cell.row.engine == "eager") is engine), None)
    if base is None:
        labels = " nor ".join(SETTINGS[key].label for key in BASELINES)
        return f"No ratios: neither {labels} was measured"
    others = [cell for cell in group if cell is not base]
    if not others:
        return ""
    instead = "" if base.row.setting == BASELINES[0] else f" (no {SETTINGS[BASELINES[0]].label} row to compare with)"
    return f"Tokens/sec against {base.setting}{instead}: " + ", ".join(_ratio(cell, base) for cell in others)


def _ratio(cell: Cell, base: Cell) -> str:
    scale = cell.row.new_tokens / base.row.new_tokens
    interval = ratio_ci(base.row.latencies_s, cell.row.latencies_s)  # a rate's ratio is the latencies' turned over
    ratio = cell.row.tokens_per_s / base.row.tokens_per_s
    if interval is None:
        return f"{cell.setting} {ratio:.2f}× (no interval from a single sample)"
    tie = ", tie" if _tie(cell, base) else ""
    return f"{cell.setting} {ratio:.2f}× ({_span((interval[0] * scale, interval[1] * scale), 2)}{tie})"


def _tie(cell: Cell, other: Cell) -> bool:
    return overlap(cell.row.tokens_per_s_ci, other.row.tokens_per_s_ci)


def _rated(cell: Cell) -> str:
    interval = cell.row.tokens_per_s_ci
    span = f" ({_span(interval, 1)})" if interval else ""
    return f"{cell.setting} at {cell.row.tokens_per_s:.1f} tokens/sec{span}"


# ---- size: one model ----

def _smallest_weights(mine: list[Cell]) -> str:
    sizes = {cell.setting.removesuffix(f" · {cell.row.engine}"): cell.row.weights_gb for cell in mine if cell.row.weights_gb is not None}
    return f"smallest weights {_least(sizes)}." if len(sizes) > 1 else ""


def _smallest_vram(mine: list[Cell]) -> str:
    said = []
    for workload in workloads(mine):
        peaks = {cell.setting: cell.row.vram_gb for cell in mine
                 if cell.workload == workload and cell.row.vram_gb is not None}
        said += [f"{_least(peaks)} at {workload}"] if len(peaks) > 1 else []
    return f"smallest peak VRAM {'; '.join(said)}." if said else ""


def _least(sizes: dict[str, float]) -> str:
    """The settings with the least, and what the most is: "GPU INT4, 0.103 GB (CPU FP32, the largest: 0.328 GB)"."""
    least, most = min(sizes.values()), max(sizes, key=sizes.__getitem__)
    names = _listed([setting for setting, size in sizes.items() if size == least])
    against = f" ({most}, the largest: {sizes[most]:.3f} GB)" if sizes[most] > least else ""
    return f"{names}, {least:.3f} GB{against}"


# ---- the whole run ----

def _noisy(named: list[Cell]) -> list[str]:
    rows = [f"{cell.model} {cell.setting} at {cell.workload}" for cell in named if cell.measured and cell.row.noisy]
    return [f"Noisy, with an interval wider than ±10%: {'; '.join(rows)}. Measure these again."] if rows else []


def _disturbed(named: list[Cell]) -> list[str]:
    """Who else used the device before a row's timed region, and what slowed the GPU after it."""
    rows = []
    for cell in named:
        throttled = ((cell.row.conditions or {}).get("after") or {}).get("throttled") or []
        told = [cell.row.busy] * bool(cell.row.busy) + [f"GPU held back by its {plain(why)}" for why in throttled]
        rows += [f"{cell.model} {cell.setting} at {cell.workload} ({', '.join(told)})"] if told and cell.measured else []
    return [f"Measured while the machine was disturbed: {'; '.join(rows)}."] if rows else []


def _not_measured(named: list[Cell]) -> list[str]:
    """One sentence per reason: the settings, and for which models and lengths unless for all of the run's."""
    by_reason: dict[str, dict[str, list[Cell]]] = {}
    for cell in named:
        if not cell.measured:
            outcome = cell.outcome if cell.row.status != "ok" else "no samples"
            by_reason.setdefault(outcome, {}).setdefault(cell.setting, []).append(cell)
    asked = {setting: sum(cell.setting == setting for cell in named) for setting in (cell.setting for cell in named)}
    return [f"Not measured, {reason}: " + _listed([
        setting if len(failed) == asked[setting] else
        f"{setting} ({'; '.join(f'{cell.model} at {cell.workload}' for cell in failed)})"
        for setting, failed in settings.items()]) + "." for reason, settings in by_reason.items()]


def _random(named: list[Cell]) -> list[str]:
    models = dict.fromkeys(cell.model for cell in named if cell.measured and cell.row.weights == "random")
    return [f"Speed and memory are real, text is not: {_listed(list(models))}."] if models else []


def _listed(texts: list[str]) -> str:
    return texts[0] if len(texts) == 1 else f"{', '.join(texts[:-1])} and {texts[-1]}"


def _span(interval: Interval, decimals: int) -> str:
    return f"{interval[0]:.{decimals}f}–{interval[1]:.{decimals}f}"


def _bold_start(sentence: str) -> str:
    start, colon, rest = sentence.partition(": ")
    return f"**{markdown_text(start)}:** {markdown_text(rest)}" if colon else markdown_text(sentence)
