"""What a sweep is asked for, as cells that are checked before anything is loaded."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass

from quantbench import machine
from quantbench.decode import find_engine
from quantbench.labels import cut
from quantbench.loading import OverLength, check_context, why_not
from quantbench.records import Measurement
from quantbench.settings import Setting, Workload, find_setting
from quantbench.weights import Source, check_name, find


@dataclass(frozen=True, eq=False)  # told apart by identity: a source holds a configuration
class Cell:
    """Model x setting x engine x workload. `ended` is the status and the reason of a cell that cannot be measured."""

    model: str
    setting: Setting
    engine: str
    workload: Workload
    source: Source | None
    ended: tuple[str, str] | None = None

    def row(self, status: str, reason: str | None) -> Measurement:
        """The measurement of a cell that gave no samples."""
        return Measurement(
            model=self.model, setting=self.setting.key, engine=self.engine, status=status, reason=reason,
            revision=self.source and self.source.revision, weights=self.source and self.source.weights,
            prompt=self.workload.prompt, batch_size=self.workload.batch_size,
            max_new_tokens=self.workload.max_new_tokens, machine=machine.facts(), versions=machine.versions())

    @property
    def key(self) -> tuple:
        """Of its row."""
        return self.row("failed", None).key

    @property
    def title(self) -> str:
        batch = f", batch {self.workload.batch_size}" if self.workload.batch_size > 1 else ""
        engine = f" · {self.engine}" if self.engine != "eager" else ""
        return f"{self.model} · {self.setting.label}{engine} · {self.workload.max_new_tokens} tokens{batch}"


def plan(models: object, settings: object, engines: object, max_new_tokens: object, batch_size: object, *, prompt: str,
         repeats: int | None, budget_s: float, weights: str | None) -> list[Cell]:
    """Every cell, in groups of one model and workload: what is compared stands together.

    Raises ValueError for a mistake in an argument. What is wrong with one model alone (its files, its architecture) is
    the status of its cells.
    """
    names, engines = [os.fspath(one) for one in many(models)], many(engines)
    rows = [find_setting(one) for one in many(settings)]
    for engine in engines:
        find_engine(engine)
    workloads = [Workload(prompt, length, batch, repeats, budget_s)
                 for length in many(max_new_tokens) for batch in many(batch_size)]
    for name in names:
        check_name(name, weights)
    reasons = {row: why_not(row) for row in rows}
    cells = []
    for name in names:
        source = None if all(reasons.values()) else find(name, weights)
        wrong = None if source is None else _wrong_with(source, workloads)
        for workload in workloads:
            cells += [Cell(name, row, engine, workload, None if reasons[row] else source,
                           ("unavailable", reasons[row]) if reasons[row] else wrong)
                      for row in rows for engine in engines]
    return cells


def many(value: object) -> list:
    """One or several: a text, a path and a number are one."""
    return list(value) if isinstance(value, Iterable) and not isinstance(value, (str, os.PathLike)) else [value]


def _wrong_with(source: Source, workloads: list[Workload]) -> tuple[str, str] | None:
    """Why none of a model's cells can be measured. Raises ValueError for a workload that it has no positions for."""
    for workload in workloads:
        try:
            check_context(source, workload)
        except OverLength:
            raise
        except Exception as error:  # what a broken tokenizer.json raises may be anything
            return "failed", cut(f"{type(error).__name__}: {error}", 290)  # transformers may list all that it knows
    return None
