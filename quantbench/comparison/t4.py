"""The reference table (the student's, Colab T4), what can be inferred about it, and the reader's rows beside it."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

import pandas as pd

from quantbench.labels import cells, machine_of
from quantbench.records import FIGURES, Measurement
from quantbench.settings import MODELS, SETTINGS
from quantbench.tables import LENGTH, RANDOM, Table, Tables

REFERENCE = "Colab T4, reference table"
PROMPT_TOKENS = 12  # by inference: it leaves 64, 128 and 256 of what the table's latency x tokens/sec give
_RATE, _SECONDS, _VRAM = FIGURES["tokens_per_s"], FIGURES["latency_s"], FIGURES["vram_gb"]
_DECIMALS = {_SECONDS: 3, _RATE: 2, _VRAM: 2, f"{_RATE} (corrected)": 1, f"{_RATE} (here)": 1}
_NOTE = ("By inference: latency × tokens/sec is exactly 76 and 140 (DistilGPT-2) and 140 and 268 (GPT-2) in all "
         f"settings, so {PROMPT_TOKENS} prompt tokens were counted as generated, and some rows generated fewer than "
         "were asked for. VRAM grows where the weights shrink, so earlier models were still held.")


def reference_table(run: Iterable[Measurement] = ()) -> pd.DataFrame:
    """The table's rows, corrected by inference (`attrs["note"]` says what), and `run`'s own eager ones beside them.
    Raises ValueError for a run of several machines."""
    rows, data, keys = list(run), _read(shipped()[-1]), {model.hub: key for key, model in MODELS.items()}
    machine_of(rows)
    rates = {(keys.get(row.model, row.model), row.setting, row.max_new_tokens): row.tokens_per_s for row in rows
             if row.status == "ok" and row.engine == "eager" and row.batch_size == 1}
    asked = zip(data["model"], data["setting"], data["max_new_tokens"])
    frame = pd.DataFrame({
        "Setting": [SETTINGS[key].label for key in data["setting"]], LENGTH: data["max_new_tokens"],
        _SECONDS: data["latency_s"], _RATE: data["tokens_per_s"], _VRAM: data["vram_gb"],
        "New tokens (inferred)": data["new"], f"{_RATE} (corrected)": data["new"] / data["latency_s"],
        f"{_RATE} (here)": [rates.get(one) for one in asked]}).astype({f"{_RATE} (here)": float})
    frame.attrs["note"] = _NOTE
    return frame.set_index(pd.Index([MODELS[key].label for key in data["model"]], name="Model", dtype=object))


def show_reference(run: Iterable[Measurement] = ()) -> Tables:
    """`reference_table` as a notebook shows it: one table per model, and below each what is inferred."""
    rows = list(run)
    random = {cell.model for cell in cells(rows) if cell.random}
    here = f"here: {machine_of(rows)}" if rows else "nothing measured here yet"
    return Tables(Table(mine, [model, REFERENCE, here] + [f"here {RANDOM}"] * (model in random), _NOTE, _DECIMALS)
                  for model, mine in reference_table(rows).groupby(level=0, sort=False))


def reference_rows(path: str | os.PathLike) -> list[Measurement]:
    """The table's rows as measurements of one sample, under the lengths that they really generated, by inference."""
    return [Measurement(model=row.model, setting=row.setting, max_new_tokens=row.new, new_tokens=row.new,
                        latencies_s=[row.latency_s], machine={"gpu": REFERENCE}) for row in _read(path).itertuples()]


def shipped() -> list[Path]:
    """The results that come with quantbench: the published rows, then the reference table. Inside an installed package,
    or in the repository."""
    package = Path(__file__).parents[1]
    home = package / "data" if (package / "data" / "published").is_dir() else package.parent / "results"
    return [*sorted(home.glob("published/*.jsonl")), home / "reference" / "colab-t4.csv"]


def _read(path: str | os.PathLike) -> pd.DataFrame:
    data = pd.read_csv(path)
    if missing := {"model", "setting", "max_new_tokens", "latency_s", "tokens_per_s", "vram_gb"} - set(data.columns):
        raise ValueError(f"{path} is not a reference table (no {', '.join(sorted(missing))}); results files are .jsonl")
    return data.assign(new=(data["latency_s"] * data["tokens_per_s"]).round().astype(int) - PROMPT_TOKENS)
