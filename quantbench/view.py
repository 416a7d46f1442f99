"""What tables, charts and findings share: the order of rows, and how models, settings and workloads are named."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from quantbench.models import MODELS
from quantbench.record import Measurement
from quantbench.settings import SETTINGS

_ORDER = {key: place for place, key in enumerate(SETTINGS)}


@dataclass(frozen=True)
class Cell:
    """A measurement and its names: the model's with "(random weights)" where they are, the setting's with what
    tells two rows of the same setting apart, and the workload's ("128 tokens")."""

    row: Measurement
    model: str
    setting: str
    workload: str

    @property
    def measured(self) -> bool:
        return self.row.status == "ok" and self.row.tokens_per_s is not None

    @property
    def status(self) -> str:
        """ "ok", "unavailable", "out of memory", ..."""
        return self.row.status.replace("_", " ")

    @property
    def outcome(self) -> str:
        """The status, with its reason: "unavailable: no NVIDIA GPU"."""
        return plain(f"{self.status}: {self.row.reason}") if self.row.reason else self.status


def cells(run: Iterable[Measurement]) -> list[Cell]:
    """The rows of a run, named and in order: by model as they first came, by SETTINGS, by length."""
    rows = list(run)
    random = _only_random(rows)
    prompts = len({row.prompt for row in rows}) > 1
    named = [Cell(row, _model(row, row.model in random), _setting(row), _workload(row, prompts)) for row in rows]
    twins = Counter((cell.model, cell.setting, cell.workload, cell.row.machine_name) for cell in named)
    named = [cell if twins[cell.model, cell.setting, cell.workload, cell.row.machine_name] == 1
             else _told_apart(cell, named) for cell in named]
    models = list(dict.fromkeys(cell.model for cell in named))
    return sorted(named, key=lambda cell: (models.index(cell.model), _ORDER.get(cell.row.setting, len(_ORDER)),
                                           cell.setting, cell.row.max_new_tokens, cell.row.batch_size))


def machine_of(run: Iterable[Measurement]) -> str:
    """The name of the one machine that all rows come from; raises ValueError naming them if there are several."""
    names = list(dict.fromkeys(plain(row.machine_name) or "a machine without a name" for row in run))
    if len(names) > 1:
        raise ValueError(f"rows of {len(names)} machines are never compared: {'; '.join(names)}. "
                         "Take one machine's: Run(row for row in run if row.machine_name == ...)")
    return names[0] if names else ""


def plain(text: object) -> str:
    """Text from a model id or a results file on one line, without characters that steer a terminal."""
    return " ".join("".join(char if char.isprintable() else " " for char in str(text)).split())


def workloads(named: Iterable[Cell]) -> list[str]:
    """The workloads' names, shortest first."""
    return list(dict.fromkeys(cell.workload for cell in sorted(
        named, key=lambda cell: (cell.row.max_new_tokens, cell.row.batch_size))))


def _only_random(rows: list[Measurement]) -> set[str]:
    """Models that never had other weights here: their rows that could not be loaded (no weights) belong to them."""
    found: dict[str, set] = {}
    for row in rows:
        found.setdefault(row.model, set()).add(row.weights)
    return {model for model, weights in found.items() if weights - {None} == {"random"}}


def _model(row: Measurement, only_random: bool) -> str:
    label = MODELS[row.model].label if row.model in MODELS else plain(row.model)
    return f"{label} (random weights)" if row.weights == "random" or only_random else label


def _setting(row: Measurement) -> str:
    return plain(row.setting_label) + ("" if row.engine == "eager" else f" · {plain(row.engine)}")


def _workload(row: Measurement, prompts: bool) -> str:
    name = f"{row.max_new_tokens} tokens" + (f", batch {row.batch_size}" if row.batch_size != 1 else "")
    prompt = plain(row.prompt)
    return name + (f", “{prompt[:20]}{'…' if prompt[20:] else ''}”" if prompts else "")


def _told_apart(cell: Cell, named: list[Cell]) -> Cell:
    """The cell with the revision or versions in which its twins differ in its setting's name."""
    def facts(row: Measurement) -> dict:
        return {"revision": row.revision, **row.versions}

    twins = [facts(other.row) for other in named
             if (other.model, other.setting, other.workload) == (cell.model, cell.setting, cell.workload)]
    differ = [f"{name} {value}" for name, value in facts(cell.row).items()
              if value is not None and any(twin.get(name) != value for twin in twins)]
    return Cell(cell.row, cell.model, " · ".join([cell.setting, *map(plain, differ)]), cell.workload)
