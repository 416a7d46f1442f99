"""What tables, charts and findings share: the order of rows, and how models, settings and workloads are named."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from quantbench.records import NOT_HERE, Measurement, Subject, records_in
from quantbench.settings import MODELS, SETTINGS
from quantbench.wording import cut, plain


@dataclass(frozen=True, eq=False)
class Cell:
    """A measurement and its names: the model's, the setting's with its engine and what tells two rows of the same
    setting apart, and the workload's ("128 tokens"). `random`: its model has random weights here."""

    row: Measurement
    model: str
    setting: str
    workload: str
    random: bool = False

    @property
    def title(self) -> str:
        """The model as a heading shows it."""
        return f"{self.model} (random weights)" if self.random else self.model

    @property
    def measured(self) -> bool:
        return self.row.status == "ok" and self.row.tokens_per_s is not None

    @property
    def outcome(self) -> str:
        """The status, with its reason: "unavailable: no NVIDIA GPU"; at most 160 characters."""
        return cut(": ".join(filter(None, [self.row.status.replace("_", " "), self.row.reason])), 160)

    @property
    def note(self) -> str:
        """What disturbed the measurement: "noisy, GPU 60% busy, GPU held back by its power cap"."""
        throttled = ((self.row.conditions or {}).get("after") or {}).get("throttled") or []
        return plain(", ".join(filter(None, ["noisy" * self.row.noisy, self.row.busy,
                                             *(f"GPU held back by its {why}" for why in throttled)])))


def cells(run: Iterable[Measurement]) -> list[Cell]:
    """The rows of a run, named and in order: by model as they first came, by SETTINGS, by length, by batch. Rows of one
    setting and workload, such as of two versions, are numbered: `compare` says in what they differ. A row without
    figures of what has run since (a package was installed, say) is left out."""
    rows, named, seen = [one for one in records_in(run) if isinstance(one, Measurement)], [], Counter()
    ran = {(*row.cell, row.work): row.created_at for row in rows if row.status == "ok"}
    rows = [row for row in rows if row.status == "ok" or row.created_at > ran.get((*row.cell, row.work), "")]
    prompts = list(dict.fromkeys(row.prompt for row in rows))
    real = {row.model for row in rows if row.weights not in (None, "random")}
    random = {row.model for row in rows if row.weights == "random"} - real
    for row in rows:
        setting = row.setting_label + f" · {row.engine}" * (row.engine != "eager")
        seen[place := (row.model, row.weights == "random", setting, row.machine_name, row.work)] += 1
        setting += f" ({seen[place]})" * (seen[place] > 1)
        work = f"{row.max_new_tokens} token{'s' * (row.max_new_tokens != 1)}"
        work += f", batch {row.batch_size}" * (row.batch_size != 1)
        work += f", prompt of {row.prompt_length}" * bool(row.prompt_length) + f", depth {row.depth}" * bool(row.depth)
        work += f", prompt {prompts.index(row.prompt) + 1} “{cut(row.prompt, 20)}”" * (len(prompts) > 1)
        work += f", {row.cache} cache" * (row.cache != "default")
        model = MODELS[row.model].label if row.model in MODELS else plain(row.model)
        named.append(Cell(row, model, plain(setting), plain(work), row.weights == "random" or row.model in random))
    titles = list(dict.fromkeys(cell.title for cell in named))
    order = {key: place for place, key in enumerate(SETTINGS)}
    return sorted(named, key=lambda cell: (
        titles.index(cell.title), order.get(cell.row.setting, len(order)), cell.setting, *cell.row.work[:0:-1]))


def able(named: list[Cell]) -> list[Cell]:
    """Those that this machine can run, and that did not fail; all where there is none."""
    return [cell for cell in named if cell.row.status not in NOT_HERE] or named


def not_here(named: list[Cell]) -> str:
    """The line under a chart or a table: which settings this machine cannot run, or which failed, and why."""
    why = {cell: cut(cell.row.reason or "", 120) for cell in named if cell.row.status in NOT_HERE}
    ends = Counter(setting for setting, _ in {(cell.setting, why.get(cell)) for cell in named})  # None: it ran
    name = {one: one.setting if ends[one.setting] < 2 else f"{one.title}, {one.setting}, {one.workload}" for one in why}
    return "Not here: " * bool(why) + "; ".join(", ".join(dict.fromkeys(
        name[cell] for cell in why if why[cell] == reason)) + f": {reason}" for reason in dict.fromkeys(why.values()))


def machine_of(run: Iterable[Subject]) -> str:
    """The name of the one machine that all rows come from; raises ValueError naming them if there are several."""
    names = list(dict.fromkeys(plain(row.machine_name) or "a machine without a name" for row in run))
    if len(names) > 1:
        raise ValueError(f"rows of {len(names)} machines are never compared: {'; '.join(names)}. "
                         "Take one machine's: run.only(machine_name=...)")
    return names[0] if names else ""
