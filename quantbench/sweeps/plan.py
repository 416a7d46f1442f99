"""What a sweep is asked for, as cells that are checked before anything is loaded."""

import dataclasses
from functools import cached_property
from itertools import groupby

from quantbench import machine
from quantbench.decode import find_engine
from quantbench.intervals import LEAST
from quantbench.labels import cells
from quantbench.quantisers import find_quantiser, why_not
from quantbench.records import Measurement
from quantbench.settings import BASELINES, FILES_OWN, SETTINGS, Setting, Workload, find_setting, many, on_gpus, whole
from quantbench.tokens import OverLength, check_context
from quantbench.weights import Source, check_name, find


@dataclasses.dataclass(frozen=True, eq=False)  # told apart by identity: a source holds a configuration
class Cell:
    """Model x setting x engine x workload, and why it cannot run on this machine, if so."""

    model: str
    setting: Setting
    engine: str
    workload: Workload
    source: Source | None
    unavailable: str | None = None
    planned_on: dict = dataclasses.field(default_factory=machine.facts)  # and to be measured there
    versions: dict = dataclasses.field(default_factory=machine.versions)

    def row(self, status: str, reason: str | None) -> Measurement:
        """The measurement of a cell that gave no samples."""
        return Measurement(
            **self.workload.asked(self.model, self.setting, self.engine), status=status, reason=reason,
            revision=self.source and self.source.revision, weights=self.source and self.source.weights,
            machine=self.planned_on, versions=self.versions)

    @cached_property
    def key(self) -> tuple:
        return self.row("failed", None).key

    @property
    def seat(self) -> tuple[str, int, str]:
        """A model's cells that share it are measured in the same process, one workload after the other."""
        return self.setting.key, self.setting.gpus, self.engine

    @property
    def title(self) -> str:
        named, = cells([self.row("failed", None)])
        return f"{self.model} · {named.setting} · {named.workload}"


def plan(models: object, settings: object, engines: object, workloads: list[Workload],
         weights: str | None, gpus: object = 1) -> list[Cell]:
    """Every cell once, in groups of one model and workload: what is compared stands together. Raises ValueError for a
    mistake in an argument, before anything is loaded."""
    names, facts = dict.fromkeys(check_name(one, weights) for one in many("models", models)), machine.facts()
    if isinstance(settings, str) and settings == "all":
        settings = [key for key, row in SETTINGS.items() if not (row.quantisation in FILES_OWN or why_not(row, facts))]
    asked = [find_setting(key) for key in many("settings", settings)]
    numbers = [one if one == "all" else whole("gpus", one) for one in many("gpus", gpus)]
    rows = [on_gpus(row, number, facts) for row in asked
            for number in (numbers if row.device == "cuda" and not row.offload else [1])]
    reasons, cells = {row: why_not(row, facts) for row in rows}, []
    engines = {one: find_engine(one) for one in many("engines", engines)}
    for name in names:
        source = None if all(reasons.values()) else find(name, weights)
        for workload in dict.fromkeys(workloads):
            try:
                source and check_context(source, workload)
            except OverLength:
                raise
            except Exception:  # a broken tokenizer.json may raise anything: the load of each cell will say so
                pass
            cells += [Cell(name, row, engine, workload, None if reason else source, reason)
                      for row, reason in reasons.items() for engine in engines]
    return cells


def missing(cells: list[Cell], known: dict[tuple, Measurement], retry: bool, trace: bool) -> list[Cell]:
    """The cells that are not in a run's rows yet, with as many rounds as one of those that are compared still lacks.
    Where one is new and the run holds its baseline, that takes part: without shared rounds there is no ratio."""
    todo, good = [], {key for key, row in known.items() if row.status == "ok" and row.rounds}
    for _, group in groupby(cells, key=lambda cell: (cell.model, cell.workload)):
        lacking = {cell.key: (cell, rounds) for cell in group if (rounds := _lacks(cell, known, retry, trace))}
        new = [cell for key, (cell, _) in lacking.items() if not cell.unavailable and key not in good]
        bases = [dataclasses.replace(new[0], setting=SETTINGS[key], engine="eager") for key in BASELINES] if new else []
        base = next((one for one in bases if one.key in {*lacking, *good}), None)
        if base is not None:
            lacking.setdefault(base.key, (base, 0))
        most = max((rounds for _, rounds in lacking.values()), default=0)
        for cell, _ in lacking.values():
            workload = dataclasses.replace(cell.workload, repeats=cell.workload.repeats and most)
            todo.append(dataclasses.replace(cell, workload=workload))
    return todo


def _lacks(cell: Cell, known: dict[tuple, Measurement], retry: bool, trace: bool) -> int:
    """How many rounds a cell lacks; one where it is only a trace."""
    row, rounds = known.get(cell.key), cell.workload.repeats or LEAST
    if row is None or row.status != "ok":
        return rounds if row is None or retry else 0
    untraced = trace and row.trace is None and find_quantiser(cell.setting.quantisation).by_torch
    return max(rounds - len(row.rounds), int(untraced))
