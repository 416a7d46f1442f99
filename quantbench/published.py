"""The published Colab T4 table, what can be inferred about it, and the reader's own rows beside it."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

import pandas as pd

from quantbench.grid import Grids
from quantbench.models import MODELS
from quantbench.record import FIGURES, Measurement
from quantbench.settings import SETTINGS
from quantbench.tables import LENGTH, grid
from quantbench.view import cells, machine_of

PROMPT_TOKENS = 12  # by inference: it leaves 64, 128 and 256 of what the published latency x tokens/sec give
_FILE = "published-colab-t4.csv"
_PACKAGE = Path(__file__).parent
_RATE, _VRAM = FIGURES["tokens_per_s"].label, FIGURES["vram_gb"].label
_NEW, _CORRECTED, _HERE = "New tokens (inferred)", f"{_RATE} (corrected)", f"{_RATE} (here)"
_ALONE = f"{FIGURES['weights_gb'].label}, model alone"
_DECIMALS = {FIGURES["latency_s"].label: 3, _RATE: 2, _VRAM: 2, _CORRECTED: 1, _ALONE: 3, _HERE: 1}


def published_table(run: Iterable[Measurement] | None = None, path: str | os.PathLike | None = None) -> pd.DataFrame:
    """The published rows, corrected by inference, and `run`'s own beside them; `attrs["note"]` says what is inferred.

    "model alone" is the weights of `run`'s row of that model whose setting stores them alike, on a GPU or a CPU.
    Raises ValueError for a run of several machines.
    """
    rows = list(run or ())
    machine_of(rows)
    data = pd.read_csv(path or _default_path())
    labels = {"latency_s": FIGURES["latency_s"].label, "tokens_per_s": _RATE, "vram_gb": _VRAM}
    frame = data.rename(columns=labels | {"max_new_tokens": LENGTH})
    frame["Setting"] = [SETTINGS[key].label for key in data["setting"]]
    counted = (data["latency_s"] * data["tokens_per_s"]).round().astype(int)
    frame[_NEW] = counted - PROMPT_TOKENS
    frame[_CORRECTED] = frame[_NEW] / data["latency_s"]
    frame[_ALONE] = [_weights_gb(rows, *keys) for keys in zip(data["model"], data["setting"])]
    frame[_HERE] = [_tokens_per_s(rows, *keys) for keys in zip(data["model"], data["setting"], data["max_new_tokens"])]
    frame.index = pd.Index([MODELS[key].label for key in data["model"]], name="Model", dtype=object)
    frame = frame[["Setting", LENGTH, *labels.values(), _NEW, _CORRECTED, _ALONE, _HERE]]
    frame = frame.astype({_ALONE: float, _HERE: float})
    frame.attrs["note"] = _note(data.assign(counted=counted))
    return frame


def show_published(run: Iterable[Measurement] | None = None, path: str | os.PathLike | None = None) -> Grids:
    """`published_table` as a notebook shows it: one table per model, and the note below the last."""
    rows = list(run or ())
    frame = published_table(rows, path)
    random = {cell.model.partition(" (random")[0] for cell in cells(rows) if cell.model.endswith("(random weights)")}
    models = list(dict.fromkeys(frame.index))
    grids = []
    for model in models:
        caption = [model, "published, Colab T4", f"here: {machine_of(rows)}" if rows else "nothing measured here yet"]
        caption += ["here with random weights"] if model in random else []
        note = frame.attrs["note"] if model == models[-1] else ""
        grids.append(grid(frame[frame.index == model], caption, note=note, decimals=_DECIMALS))
    return Grids(grids)


def _default_path() -> Path:
    """Inside an installed package, or in the repository."""
    installed = _PACKAGE / "reference" / _FILE
    return installed if installed.is_file() else _PACKAGE.parent / "results" / "reference" / _FILE


def _is(row: Measurement, model: str) -> bool:
    return row.model in (model, MODELS[model].hub)


def _weights_gb(rows: list[Measurement], model: str, setting: str) -> float | None:
    alike = [row for row in rows if _is(row, model) and row.weights_gb is not None and row.setting in SETTINGS
             and SETTINGS[row.setting].storage == SETTINGS[setting].storage]
    own = [row for row in alike if row.setting == setting]
    return (own or alike)[-1].weights_gb if alike else None


def _tokens_per_s(rows: list[Measurement], model: str, setting: str, length: int) -> float | None:
    own = [row for row in rows if _is(row, model) and row.setting == setting and row.max_new_tokens == length
           and row.batch_size == 1 and row.status == "ok"]
    return own[-1].tokens_per_s if own else None


def _note(data: pd.DataFrame) -> str:
    """What follows from the published numbers alone, in words; every number here is computed from them."""
    counted, lengths = [], []
    for model, rows in data.groupby("model", sort=False):
        label = MODELS[model].label
        counted.append(f"{_listed(rows['counted'])} ({label})")
        new = rows["counted"] - PROMPT_TOKENS
        if (new != rows["max_new_tokens"]).any():
            lengths.append(f"{label}'s rows of {_listed(rows['max_new_tokens'])} generated {_listed(new)}")
    gpu = data.dropna(subset="vram_gb")
    first = gpu[(gpu["model"] == gpu["model"].iloc[0]) & (gpu["max_new_tokens"] == gpu["max_new_tokens"].iloc[0])]
    rise = ", ".join(f"{SETTINGS[row.setting].label} {row.vram_gb:.2f}" for row in first.itertuples())
    return (f"By inference: latency × tokens/sec is exactly {' and '.join(counted)} in all "
            f"{data['setting'].nunique()} settings, so {PROMPT_TOKENS} prompt tokens were counted as generated"
            + "".join(f", and {text}" for text in lengths) + f". VRAM ({rise} GB for {MODELS[first['model'].iloc[0]].label}) "
            "grows where the weights shrink, so earlier models were still held: the weights of the model alone stand "
            "beside it.")


def _listed(values: pd.Series) -> str:
    return " and ".join(str(value) for value in dict.fromkeys(values))
