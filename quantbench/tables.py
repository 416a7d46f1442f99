"""Measurements as a DataFrame, and as tables for a notebook, a terminal and the README."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import pandas as pd

from quantbench.intervals import LEAST
from quantbench.labels import Cell, able, cells, not_here
from quantbench.records import DECIMALS, FIGURES, Measurement
from quantbench.settings import expect
from quantbench.wording import EMPTY, cut, html_text, listed, markdown_text, plain, span

_DECIMALS = {FIGURES[name]: decimals for name, decimals in DECIMALS.items()}
LENGTH, INTERVAL = "Max New Tokens", FIGURES["tokens_per_s_ci"]
PUBLISHED_COLUMNS = ("Setting", LENGTH, FIGURES["latency_s"], FIGURES["tokens_per_s"], FIGURES["vram_gb"])
COLUMNS = tuple(dict.fromkeys([*PUBLISHED_COLUMNS, *_DECIMALS, "Workload", "Weights", "Audit", "Status", "Note",
                               "Machine"]))
RANDOM = "random weights: speed and memory are real, text is not"
_LOOKS = f"Looks: of fewer than {LEAST} samples there is no 95% interval; slowest and fastest stand in its place."
_STYLE = {  # CSS selector within a notebook's table -> what it looks like
    "": "border-collapse:collapse;margin:0 0 1.2em 0;font-size:12px;line-height:1.35",
    "caption": "caption-side:top;text-align:left;padding:4px 5px;font-weight:bold;overflow-wrap:anywhere",
    "th, td": "padding:4px 5px;border-bottom:1px solid rgba(128,128,128,.3);text-align:left;vertical-align:top;"
              "max-width:26em;overflow-wrap:break-word", ".col0": "min-width:6em"}
_MACHINE = {"cpu": "CPU", "cores": "CPU cores", "torch_threads": "PyTorch threads", "ram_bytes": "RAM", "os": "System",
            "gpu": "GPU", "gpu_bytes": "GPU memory", "driver": "Driver", "cuda": "CUDA"}


@dataclass(frozen=True)
class Table:
    """One table: numbers with the `decimals` of their column (0 where it has none) and set to the right, as every
    column named in `decimals` is. The caption's parts stand above, the note below; rows numbered in `grey` are pale."""

    frame: pd.DataFrame
    caption: list[str]
    note: str = ""
    decimals: Mapping[str, int] = field(default_factory=lambda: _DECIMALS)
    grey: Iterable[int] = ()

    def _texts(self) -> pd.DataFrame:
        """Every cell as text: both ends of an interval, a dash where there is nothing."""
        rows = [[plain(value) if isinstance(value, str) else span(value, digits) if isinstance(value, tuple) else
                 EMPTY if pd.isna(value) else f"{value:{digits}}" for name, value in zip(self.frame, line)
                 for digits in [f".{self.decimals.get(name, 0)}f"]] for line in self.frame.itertuples(index=False)]
        return pd.DataFrame(rows, columns=[plain(name) for name in self.frame], dtype=object)

    def _sides(self) -> list[str]:
        return ["right" if name in self.decimals or pd.api.types.is_numeric_dtype(self.frame[name]) else "left"
                for name in self.frame]

    def _repr_html_(self) -> str:
        looks = _STYLE | {f"td.col{place}, th.col{place}": f"text-align:{side};font-variant-numeric:tabular-nums"
                          for place, side in enumerate(self._sides())}
        looks |= {f"td.row{place}": "opacity:.5" for place in self.grey}
        return (self._texts().style.format(html_text).format_index(html_text, axis=1).hide(axis="index")
                .set_caption(html_text(" · ".join(self.caption))).set_table_attributes('class="tex2jax_ignore"')
                .set_table_styles([{"selector": where, "props": look} for where, look in looks.items()]).to_html()
                + f"<p>{html_text(self.note)}</p>" * bool(self.note))

    def markdown(self) -> str:
        """The same as a GitHub Markdown table."""
        texts = self._texts().rename(columns=markdown_text).map(markdown_text)
        sides = ["---:" if side == "right" else "---" for side in self._sides()]
        rows = [[*texts], sides, *texts.itertuples(index=False)]
        lines = [f"**{markdown_text(' · '.join(self.caption))}**", "", *(f"| {' | '.join(row)} |" for row in rows)]
        return "\n".join([*lines, *["", markdown_text(self.note)][:2 * bool(self.note)], ""])

    def __repr__(self) -> str:
        return "\n".join([plain(" · ".join(self.caption)), self._texts().to_string(index=False), plain(self.note)])


