"""Results of several machines or versions, cell by cell beside each other."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from quantbench.published import published_table
from quantbench.record import FIGURES, Measurement
from quantbench.run import Run
from quantbench.settings import SETTINGS
from quantbench.stats import Interval, ratio_ci
from quantbench.view import Cell, cells, plain

RANDOM = " (random weights)"
PUBLISHED = "Colab T4, published"
Source = str | os.PathLike | Iterable[Measurement]
_KEYS = {row.label: key for key, row in SETTINGS.items()}
_PLACES = {key: place for place, key in enumerate(SETTINGS)}


@dataclass(frozen=True)
class Key:
    """One cell wherever it ran. A model keeps its name whatever its weights: their speed is the same."""

    model: str
    setting: str
    workload: str


@dataclass(frozen=True)
class Entry:
    """What one side has for a cell: a measured row, or a published rate that has no samples."""

    setting: str
    length: int
    rate: float | None
    row: Measurement | None = None
    status: str = ""

    @property
    def interval(self) -> Interval | None:
        return self.row.tokens_per_s_ci if self.row else None

    @property
    def random(self) -> bool:
        return self.row is not None and self.row.weights == "random"


@dataclass(frozen=True)
class Side:
    """One machine under one set of versions."""

    machine: str
    versions: dict
    name: str = ""
    note: str = ""
    entries: dict[Key, Entry] = field(default_factory=dict)


def shipped() -> list[Path]:
    """The results that come with quantbench: its own measurements, then the published T4 table."""
    package = Path(__file__).parent
    installed, results = package / "reference", package.parent / "results"
    rows = sorted(installed.glob("*.jsonl")) or sorted(results.glob("published/*.jsonl"))
    return [*rows, *(installed if installed.is_dir() else results / "reference").glob("published-*.csv")]


def sides(sources: Iterable[Source], per_source: bool = False) -> list[Side]:
    """The machines of runs, of results files (.jsonl) and of the published table (.csv), in the order they come.

    A machine measured under several sets of versions has a side for each; with `per_source` also one for each source.
    Raises ValueError for no sources, OSError for a file that is not there.
    """
    sources = list(sources)
    if not sources:
        raise ValueError("nothing to compare: give runs or paths of results files")
    groups: dict[tuple, list[Measurement]] = {}
    published = []
    for place, source in enumerate(sources):
        if _is_table(source):
            published.append((len(groups), source))
            continue
        for row in Run.read(source) if isinstance(source, (str, os.PathLike)) else source:
            groups.setdefault((place * per_source, row.machine_name, row.subject[-1]), []).append(row)
    found = _measured(list(groups.values()))
    for before, path in reversed(published):
        found.insert(before, _published(path))
    return found


def keys(found: list[Side]) -> list[Key]:
    """Every cell that some side measured: by model as they came, by SETTINGS, by length."""
    first: dict[Key, Entry] = {}
    for side in found:
        for key, entry in side.entries.items():
            if entry.rate is not None:
                first.setdefault(key, entry)
    models = list(dict.fromkeys(key.model for key in first))
    return sorted(first, key=lambda key: (models.index(key.model), _PLACES.get(first[key].setting, len(_PLACES)),
                                          key.setting, first[key].length, key.workload))


def ratio(entry: Entry, base: Entry) -> tuple[float | None, Interval | None]:
    """`entry`'s tokens/sec over `base`'s, and its 95% interval where both have samples."""
    if entry.rate is None or base.rate is None:
        return None, None
    if entry.row is None or base.row is None:
        return entry.rate / base.rate, None
    scale = entry.row.new_tokens * entry.row.batch_size / (base.row.new_tokens * base.row.batch_size)
    span = ratio_ci(base.row.latencies_s, entry.row.latencies_s)  # a rate's ratio is the latencies' turned over
    return entry.rate / base.rate, span and (span[0] * scale, span[1] * scale)


def holds_one(span: Interval) -> bool:
    """Whether a ratio's interval leaves open which of the two is faster."""
    return span[0] <= 1 <= span[1]


def differences(sets: Iterable[dict]) -> list[str]:
    """The packages in which these sets of versions differ."""
    sets = list(sets)
    names = dict.fromkeys(name for versions in sets for name in versions)
    return [name for name in names if len({str(versions.get(name)) for versions in sets}) > 1]


def _is_table(source: Source) -> bool:
    return isinstance(source, (str, os.PathLike)) and Path(source).suffix.lower() == ".csv"


def _measured(groups: list[list[Measurement]]) -> list[Side]:
    everything = [row for rows in groups for row in rows]
    workloads = {id(cell.row): cell.workload for cell in cells(everything)}  # told apart by prompt over all sides
    named = [cells(rows) for rows in groups]
    mixed = {cell.row.model for mine in named for cell in mine if _both(mine, cell.row.model)}
    found = []
    for rows, mine in zip(groups, named):
        machine = plain(rows[0].machine_name) or "a machine without a name"
        side = Side(machine, {"driver": rows[0].machine.get("driver"), **rows[0].versions})
        for cell in mine:
            model = cell.model if cell.row.model in mixed else cell.model.removesuffix(RANDOM)
            side.entries[Key(model, cell.setting, workloads[id(cell.row)])] = _entry(cell)
        found.append(side)
    return [Side(side.machine, side.versions, _name(side, found), "", side.entries) for side in found]


def _both(mine: list[Cell], model: str) -> bool:
    """Whether a side holds a model with random weights and with others: then they are two models."""
    return len({cell.row.weights == "random" for cell in mine if cell.row.model == model and cell.row.weights}) > 1


def _entry(cell: Cell) -> Entry:
    row = cell.row
    status = "" if row.status == "ok" else cell.status
    return Entry(row.setting, row.max_new_tokens, row.tokens_per_s if cell.measured else None, row, status)


def _name(side: Side, found: list[Side]) -> str:
    """The machine, with the versions in which its own sides differ."""
    own = [other.versions for other in found if other.machine == side.machine]
    differ = [f"{name} {plain(side.versions[name])[:12]}" for name in differences(own)
              if name not in ("commit", "driver") and side.versions.get(name) is not None]
    return " · ".join([side.machine, ", ".join(differ)] if differ else [side.machine])


def _published(path: str | os.PathLike) -> Side:
    """The published table under the lengths it really generated, by inference."""
    try:
        frame = published_table(path=path)
    except KeyError as error:
        raise ValueError(f"{path} is not a published table (no {error}); results files are .jsonl") from None
    rate = f"{FIGURES['tokens_per_s'].label} (corrected)"
    inferred = frame.attrs["note"].partition(" VRAM (")[0]
    side = Side(PUBLISHED, {}, PUBLISHED, f"{PUBLISHED}: one figure per row, no samples and so no intervals; here the "
                f"new tokens that were really generated over the latency. {inferred}")
    for model, row in zip(frame.index, frame.to_dict("records")):
        length = int(row["New tokens (inferred)"])
        key = Key(model, row["Setting"], f"{length} tokens")
        side.entries[key] = Entry(_KEYS.get(row["Setting"], ""), length, row[rate])
    return side
