"""Which setting to take: what each keeps of the reference, beside what it saves and costs."""

from collections.abc import Iterable
from statistics import multimode
from typing import NamedTuple, Self

from quantbench.conclusions import Findings
from quantbench.evaluation.scores import Quality
from quantbench.intervals import Ratio, ratio_of_rounds
from quantbench.labels import Cell, cells, machine_of
from quantbench.results import Run
from quantbench.settings import MODELS, SETTINGS
from quantbench.wording import cut, plain

WORTH = 0.05  # share of the baseline's memory that is worth saving
MEMORY = {"vram_gb": "VRAM", "weights_gb": "weights"}


class Scored(NamedTuple):
    """A quality with its names, and its setting's row at the workload that most of its group have, where it has one."""

    found: Quality
    model: str
    setting: str
    device: str | None
    quantised: bool
    is_reference: bool
    cell: Cell | None

    @classmethod
    def of(cls, found: Quality, cell: Cell | None = None) -> Self:
        row, model = SETTINGS[found.setting] if found.setting in SETTINGS else None, MODELS.get(found.model)
        own = found.cache == "default"
        return cls(found, plain(model.label if model else found.model), plain(found.setting_label), row and row.device,
                   row is None or row.quantised or not own, own and found.setting == found.reference, cell)


def groups(run: Iterable) -> list[list[Scored]]:
    """What can be compared, in the order of SETTINGS: one model, machine, versions, text, windows and reference."""
    run, together, joined = Run.of(run), {}, []
    for one in sorted(run.qualities, key=lambda one: [*SETTINGS, one.setting].index(one.setting)):
        if one.status == "ok" and one.perplexity is not None:
            together.setdefault((*one.key[:3], *one.key[4:6], *one.key[7:], one.text), []).append(one)
    for group in together.values():
        subjects = [one.subject for one in group]
        works = {cell: (cell.row.engine == "eager", -cell.row.gpus, *cell.row.work[:1:-1], cell.row.prompt,
                        cell.row.engine) for cell in cells(run) if cell.measured and cell.row.subject in subjects}
        shared = max(multimode(works.values()), default=None)  # of several: eager, on the fewest GPUs, the longest
        at = {(cell.row.subject, cell.row.cache): cell for cell, work in works.items() if work == shared}
        joined.append([Scored.of(one, at.get((one.subject, one.cache))) for one in group])
    return joined


def on_what(group: list[Scored]) -> str:
    """ "quantbench-eval against CPU FP32: 2978 tokens, context 512, stride 256; speed at 128 tokens (eager)"."""
    one, speed = group[0].found, {f"; speed at {it.cell.workload} ({it.cell.row.engine})" for it in group
                                  if it.cell and it.found.cache == "default"}
    base = SETTINGS[one.reference].label if one.reference in SETTINGS else one.reference
    return plain(f"{one.text}{f' against {base}' if base else ''}: {one.tokens} tokens, context {one.context}, "
                 f"stride {one.stride}{''.join(speed)}")


def quality_findings(run: Iterable) -> Findings:
    """Per model what was read, and what its settings are held against: the unquantised one of the same device with the
    least KL. Then a line for each: whether to take it, and in brackets how close it stays, what it saves and costs. It
    is beaten only by another of its device, never by the reference. Raises ValueError for a run of several machines."""
    run, said = Run.of(run), []
    machine_of([*run, *run.qualities])
    for group in groups(run):
        said.append(f"{group[0].model}: every setting read {on_what(group)}.")
        paired = [one for one in group if one.found.kl_mean is not None]
        said += [f"{one.model}, {one.setting}: {_verdict(one, paired)}." for one in paired if not one.is_reference]
    read = {(one.model, one.setting, one.machine_name, one.cache, what): one.created_at for one in run.qualities
            if one.status == "ok" for what in (one.key[7:], (None,) * 5)}  # these windows; and that it loads at all
    failed = [Scored.of(one) for one in run.qualities if one.status != "ok" and one.created_at > read.get(
        (one.model, one.setting, one.machine_name, one.cache, one.key[7:]), "")]
    said += [f"{one.model}, {one.setting}: {cut(f'{one.found.status}: {one.found.reason}', 160)}." for one in failed]
    return Findings(said or ["no quality measured yet"])


def _verdict(one: Scored, group: list[Scored]) -> str:
    """Whether to take a setting, in words, and in brackets why."""
    mates = [mate for mate in group if mate.device == one.device and not mate.quantised]
    base = min(mates, key=lambda mate: mate.found.kl_mean, default=None)
    (saved, memory, pace), kept, agreement, cost = against(one, base), one.found.keeps_99, one.found.top1_agreement, []
    if memory:
        share = "as much" if abs(saved) < 0.005 else f"{abs(saved):.0%} {'more' if saved < 0 else 'less'}"
        cost.append(f"{share} {memory}")
    if pace.interval is not None:
        cost.append("as fast" if pace.verdict == "tie" else f"{pace.value:.2f} × the speed")
    numbers = f"KL {one.found.kl_mean:.2g}" + ("" if agreement is None else f", {agreement:.1%} the same first choice")
    if cost and one is not base:
        numbers += f"; against {base.setting} {' and '.join(cost)}"
    told = f"{'it keeps' if kept else f'{one.found.tokens:,} tokens do not tell whether it keeps'} 99% of the accuracy"
    if one is base:
        told = "what its device's others are held against"
    elif kept is False:
        told = "not for this model, as it keeps less than 99% of the accuracy"
    elif saved < WORTH and pace.verdict in ("tie", "slower"):
        told = f"nothing gained over {base.setting}"
    elif better := next((other for other in group if beats(other, one)), None):
        told = f"{better.setting} is closer, no larger and no slower"
    elif saved >= WORTH or pace.verdict == "faster":
        told = f"worth {'taking' if kept else 'trying'}: {told}"
    return f"{told} ({numbers})"


def beats(other: Scored, one: Scored) -> bool:
    """Whether `other`, of the same device, no reference, is closer in the text's windows, no larger, and not slower."""
    saved, _, pace = against(other, one)
    by_window = [{place: kl for place, kl in enumerate(it.found.kl_windows or ()) if kl > 0} for it in (other, one)]
    return (other.device == one.device and not other.is_reference and saved >= 0 and pace.verdict in ("faster", "tie")
            and ratio_of_rounds(*by_window).verdict == "slower")


def against(one: Scored, base: Scored | None) -> tuple[float, str, Ratio]:
    """The share of the base's memory that is not needed (NaN: not known), of VRAM where both have it, else of the
    weights, and which; and the speed over the base's, by the rounds that both were in."""
    rows = [it.cell.row if it and it.cell else None for it in (one, base)]
    pace = ratio_of_rounds(*(row.rate_by_round() if row else {} for row in rows))
    for name, memory in MEMORY.items():
        mine, theirs = (getattr(row, name, None) for row in rows)
        if mine and theirs:
            return 1 - mine / theirs, memory, pace
    return float("nan"), "", pace