class Tables(list[Table]):
    """Tables that a notebook shows one under the other. `empty` is what stands there when there are none."""

    def __init__(self, tables: Iterable[Table], empty: str = "nothing measured yet") -> None:
        super().__init__(tables)
        self.empty = empty

    def _repr_html_(self) -> str:
        return "\n".join(one._repr_html_() for one in self) or f"<p>{html_text(self.empty)}</p>"

    def markdown(self) -> str:
        return "\n".join(one.markdown() for one in self) or f"{markdown_text(self.empty)}\n"

    def __repr__(self) -> str:
        return "\n".join(map(repr, self)).rstrip("\n") or plain(self.empty)


def table(run: Iterable[Measurement]) -> pd.DataFrame:
    """One row per measurement, the published columns first; numbers stay numbers, NaN where there is none.

    Sorted by model as they first came, then by setting, then by length. A cell that could not run keeps its row."""
    return view(_frame(cells(run)), [], _DECIMALS)


def show(run: Iterable[Measurement] | pd.DataFrame) -> Tables:
    """The table as a notebook or a terminal shows it: one per model and machine, without empty columns. The frame of
    another view, such as `memory_table`, is shown likewise, under the caption that it has (see `view`)."""
    if isinstance(run, pd.DataFrame) and "shown" in run.attrs:
        (caption, *how), run = run.attrs["shown"], run.set_index("Model") if "Model" in run else run
        return Tables(Table(part.loc[:, ~(part.isna() | part.isin([0, ""])).all()], [str(model), *caption], *how)
                      for model, part in run.groupby(level=0, sort=False))
    groups: dict[tuple, list[Cell]] = {}
    for cell in cells(run):
        groups.setdefault((cell.title, cell.row.machine_name), []).append(cell)
    return Tables(map(_shown, groups.values()))


def view(frame: pd.DataFrame, caption: list[str], decimals: Mapping[str, int], note: str = "") -> pd.DataFrame:
    """A frame by model that `show` can show, with what stands above it beside the model's name, and below."""
    frame.attrs["shown"] = caption, note, decimals
    return frame


def machine_table(facts: dict, versions: dict | None = None) -> Tables:
    """What `machine.facts()` and `machine.versions()` say, in words."""
    facts, versions = (expect(one or {}, dict, "this takes qb.facts() and qb.versions()") for one in (facts, versions))
    known = {"gpu": "none that this PyTorch can use"} | {name: fact for name, fact in facts.items() if fact is not None}
    words = {label: f"{known[name] / 1e9:.1f} GB" if name.endswith("_bytes") else str(known[name])
             for name, label in _MACHINE.items() if name in known}
    rows = [*words.items(), *((name, version) for name, version in versions.items() if version)]
    return Tables([Table(pd.DataFrame(rows, columns=["", "is"]), ["This machine"])])


def _frame(named: list[Cell]) -> pd.DataFrame:
    frame = pd.DataFrame(map(_record, named), columns=COLUMNS,
                         index=pd.Index([cell.model for cell in named], name="Model", dtype=object))
    return frame.astype({name: float for name in _DECIMALS if name != INTERVAL})


def _record(cell: Cell) -> dict:
    row, looks, found = cell.row, len(cell.row.latencies_s), cell.row.audit or {}
    seen = row.tokens_per_s_ci or row.tokens_per_s_range
    few = "" if row.tokens_per_s_ci else f" ({looks} looks)"
    return {
        "Setting": cell.setting, LENGTH: row.max_new_tokens, **{FIGURES[name]: getattr(row, name) for name in DECIMALS},
        INTERVAL: EMPTY if not seen else "1 look" if looks == 1 else span(seen, ".1f") + few,
        "Workload": cell.workload, "Weights": row.weights or EMPTY,
        "Audit": plain(f"{found['quantised']} × {found.get('class')}") if found.get("quantised") else EMPTY,
        "Status": cell.outcome, "Note": cell.note, "Machine": plain(row.machine_name)}


def _shown(named: list[Cell]) -> Table:
    """The cells of one model on one machine, without what the caption or another column says; those that cannot run
    there are a line below."""
    every, named = named, able(named)
    frame, kinds = _frame(named), list(dict.fromkeys(cell.row.weights for cell in named if cell.row.weights))
    caption = [named[0].model, RANDOM if named[0].random else f"{listed(kinds)} weights" if kinds else "",
               frame["Machine"].iloc[0]]
    empty = (frame.isna() | frame.isin(["", EMPTY, "ok"])).all()
    drop = {"Weights", "Machine"} | set(empty.index[empty]) - set(PUBLISHED_COLUMNS)
    if all(cell.row.work[:5] == (named[0].row.prompt, "default", 0, 0, 1) for cell in named):
        drop.add("Workload")
    few = any(cell.measured and cell.row.tokens_per_s_ci is None for cell in named)
    return Table(frame.assign(Status=[cut(text, 48) for text in frame["Status"]]).drop(columns=list(drop)),
                 list(filter(None, caption)), f"{_LOOKS * few} {not_here(every) * (named is not every)}".strip())
